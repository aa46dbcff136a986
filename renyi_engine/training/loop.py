"""The training loop, the same for every objective. `train_step` is the method; the loop repeats it.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from renyi_engine.core import DoesNotFit, StopSignals, TrainingProgress, must_fit, seeding
from renyi_engine.critical_alpha import estimate_alpha_star
from renyi_engine.data import StepSampler, excerpt
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives import ESS, Evaluation, Task, alpha_rule, evaluate, length, potential_curvature
from renyi_engine.training import checkpoint, record_contents
from renyi_engine.training.callbacks import Callbacks
from renyi_engine.training.config import TrainConfig, steps_of
from renyi_engine.training.dataset import Dataset
from renyi_engine.training.loss_spikes import remember, spike_limit
from renyi_engine.training.records import REPORT_FILE
from renyi_engine.training.report import write_report
from renyi_engine.training.run_folder import RunFolder, another_version, require_same_base
from renyi_engine.training.state import State, Window
from renyi_engine.training.train_step import StepResult, train_step

TRAINING_EXAMPLES_SHOWN = 256
"""Without held-out data, the report's heat map shows so many training examples."""


class TrainingInterrupted(Exception):
    """A signal asked to stop; the step was finished. `checkpoint` is where a resumed run goes on; None: at step 0."""

    def __init__(self, signum: int, step: int, path: Path | None, saved: str) -> None:
        self.signum, self.step, self.checkpoint = signum, step, path
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, {saved}; "
            "run the same command with --resume_from_checkpoint true to go on"
        )


class TrainingDiverged(RuntimeError):
    """A particle's update was skipped too many times in a row, or the last loss is not finite."""


