"""What a run writes and shows while it goes on: lines of metrics, evaluations, run.json, and words to a person."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from renyi_engine.core import TrainingProgress, must_fit
from renyi_engine.data import excerpt
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives import ESS, Evaluation, Scorer, Task, alpha_rule
from renyi_engine.training import record_contents
from renyi_engine.training.callbacks import Callbacks
from renyi_engine.training.config import TrainConfig
from renyi_engine.training.dataset import Dataset
from renyi_engine.training.run_folder import RunFolder
from renyi_engine.training.state import State, Window
from renyi_engine.training.train_step import StepResult

TRAINING_EXAMPLES_SHOWN = 256
"""Without held-out data, the report's heat map shows so many training examples."""


class Journal:
    """The records of one run in its folder, its display, and the callbacks that are told of each line.

    Attributes:
        evaluation: the newest, and the step after which it was made.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        task: Task,
        dataset: Dataset,
        ensemble: LoraEnsemble,
        callbacks: Callbacks,
        state: State,
        progress: TrainingProgress,
    ) -> None:
        self.config, self.run, self.task, self.dataset, self.ensemble = config, run, task, dataset, ensemble
        self.callbacks, self.state, self.progress = callbacks, state, progress
        self.clock = record_contents.Clock()
        self.evaluation: tuple[int, Evaluation] | None = None

    def announce(self, total_steps: int) -> None:
        config, dataset = self.config, self.dataset
        resumed = f", from {self.run.resume_from}" if self.run.resume_from else ""
        if self.state.micro_batch_size < config.per_device_train_batch_size:
            resumed += f", in micro-batches of {self.state.micro_batch_size}: larger ones did not fit"
        at_alpha = "with alpha by" if config.alpha_varies else "at alpha"
        rule = alpha_rule(config.alpha, config.alpha_schedule, config.alpha_0, config.alpha_controller)
        self.progress.say(
            f"{config.num_particles} particles {at_alpha} {rule} on {config.model_name_or_path}: "
            f"{len(dataset.train)} training and {len(dataset.held_out)} held-out examples, "
            f"{total_steps} steps{resumed}"
        )
        for line in dataset.description:
            self.progress.say(line)

    def describe(self, status: str) -> None:
        """Write run.json."""
        size = self.state.micro_batch_size
        self.run.records.write_facts(
            record_contents.facts(status, self.run.command, self.ensemble, self.dataset, size, self.clock)
        )

    def log(self, last: StepResult | None, learning_rate: float, epoch: float) -> None:
        """Write a line of metrics and show it, if there was a step since the last line. `last`: the newest step."""
        state, config = self.state, self.config
        if not state.window.examples or last is None:
            return
        learns_weights = config.particle_weights == "learned"
        record = record_contents.step_record(state, self.task, last, learning_rate, learns_weights, epoch, self.clock)
        self.run.records.log(record)
        at_alpha = f"  alpha {state.alpha:.3g}" if config.alpha_varies else ""
        self.progress.show(record, self.task.headline(record) + at_alpha)
        state.window = Window()
        self.callbacks.log(record)

    def evaluate(self, epoch: float) -> None:
        """Evaluate on the held-out examples, or where there are none on training examples; once after a step."""
        state, config, held_out = self.state, self.config, self.dataset.held_out
        if self.evaluation is not None and self.evaluation[0] == state.step:
            return
        with must_fit("an evaluation", "lower --per_device_eval_batch_size"):
            found = self._scorer()
        self.evaluation = state.step, found
        summary = found.summary(state.alpha)
        split = "held-out" if held_out else "training"
        self.run.records.write_evaluation(state.step, split, state.alpha, found, self._texts)
        self.progress.say(
            f"{'held-out' if held_out else 'training examples:'} {self.task.headline(summary)}, mean particle NLL "
            f"{summary[self.task.nll.mean_particle.name]:.3f} nats/{self.task.unit}, "
            f"ESS {summary[ESS.name]:.2f}/{config.num_particles}"
        )
        # a run that is resumed at its end has the line already
        if held_out and not self.run.records.has_evaluation(state.step):
            record = record_contents.evaluation_record(state, summary, epoch)
            self.run.records.log(record)
            self.callbacks.log(record)

    def evaluation_is_missing(self, total_steps: int) -> bool:
        """Whether a signal stopped the run at a step at which it evaluates: see `Loop._interrupt`."""
        step, every = self.state.step, self.config.eval_steps
        is_due = every is not None and step % every == 0 and 0 < step < total_steps
        return is_due and bool(self.dataset.held_out) and not self.run.records.has_evaluation(step)

    @property
    def _evaluated(self) -> list[Any]:
        return self.dataset.held_out or self.dataset.train[:TRAINING_EXAMPLES_SHOWN]

    @cached_property
    def _scorer(self) -> Scorer:
        batch_size, recorded = self.config.per_device_eval_batch_size, self.config.cuda_graphs != "false"
        return Scorer(self.ensemble, self.task, self._evaluated, batch_size, cuda_graphs=recorded)

    @cached_property
    def _texts(self) -> list[str]:
        """How each evaluated example begins; every evaluation of the run writes the same."""
        return [excerpt(self.task.tokenizer, example.sequences[0]) for example in self._evaluated]
