"""Decoder layers that torch.compile compiles, one by one. Layers of a kind share their code, and so do all lengths.

A mode is what forwards have in common that share code: they are packed rows, or padded batches of one size, and more. A
mode is tried on a few tokens before it is used, see `compile_trial`. If it cannot be used, its layers run uncompiled,
and a warning says why.

Layers are compiled where the ensemble itself reads whole texts. They run uncompiled where somebody else calls the
model, where text is generated, and where all derivatives exist: on the reference path of the kernels, and if every
particle has rows of its own.
"""

from __future__ import annotations

import hashlib
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import renyi_kernels
from renyi_engine.ensemble import compile_trial
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_engine.ensemble.packed_attention import MaskInGraph, PackedMask

MOST_SIZES = 2
"""Padded batches of so many sizes are compiled, in a kind of forward. Most batches of a run have one size."""


class Mode(NamedTuple):
    """`learning`: gradients are asked for. `size`: how many sequences a padded batch has; None: it is a packed row.
    `path`: the one that the kernels take (see `renyi_kernels.use_backend`)."""

    learning: bool
    rows: Rows
    size: int | None
    path: str

    @property
    def in_words(self) -> str:
        what = ("training" if self.learning else "scoring") + (" the base" if self.rows is Rows.BASE else "")
        return f"{what} on {'packed rows' if self.size is None else f'padded batches of {self.size}'}"


class CompiledLayers:
    """The compiled code of the layers of one model, and the mode in which they run.

    `backend` is the one of torch.compile. `say` is called with a sentence before layers are compiled. A deep copy has
    code of its own.
    """

    def __init__(self, backend: str, say: Callable[[str], object]) -> None:
        self._backend, self._say = backend, say
        self._code: dict[Mode, Callable[..., Any]] = {}
        self._usable: dict[Mode, bool] = {}
        self._trying = False
        self._mode: Mode | None = None
        self._in_checkpoint = False

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledLayers:
        return CompiledLayers(self._backend, self._say)

    def usable(self, mode: Mode) -> bool | None:
        """Whether layers can run in this mode; None if it has to be tried."""
        if self._trying:
            return mode in self._code
        if mode not in self._usable and mode.size is not None:
            others = [known for known in self._usable if known.size and known._replace(size=mode.size) == mode]
            return False if len(others) >= MOST_SIZES else None
        return self._usable.get(mode)

    def try_out(self, mode: Mode, model: str, read: Callable[[], Tensor], parameters: Sequence[Tensor]) -> bool:
        """Compile the layers for this mode, and find out whether it is usable. `read` reads a few tokens by the
        ensemble that has these parameters. Meanwhile no other thread may run a forward."""
        if self.usable(mode) is None:  # no other thread has just tried it
            # where one mode cannot be compiled, another one costs the same time for nothing
            self._usable[mode] = all(self._usable.values()) and self._try(mode, model, read, parameters)
        return bool(self.usable(mode))

    def _try(self, mode: Mode, model: str, read: Callable[[], Tensor], parameters: Sequence[Tensor]) -> bool:
        self._say(f"compiling the decoder layers for {mode.in_words}")
        code = torch.compile(_run_with_own_code(), fullgraph=True, dynamic=False, backend=self._backend)
        self._code.pop(mode, None)  # of a trial that ran out of memory
        self._trying = True
        try:
            uncompiled = compile_trial.measure(read, parameters)
            self._code[mode] = code
            problem = compile_trial.obstacle(read, parameters, uncompiled)
        finally:
            self._trying = False
        if problem is not None:
            self._refuse(mode, model, problem)
        return problem is None

    def _refuse(self, mode: Mode, model: str, problem: str) -> None:
        """Use the mode no more. The forward that is running now keeps to the code, because layers that are checkpointed
        have to run again as they ran first."""
        if self._usable.get(mode) is not False:
            self._usable[mode] = False
            warnings.warn(
                f"{model}: its decoder layers run uncompiled in {mode.in_words}, which takes more time ({problem})",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ forwards

    @property
    def mode(self) -> Mode | None:
        """The mode in which layers run now; None if they run uncompiled."""
        return self._mode

    @contextmanager
    def running(self, mode: Mode | None, *, in_checkpoint: bool = False) -> Iterator[None]:
        """Inside the block, layers run in this mode. `in_checkpoint`: a checkpoint runs the block."""
        before = self._mode, self._in_checkpoint
        self._mode, self._in_checkpoint = mode, in_checkpoint
        try:
            yield
        finally:
            self._mode, self._in_checkpoint = before

    def forward(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the `forward` of a layer."""
        mode = self._mode
        if mode is None:
            return forward(*args, **kwargs)
        run = partial(self._run, mode, layer, forward, **kwargs)
        if layer.training and not self._in_checkpoint:  # newer versions of transformers checkpoint within `forward`
            checkpoint: Callable[..., Any] = vars(layer)["_gradient_checkpointing_func"]  # see `installation`
            return checkpoint(run, *args)
        return run(*args)

    def _run(self, mode: Mode, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer.training = False  # see `installation`
        given = partial(_for_code, layer, args[0] if args else kwargs["hidden_states"])
        try:
            with torch.compiler.config.patch(cache_key_tag=_tag()):  # type: ignore[attr-defined]
                return self._code[mode](
                    layer, tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()}
                )
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            if self._trying:
                raise
            problem = compile_trial.in_words(error)
        # the layer is of a kind, or is given something, that was not in the trial
        out = forward(*args, **kwargs)
        self._refuse(mode, type(layer).__name__, problem)
        return out


@cache
def _tag() -> str:
    """A name for the code of our operators. torch's cache on the disk knows operators by their names alone. Without
    this, it would go on using the backward of an earlier version of them."""
    digest = hashlib.sha256()
    for path in sorted(Path(renyi_kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"renyi_kernels {digest.hexdigest()}"


TOKENS = {1: [0], 2: [1], 3: [1], 4: [2, 3]}
"""Which sizes of what a layer is given are the number of tokens, by how many sizes there are: positions [N] and [K, N],
hidden states and rotations [K, N, D], masks [K, 1, N, N]."""


def _for_code(layer: nn.Module, hidden: Tensor, value: Any) -> Any:
    """What compiled code is given for one of the layer's arguments. torch.compile is told which sizes are the number of
    tokens. These alone may vary."""
    if isinstance(value, PackedMask):
        return MaskInGraph(value, layer, hidden)
    for tensor in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(tensor, Tensor):
            number = hidden.shape[1]
            varying = [size for size in TOKENS.get(tensor.dim(), []) if tensor.shape[size] == number]
            torch._dynamo.maybe_mark_dynamic(tensor, varying)
    return value


def _run(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is compiled. The layer is an argument, so that layers of a kind share the code."""
    return type(layer).forward(layer, *args, **kwargs)


def _run_with_own_code() -> Callable[..., Any]:
    """`_run` with a code object of its own. For each code object, torch.compile keeps what it has compiled, and counts
    it: after a few compilations it refuses another one."""
    return types.FunctionType(_run.__code__.replace(), _run.__globals__, _run.__name__)
