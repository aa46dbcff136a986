"""The examples of a training run: those it learns from, those held out, and the rows that could not be used."""

from __future__ import annotations

from dataclasses import dataclass

from renyi_engine import data
from renyi_engine.config import TrainConfig
from renyi_engine.task import Item, Task, describe_rows, read_items


@dataclass
class Dataset:
    """Tokenised examples; `held_out` is empty where the data has no such split. `dropped`: rows by reason."""

    train: list[Item]
    held_out: list[Item]
    dropped: dict[str, list[int]]

    @property
    def description(self) -> list[str]:
        """What became of the rows that are not whole here, in lines."""
        held_out = [f"held out: {line}" for line in describe_rows(self.held_out, {})]
        return describe_rows(self.train, self.dropped) + held_out

    def check_vocabulary(self, num_embeddings: int) -> None:
        """ValueError if the tokenizer knows tokens that the model does not."""
        sequences = [sequence for item in [*self.train, *self.held_out] for sequence in item.sequences]
        largest = max(max(sequence.input_ids) for sequence in sequences)
        if largest >= num_embeddings:
            raise ValueError(
                f"model_name_or_path: the tokenizer gives token {largest}, the model has {num_embeddings} embeddings; "
                "they do not belong together"
            )


def load_dataset(config: TrainConfig, task: Task) -> Dataset:
    """The rows that `config` names, as examples of `task`.

    Raises:
        ValueError: a file, split or column is missing, a row is broken, or none is left.
    """
    splits = data.load_splits(config.dataset_name, config.dataset_train_split, config.dataset_config, "dataset_name")
    rows = data.rows_of(splits, config.dataset_train_split, config.dataset_name, "dataset_name")
    examples, dropped = read_items(task, rows, "dataset_name")
    held_out: list[Item] = []
    argument, name, split = "dataset_name", config.dataset_name, config.dataset_test_split
    if config.eval_dataset_name:
        argument, name = "eval_dataset_name", config.eval_dataset_name
        splits = data.load_splits(name, split, None, argument)
    if config.eval_dataset_name or split in splits:
        rows = data.rows_of(splits, split, name, argument)
        held_out, dropped_held_out = read_items(task, rows, argument)
        dropped |= {f"held out: {reason}": numbers for reason, numbers in dropped_held_out.items()}
    return Dataset(examples, held_out, dropped)
