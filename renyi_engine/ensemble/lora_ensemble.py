"""LoraEnsemble: K LoRA adapters on one frozen Hugging Face decoder, run as one batch.

Layout: K particles, B sequences, T tokens, M rows, D hidden size, I/O in/out features, R rank. Rows are particle-major:
[K, B, ...] flattened to [K*B, ...].

The model's own forward runs; hooks and the adapted maps' own forwards do the rest, and come off without a trace:

    embedding and layers below the first adapted one      B rows, no gradient: the shared trunk (`trunk`)
    pre-hook on the first adapted layer                   B -> K*B rows
    every adapted linear map (`adapted_maps`)             base output + scaling * (x A_k^T) B_k^T
    maps that read the same input (q, k, v)               one op
    those of them that read the still-shared input        base product on B rows

Where a model's layers cannot be brought from B to K*B rows, all K*B run from the start: slower, and the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from renyi_engine.core import is_out_of_memory, seeding, size_of_memory
from renyi_engine.ensemble import adapter_folder, architecture, generation, origin, targets
from renyi_engine.ensemble.adapted_maps import MapGroup, OpaqueMap, Rows, StackedAdapter, by_input
from renyi_engine.ensemble.architecture import Architecture
from renyi_engine.ensemble.config import EnsembleConfig
from renyi_engine.ensemble.fingerprint import Fingerprint, fingerprint
from renyi_engine.ensemble.forwards import Runs
from renyi_engine.ensemble.trunk import RowDimensions, SharedTrunk, repeat_rows
from renyi_kernels import IGNORE_INDEX

SPREAD_STD = 0.01
"""Standard deviation of B under init="spread"."""


class LoraEnsemble(nn.Module):
    """K coupled LoRA adapters on a frozen decoder. `parameters()` is exactly the stacked adapters.

    While attached, the model itself runs the ensemble on particle-major rows; inside `disable_adapters()` it is the
    bare base. `detach()` gives it back as it was.

    Threads may share an ensemble. Its forwards, and those of the model itself, run one after the other. Whether the
    adapters are on is set for each thread, or asyncio task, by itself. Parameters are shared: a forward beside another
    thread's optimizer step may read some of them before it and some after it. `copy.deepcopy` copies the model too.

    >>> ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=8))
    >>> logp = ensemble.sequence_logprob(batch)             # [K, B]
    >>> renyi_reduce(logp, alpha=0.8).loss.mean().backward()
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: EnsembleConfig,
        adapters: Mapping[str, tuple[Tensor, Tensor]],
        found: Architecture,
    ) -> None:
        """Use `attach` or `from_pretrained`."""
        super().__init__()
        self.config = config
        self.alpha: float | None = None
        """The coupling that a loaded ensemble was trained with, where its folder records it."""
        self.reads_from_cache: bool | None = None
        """Whether `generate` may trust the model's cache; None before it was tried."""
        self._model = (model,)  # in a tuple: the base is no submodule of the ensemble
        self._was_training = [module for module in model.modules() if module.training]
        self._was_trainable = [p for p in model.parameters() if p.requires_grad]
        self._runs = Runs()
        self._found = found
        self._trunk: SharedTrunk | None = None
        self._maps: list[MapGroup | OpaqueMap] = []
        self._handles: list[torch.utils.hooks.RemovableHandle | _Takeover] = []
        # a ModuleDict key may not hold a dot
        self.adapters = nn.ModuleDict(
            {path.replace(".", "/"): StackedAdapter(A, B) for path, (A, B) in adapters.items()}
        )
        layers_path, layers = targets.decoder_layers(model)
        self.layers = tuple(layers)
        self.first_layer = min(targets.layer_index(path, layers_path) for path in adapters)

    # ------------------------------------------------------------------ making and unmaking

    @classmethod
    def attach(cls, model: PreTrainedModel, config: EnsembleConfig | None = None) -> LoraEnsemble:
        """Put fresh adapters on `model` and freeze it.

        Raises:
            ValueError: no linear map matches, or not one for every name and layer; the model already carries an
                ensemble or PEFT adapters, has weights that are not finite, or does something that cannot be run for
                several particles at once. TypeError: it is no transformers model.
        """
        config = config or EnsembleConfig()
        with _claimed(model):
            maps = targets.match_targets(model, config.target_modules, config.layers_to_transform)
            found = architecture.observe(model)
            maps = architecture.adaptable(found, maps, config.target_modules)
            ensemble = cls(model, config, initial_adapters(maps, config), found)
            ensemble._install()
        return ensemble

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, directory: str | Path, *, check_base: bool = True) -> LoraEnsemble:
        """Put saved adapters on `model`: a folder that `save_pretrained` wrote, a folder of PEFT adapter folders,
        or one PEFT adapter folder (K = 1).

        `model` must be the base that they were trained on, in whatever floating-point type. Where that cannot be told
        for certain (PEFT writes only the base's name, and a base may be quantised), a doubt is a warning. `check_base`
        False: nothing is compared.

        Raises:
            ValueError: the folder is not such a folder, or not whole (see `adapter_folder`); adapters differ in kind;
                tensors are missing, extra, misshapen or not finite; a file does not match its checksum; weights are
                pickled (they are not opened); the model has other weights than the base.
        """
        with _claimed(model):
            saved = adapter_folder.read(Path(directory))
            try:
                config = EnsembleConfig(**saved.config)
                maps = targets.match_targets(model, config.target_modules, config.layers_to_transform, each=False)
            except ValueError as error:
                raise ValueError(f"{directory}: {error}") from None
            found = architecture.observe(model)
            maps = architecture.adaptable(found, maps, config.target_modules)
            adapter_folder.check_against(saved, {path: targets.features(linear) for path, linear in maps.items()})
            if check_base:
                origin.check(saved.origins, model)
            adapters = {}
            for path, linear in maps.items():
                A, B = saved.adapters[path]
                device = next(linear.parameters()).device
                adapters[path] = (A.to(device, torch.float32), B.to(device, torch.float32))
            ensemble = cls(model, config, adapters, found)
            ensemble.alpha = saved.alpha
            ensemble._install()
        return ensemble

    def save_pretrained(self, directory: str | Path, *, alpha: float | None = None) -> None:
        """Write `directory`/p000, p001, ...: PEFT adapter folders that PEFT and vLLM load; and ensemble.json, last.

        `alpha`, if given, is recorded there: the one that the ensemble was trained with.

        Raises:
            ValueError: `directory` holds a particle folder that `save_pretrained` did not write; alpha is negative or
                not finite.
        """
        adapter_folder.write(
            Path(directory),
            config=self.config,
            adapters=self.stacked(),
            **targets.describe(self.model, self.paths)._asdict(),
            base_model=self.model.config._name_or_path or None,
            base=self.base_fingerprint,
            fan_in_fan_out=isinstance(self.model.get_submodule(self.paths[0]), targets.Conv1D),
            alpha=alpha,
        )

    def detach(self) -> PreTrainedModel:
        """Take every hook off and give the model back, bit for bit as it was, its flags too."""
        model = self.model
        with self._runs.run(self.rows):  # not while another thread's forward runs
            if not self._maps:  # already given back
                return model
            self._uninstall()
            for parameter in self._was_trainable:
                parameter.requires_grad_(True)
            model.eval()
            for module in self._was_training:
                module.training = True
            vars(model).pop("_renyi_ensemble", None)
        return model

    # ------------------------------------------------------------------ running

    @property
    def model(self) -> PreTrainedModel:
        return self._model[0]

    @cached_property
    def base_fingerprint(self) -> Fingerprint:
        """What tells the frozen base from another; every weight is read once."""
        return fingerprint(self.model)

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted linear maps, in the model's order."""
        return [key.replace("/", ".") for key in self.adapters]

    @property
    def pads_left(self) -> bool:
        """Whether the model may be given texts padded on the left."""
        return self._found.pads_left

    def stacked(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [K, R, I], B [K, O, R]) of every adapted map by path."""
        return {path: (stack.A, stack.B) for path, stack in zip(self.paths, self._stacks(), strict=True)}

    def _stacks(self) -> list[StackedAdapter]:
        return [cast(StackedAdapter, stack) for stack in self.adapters.values()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Final-norm hidden states ``[K, B, T, D]`` of every particle, in the model's dtype; K = 1 while disabled.

        Args:
            input_ids: ``[B, T]``. attention_mask: ``[B, T]``, 0 on padding, left or right; None: no padding. On the
                model's device or on the CPU.
        """
        fits = attention_mask is None or attention_mask.shape == input_ids.shape
        if input_ids.dim() != 2 or input_ids.numel() == 0 or not fits:
            raise ValueError(
                f"input_ids, attention_mask: expected [B, T] each, B and T at least 1; got {list(input_ids.shape)} and "
                f"{None if attention_mask is None else list(attention_mask.shape)}"
            )
        device = self.model.get_input_embeddings().weight.device
        with self._run(self.rows):  # until it is over, no other thread detaches the model
            input_ids = input_ids.to(device, non_blocking=True)
            input_ids, positions = self._for_all(input_ids), None
            if attention_mask is not None:
                attention_mask = attention_mask.to(device, non_blocking=True)
                if not self.pads_left and not attention_mask[:, 0].all():
                    raise ValueError(f"attention_mask: {type(self.model).__name__} needs padding on the right")
                attention_mask = self._for_all(attention_mask)
                positions = architecture.positions(attention_mask)
            hidden: Tensor = self._found.decoder(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        return hidden.view(self.num_running, -1, *hidden.shape[1:])

    def _for_all(self, rows: Tensor) -> Tensor:
        """Rows of the model's input: B, or K*B where there is no shared trunk."""
        if self.rows is Rows.SHARED and self._trunk is None:
            return repeat_rows(rows, self.config.num_particles)
        return rows

    def token_logprob(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probability in nats, ``[K, B, T]`` fp32, of the labelled tokens; 0.0 elsewhere. With rows of their own,
        ``[K, B / K, T]``.

        `batch` holds input_ids, attention_mask (optional) and labels, each ``[B, T]``; labels as Hugging Face has them:
        aligned with input_ids, -100 where no token counts. Entry t of the result belongs to the label at t + 1. A batch
        may lie on the CPU, and its labels are best left there: see `linear_logprob`.
        """
        labels = batch["labels"]
        if labels.shape != batch["input_ids"].shape:
            raise ValueError(
                f"labels: expected [B, T] as input_ids {list(batch['input_ids'].shape)}; got {list(labels.shape)}"
            )
        hidden = self(batch["input_ids"], batch.get("attention_mask"))
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).view(-1, *hidden.shape[1:3])
        if self.rows is not Rows.OWN:
            return self.label_logprob(hidden, shifted)
        # such rows are for derivatives of any order, on the reference path, which skips no position it is given
        labelled = shifted != IGNORE_INDEX
        logp = self.label_logprob(hidden[labelled], shifted[labelled])
        return logp.new_zeros(shifted.shape).masked_scatter(labelled.to(logp.device), logp)

    def label_logprob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probability, ``[K, ...]`` fp32 nats, by the model's head, of labels ``[...]`` that all particles share,
        or of labels ``[K, ...]`` of its own for each.

        hidden: ``[K, ..., D]`` where each label is predicted; -100: no label, 0.0.
        """
        return self._found.head.logprob(hidden, labels.expand(hidden.shape[:-1]))

    def sequence_logprob(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Supervised log-likelihood ``s[k, i]`` in nats, ``[K, B]`` fp32: summed over labelled tokens (4.1)."""
        return sum_tokens(self.token_logprob(batch))

    generate = generation.generate

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> Tensor:
        """Logits ``[rows, V]`` of the token after `input_ids` ``[rows, T]``, by the model's own head; the cache, which
        `attention_mask` covers too, grows by T."""
        with self._run(self.rows):
            input_ids, attention_mask = self._for_all(input_ids), self._for_all(attention_mask)
            positions = architecture.positions(attention_mask)[:, -input_ids.shape[1] :]
            argument = architecture.cache_argument(self._found.decoder)
            if argument == "cache_params":
                # Mamba: there is no attention to what was read, and its mask is that of the tokens read now
                attention_mask = attention_mask[:, -input_ids.shape[1] :]
            hidden = self._found.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=True,
                **{argument: cache},
            ).last_hidden_state
        return self.logits(hidden[:, -1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` by the model's own head of hidden states ``[..., D]``."""
        # rows of a matrix: of a slice of [rows, T, D], torch on a CPU copies the head's weight once a row
        return self._found.head.logits(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)

    @property
    def num_shared_layers(self) -> int:
        """Layers from the first that run on B rows while particles share their input: the trunk."""
        return 0 if self._trunk is None else self.first_layer

    @property
    def rows(self) -> Rows:
        """The rows of the forwards that this thread or task starts."""
        return self._runs.asked

    def disable_adapters(self) -> AbstractContextManager[None]:
        """Inside, the model is the bare base, and the ensemble is that one particle: ``[1, B, ...]``. This holds for
        the thread, or the asyncio task, that is inside, and for no other."""
        return self.running(Rows.BASE)

    def running(self, rows: Rows) -> AbstractContextManager[None]:
        """Inside, the rows of a forward are these, in this thread or task."""
        return self._runs.asking(rows)

    @property
    def num_running(self) -> int:
        """K; 1 while the adapters are off."""
        return 1 if self.rows is Rows.BASE else self.config.num_particles

    @contextmanager
    def _run(self, rows: Rows) -> Iterator[None]:
        """Around one forward of the decoder, or of a layer that runs again for its backward."""
        with self._runs.run(rows) as outermost:
            if not self._maps:
                raise _detached()
            try:
                yield
            finally:
                if outermost:
                    self.forget()

    def forget(self) -> None:
        """Drop what a forward, or a checkpointed backward, left behind when it was cut short."""
        if self._trunk is not None:
            self._trunk.forget()
        for adapted in self._maps:
            adapted.forget()

    # ------------------------------------------------------------------ hooks

    def _install(self) -> None:
        model = self.model
        model.requires_grad_(False)
        try:
            with architecture.understood(model, "run particles as rows of one batch"):
                self._hook(self._found.row_dimensions)
                if not self._trunk_is_right():
                    self._uninstall()
                    self._hook(None)
                with torch.enable_grad():
                    differentiable = self(*self._few_rows()).requires_grad
            if not differentiable:
                raise ValueError(f"model: {type(model).__name__} gives no gradient of its hidden states")
        except BaseException:
            self.detach()
            raise

    def _hook(self, row_dimensions: Sequence[RowDimensions] | None) -> None:
        """Put hooks and maps on; `row_dimensions` None: without a shared trunk."""
        found, first = self._found, self.first_layer
        layers_path, _ = targets.decoder_layers(self.model)
        shared = next(
            found.inputs[path]
            for path in found.inputs
            if path in self.paths and targets.layer_index(path, layers_path) == first
        )
        linears = {path: self.model.get_submodule(path) for path in self.paths}
        stacks = dict(zip(self.paths, self._stacks(), strict=True))
        # a map that one run calls several times is a group of its own: no other map reads this copy of its input
        alone = {path: found.inputs[path].clone() for path in self.paths if path not in found.once}
        inputs = {path: found.inputs[path] for path in self.paths} | alone
        for adapted in by_input(linears, stacks, self.config.scaling, inputs, shared if row_dimensions else None):
            adapted.install(self._runs.rows)
            self._maps.append(adapted)
        self._handles = [
            _Takeover(found.decoder, "forward", self._decode),
            *(
                part.register_forward_pre_hook(partial(_stay_deterministic, layer))
                for layer in self.layers
                for part in layer.children()
            ),
        ]
        if row_dimensions is not None:
            self._trunk = SharedTrunk(
                self.layers[first:],
                row_dimensions[first:],
                self.config.num_particles,
                self._runs.rows,
            )

    @torch.no_grad()
    def _trunk_is_right(self) -> bool:
        """Whether hidden states are the same as with K*B rows from the start, with and without padding."""
        if self._trunk is None:
            return False
        ids, mask = self._few_rows()
        K = self.config.num_particles
        with self.running(Rows.OWN):
            truth = self(repeat_rows(ids, K), repeat_rows(mask, K))
        try:
            alike = architecture.close(self(ids, mask), truth)
            return alike and architecture.close(self(ids[-1:]), truth[:, -1:])
        except Exception as error:  # whatever a model's own layers do with rows that they did not expect
            if is_out_of_memory(error):
                raise
            return False

    def _few_rows(self) -> tuple[Tensor, Tensor]:
        """Short texts, padded in the ways that are right for the model."""
        ids, mask = architecture.batches(self.model)[1]
        return (ids, mask) if self.pads_left else (ids[1:], mask[1:])

    def _uninstall(self) -> None:
        if self._trunk is not None:
            self._trunk.remove()
        for adapted in [*self._maps, *self._handles]:
            adapted.remove()
        self._trunk = None
        self._maps.clear()
        self._handles.clear()

    def _set_modes(self) -> None:
        """The frozen base stays deterministic: no dropout, whoever called model.train(). Only gradient checkpointing,
        which Hugging Face ties to the training flag of the layer, follows the ensemble's own flag, and only where there
        are gradients: a checkpointed layer leaves the cache alone."""
        self.model.eval()
        learning = self.training and torch.is_grad_enabled()
        for layer in self.layers:
            layer.training = learning and getattr(layer, "gradient_checkpointing", False)
            if layer.training and not isinstance(layer._gradient_checkpointing_func, _Takeover):
                self._handles.append(_Takeover(layer, "_gradient_checkpointing_func", self._checkpoint))

    def _decode(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the decoder's `forward`, also where the model itself calls it."""
        with self._run(self.rows):
            self._set_modes()
            return forward(*args, **kwargs)

    def _checkpoint(self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
        """In place of the function by which Hugging Face checkpoints a layer: the backward runs the layer again, often
        in a thread of autograd's, and the rows are to be those of its first run."""
        return checkpoint(partial(self._run_layer, self._runs.rows(), layer), *args)

    def _run_layer(self, rows: Rows, layer: Callable[..., Any], *args: Any) -> Any:
        with self._run(rows):
            return layer(*args)


class _Takeover:
    """Stands in for a function of a module, until `remove`: `instead(function, ...)` runs in its place."""

    def __init__(self, module: nn.Module, name: str, instead: Callable[..., Any]) -> None:
        self._module, self._name, self._instead = module, name, instead
        self._before = vars(module).get(name)
        self.__wrapped__ = getattr(module, name)  # for those who ask for the signature
        vars(module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        own = vars(self._module)
        if own.get(self._name) is self:
            del own[self._name]
            if self._before is not None:
                own[self._name] = self._before


def _stay_deterministic(layer: nn.Module, part: nn.Module, args: tuple) -> None:
    """Once a part of the layer runs, its checkpointing is decided, and its training flag means dropout alone (OPT)."""
    if layer.training:
        layer.training = False


def initial_adapters(maps: Mapping[str, nn.Module], config: EnsembleConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Fresh (A, B) of every map; particle k draws from a generator of its own, seeded by (seed, k).

    Raises:
        ValueError: the device has not that much memory.
    """
    K, R = config.num_particles, config.rank
    num_bytes = 4 * K * R * sum(sum(targets.features(linear)) for linear in maps.values())
    room = min((size_of_memory(next(linear.parameters()).device) for linear in maps.values()), default=num_bytes)
    if num_bytes > room:
        raise ValueError(
            f"{'num_particles' if K >= R else 'rank'}: {K} adapters of rank {R} do not fit into memory: they take "
            f"{num_bytes / 2**30:.0f} GiB of {room / 2**30:.0f}; give fewer, or a lower rank"
        )
    generators = [seeding.generator(config.seed, k) for k in range(config.num_particles)]
    adapters = {}
    for path, linear in maps.items():
        num_in, num_out = targets.features(linear)
        # Kaiming-uniform with a = sqrt(5), as PEFT and nn.Linear have it: bound 1 / sqrt(I)
        bound = 1.0 / math.sqrt(num_in)
        A = torch.stack([torch.empty(config.rank, num_in).uniform_(-bound, bound, generator=g) for g in generators])
        B = torch.zeros(config.num_particles, num_out, config.rank)
        if config.init == "spread":
            for k, generator in enumerate(generators):
                B[k].normal_(0.0, SPREAD_STD, generator=generator)
        device = next(linear.parameters()).device
        adapters[path] = (A.to(device), B.to(device))
    return adapters


def _detached() -> RuntimeError:
    return RuntimeError("this ensemble was detached from its model; attach or load it again")


@contextmanager
def _claimed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, an ensemble is put on the model. From now on no other can be put on it, unless the block fails."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers PreTrainedModel; got {type(model).__name__}; "
            "of a PEFT model, pass model.unload() or its base model"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or any("lora_A" in name for name, _ in model.named_modules()):
        raise ValueError("model: it already carries PEFT adapters; pass the bare base model")
    mine = object()
    if vars(model).setdefault("_renyi_ensemble", mine) is not mine:  # atomic: of two threads, one gets it
        raise ValueError("model: it already carries an ensemble; call detach() on that one first")
    try:
        yield
    except BaseException:
        vars(model).pop("_renyi_ensemble", None)
        raise


def sum_tokens(token_logp: Tensor) -> Tensor:
    """Supervised log-likelihood s[k, i] = sum_t log p_k(y_it | x_i, y_i<t), nats, [K, B, T] -> [K, B] (4.1)."""
    return token_logp.sum(dim=-1)
