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

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from renyi_engine.core import is_out_of_memory
from renyi_engine.ensemble import adapter_folder, architecture, generation, origin, targets
from renyi_engine.ensemble.adapted_maps import Rows, StackedAdapter
from renyi_engine.ensemble.architecture import Architecture
from renyi_engine.ensemble.config import EnsembleConfig
from renyi_engine.ensemble.fingerprint import Fingerprint, fingerprint
from renyi_engine.ensemble.initial_adapters import initial_adapters
from renyi_engine.ensemble.installation import Installation
from renyi_engine.ensemble.loan import Loan, claimed
from renyi_engine.ensemble.trunk import repeat_rows
from renyi_kernels import IGNORE_INDEX


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
        self._loan = Loan(model)
        self._found = found
        # a ModuleDict key may not hold a dot
        self.adapters = nn.ModuleDict(
            {path.replace(".", "/"): StackedAdapter(A, B) for path, (A, B) in adapters.items()}
        )
        self._installation = Installation(model, found, self._stacks(), config.scaling)
        self._forwards = self._installation.forwards

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
        with claimed(model):
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
        with claimed(model):
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
            targets=targets.describe(self.model, self.paths),
            base_model=self.model.config._name_or_path or None,
            base=self.base_fingerprint,
            fan_in_fan_out=isinstance(self.model.get_submodule(self.paths[0]), targets.Conv1D),
            alpha=alpha,
        )

    def detach(self) -> PreTrainedModel:
        """Take every hook off and give the model back, bit for bit as it was, its flags too."""
        with self._forwards.run(self.rows):  # not while another thread's forward runs
            if self._installation.maps:  # not yet given back
                self._installation.take_off()
                self._loan.give_back()
        return self.model

    # ------------------------------------------------------------------ running

    @property
    def model(self) -> PreTrainedModel:
        return self._loan.model

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The decoder's layers."""
        return self._installation.layers

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
        return {path: (stack.A, stack.B) for path, stack in self._stacks().items()}

    def _stacks(self) -> dict[str, StackedAdapter]:
        return {key.replace("/", "."): cast(StackedAdapter, stack) for key, stack in self.adapters.items()}

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
        with self._installation.forward(self.rows):  # until it is over, no other thread detaches the model
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
        if self.rows is Rows.SHARED and self._installation.trunk is None:
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
        with self._installation.forward(self.rows):
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
        return self._installation.num_shared_layers

    @property
    def rows(self) -> Rows:
        """The rows of the forwards that this thread or task starts."""
        return self._forwards.asked

    def disable_adapters(self) -> AbstractContextManager[None]:
        """Inside, the model is the bare base, and the ensemble is that one particle: ``[1, B, ...]``. This holds for
        the thread, or the asyncio task, that is inside, and for no other."""
        return self.running(Rows.BASE)

    def running(self, rows: Rows) -> AbstractContextManager[None]:
        """Inside, the rows of a forward are these, in this thread or task."""
        return self._forwards.asking(rows)

    @property
    def num_running(self) -> int:
        """K; 1 while the adapters are off."""
        return 1 if self.rows is Rows.BASE else self.config.num_particles

    def forget(self) -> None:
        """Drop what a forward, or a checkpointed backward, left in memory when an error cut it short."""
        self._installation.forget()

    # ------------------------------------------------------------------ hooks

    def _install(self) -> None:
        model = self.model
        model.requires_grad_(False)
        try:
            with architecture.understood(model, "run particles as rows of one batch"):
                self._installation.put_on(self._found.row_dimensions)
                if not self._trunk_is_right():
                    self._installation.take_off()
                    self._installation.put_on(None)
                with torch.enable_grad():
                    differentiable = self(*self._few_rows()).requires_grad
            if not differentiable:
                raise ValueError(f"model: {type(model).__name__} gives no gradient of its hidden states")
        except BaseException:
            self.detach()
            raise

    @torch.no_grad()
    def _trunk_is_right(self) -> bool:
        """Whether hidden states are the same as with K*B rows from the start, with and without padding."""
        if self._installation.trunk is None:
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


def sum_tokens(token_logp: Tensor) -> Tensor:
    """Supervised log-likelihood s[k, i] = sum_t log p_k(y_it | x_i, y_i<t), nats, [K, B, T] -> [K, B] (4.1)."""
    return token_logp.sum(dim=-1)
