"""The callbacks of transformers in a run: its integrations (`report_to`), and those that a user gives to a `Trainer`.

They are called at the points at which transformers' own trainer calls them. `model` is the base model, which carries
the particles; `lr_scheduler` and the data loaders are None, because a run has no such objects. A line of metrics.jsonl
reaches them as plain numbers: see `records.numbers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from renyi_engine.core import reason, typos
from renyi_engine.objectives import EVAL, Metric, Task, metrics_of
from renyi_engine.training.config import TrainConfig
from renyi_engine.training.records import STEP, TASKS, Record, is_evaluation, numbers

_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""The pip packages of integrations that have another name."""


class Callbacks:
    """Tells callbacks what happens in a run. What they ask for is in `control`.

    Raises:
        ValueError: report_to or metric_for_best_model names something unknown. TypeError: a callback is none.
    """

    def __init__(self, config: TrainConfig, given: Iterable[TrainerCallback | type[TrainerCallback]]) -> None:
        if not isinstance(given, Iterable):
            raise TypeError(f"callbacks: expected a list of transformers' TrainerCallback; got {given!r}")
        self.task, self.output_dir = TASKS[config.kind], Path(config.output_dir)
        self.best = _best_metric(config, self.task)
        others = [*_integrations(config.report_to), *map(_callback, given)]
        self.handler = CallbackHandler([_Flow(config), *others], None, None, None, None)
        self.stateful = [callback for callback in others if isinstance(callback, ExportableState)]
        # TrainingArguments need the package accelerate, so a run without callbacks does without them
        self.arguments = _training_arguments(config, self.best) if others else None
        self.state = TrainerState(
            logging_steps=config.logging_steps,
            eval_steps=config.eval_steps or 0,
            save_steps=config.save_steps,
            train_batch_size=config.per_device_train_batch_size,
        )
        self.control = TrainerControl()

    @property
    def given(self) -> bool:
        """Whether there are any beside the one that follows the settings."""
        return self.arguments is not None

    def begin(
        self,
        model: PreTrainedModel,
        task: Task,
        optimizer: torch.optim.Optimizer,
        max_steps: int,
        num_epochs: int,
        history: Sequence[Record],
        has_held_out: bool,
    ) -> None:
        """Before the first step, or the first after a checkpoint; `history`: the lines of metrics.jsonl up to there."""
        self.handler.model, self.handler.optimizer = model, optimizer
        self.handler.processing_class = task.tokenizer
        self.state.max_steps, self.state.num_train_epochs = max_steps, num_epochs
        self.state.log_history, self.state.best_metric, self.state.best_global_step = [], None, None
        for record in history:
            self._compare_with_best(self._remember(record))
        self._find_best_checkpoint()
        if self.arguments is not None and not has_held_out:
            self.arguments.eval_strategy = type(self.arguments.eval_strategy)("no")
        self.tell("on_init_end")
        self.tell("on_train_begin")

    def at(self, step: int, epoch: float, num_tokens: int) -> None:
        self.state.global_step, self.state.epoch, self.state.num_input_tokens_seen = step, epoch, num_tokens

    def tell(self, event: str, **values: Any) -> TrainerControl:
        """Call every callback's method of that name. Returns what they ask for."""
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, **values)
        return self.control

    def log(self, record: Record) -> None:
        """Hand on a line of metrics.jsonl."""
        found = self._remember(record)
        logs = {name: value for name, value in found.items() if name != STEP.name}
        self.tell("on_log", logs=dict(logs))
        if is_evaluation(record):
            self.tell("on_evaluate", metrics=dict(logs))
            self._compare_with_best(found)
            self._find_best_checkpoint()

    def saved(self) -> None:
        """A checkpoint was written, and older ones may have been removed."""
        self._find_best_checkpoint()
        self.tell("on_save")

    def saved_states(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps of callbacks that have something to keep; `restore` takes it."""
        return [{"name": type(callback).__name__, **callback.state()} for callback in self.stateful]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        left = list(states)
        for callback in self.stateful:
            found = next((state for state in left if state["name"] == type(callback).__name__), None)
            if found is not None:
                left.remove(found)
                for name, value in found["attributes"].items():
                    setattr(callback, name, value)

    def _remember(self, record: Record) -> dict[str, float]:
        found = numbers(record, self.task)
        self.state.log_history.append(dict(found))
        return found

    def _compare_with_best(self, found: Mapping[str, float]) -> None:
        value, best = found.get(EVAL + self.best.name), self.state.best_metric
        if value is None:
            return
        if best is None or (value > best if self.best.better == "higher" else value < best):
            self.state.best_metric, self.state.best_global_step = value, int(found[STEP.name])

    def _find_best_checkpoint(self) -> None:
        """The checkpoint of the best step, if there is one and it is kept."""
        folder = self.output_dir / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(folder) if folder.is_dir() else None


class _Flow(DefaultFlowCallback):
    """When a run logs, evaluates and saves, as its settings say. It is asked first: others can ask for more, or less.

    At its end a run always saves and evaluates, whatever callbacks ask for.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        config, step = self.config, state.global_step
        at_the_end = step >= state.max_steps
        control.should_log |= at_the_end or step % config.logging_steps == 0
        control.should_evaluate |= config.eval_steps is not None and step % config.eval_steps == 0
        control.should_save |= at_the_end or step % config.save_steps == 0
        control.should_training_stop |= at_the_end
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        return control


def _callback(given: Any) -> TrainerCallback:
    callback = given() if isinstance(given, type) else given
    if not isinstance(callback, TrainerCallback):
        raise TypeError(f"callbacks: expected subclasses or instances of transformers' TrainerCallback; got {given!r}")
    return callback


def _integrations(names: Sequence[str]) -> list[TrainerCallback]:
    """transformers' callbacks for `report_to`."""
    if len(names) > 1 and (alone := {"none", "all"}.intersection(names)):
        raise ValueError(f"report_to: expected {alone.pop()!r} alone, or names of programs; got {', '.join(names)}")
    try:
        kinds = get_reporting_integration_callbacks(names[0] if len(names) == 1 else [*names])
    except ValueError as error:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        unknown = next(name for name in names if name not in INTEGRATION_TO_CALLBACK)
        hint = typos.hint(unknown, INTEGRATION_TO_CALLBACK)
        raise ValueError(f"report_to: {reason(error)}" + hint) from None
    callbacks = []
    for kind, name in zip(kinds, names if len(names) == len(kinds) else [kind.__name__ for kind in kinds], strict=True):
        try:
            callbacks.append(kind())
        except (RuntimeError, ImportError, ValueError) as error:
            package = _PACKAGES.get(name, name)
            raise ValueError(f"report_to: {name} is not installed ({reason(error)}); pip install {package}") from None
    return callbacks


def _best_metric(config: TrainConfig, task: type[Task]) -> Metric:
    name = config.metric_for_best_model
    if name is None:
        return task.nll.mixture
    known = {metric.name: metric for metric in metrics_of(task) if metric.better}
    if name.removeprefix(EVAL) not in known:
        hint = typos.hint(name, known)
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(known)}; got {name!r}" + hint)
    return known[name.removeprefix(EVAL)]


def _training_arguments(config: TrainConfig, best: Metric) -> TrainingArguments:
    """Every setting that transformers has under the same name, and other facts of the run that it knows."""
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name in theirs}
    checkpointing = ours.pop("gradient_checkpointing")
    del ours["torch_compile"]  # given to the class, it would change the environment
    ours |= {"metric_for_best_model": best.name, "greater_is_better": best.better == "higher"}
    try:
        arguments = TrainingArguments(**ours, eval_strategy="no" if config.eval_steps is None else "steps")
    except ImportError as error:
        raise ValueError(f"callbacks, report_to: {reason(error)}") from None
    arguments.gradient_checkpointing = checkpointing  # to give it to the class is deprecated under this name
    return arguments
