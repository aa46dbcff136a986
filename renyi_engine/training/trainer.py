"""Training: one loop for every objective. `train_step` is the method; what is here keeps it alive.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from renyi_engine import base_model
from renyi_engine.core import DoesNotFit, StopSignals, TrainingProgress, must_fit, seeding, versions
from renyi_engine.critical_alpha import estimate_alpha_star
from renyi_engine.data import StepSampler, excerpt
from renyi_engine.ensemble import LoraEnsemble, difference, is_fingerprint
from renyi_engine.objectives import (
    DpoTask,
    Evaluation,
    SftTask,
    Task,
    alpha_rule,
    check_fits,
    cut_rows,
    evaluate,
    length,
    means,
    potential_curvature,
)
from renyi_engine.training import checkpoint
from renyi_engine.training.config import DpoConfig, SftConfig, TrainConfig, steps_of
from renyi_engine.training.dataset import Dataset, load_dataset
from renyi_engine.training.report import write_report
from renyi_engine.training.run_folder import RunFolder, another_version
from renyi_engine.training.state import State, Window
from renyi_engine.training.train_step import StepResult, train_step
from renyi_engine.training.watchdog import remember, spike_limit

# without held-out data, the report's heat map is of this many training examples
TRAINING_EXAMPLES_SHOWN = 256


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `ensemble` is still attached to its model; `evaluation` is the one at the end."""

    output_dir: Path
    global_step: int
    ensemble: LoraEnsemble
    evaluation: Evaluation


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


def train(config: TrainConfig) -> TrainResult:
    """Train an ensemble as `config` says; everything it makes is in `config.output_dir`.

    Raises:
        ValueError: a setting, the data, the model or the folder cannot be used; nothing was trained.
        TrainingInterrupted: SIGINT or SIGTERM; the run can be resumed.
        TrainingDiverged: a particle's gradient stayed NaN or infinite, the loss beyond `spike_threshold`, or the last
            loss is NaN or infinite; earlier checkpoints are kept.
        DoesNotFit: memory ended, in a step even with one example at a time; what was trained is saved.
    """
    base_model.load_config(config)
    with RunFolder.open(config) as run:
        task = make_task(config)
        dataset = load_dataset(config, task)
        run.check_data(config, dataset.sha256)
        model = base_model.load_model(config)
        check_fits(model, [*dataset.train, *dataset.held_out])
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ensemble = LoraEnsemble.attach(model, config.ensemble_config()).train()
        run.claim(config)
        for part in (dataset.train, dataset.held_out):
            base = ensemble.base_fingerprint["digest"]
            part[:] = task.prepare(ensemble, part, run.path, config.per_device_eval_batch_size, base)
        return _Trainer(config, run, task, dataset, ensemble).run_to_the_end()


