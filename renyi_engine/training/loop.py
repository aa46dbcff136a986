"""The training loop, the same for every objective. `train_step` is the method; the loop repeats it.

The loop asks for a step before it has read the measurements of the step before. So a GPU always has work, and still
every file is what it would be if each step were read at once, because

- what a step needs of earlier ones (parameters, moments, the limit of its loss) never leaves the device;
- all steps are read before a line of metrics, an evaluation, a checkpoint and the end of the run;
- where something looks at every step, each is read at once: callbacks, and a controller that sets alpha by it.

Only a run that ends because a particle was skipped too often may make one more step, which nobody reads or saves.

Layout: K particles.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import asdict
from pathlib import Path

import torch

from renyi_engine.core import DoesNotFit, StopSignals, TrainingProgress, must_fit, seeding
from renyi_engine.critical_alpha import estimate_alpha_star
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives import EssController, Evaluation, Task, potential_curvature
from renyi_engine.training import checkpoint
from renyi_engine.training.callbacks import Callbacks
from renyi_engine.training.config import TrainConfig
from renyi_engine.training.dataset import Dataset
from renyi_engine.training.figures import MadeStep
from renyi_engine.training.journal import Journal
from renyi_engine.training.outcomes import Outcomes, describe_checkpoint
from renyi_engine.training.records import FINISHED, REPORT_FILE
from renyi_engine.training.report import write_report
from renyi_engine.training.run_folder import RunFolder, another_version, require_same_base
from renyi_engine.training.state import State, Window
from renyi_engine.training.steps import Steps


class TrainingInterrupted(Exception):
    """A signal asked to stop; the step was finished. `checkpoint` is where a resumed run goes on; None: at step 0."""

    def __init__(self, signum: int, step: int, path: Path | None, saved: str) -> None:
        self.signum, self.step, self.checkpoint = signum, step, path
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, {saved}; "
            "run the same command with --resume_from_checkpoint true to go on"
        )


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
        self.steps = Steps(config, task, dataset.train, ensemble, callbacks.tell)
        self.coupling = config.coupling(self.steps.total, self._estimate_alpha_star)
        self.state = State(config.per_device_train_batch_size, skipped=[0] * K, skipped_in_a_row=[0] * K)
        self.last_checkpoint = run.resume_from
        self.save_is_due = False
        if run.resume_from:
            self._restore(run.resume_from)
        self.progress = TrainingProgress(self.steps.total, self.state.step, K)
        say = self.progress.say
        if config.compiles(self.steps.device.type, self.steps.total - self.state.step):
            ensemble.compile_layers(say=say)
        self.outcomes = Outcomes(self.state, self.coupling, config.max_consecutive_skips, run.records, say)
        self.journal = Journal(config, run, task, dataset, ensemble, callbacks, self.state, self.progress)
        self.reads_at_once = callbacks.given or isinstance(self.coupling, EssController)

    def run_to_the_end(self) -> Evaluation:
        config, state = self.config, self.state
        nothing_is_left = self._is_over() and self.run.is_finished()
        self.run.begin(config, state.step)
        self.journal.describe("running")
        with StopSignals() as signals, self.progress, self.steps.batches:
            self.journal.announce(self.steps.total)
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
                    self.journal.describe("failed")
                if isinstance(error, DoesNotFit) and state.step:
                    self._save()
                    raise DoesNotFit(f"{error}; what was trained is {self._what_is_saved()}") from None
                raise
            if not nothing_is_left:  # else they stay as they are: their weights may have been fitted since
                self.ensemble.save_pretrained(self.run.particles, alpha=state.alpha)
            self.journal.describe(FINISHED)
            self.progress.say(f"particles: {self.run.particles}")
            if self.run.records.has_training():  # not if a callback ended the run before its first step
                self.progress.say(f"report: {write_report([self.run.path], self.run.path / REPORT_FILE)}")
            self.callbacks.tell("on_train_end")  # last, so that an error in a callback loses nothing
        return evaluation

    # ------------------------------------------------------------------ begin, step, end

    def _begin(self) -> None:
        epochs = -(-self.steps.total // self.steps.sampler.steps_per_epoch)
        history, has_held_out = self.run.records.metrics(), bool(self.dataset.held_out)
        self._update_callbacks()
        self.callbacks.begin(
            self.ensemble.model, self.task, self.steps.optimizer, self.steps.total, epochs, history, has_held_out
        )
        if self.journal.evaluation_is_missing(self.steps.total):
            self._evaluate()
        if not self._is_over():
            self.callbacks.tell("on_epoch_begin")

    def _is_over(self) -> bool:
        return self.state.position >= self.steps.total or self.callbacks.control.should_training_stop

    def _one_step(self) -> None:
        state = self.state
        self.steps.set_learning_rate(state.step)
        self.callbacks.tell("on_step_begin")
        made = self._step_that_fits(self.coupling.at(state.step))
        state.alpha = made.alpha
        state.step += 1
        self.progress.advance(state.step)
        state.tokens += made.num_tokens
        self.journal.clock.window_tokens += made.num_tokens
        self.outcomes.expect(made)
        self.outcomes.read(but_newest=not self.reads_at_once)

    def _step_that_fits(self, alpha: float) -> MadeStep:
        """The step, which does not depend on micro-batches: these are halved until they fit into the memory."""
        while True:
            try:
                return self.steps.make(self.state, alpha)
            except DoesNotFit as error:
                problem = str(error)
            # the memory of the attempt is free only here, where the error is gone
            self._halve_micro_batches(problem)

    def _halve_micro_batches(self, problem: str) -> None:
        """After an attempt that did not fit; DoesNotFit if its micro-batches held one example each."""
        config, state = self.config, self.state
        torch.cuda.empty_cache()  # blocks cut for the larger ones
        size = min(state.micro_batch_size, len(self.steps.sampler.examples(state.position)))
        if size == 1:
            state.micro_batch_size = config.per_device_train_batch_size  # a resumed run may have more memory
            checkpointing = "" if config.gradient_checkpointing else "resume with --gradient_checkpointing true, or "
            raise DoesNotFit(
                f"step {state.step + 1}: {problem}; {checkpointing}start with fewer particles, adapted layers or "
                "tokens (max_length)"
            )
        state.micro_batch_size = (size + 1) // 2
        self.progress.say(
            f"step {state.step + 1}: {problem}; going on with micro-batches of {state.micro_batch_size} in place of "
            f"{size}, which add up to the same steps"
        )
        self.journal.describe("running")

    def _after_step(self, signals: StopSignals) -> None:
        """Do what the settings and the callbacks ask for."""
        self._update_callbacks()
        if self.callbacks.tell("on_step_end").should_log:
            self._log()
        self._leave_epoch_if_asked()
        if signals.received and not self._is_over():
            self._interrupt(signals.received)
        self._evaluate_and_save()
        if self._is_over() or self.state.position % self.steps.sampler.steps_per_epoch == 0:
            self._update_callbacks()
            if self.callbacks.tell("on_epoch_end").should_log:
                self._log()
            self._evaluate_and_save()
            if not self._is_over():
                self.callbacks.tell("on_epoch_begin")

    def _leave_epoch_if_asked(self) -> None:
        """Leave out the other steps of the epoch, if a callback asks for it."""
        if self.callbacks.control.should_epoch_stop:
            self.state.left_out += -self.state.position % self.steps.sampler.steps_per_epoch

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
        if self.save_is_due and self._save():
            self.save_is_due = False

    def _interrupt(self, signum: int) -> None:
        """Save at once: the sender of the signal may not wait for an evaluation."""
        self._save()
        self.journal.describe("interrupted")
        raise TrainingInterrupted(signum, self.state.step, self.last_checkpoint, self._what_is_saved())

    def _end(self) -> Evaluation:
        """Log and save what is still open because a callback ended the run early, and evaluate the particles."""
        self._log()
        if self.state.step:
            self._save()
        self.outcomes.require_finite_loss(self.last_checkpoint)
        self._evaluate()
        assert self.journal.evaluation is not None
        return self.journal.evaluation[1]

    # ------------------------------------------------------------------ what needs every step to be read

    def _log(self) -> None:
        self.outcomes.read()
        self.journal.log(self.outcomes.last, self.steps.optimizer.param_groups[0]["lr"], self._epoch)

    def _evaluate(self) -> None:
        self.outcomes.read()
        self.journal.evaluate(self._epoch)

    def _save(self) -> bool:
        """Save a checkpoint, unless there is one of this step. Returns False, and saves nothing, if the last loss is
        not finite."""
        self.outcomes.read()
        if not self.outcomes.loss_is_finite:
            return False
        step = self.state.step
        if self.last_checkpoint is not None and self.last_checkpoint.name == f"checkpoint-{step}":
            return True
        self.state.recent_nlls = self.steps.recent_nlls.known()
        state = self.state.saved()
        state["particle_weights"] = self.ensemble.particle_weights.tolist()
        state |= {"coupling": self.coupling.state(), "base": self.ensemble.base_fingerprint}
        state |= {"data_sha256": self.dataset.sha256, "ensemble": asdict(self.ensemble.config)}
        if callbacks := self.callbacks.saved_states():
            state["callbacks"] = callbacks
        keep, optimizer = self.config.save_total_limit, self.steps.optimizer
        self.last_checkpoint = checkpoint.save(self.run.path, step, self.ensemble, optimizer, state, keep)
        self.callbacks.saved()
        return True

    def _what_is_saved(self) -> str:
        if not self.outcomes.loss_is_finite:
            return f"not saved: the loss is not finite; {describe_checkpoint(self.last_checkpoint)}"
        return f"saved as {self.last_checkpoint}"

    # ------------------------------------------------------------------ where the run stands

    @property
    def _epoch(self) -> float:
        return self.state.position / self.steps.sampler.steps_per_epoch

    def _update_callbacks(self) -> None:
        self.callbacks.at(self.state.step, self._epoch, self.state.tokens)

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

    def _restore(self, path: Path) -> None:
        saved = checkpoint.load(path, self.ensemble, self.steps.optimizer)
        del saved["data_sha256"]  # compared before the model was loaded
        saved.pop("ensemble", None)  # for `export`; the settings of the run were compared
        require_same_base(path, saved.pop("base", None), self.ensemble.base_fingerprint)
        if "particle_weights" in saved:  # checkpoints of earlier versions have none
            self.ensemble.particle_weights = saved.pop("particle_weights")
        self.coupling.restore(saved.pop("coupling"))
        self.callbacks.restore(saved.pop("callbacks", []))
        try:
            self.state = State.load(saved)
        except TypeError:
            raise another_version(path) from None
        self.steps.go_on(self.state.recent_nlls)
        if self.run.records.has_training(self.state.step):  # written after the checkpoint, because a callback asked
            self.state.window = Window()
        if self.state.step > self.steps.total:
            setting = "max_steps" if self.config.max_steps > 0 else "num_train_epochs"
            raise ValueError(
                f"{setting}: {self.steps.total} steps are asked for, but {path} is already at step {self.state.step}; "
                "give more, or resume from an earlier checkpoint"
            )
