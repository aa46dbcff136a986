"""Columns that are missing, misspelt, of another form, or not read are named."""

from __future__ import annotations

import pytest

from renyi_engine import DpoTask, SftTask
from renyi_engine.data.columns import missing_column


def test_columns_that_are_not_read_are_named_once(tokenizer):
    columns = ["messages", "tools", "documents", "chat_template_kwargs", "system", "source"]
    with pytest.warns(UserWarning, match="dataset_name: these columns are not read: system, source") as caught:
        SftTask(tokenizer, 64).check_columns(columns, "dataset_name")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="dataset_name: these columns are not read: tools"):
        SftTask(tokenizer, 64).check_columns(["text", "tools"], "dataset_name")
    with pytest.warns(UserWarning, match="dataset_name: these columns are not read: score_chosen"):
        DpoTask(tokenizer, 64, 0.1).check_columns(["chosen", "rejected", "tools", "score_chosen"], "dataset_name")


def test_rows_in_the_form_of_sharegpt_and_alpaca_are_told_their_conversion():
    forms = ("messages", "prompt + completion", "text")
    sharegpt = str(missing_column("dataset_name", ["id", "conversations"], forms))
    assert "ShareGPT" in sharegpt
    assert "conversations to messages" in sharegpt
    for before, after in (("from", "role"), ("value", "content"), ("human", "user"), ("gpt", "assistant")):
        assert f"{before} to {after}" in sharegpt
    alpaca = str(missing_column("dataset_name", ["instruction", "input", "output"], forms))
    assert "Alpaca" in alpaca
    assert "output to completion and instruction to prompt" in alpaca
    assert "input" in alpaca
    near = str(missing_column("dataset_name", ["mesages"], forms))
    assert near.endswith("got ['mesages']; is 'mesages' meant to be 'messages'?")