def make_task(config: TrainConfig) -> Task:
    """The kind of training that `config` asks for."""
    if isinstance(config, SftConfig):
        return SftTask(base_model.load_tokenizer(config), config.max_length)
    if isinstance(config, DpoConfig):
        tokenizer = base_model.load_tokenizer(config)
        return DpoTask(tokenizer, config.max_length, config.beta, config.min_score_gap, config.score_columns)
    raise TypeError(f"config: expected an SftConfig or a DpoConfig; got {type(config).__name__}")


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        task: Task,
        dataset: Dataset,
        ensemble: LoraEnsemble,
    ) -> None:
        self.config, self.run, self.task, self.dataset, self.ensemble = config, run, task, dataset, ensemble
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
            ensemble.parameters(),
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
        if run.resume_from:
            self._restore(run.resume_from)
        self.started = self.window_started = time.monotonic()
        self.window_tokens = 0

    def run_to_the_end(self) -> TrainResult:
        config, state = self.config, self.state
        self.run.begin(config, state.step)
        self._describe("running")
        with StopSignals() as signals, TrainingProgress(self.total_steps, state.step, config.num_particles) as progress:
            self.progress = progress
            self._announce()
            try:
                if self._evaluation_is_missing():
                    self._evaluate()
                while state.step < self.total_steps:
                    self._one_step()
                    self._after_step(signals)
                self._require_finite_loss()
                evaluation = self._evaluate()
            except TrainingInterrupted:
                raise
            except Exception as error:
                with contextlib.suppress(OSError):  # the disk may be what failed
                    self._describe("failed")
                if isinstance(error, DoesNotFit) and state.step:
                    raise DoesNotFit(f"{error}; what was trained is {self._save()}") from None
                raise
            self.ensemble.save_pretrained(self.run.particles, alpha=state.alpha)
            self._describe("finished")
            report = write_report([self.run.path], self.run.path / "report.html")
            progress.say(f"particles: {self.run.particles}\nreport: {report}")
        return TrainResult(self.run.path, state.step, self.ensemble, evaluation)

    def _one_step(self) -> None:
        config, state = self.config, self.state
        learning_rate = config.learning_rate * self.learning_rate_factor(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        alpha = self.coupling.at(state.step)
        examples = [self.dataset.train[i] for i in self.sampler.examples(state.step)]
        labels = sum(example.num_labels for example in examples)
        largest_nll = spike_limit(config.spike_threshold, state.recent_nlls) * labels / len(examples)
        result = self._step_that_fits(examples, alpha, largest_nll)
        self.loss_is_finite = bool(result.mixture_nll.isfinite().all())
        tokens = sum(len(sequence.input_ids) for example in examples for sequence in example.sequences)
        state.alpha = alpha
        state.step += 1
        self.progress.advance(state.step)
        state.tokens += tokens
        self.window_tokens += tokens
        self._count_skips(result, [example.row for example in examples])
        if result.updated.any():
            self.coupling.observe(result.logp)
            state.recent_nlls = remember(state.recent_nlls, result.mixture_nll.sum().item() / labels)
        self._add_to_window(result, labels)
        if state.step % config.logging_steps == 0 or state.step == self.total_steps:
            self._log(result, learning_rate)

    def _step_that_fits(self, examples: Sequence[Any], alpha: float, largest_nll: float) -> StepResult:
        """The same step whatever the micro-batches: they are halved until the device has the memory."""
        config, num_train_examples = self.config, len(self.dataset.train)
        while True:
            size = min(self.state.micro_batch_size, len(examples))
            parts = [examples[start : start + size] for start in range(0, len(examples), size)]
            batches = [self.task.collate(part) for part in parts]
            try:
                return train_step(
                    self.ensemble, self.task, self.optimizer, batches, alpha, config, num_train_examples, largest_nll
                )
            except DoesNotFit as error:
                problem = str(error)
            # only here, with the error gone, is the memory of the attempt free
            self._halve_micro_batches(size, problem)

    def _after_step(self, signals: StopSignals) -> None:
        config, state = self.config, self.state
        at_the_end = state.step == self.total_steps
        if signals.received and not at_the_end:
            saved = self._save()  # at once: whoever sent the signal may not wait for an evaluation
            self._describe("interrupted")
            raise TrainingInterrupted(signals.received, state.step, self.last_checkpoint, saved)
        # before the checkpoint, which vouches for the lines of metrics up to its step
        if self._evaluates_at(state.step):
            self._evaluate()
        self.save_is_due |= at_the_end or state.step % config.save_steps == 0
        if self.save_is_due and self.loss_is_finite:
            self._save()
            self.save_is_due = False

    def _evaluates_at(self, step: int) -> bool:
        every = self.config.eval_steps
        return every is not None and step % every == 0 and 0 < step < self.total_steps

    def _evaluation_is_missing(self) -> bool:
        """Whether the run was stopped by a signal at a step that evaluates: see `_after_step`."""
        step, held_out = self.state.step, self.dataset.held_out
        return bool(held_out) and self._evaluates_at(step) and not self.run.has_evaluation(step)

    # ------------------------------------------------------------------ what is measured

    def _add_to_window(self, result: StepResult, labels: int) -> None:
        window = self.state.window
        window.examples += result.loss.numel()
        window.labels += labels
        window.alphas.append(self.state.alpha)
        shown = {"loss": result.loss, "ess": result.ess, "mixture": result.mixture_nll, "particles": -result.logp}
        window.add(shown)
        window.add(result.details)

    def _log(self, result: StepResult, learning_rate: float) -> None:
        state, window, now = self.state, self.state.window, time.monotonic()
        totals, unit = window.totals, self.task.unit
        particles = [nll / window.labels for nll in totals["particles"]]
        metrics = {
            "step": state.step,
            "epoch": state.step / self.sampler.steps_per_epoch,
            "loss_nats": totals["loss"] / window.examples,
            f"mixture_nll_nats_per_{unit}": totals["mixture"] / window.labels,
            f"mean_particle_nll_nats_per_{unit}": sum(particles) / len(particles),
            f"particle_nll_nats_per_{unit}": particles,
            "ess_particles": totals["ess"] / window.examples,
            **means({name: totals[name] for name in result.details}, window.examples),
            "alpha": state.alpha,
            "alpha_of_steps": window.alphas,
            **({} if window.alpha_star is None else {"alpha_star": window.alpha_star}),
            "prior_nats": result.prior.item(),
            "learning_rate": learning_rate,
            "grad_norm": result.norms.tolist(),
            "skipped_updates": state.skipped,
            "tokens": state.tokens,
            "tokens_per_s": self.window_tokens / (now - self.window_started),
            "elapsed_s": now - self.started,
        }
        self.run.log(metrics)
        at_alpha = f"  alpha {state.alpha:.3g}" if self.config.alpha_varies else ""
        self.progress.show(metrics, self.task.headline(metrics) + at_alpha)
        state.window = Window()
        self.window_started, self.window_tokens = now, 0

    def _evaluate(self) -> Evaluation:
        examples = self.dataset.held_out or self.dataset.train[:TRAINING_EXAMPLES_SHOWN]
        with must_fit("an evaluation", "lower --per_device_eval_batch_size"):
            evaluation = evaluate(self.ensemble, self.task, examples, self.config.per_device_eval_batch_size)
        summary = evaluation.summary(self.state.alpha)
        # a run that is taken up at its end has the line already
        if self.dataset.held_out and not self.run.has_evaluation(self.state.step):
            epoch = self.state.step / self.sampler.steps_per_epoch
            self.run.log({"step": self.state.step, "epoch": epoch} | {f"eval_{k}": v for k, v in summary.items()})
        self.run.write_json(
            "evaluation.json",
            {
                "step": self.state.step,
                "split": "held-out" if self.dataset.held_out else "training",
                "alpha": self.state.alpha,
                "example_ids": evaluation.rows,
                "texts": [excerpt(self.task.tokenizer, example.sequences[0]) for example in examples],
                "num_labels": evaluation.num_labels.tolist(),
                "logp_nats": evaluation.logp.tolist(),
            },
        )
        kind = "held-out" if self.dataset.held_out else "training examples:"
        self.progress.say(
            f"{kind} {self.task.headline(summary)}, mean particle NLL "
            f"{summary[f'mean_particle_nll_nats_per_{self.task.unit}']:.3f} nats/{self.task.unit}, "
            f"ESS {summary['ess_particles']:.2f}/{self.config.num_particles}"
        )
        return evaluation

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
        """run.json: what the report says of the run beside its settings."""
        per_particle = sum(p[0].numel() for p in self.ensemble.parameters())
        self.run.write_json(
            "run.json",
            {
                "command": self.run.command,
                "status": status,
                "versions": versions(),
                "device": torch.cuda.get_device_name() if self.ensemble.model.device.type == "cuda" else "CPU",
                "dtype": str(self.ensemble.model.dtype).removeprefix("torch."),
                "data_sha256": self.dataset.sha256,
                "num_train_examples": len(self.dataset.train),
                "num_eval_examples": len(self.dataset.held_out),
                "num_parameters_per_particle": per_particle,
                "adapted_maps": len(self.ensemble.paths),
                "micro_batch_size": self.state.micro_batch_size,
                "dropped_rows": {reason: len(rows) for reason, rows in self.dataset.dropped.items()},
                "cut_rows": len(cut_rows(self.dataset.train)) + len(cut_rows(self.dataset.held_out)),
                "elapsed_s": time.monotonic() - self.started,
            },
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
        self.ensemble.forget()
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()  # blocks cut for the larger ones
        if size == 1:
            state.micro_batch_size = config.per_device_train_batch_size  # whoever resumes has made room
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
        self.run.log_skip({"step": state.step, "particles": skipped, "rows": rows, "why": why})
        self.progress.say(f"step {state.step}: no update of particles {skipped}: {why} (rows {rows})")
        lost = [k for k in skipped if state.skipped_in_a_row[k] >= limit]
        if lost:
            raise TrainingDiverged(
                f"no update of particles {lost} {limit} steps in a row (max_consecutive_skips): {why}; the rows are in "
                f"{self.run.skips}; start with a lower learning rate, or resume with a larger max_consecutive_skips"
                + (" or spike_threshold" if result.spike else "")
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

    def _save(self) -> str:
        """Save a checkpoint, unless the last loss is not finite. Returns what was done, for a message."""
        if not self.loss_is_finite:
            return f"not saved: the loss is not finite; {self._describe_last_checkpoint()}"
        state = asdict(self.state)
        state |= {"coupling": self.coupling.state(), "base": self.ensemble.base_fingerprint}
        state |= {"data_sha256": self.dataset.sha256, "ensemble": asdict(self.ensemble.config)}
        keep = self.config.save_total_limit
        path = checkpoint.save(self.run.path, self.state.step, self.ensemble, self.optimizer, state, keep)
        self.last_checkpoint = path
        return f"saved as {path}"

    def _restore(self, path: Path) -> None:
        saved = checkpoint.load(path, self.ensemble, self.optimizer)
        del saved["data_sha256"]  # compared before the model was loaded
        saved.pop("ensemble", None)  # for `export`; the settings of the run were compared
        self._require_same_base(path, saved.pop("base", None))
        self.coupling.restore(saved.pop("coupling"))
        try:
            self.state = State(**saved | {"window": Window(**saved["window"])})
        except TypeError:
            raise another_version(path) from None
        if self.state.step > self.total_steps:
            setting = "max_steps" if self.config.max_steps > 0 else "num_train_epochs"
            raise ValueError(
                f"{setting}: {self.total_steps} steps are asked for, and {path} is {self.state.step} steps on; give "
                "more, or resume from an earlier checkpoint"
            )

    def _require_same_base(self, path: Path, base: Any) -> None:
        """ValueError unless this is the base that the checkpoint at `path` was trained on, to the bit."""
        if not is_fingerprint(base):
            raise another_version(path)
        found = difference(base, self.ensemble.base_fingerprint)
        weights = found.weights + found.rounded + found.unknown
        for what, names in (("weights", weights), ("config", found.values)):
            if names:
                raise ValueError(
                    f"resume_from_checkpoint: {path}: the base model's {what} changed: {', '.join(names[:3])}"
                    + f" and {len(names) - 3} more" * (len(names) > 3)
                )


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The learning rate's factor as a function of the step: no state to save."""
    warmup = steps_of(config.warmup_steps, total_steps)
    name = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps).lr_lambdas[0]
