"""The examples of a training run: those it learns from, those held out, and the rows that could not be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from renyi_engine.data import Row, content_hash, load_splits
from renyi_engine.objectives import Item, Task, describe_rows, read_items
from renyi_engine.training.config import TrainConfig


@dataclass
class Dataset:
    """Tokenised examples; `held_out` is empty where the data has no such split.

    Attributes:
        dropped: rows by reason.
        sha256: hashes of what must be the same when a run is resumed, by name: the rows, and the tokens made of them,
            or what makes the tokens where the chat template writes the date.
    """

    train: list[Item]
    held_out: list[Item]
    dropped: dict[str, list[int]]
    sha256: dict[str, str]

    @property
    def description(self) -> list[str]:
        """Which rows were dropped and why, and which were cut, in lines."""
        held_out = [f"held out: {line}" for line in describe_rows(self.held_out, {})]
        return describe_rows(self.train, self.dropped) + held_out


def load_dataset(config: TrainConfig, task: Task) -> Dataset:
    """The rows that `config` names, as examples of `task`.

    Raises:
        ValueError: a file, split or column is missing, a row is broken, or none is left.
    """
    split = config.dataset_test_split
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_train_split, "dataset_train_split", TrainConfig.dataset_train_split)
    examples, dropped = read_items(task, rows, "dataset_name")
    rows_held_out: list[Row] = []
    held_out: list[Item] = []
    if config.eval_dataset_name:
        splits = load_splits(config.eval_dataset_name, None, "eval_dataset_name")
    # without eval_dataset_name, the default split is held out only if there is one
    if config.eval_dataset_name or split in splits or split != TrainConfig.dataset_test_split:
        rows_held_out = splits.rows(split, "dataset_test_split", TrainConfig.dataset_test_split)
        held_out, dropped_held_out = read_items(task, rows_held_out, splits.argument)
        dropped |= {f"held out: {reason}": numbers for reason, numbers in dropped_held_out.items()}
    sha256 = {
        "training rows": content_hash(rows),
        "held-out rows": content_hash(rows_held_out),
        "tokens": _tokens_hash(task, [*examples, *held_out]),
    }
    return Dataset(examples, held_out, dropped, sha256)


def _tokens_hash(task: Task, items: Iterable[Item]) -> str:
    tokenizer, digest = task.tokenizer, hashlib.sha256()
    if "strftime_now" in str(tokenizer.chat_template):  # it writes the date: the tokens of tomorrow are others
        makers = [tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.get_vocab()]
        digest.update(json.dumps(makers, sort_keys=True).encode())
        return digest.hexdigest()
    for item in items:
        digest.update(json.dumps([[s.input_ids, s.labels] for s in item.sequences]).encode())
    return digest.hexdigest()
