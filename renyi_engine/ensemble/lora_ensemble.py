"""LoraEnsemble: K LoRA adapters on one frozen Hugging Face decoder, run as one batch.

The model's own forward runs. `installation` says what is put on the model so that it runs all particles.

Layout: K particles, B sequences, T tokens, D hidden size, V vocabulary, I/O in/out features, R rank. Rows are
particle-major: [K, B, ...] flattened to [K*B, ...].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from renyi_engine.core import Pool, is_out_of_memory
from renyi_engine.ensemble import (
    adapter_folder,
    architecture,
    base_check,
    captured,
    ensemble_file,
    generation,
    packing_trial,
    targets,
)
from renyi_engine.ensemble.adapted_maps import Rows, by_input
from renyi_engine.ensemble.architecture import Architecture
from renyi_engine.ensemble.borrowed_model import Loan, claimed
from renyi_engine.ensemble.compiled_layers import CompiledLayers, Mode
from renyi_engine.ensemble.config import EnsembleConfig
from renyi_engine.ensemble.decode_steps import DecodeSteps
from renyi_engine.ensemble.fingerprint import Fingerprint, fingerprint
from renyi_engine.ensemble.initial_adapters import initial_adapters
from renyi_engine.ensemble.installation import Installation
from renyi_engine.ensemble.packed_attention import Packing
from renyi_engine.ensemble.particle_matrix import ParticleMatrix
from renyi_engine.ensemble.trunk import repeat_rows
from renyi_kernels import IGNORE_INDEX
from renyi_kernels.backend import resolve


class LoraEnsemble(nn.Module):
    """K coupled LoRA adapters on a frozen decoder. `parameters()` gives the stacked adapters and nothing else.

    While the ensemble is attached, the model itself runs all particles, and its rows are particle-major. Inside
    `disable_adapters()` the model is the bare base. `detach()` gives the model back as it was.

    Threads may share an ensemble. Its forwards, and those of the model itself, run one after the other. Every thread
    and every asyncio task switches the adapters on and off for itself alone. All of them share the parameters: while
    one thread makes an optimizer step, a forward of another may read some parameters from before the step and some from
    after it. `copy.deepcopy` copies the model too.

    >>> ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=8))
    >>> logp = ensemble.sequence_logprob(batch)             # [K, B]
    >>> renyi_reduce(logp, alpha=0.8).loss.mean().backward()
    """

    _weights: Tensor

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
        """The alpha that a loaded ensemble was trained with; None if its folder does not say it."""
        self.reads_from_cache: bool | None = None
        """Whether `generate` may use the model's cache; None until it has been tried."""
        self.graph_pool = Pool()
        """The memory of what is recorded as CUDA graphs (see `captured`)."""
        self.decode_steps = DecodeSteps()
        """What `generate` has recorded as CUDA graphs."""
        self._loan = Loan(model)
        self._found = found
        maps = {path: model.get_submodule(path) for path in adapters}
        # a map that runs several times in one forward is alone: the copy of its input is read by no other
        inputs = {path: found.inputs[path] if path in found.once else found.inputs[path].clone() for path in maps}
        self.particles = ParticleMatrix(by_input(maps, inputs), adapters, _device(maps))
        """All parameters of all particles, in one matrix."""
        K, device = config.num_particles, self.particles.values.device
        uniform = torch.full((K,), 1 / K, dtype=torch.float64, device=device)
        self.register_buffer("_weights", uniform, persistent=False)
        self.adapters = nn.ModuleDict()
        for path, stack in self.particles.stacks.items():
            self.adapters[path.replace(".", "/")] = stack  # torch allows no dot in a key of a ModuleDict
        self._installation = Installation(model, found, self.particles, config.scaling)
        self._forwards, self.layers = self._installation.forwards, self._installation.layers

    # ------------------------------------------------------------------ making and unmaking

    @classmethod
    def attach(cls, model: PreTrainedModel, config: EnsembleConfig | None = None) -> LoraEnsemble:
        """Put fresh adapters on `model` and freeze it.

        Raises:
            ValueError: no linear map matches, or a name or layer matches none; the model already carries an ensemble or
                PEFT adapters; a weight is not finite; or the model cannot run several particles in one batch.
            TypeError: it is no transformers model.
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
        """Put saved adapters on `model`: from a folder that `save_pretrained` wrote, from a folder of PEFT adapter
        folders, or from one PEFT adapter folder (K = 1).

        `model` must be the base that the adapters were trained on, in any floating-point type. This is checked, unless
        `check_base` is False. Sometimes nobody can tell: PEFT writes only the name of the base, and a base may be
        quantised. Then a warning says so.

        Raises:
            ValueError: the folder is none of these, or a part of it is missing (see `adapter_folder`); the adapters
                differ in kind; a tensor is missing, unexpected, misshapen or not finite; a file does not match its
                checksum; weights are pickled (nobody opens them); the model has other weights than the base.
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
                base_check.check(saved.origins, model)
            ensemble = cls(model, config, {path: saved.adapters[path] for path in maps}, found)
            ensemble.alpha = saved.alpha
            if saved.weights is not None:
                ensemble.particle_weights = saved.weights
            ensemble._install()
        return ensemble

    def save_pretrained(self, directory: str | Path, *, alpha: float | None = None) -> None:
        """Write `directory`/p000, p001, ..., which PEFT and vLLM load, and then ensemble.json.

        ensemble.json records `particle_weights` and, if it is given, `alpha`, with which the ensemble was trained.

        Raises:
            ValueError: `directory` holds a particle folder that `save_pretrained` did not write; alpha is negative or
                not finite.
        """
        adapter_folder.write(
            Path(directory),
            self.model,
            self.config,
            self.stacked(),
            base_model=self.model.config._name_or_path or None,
            base=self.base_fingerprint,
            alpha=alpha,
            weights=self._weights.tolist(),
        )

    def detach(self) -> PreTrainedModel:
        """Take everything off the model and give it back, bit for bit as it was, with the flags that it had."""
        with self._forwards.run(self.rows):  # wait until no other thread runs a forward
            if self._installation.maps:  # the model was not given back yet
                self._installation.take_off()
                self._loan.give_back()
        self.decode_steps.drop()
        self.graph_pool.drop()
        return self.model

    # ------------------------------------------------------------------ running

    @property
    def model(self) -> PreTrainedModel:
        return self._loan.model

    @property
    def particle_weights(self) -> Tensor:
        """How much each particle counts in the mixture ``sum_k w_k p_k``: ``[K]``, fp64, on the particles' device. The
        sum is 1. At first, and in folders that do not say them, they are 1/K each. While the adapters are off, it is
        the weight of the base alone, ``[1]``.

        It can be set to K numbers, or to a tensor or an array ``[K]``. They are written into the same tensor, so graphs
        that were recorded (see `captured`) go on with them.

        Raises:
            ValueError: what is set is no distribution over the K particles.
        """
        return torch.ones_like(self._weights[:1]) if self.rows is Rows.BASE else self._weights

    @particle_weights.setter
    def particle_weights(self, weights: Tensor | NDArray[np.floating[Any]] | Sequence[float]) -> None:
        given = weights.tolist() if isinstance(weights, Tensor | np.ndarray) else list(weights)
        given = [float(weight) if isinstance(weight, np.floating) else weight for weight in given]
        K = self.config.num_particles
        if not ensemble_file.is_distribution(given, K):
            raise ValueError(
                f"particle_weights: expected {K} finite numbers of at least 0 with the sum 1, one for each particle; "
                f"got {given}; divide them by their sum"
            )
        self._weights.copy_(torch.tensor(given, dtype=torch.float64))

    @cached_property
    def base_fingerprint(self) -> Fingerprint:
        """The fingerprint of the frozen base. To make it, every weight is read once."""
        return fingerprint(self.model)

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted linear maps, in the model's order."""
        return list(self.particles.stacks)

    @property
    def pads_left(self) -> bool:
        """Whether the model gives right values for texts that are padded on the left."""
        return self._found.pads_left

    def stacked(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [K, R, I], B [K, O, R]) of every adapted map by path."""
        return {path: (stack.A, stack.B) for path, stack in self.particles.stacks.items()}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states ``[K, B, T, D]`` of every particle after the final norm, in the model's dtype. While the
        adapters are off, K is 1.

        Args:
            input_ids: ``[B, T]``, on the model's device or on the CPU.
            attention_mask: ``[B, T]``, 0 on padding, which may be left or right. None means that there is no padding.
        """
        fits = attention_mask is None or attention_mask.shape == input_ids.shape
        if input_ids.dim() != 2 or input_ids.numel() == 0 or not fits:
            raise ValueError(
                f"input_ids, attention_mask: expected [B, T] each, B and T at least 1; got {list(input_ids.shape)} and "
                f"{None if attention_mask is None else list(attention_mask.shape)}"
            )
        device, mode = self.model.get_input_embeddings().weight.device, self._mode(len(input_ids))
        # no other thread can detach the model before this is over
        with self._installation.forward(self.rows), self._installation.in_mode(mode):
            input_ids = self._for_all(input_ids.to(device, non_blocking=True))
            positions = None
            if attention_mask is not None:
                if not self.pads_left and not attention_mask[:, 0].all():
                    raise ValueError(
                        f"attention_mask: {type(self.model).__name__} gives wrong values for texts padded on the left; "
                        "pad on the right"
                    )
                attention_mask = self._for_all(attention_mask.to(device, non_blocking=True))
                positions = architecture.positions(attention_mask)
            hidden: Tensor = self._found.decoder(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        return hidden.view(self.num_running, -1, *hidden.shape[1:])

    def packed_hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states ``[K, N, D]`` of a packed row, as `forward` gives those of a batch. `batch`: see `data.pack`.

        Whether the model can read such rows is for the caller to know: see `packs`.

        Raises:
            RuntimeError: every particle has rows of its own (`Rows.OWN`), but a packed row is one for all.
        """
        if self.rows is Rows.OWN:
            raise RuntimeError("a packed row is one for all particles, but here every particle has rows of its own")
        device, mode = self.model.get_input_embeddings().weight.device, self._mode(None)
        packing = Packing(self._found.decoder.config, batch)
        with self._installation.forward(self.rows, packing), self._installation.in_mode(mode):
            ids, positions = (batch[name].to(device, non_blocking=True) for name in ("input_ids", "position_ids"))
            ids, positions = self._for_all(ids), self._for_all(positions)
            # a mask without padding: given none, transformers would look for sequences in the positions
            hidden: Tensor = self._found.decoder(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
            ).last_hidden_state
        return hidden.view(self.num_running, *hidden.shape[-2:])

    @cached_property
    def packs(self) -> bool:
        """Whether the model can read packed rows (see `data.pack`): whether a sequence in such a row gets the hidden
        states that it gets alone, whatever the other sequences are. It is tried once. Models whose layers mix tokens in
        other ways than by attention cannot, and those whose attention is not the one of transformers' interface. A
        warning then says why. Set it to False to have batches padded."""
        with self.running(Rows.SHARED):
            obstacle = packing_trial.obstacle(self)
        if obstacle is not None:
            warnings.warn(
                f"{type(self.model).__name__} cannot read packed rows ({obstacle}): its batches are padded, which "
                "takes more time and memory",
                stacklevel=2,
            )
        return obstacle is None

    def compile_layers(
        self, *, backend: str = "inductor", say: Callable[[str], object] = lambda sentence: None
    ) -> None:
        """Let torch.compile compile the decoder layers, until `detach`.

        This happens at the first forward of a kind: with gradients or without, packed or padded, of all particles or of
        the base. It takes some ten seconds, and less if torch finds it in its cache on the disk. From then on, all
        lengths share the code. Before it is used, the hidden states and gradients of a few tokens are compared with
        those of the uncompiled layers. If they differ, or a layer cannot be compiled, layers of this model run
        uncompiled, and a warning says why.

        Text is generated uncompiled, and so is everything if somebody calls the model itself. Hooks that are put on
        parts of a layer later do not run. The backward of compiled layers takes no ``retain_graph=True``.

        Args:
            backend: of torch.compile.
            say: called with a sentence each time that compiling begins.
        """
        if any("forward" in vars(layer) for layer in self.layers) and self._installation.compiled is None:
            warnings.warn(
                f"{type(self.model).__name__}: its decoder layers run uncompiled, because somebody else, such as "
                "accelerate, has put another forward on them",
                stacklevel=2,
            )
        elif self._installation.compiled is None:
            self._installation.compile(CompiledLayers(backend, say))

    def _mode(self, size: int | None) -> Mode | None:
        """The mode in which the layers of this thread's next forward run; None if they run uncompiled. `size`: see
        `Mode`."""
        compiled, embeddings = self._installation.compiled, self.model.get_input_embeddings().weight
        path = "reference" if compiled is None else resolve("lora_linears", embeddings, None)
        if compiled is None or path == "reference" or self.rows is Rows.OWN:
            return None
        mode = Mode(torch.is_grad_enabled(), self.rows, size, path)
        usable = compiled.usable(mode)
        if usable is None:
            with self._forwards.run(self.rows):  # no other thread runs a forward
                usable = compiled.try_out(
                    mode, type(self.model).__name__, partial(self._read_few, size), list(self.parameters())
                )
        return mode if usable else None

    def _read_few(self, size: int | None) -> Tensor:
        """Hidden states of a few tokens, in a batch of this size or, if it is None, in a packed row."""
        if size is None:
            return packing_trial.few_sequences(self)
        ids, mask = (rows.repeat(size, 1)[:size] for rows in self._few_rows())
        return self(ids, mask)

    def _for_all(self, rows: Tensor) -> Tensor:
        """The rows that the model is given: B of them, or K*B if there is no shared trunk."""
        if self.rows is Rows.SHARED and self._installation.trunk is None:
            return repeat_rows(rows, self.config.num_particles)
        return rows

    def token_logprob(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities ``[K, B, T]`` of the labelled tokens, fp32, in nats; 0.0 elsewhere. If particles have rows
        of their own, the B rows of the batch are shared out among them: ``[K, B / K, T]``.

        `batch` holds input_ids, labels and perhaps attention_mask, each ``[B, T]``. As in Hugging Face, labels stand at
        the places of their tokens, and -100 means that a token does not count. Entry t of the result belongs to the
        label at t + 1. The batch may lie on the CPU. It is best to leave its labels there: see `linear_logprob`.

        Or `batch` is a packed row: see `data.pack`. Then entry t belongs to the t-th label of a sequence.
        """
        if "segments" in batch:
            return self._packed_logprob(batch)
        labels = batch["labels"]
        if labels.shape != batch["input_ids"].shape:
            raise ValueError(
                f"labels: expected [B, T] as input_ids {list(batch['input_ids'].shape)}; got {list(labels.shape)}"
            )
        hidden = self(batch["input_ids"], batch.get("attention_mask"))
        shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).view(-1, *hidden.shape[1:3])
        if self.rows is not Rows.OWN:
            return self.label_logprob(hidden, shifted)
        # rows of their own serve derivatives of any order. These need the reference path of `linear_logprob`, which
        # works on every position that it is given. So it is given those with a label alone.
        labelled = shifted != IGNORE_INDEX
        logp = self.label_logprob(hidden[labelled], shifted[labelled])
        return logp.new_zeros(shifted.shape).masked_scatter(labelled.to(logp.device), logp)

    def _packed_logprob(self, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = self.packed_hidden(batch)
        labels, rows, places = (
            batch[name].to(hidden.device, non_blocking=True) for name in ("labels", "label_rows", "label_places")
        )
        predicting = hidden.index_select(1, rows)
        logp = self._found.head.logprob(predicting, labels.expand(predicting.shape[:-1]), all_labelled=True)
        # a place of its own for those that have no more labels
        logp = nn.functional.pad(logp, (0, 1))
        return logp.index_select(1, places.flatten()).unflatten(1, places.shape)

    def label_logprob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities ``[K, ...]`` of labels by the model's head, fp32, in nats.

        Args:
            hidden: ``[K, ..., D]`` at the positions that predict the labels.
            labels: ``[...]`` if all particles share them, or ``[K, ...]``. -100 is no label; there the result is 0.0.
        """
        return self._found.head.logprob(hidden, labels.expand(hidden.shape[:-1]))

    def sequence_logprob(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Supervised log-likelihoods ``s[k, i]``, ``[K, B]``, fp32, in nats: sums over the labelled tokens (4.1)."""
        return sum_tokens(self.token_logprob(batch))

    captured = captured.captured
    generate = generation.generate

    def next_logits(
        self, input_ids: Tensor, attention_mask: Tensor, cache: Cache, positions: Tensor | None = None
    ) -> Tensor:
        """Logits ``[rows, V]`` of the token after `input_ids` ``[rows, T]``, by the model's own head.

        The T tokens go into the cache. `attention_mask` covers what the cache held before, and these T tokens. If it
        covers more than that, `positions` ``[rows, T]`` are those of these tokens.
        """
        with self._installation.forward(self.rows):
            input_ids, attention_mask = self._for_all(input_ids), self._for_all(attention_mask)
            if positions is None:
                positions = architecture.positions(attention_mask)[:, -input_ids.shape[1] :]
            argument = architecture.cache_argument(self._found.decoder)
            if argument == "cache_params":
                # Mamba has no attention to what it has read: its mask covers the tokens that it reads now
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
        """Logits ``[..., V]`` of hidden states ``[..., D]`` by the model's own head."""
        # flattened, because of a slice of [rows, T, D] torch on a CPU would copy the head's weight once for each row
        return self._found.head.logits(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)

    @property
    def num_shared_layers(self) -> int:
        """The number of layers in the shared trunk: the first layers, which run on B rows for all particles."""
        return self._installation.num_shared_layers

    @property
    def rows(self) -> Rows:
        """What the rows are in the forwards that this thread or task starts."""
        return self._forwards.asked

    def disable_adapters(self) -> AbstractContextManager[None]:
        """Inside the block, the model is the bare base, and the ensemble gives the base's values as those of one
        particle: ``[1, B, ...]``. This holds for the thread or asyncio task that is inside, and for no other."""
        return self.running(Rows.BASE)

    def running(self, rows: Rows) -> AbstractContextManager[None]:
        """Inside the block, the forwards of this thread or task have these rows."""
        return self._forwards.asking(rows)

    @property
    def num_running(self) -> int:
        """K, or 1 while the adapters are off."""
        return 1 if self.rows is Rows.BASE else self.config.num_particles

    def forget(self) -> None:
        """Drop what a forward or a checkpointed backward left in memory because an error cut it short."""
        self._installation.forget()

    # ------------------------------------------------------------------ as a module

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.particles.adopt()  # with assign=True the parameters are others now
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> LoraEnsemble:
        weights = self._weights
        super()._apply(*args, **kwargs)
        self.particles.adopt()
        self._weights = weights.to(self.particles.values.device)  # they stay in fp64
        return self

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
        """Whether the shared trunk gives the hidden states that K*B rows from the start give, with padding and
        without."""
        if self._installation.trunk is None:
            return False
        ids, mask = self._few_rows()
        K = self.config.num_particles
        with self.running(Rows.OWN):
            truth = self(repeat_rows(ids, K), repeat_rows(mask, K))
        try:
            alike = architecture.close(self(ids, mask), truth)
            return alike and architecture.close(self(ids[-1:]), truth[:, -1:])
        except Exception as error:  # layers of a model may raise anything for rows that they did not expect
            if is_out_of_memory(error):
                raise
            return False

    def _few_rows(self) -> tuple[Tensor, Tensor]:
        """Short texts, padded in the ways that the model can read."""
        ids, mask = architecture.batches(self.model)[1]
        return (ids, mask) if self.pads_left else (ids[1:], mask[1:])


def _device(maps: Mapping[str, nn.Module]) -> torch.device:
    """The device of all these maps."""
    devices = {next(linear.parameters()).device: path for path, linear in maps.items()}
    if len(devices) > 1:
        where = ", ".join(f"{path} on {device}" for device, path in devices.items())
        raise ValueError(f"model: its adapted maps lie on several devices ({where}); load the model onto one of them")
    return next(iter(devices))


def sum_tokens(token_logp: Tensor) -> Tensor:
    """Supervised log-likelihoods s[k, i] = sum_t log p_k(y_it | x_i, y_i<t) in nats, [K, B, T] -> [K, B] (4.1)."""
    return token_logp.sum(dim=-1)