class Loop:
    """One run, from its first step or from a checkpoint to its end."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        task: Task,
        dataset: Dataset,
        ensemble: LoraEnsemble,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.run, self.task, self.dataset, self.ensemble = config, run, task, dataset, ensemble
        self.callbacks = callbacks
        K = config.num_particles
        self.sampler = StepSampler(
            [length(item) for item in dataset.train],
            config.per_device_train_batch_size * config.gradient_accumulation_steps,
            config.seed,
            config.train_sampling_strategy == "group_by_length",
        )
        epochs = round(config.num_train_epochs * self.sampler.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else max(1, epochs)
        self.optimizer = torch.optim.AdamW(
            [ensemble.particles.values],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,  # needs no memory beside the moments
        )
        self.learning_rate_factor = _schedule(config, self.optimizer, self.total_steps)
        self.coupling = config.coupling(self.total_steps, self._estimate_alpha_star)
        self.state = State(config.per_device_train_batch_size, skipped=[0] * K, skipped_in_a_row=[0] * K)
        self.last_checkpoint = run.resume_from
        self.loss_is_finite = True
        """Whether the last loss of the healthy particles is finite. While it is not, no checkpoint is made."""
        self.save_is_due = False
        self.last_step: StepResult | None = None
        self.evaluation: tuple[int, Evaluation] | None = None
        """The newest, and the step after which it was made."""
        if run.resume_from:
            self._restore(run.resume_from)
        self.clock = record_contents.Clock()

    def run_to_the_end(self) -> Evaluation:
        config, state = self.config, self.state
        self.run.begin(config, state.step)
        self._describe("running")
        with StopSignals() as signals, TrainingProgress(self.total_steps, state.step, config.num_particles) as progress:
            self.progress = progress
            self._announce()
            try:
                self._begin()
                while not self._is_over():
                    self._one_step()
                    self._after_step(signals)
                evaluation = self._end()
            except TrainingInterrupted:
                raise
            except Exception as error:
                with contextlib.suppress(OSError):  # perhaps the disk has failed
                    self._describe("failed")
                if isinstance(error, DoesNotFit) and state.step:
                    self._save()
                    raise DoesNotFit(f"{error}; what was trained is {self._what_is_saved()}") from None
                raise
            self.ensemble.save_pretrained(self.run.particles, alpha=state.alpha)
            self._describe("finished")
            progress.say(f"particles: {self.run.particles}")
            if self.run.records.has_training():  # not if a callback ended the run before its first step
                progress.say(f"report: {write_report([self.run.path], self.run.path / REPORT_FILE)}")
            self.callbacks.tell("on_train_end")  # last, so that an error in a callback loses nothing
        return evaluation

    # ------------------------------------------------------------------ begin, step, end

    def _begin(self) -> None:
        epochs = -(-self.total_steps // self.sampler.steps_per_epoch)
        history, has_held_out = self.run.records.metrics(), bool(self.dataset.held_out)
        self._update_callbacks()
        self.callbacks.begin(
            self.ensemble.model, self.task, self.optimizer, self.total_steps, epochs, history, has_held_out
        )
        if self._evaluation_is_missing():
            self._evaluate()
        if not self._is_over():
            self.callbacks.tell("on_epoch_begin")

    def _is_over(self) -> bool:
        return self.state.position >= self.total_steps or self.callbacks.control.should_training_stop

    def _one_step(self) -> None:
        config, state = self.config, self.state
        learning_rate = config.learning_rate * self.learning_rate_factor(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.callbacks.tell("on_step_begin")
        alpha = self.coupling.at(state.step)
        examples = [self.dataset.train[i] for i in self.sampler.examples(state.position)]
        labels = sum(example.num_labels for example in examples)
        largest_nll = spike_limit(config.spike_threshold, state.recent_nlls) * labels / len(examples)
        result = self.last_step = self._step_that_fits(examples, alpha, largest_nll)
        self.loss_is_finite = bool(result.mixture_nll.isfinite().all())
        tokens = sum(len(sequence.input_ids) for example in examples for sequence in example.sequences)
        state.alpha = alpha
        state.step += 1
        self.progress.advance(state.step)
        state.tokens += tokens
        self.clock.window_tokens += tokens
        self._count_skips(result, [example.row for example in examples])
        if result.updated.any():
            self.coupling.observe(result.logp)
            state.recent_nlls = remember(state.recent_nlls, result.mixture_nll.sum().item() / labels)
        state.window.add(result, labels, alpha)

    def _step_that_fits(self, examples: Sequence[Any], alpha: float, largest_nll: float) -> StepResult:
        """The step, which does not depend on micro-batches: these are halved until they fit into the memory."""
        config, num_train_examples = self.config, len(self.dataset.train)
        while True:
            size = min(self.state.micro_batch_size, len(examples))
            parts = [examples[start : start + size] for start in range(0, len(examples), size)]
            batches = [self.task.collate(part) for part in parts]
            try:
                return train_step(
                    self.ensemble,
                    self.task,
                    self.optimizer,
                    batches,
                    alpha,
                    config,
                    num_train_examples,
                    len(examples),
                    largest_nll,
                    self.callbacks.tell,
                )
            except DoesNotFit as error:
                problem = str(error)
            # the memory of the attempt is free only here, where the error is gone
            self._halve_micro_batches(size, problem)

    def _after_step(self, signals: StopSignals) -> None:
        """Do what the settings and the callbacks ask for."""
        self._update_callbacks()
        if self.callbacks.tell("on_step_end").should_log:
            self._log()
        self._leave_epoch_if_asked()
        if signals.received and not self._is_over():
            self._interrupt(signals.received)
        self._evaluate_and_save()
        if self._is_over() or self.state.position % self.sampler.steps_per_epoch == 0:
            self._update_callbacks()
            if self.callbacks.tell("on_epoch_end").should_log:
                self._log()
            self._evaluate_and_save()
            if not self._is_over():
                self.callbacks.tell("on_epoch_begin")

    def _leave_epoch_if_asked(self) -> None:
        """Leave out the other steps of the epoch, if a callback asks for it."""
        if self.callbacks.control.should_epoch_stop:
            self.state.left_out += -self.state.position % self.sampler.steps_per_epoch

    def _evaluate_and_save(self) -> None:
        # before the checkpoint, because a resumed run keeps the lines of metrics up to the checkpoint's step
        if self.callbacks.control.should_evaluate and not self._is_over():
            self._evaluate()
            self._leave_epoch_if_asked()
        if self._is_over():
            self._log()
        control = self.callbacks.control
        self.save_is_due |= control.should_save
        control.should_evaluate = control.should_save = False
        if self.save_is_due and self.loss_is_finite:
            self._save()
            self.save_is_due = False

    def _interrupt(self, signum: int) -> None:
        """Save at once: the sender of the signal may not wait for an evaluation."""
        self._save()
        self._describe("interrupted")
        raise TrainingInterrupted(signum, self.state.step, self.last_checkpoint, self._what_is_saved())

    def _end(self) -> Evaluation:
        """Log and save what is still open because a callback ended the run early, and evaluate the particles."""
        self._log()
        if self.state.step:
            self._save()
        self._require_finite_loss()
        self._evaluate()
        assert self.evaluation is not None
        return self.evaluation[1]

    # ------------------------------------------------------------------ what is written

    @property
    def _epoch(self) -> float:
        return self.state.position / self.sampler.steps_per_epoch

    def _update_callbacks(self) -> None:
        self.callbacks.at(self.state.step, self._epoch, self.state.tokens)

    def _log(self) -> None:
        """Write a line of metrics and show it, if there was a step since the last line."""
        state, config = self.state, self.config
        if not state.window.examples or self.last_step is None:
            return
        learning_rate = self.optimizer.param_groups[0]["lr"]
        record = record_contents.step_record(state, self.task, self.last_step, learning_rate, self._epoch, self.clock)
        self.run.records.log(record)
        at_alpha = f"  alpha {state.alpha:.3g}" if config.alpha_varies else ""
        self.progress.show(record, self.task.headline(record) + at_alpha)
        state.window = Window()
        self.callbacks.log(record)

    def _evaluate(self) -> None:
        """Evaluate on the held-out examples, or where there are none on training examples; once after a step."""
        state, config, held_out = self.state, self.config, self.dataset.held_out
        if self.evaluation is not None and self.evaluation[0] == state.step:
            return
        with must_fit("an evaluation", "lower --per_device_eval_batch_size"):
            found = evaluate(self.ensemble, self.task, self._evaluated, config.per_device_eval_batch_size)
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
            record = record_contents.evaluation_record(state, summary, self._epoch)
            self.run.records.log(record)
            self.callbacks.log(record)

    @property
    def _evaluated(self) -> list[Any]:
        return self.dataset.held_out or self.dataset.train[:TRAINING_EXAMPLES_SHOWN]

    @cached_property
    def _texts(self) -> list[str]:
        """How each evaluated example begins; every evaluation of the run writes the same."""
        return [excerpt(self.task.tokenizer, example.sequences[0]) for example in self._evaluated]

    def _evaluation_is_missing(self) -> bool:
        """Whether a signal stopped the run at a step at which it evaluates: see `_interrupt`."""
        step, every = self.state.step, self.config.eval_steps
        is_due = every is not None and step % every == 0 and 0 < step < self.total_steps
        return is_due and bool(self.dataset.held_out) and not self.run.records.has_evaluation(step)

    def _estimate_alpha_star(self, step: int) -> float:
        """The critical alpha before `step`; the next line of metrics has it too. A kernel's repulsion is left out."""
        config, items = self.config, self.dataset.train
        weight = 0.0 if config.prior == "none" else config.prior_lambda
        of_prior = potential_curvature(weight, len(items), config.prior_std)
        seed = seeding.generator(config.seed, step).initial_seed()
        with must_fit("an estimate of the critical alpha", "start a run with another --alpha_controller"):
            found = estimate_alpha_star(self.ensemble, self.task, items, prior_curvature=of_prior, seed=seed)
        self.state.window.alpha_star = found
        return found

    def _describe(self, status: str) -> None:
        size = self.state.micro_batch_size
        self.run.records.write_facts(
            record_contents.facts(status, self.run.command, self.ensemble, self.dataset, size, self.clock)
        )

    def _announce(self) -> None:
        config, dataset = self.config, self.dataset
        resumed = f", from {self.run.resume_from}" if self.run.resume_from else ""
        if self.state.micro_batch_size < config.per_device_train_batch_size:
            resumed += f", in micro-batches of {self.state.micro_batch_size}: larger ones did not fit"
        at_alpha = "with alpha by" if config.alpha_varies else "at alpha"
        rule = alpha_rule(config.alpha, config.alpha_schedule, config.alpha_0, config.alpha_controller)
        self.progress.say(
            f"{config.num_particles} particles {at_alpha} {rule} on {config.model_name_or_path}: "
            f"{len(dataset.train)} training and {len(dataset.held_out)} held-out examples, "
            f"{self.total_steps} steps{resumed}"
        )
        for line in dataset.description:
            self.progress.say(line)

    # ------------------------------------------------------------------ what can go wrong

    def _halve_micro_batches(self, size: int, problem: str) -> None:
        """After an attempt with micro-batches of `size`; DoesNotFit if that was one."""
        config, state = self.config, self.state
        torch.cuda.empty_cache()  # blocks cut for the larger ones
        if size == 1:
            state.micro_batch_size = config.per_device_train_batch_size  # a resumed run may have more memory
            checkpointing = "" if config.gradient_checkpointing else "resume with --gradient_checkpointing true, or "
            raise DoesNotFit(
                f"step {state.step + 1}: {problem}; {checkpointing}start with fewer particles, adapted layers or "
                "tokens (max_length)"
            )
        state.micro_batch_size = (size + 1) // 2
        self.progress.say(
            f"step {state.step + 1}: {problem}; going on with micro-batches of {state.micro_batch_size}, which add up "
            "to the same steps"
        )
        self._describe("running")

    def _count_skips(self, result: StepResult, rows: list[int]) -> None:
        """Count the particles whose update was skipped; record the rows; stop when one cannot recover."""
        state, limit = self.state, self.config.max_consecutive_skips
        skipped = [k for k, updated in enumerate(result.updated.tolist()) if not updated]
        state.skipped_in_a_row = [n + 1 if k in skipped else 0 for k, n in enumerate(state.skipped_in_a_row)]
        if not skipped:
            return
        for k in skipped:
            state.skipped[k] += 1
        why = "the loss is a spike (spike_threshold)" if result.spike else "the gradient is not finite"
        self.run.records.log_skip({"step": state.step, "particles": skipped, "rows": rows, "why": why})
        self.progress.say(f"step {state.step}: no update of particles {skipped}: {why} (rows {rows})")
        lost = [k for k in skipped if state.skipped_in_a_row[k] >= limit]
        if lost:
            raise TrainingDiverged(
                f"no update of particles {lost} {limit} steps in a row (max_consecutive_skips): {why}; the rows are in "
                f"{self.run.records.skips}; start with a lower learning rate, or resume with a larger "
                "max_consecutive_skips" + (" or spike_threshold" if result.spike else "")
            )

    def _require_finite_loss(self) -> None:
        """TrainingDiverged if the last loss is NaN or infinite: such particles are of no use."""
        if not self.loss_is_finite:
            raise TrainingDiverged(
                f"the loss of the last step, {self.state.step}, is not finite, so the particles are not written; "
                f"{self._describe_last_checkpoint()}; start with a lower learning rate"
            )

    def _describe_last_checkpoint(self) -> str:
        if self.last_checkpoint is None:
            return "there is no checkpoint from before"
        return f"the last checkpoint whose loss was finite is {self.last_checkpoint}"

    # ------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """Save a checkpoint, unless there is one of this step, or the last loss is not finite."""
        step = self.state.step
        is_there = self.last_checkpoint is not None and self.last_checkpoint.name == f"checkpoint-{step}"
        if is_there or not self.loss_is_finite:
            return
        state = self.state.saved()
        state |= {"coupling": self.coupling.state(), "base": self.ensemble.base_fingerprint}
        state |= {"data_sha256": self.dataset.sha256, "ensemble": asdict(self.ensemble.config)}
        if callbacks := self.callbacks.saved_states():
            state["callbacks"] = callbacks
        keep = self.config.save_total_limit
        self.last_checkpoint = checkpoint.save(self.run.path, step, self.ensemble, self.optimizer, state, keep)
        self.callbacks.saved()

    def _what_is_saved(self) -> str:
        if not self.loss_is_finite:
            return f"not saved: the loss is not finite; {self._describe_last_checkpoint()}"
        return f"saved as {self.last_checkpoint}"

    def _restore(self, path: Path) -> None:
        saved = checkpoint.load(path, self.ensemble, self.optimizer)
        del saved["data_sha256"]  # compared before the model was loaded
        saved.pop("ensemble", None)  # for `export`; the settings of the run were compared
        require_same_base(path, saved.pop("base", None), self.ensemble.base_fingerprint)
        self.coupling.restore(saved.pop("coupling"))
        self.callbacks.restore(saved.pop("callbacks", []))
        try:
            self.state = State.load(saved)
        except TypeError:
            raise another_version(path) from None
        if self.run.records.has_training(self.state.step):  # written after the checkpoint, because a callback asked
            self.state.window = Window()
        if self.state.step > self.total_steps:
            setting = "max_steps" if self.config.max_steps > 0 else "num_train_epochs"
            raise ValueError(
                f"{setting}: {self.total_steps} steps are asked for, but {path} is already at step {self.state.step}; "
                "give more, or resume from an earlier checkpoint"
            )


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The learning rate's factor as a function of the step: no state to save."""
    warmup = steps_of(config.warmup_steps, total_steps)
    name = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps).lr_lambdas[0]
