"""Train an ensemble: load the parts that are not given, check all of them, and hand them to the loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from renyi_engine import base_model
from renyi_engine.core import require_given
from renyi_engine.ensemble import LoraEnsemble, records, require_bare
from renyi_engine.objectives import Evaluation, check_fits
from renyi_engine.training.callbacks import Callbacks
from renyi_engine.training.config import DpoConfig, SftConfig, TrainConfig
from renyi_engine.training.dataset import load_dataset, make_task
from renyi_engine.training.loop import Loop
from renyi_engine.training.run_folder import RunFolder

Rows = Any
"""A `datasets.Dataset`, or a sequence of rows, each a dict."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `ensemble` is still attached to its model; `evaluation` is the one at the end."""

    output_dir: Path
    global_step: int
    ensemble: LoraEnsemble
    evaluation: Evaluation


class Trainer:
    """Trains an ensemble as `config` says; everything it makes is in `config.output_dir`.

    A part that is given is not loaded, and its setting (model_name_or_path, dataset_name) may be left out. A part that
    is not given is loaded by its setting. For example::

        from transformers import EarlyStoppingCallback
        from renyi_engine import SftConfig, Trainer

        rows = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(100)]
        config = SftConfig(
            model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct", output_dir="runs/sums", eval_steps=10
        )
        stop = EarlyStoppingCallback(early_stopping_patience=3)
        result = Trainer(config, train_dataset=rows[:80], eval_dataset=rows[80:], callbacks=[stop]).train()
        model = result.ensemble.detach()

    Args:
        config: an SftConfig or a DpoConfig.
        model: a causal language model of transformers. Training changes none of its weights. It is moved to the device
            that training uses, and afterwards it carries the particles: `TrainResult.ensemble.detach()` takes them off.
            If training fails, they are taken off at once. `gradient_checkpointing` stays switched on in it.
        processing_class: the model's tokenizer. If only `model` is given, the tokenizer is loaded from where the model
            came from.
        train_dataset, eval_dataset: a `datasets.Dataset`, or a sequence of rows, each a dict, with the columns that
            `renyi-engine sft` or `dpo` expects of a file. With `train_dataset`, the held-out data are only
            `eval_dataset` or those that eval_dataset_name names.
        callbacks: transformers' TrainerCallback, its subclasses or instances of them. They are called at transformers'
            points, on_init_end right before on_train_begin; `model` is the base model that carries the particles. The
            run does what they ask for in `control`. A run that one of them stops is saved, evaluated and reported like
            any other, and can be resumed. Metrics have the names that metrics.jsonl gives them; a particle's has a name
            of its own, such as particle_nll_nats_per_token/p000.

    Raises:
        ValueError: a part is neither given nor named; report_to names something unknown or not installed;
            metric_for_best_model is no metric of this kind of training. TypeError: a part is of the wrong type.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        train_dataset: Rows = None,
        eval_dataset: Rows = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
    ) -> None:
        _require_type("config", config, (SftConfig, DpoConfig), "an SftConfig or a DpoConfig")
        _require_type("model", model, (PreTrainedModel, type(None)), "a model of transformers")
        _require_type(
            "processing_class", processing_class, (PreTrainedTokenizerBase, type(None)), "a tokenizer of transformers"
        )
        if model is not None and not config.model_name_or_path:
            config = replace(config, model_name_or_path=model.name_or_path)
        parts = {"model_name_or_path": model, "dataset_name": train_dataset}
        require_given(config, excused=[setting for setting, part in parts.items() if part is not None])
        if processing_class is None and not config.model_name_or_path:
            raise ValueError(
                "processing_class: needed, but not given, because the model does not say where it came from; pass its "
                "tokenizer, or set model_name_or_path"
            )
        self.config, self.model, self.processing_class = config, model, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.callbacks = Callbacks(config, callbacks)

    def train(self) -> TrainResult:
        """Train from the first step, or from the checkpoint that `config.resume_from_checkpoint` asks for.

        Raises:
            ValueError: a setting, the data, the model or the folder cannot be used; nothing was trained.
            TrainingInterrupted: SIGINT or SIGTERM; the run can be resumed.
            TrainingDiverged: a particle's gradient stayed NaN or infinite, the loss stayed beyond `spike_threshold`, or
                the last loss is NaN or infinite; earlier checkpoints are kept.
            DoesNotFit: memory ran out, in a step even with one example at a time; the trained steps are saved.
        """
        config = self.config
        if self.model is None:
            base_model.load_config(config)
        else:
            require_bare(self.model)
        with RunFolder.open(config) as run:
            task = make_task(config, self._tokenizer())
            dataset = load_dataset(config, task, self.train_dataset, self.eval_dataset)
            if self.processing_class is not None:
                dataset.given_as["tokens"] = "processing_class"
            run.check_data(dataset)
            model = base_model.load_model(config) if self.model is None else base_model.made_ready(self.model, config)
            check_fits(model, [*dataset.train, *dataset.held_out])
            if config.gradient_checkpointing:
                # no layer draws random numbers, and their state could not be read while a CUDA graph is recorded
                how = {"use_reentrant": False, "preserve_rng_state": False}
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
            ensemble = LoraEnsemble.attach(model, config.ensemble_config()).train()
            if not config.padding_free:
                ensemble.packs = False
            try:
                _require_gpu(config, ensemble)
                run.claim(config)
                for part in (dataset.train, dataset.held_out):
                    base = ensemble.base_fingerprint["digest"]
                    part[:] = task.prepare(ensemble, part, run.path, config.per_device_eval_batch_size, base)
                loop = Loop(config, run, task, dataset, ensemble, self.callbacks)
                evaluation = loop.run_to_the_end()
            except BaseException:
                if self.model is not None:
                    ensemble.detach()
                raise
        return TrainResult(run.path, loop.state.step, ensemble, evaluation)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.processing_class is None:
            return base_model.load_tokenizer(self.config)
        base_config = base_model.load_config(self.config) if self.model is None else self.model.config
        base_model.fit_pad_token(self.processing_class, base_config)
        return self.processing_class


def train(config: TrainConfig) -> TrainResult:
    """`Trainer(config).train()`."""
    return Trainer(config).train()


def _require_gpu(config: TrainConfig, ensemble: LoraEnsemble) -> None:
    device = ensemble.particles.values.device
    if config.cuda_graphs == "true" and not records(device):
        raise ValueError(f"cuda_graphs: true needs a model on a GPU, but this one is on the {device}; leave it at auto")


def _require_type(argument: str, value: object, types: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{argument}: expected {expected}; got {type(value).__name__}")
