"""The examples of a training run: those it learns from, those held out, and the rows that could not be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from renyi_engine import base_model
from renyi_engine.data import Row, Splits, content_hash, given_rows, load_splits
from renyi_engine.objectives import DpoTask, Item, SftTask, Task, describe_rows, read_items
from renyi_engine.training.config import DpoConfig, TrainConfig


@dataclass
class Dataset:
    """Tokenised examples; `held_out` is empty where the data has no such split.

    Attributes:
        dropped: rows by reason.
        sha256: hashes of what must be the same when a run is resumed, by name: the rows, and the tokens made of them,
            or what makes the tokens where the chat template writes the date.
        given_as: the setting, or the argument of `Trainer`, that each of them comes from.
    """

    train: list[Item]
    held_out: list[Item]
    dropped: dict[str, list[int]]
    sha256: dict[str, str]
    given_as: dict[str, str]

    @property
    def description(self) -> list[str]:
        """Which rows were dropped and why, and which were cut, in lines."""
        held_out = [f"held out: {line}" for line in describe_rows(self.held_out, {})]
        return describe_rows(self.train, self.dropped) + held_out


def make_task(config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Task:
    """The kind of training that `config` asks for, with its own tokenizer where none is given."""
    tokenizer = tokenizer or base_model.load_tokenizer(config)
    if isinstance(config, DpoConfig):
        return DpoTask(tokenizer, config.max_length, config.beta, config.min_score_gap, config.score_columns)
    return SftTask(tokenizer, config.max_length)


def load_dataset(config: TrainConfig, task: Task, train_dataset: Any = None, eval_dataset: Any = None) -> Dataset:
    """The rows that are given, or else those that `config` names, as examples of `task`.

    Raises:
        ValueError: a file, split or column is missing, a row is broken, or none is left.
    """
    rows, argument, splits = _training_rows(config, train_dataset)
    examples, dropped = read_items(task, rows, argument)
    held_out: list[Item] = []
    rows_held_out, argument_held_out, setting = _held_out_rows(config, splits, eval_dataset)
    if rows_held_out:
        held_out, dropped_held_out = read_items(task, rows_held_out, argument_held_out)
        dropped |= {f"held out: {reason}": numbers for reason, numbers in dropped_held_out.items()}
    sha256 = {
        "training rows": content_hash(rows),
        "held-out rows": content_hash(rows_held_out),
        "tokens": _tokens_hash(task, [*examples, *held_out]),
    }
    # if only the tokens differ, the tokenizer or its chat template has changed
    given_as = {"training rows": argument, "held-out rows": setting, "tokens": base_model.ARGUMENT}
    return Dataset(examples, held_out, dropped, sha256, given_as)


def _training_rows(config: TrainConfig, given: Any) -> tuple[list[Row], str, Splits | None]:
    """(rows, the argument that they are from, all splits of the data set that the settings name)."""
    if given is not None:
        return given_rows(given, "train_dataset"), "train_dataset", None
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_train_split, "dataset_train_split", TrainConfig.dataset_train_split)
    return rows, "dataset_name", splits


def _held_out_rows(config: TrainConfig, splits: Splits | None, given: Any) -> tuple[list[Row], str, str]:
    """(rows, the argument that they are from, the setting that chose them); no rows where nothing is held out."""
    if given is not None:
        return given_rows(given, "eval_dataset"), "eval_dataset", "eval_dataset"
    split, setting = config.dataset_test_split, "dataset_test_split"
    if config.eval_dataset_name:
        splits, setting = load_splits(config.eval_dataset_name, None, "eval_dataset_name"), "eval_dataset_name"
    # without eval_dataset_name, the default split is held out only if there is one
    elif splits is None or (split not in splits and split == TrainConfig.dataset_test_split):
        return [], "dataset_name", setting if splits else "eval_dataset"
    return splits.rows(split, "dataset_test_split", TrainConfig.dataset_test_split), splits.argument, setting


def _tokens_hash(task: Task, items: Iterable[Item]) -> str:
    tokenizer, digest = task.tokenizer, hashlib.sha256()
    if "strftime_now" in str(tokenizer.chat_template):  # it writes the date, so tomorrow's tokens will differ
        makers = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.get_vocab()]
        digest.update(json.dumps(makers, sort_keys=True).encode())
        return digest.hexdigest()
    for item in items:
        digest.update(json.dumps([[s.input_ids, s.labels] for s in item.sequences]).encode())
    return digest.hexdigest()
