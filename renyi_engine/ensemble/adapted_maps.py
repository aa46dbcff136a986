"""How an adapted linear map runs: the frozen map on all rows at once, and the low-rank update of every particle.

Layout: K particles, B sequences, T tokens, I/O in/out features, R rank. Rows are particle-major: [K*B, T, I].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from renyi_kernels import grouped_lora, lora_linears


class Rows(Enum):
    """What the rows in a forward of the model are."""

    BASE = "adapters off"
    SHARED = "B rows up to the first adapted layer, which all particles share"
    OWN = "K*B rows from the start, particle-major: every particle has tokens of its own"


class StackedAdapter(nn.Module):
    """The K adapters of one linear map: A [K, R, I] and B [K, O, R], fp32. The parameters share the given memory."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    @property
    def num_particles(self) -> int:
        return self.A.shape[0]


class AdapterGroup:
    """The adapters of maps that read one input, the copies of them that the products read, and their gradients.

    `copies`: the A of all maps as one block [K, R_1 + ... + R_n, I], and the B of each map, in the base's dtype.
    `gradients`: the same parts of the matrix of gradients. Both are the business of `particle_matrix`. `backward`: the
    one in which the ops add to `gradients` themselves.
    """

    def __init__(self, stacks: Sequence[StackedAdapter], backward: OneBackward) -> None:
        self.stacks = list(stacks)
        self.copies: tuple[Tensor, list[Tensor]] | None = None
        self.gradients: Gradients | None = None
        self._backward = backward
        self.adopt()

    def adopt(self) -> None:
        """Take the parameters that the adapters hold now as those that were copied and get the gradients."""
        self._own = [(stack.A, stack.B) for stack in self.stacks]

    @property
    def num_particles(self) -> int:
        return self.stacks[0].num_particles

    @property
    def holds_its_own(self) -> bool:
        """Whether nobody has put other tensors in the parameters' places (as torch.func.functional_call does)."""
        return all(stack.A is A and stack.B is B for stack, (A, B) in zip(self.stacks, self._own, strict=True))

    def copies_in(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]] | None:
        """The copies, unless they are of another dtype or of other tensors."""
        if self.copies is None or self.copies[0].dtype != dtype or not self.holds_its_own:
            return None
        return self.copies

    def link_gradients(self, *, keep: bool = False) -> None:
        """Let autograd add the gradients of all parameters to `gradients`. With `keep`, those that the parameters have
        now are put there first."""
        assert self.gradients is not None
        for pair, views in zip(self._own, zip(self.gradients.A, self.gradients.B, strict=True), strict=True):
            for parameter, view in zip(pair, views, strict=True):
                if parameter.grad is view:
                    continue
                if keep:
                    view.zero_() if parameter.grad is None else view.copy_(parameter.grad)
                parameter.grad = view

    def gradients_in_place(self) -> tuple[Tensor, list[Tensor]] | None:
        """What the op of these maps asks in its backward: where it is to add the gradients of A and B itself. None if
        autograd is to have them: in any backward but the one, and if a parameter has hooks or another gradient."""
        held = self.gradients
        if held is None or not self._backward.runs_here():
            return None
        for (A, B), dA, dB in zip(self._own, held.A, held.B, strict=True):
            if A.grad is not dA or B.grad is not dB or _has_hooks(A) or _has_hooks(B):
                return None
        return held.block, held.B


class Gradients(NamedTuple):
    """Of a group, as views of one matrix: the A of all maps as one block, each A, and each B."""

    block: Tensor
    A: list[Tensor]
    B: list[Tensor]


class OneBackward:
    """Tells the backward of one loss from all others, which may run at the same time in other threads."""

    def __init__(self) -> None:
        self._running: tuple[int, object] | None = None

    def of(self, loss: Tensor) -> None:
        """Run the backward of `loss`."""
        stream = _stream(loss.device)

        def begins(gradient: Tensor) -> None:
            self._running = torch._C._current_graph_task_id(), stream

        handle = loss.register_hook(begins)
        try:
            loss.backward()
        finally:
            handle.remove()
            self._running = None

    def runs_here(self) -> bool:
        """Whether the caller is called by that backward, on the stream of the thread that asked for it."""
        running = self._running
        if running is None or running[0] != torch._C._current_graph_task_id():
            return False
        return running[1] is None or running[1] == torch.cuda.current_stream()


def _stream(device: torch.device) -> object:
    """The one that the device works on now. None if it is no GPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


class _Copied(torch.autograd.Function):
    """A parameter, read from its copy in another dtype. The gradient goes to the parameter, which must not have changed
    since: a later forward would have changed the copy too."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (parameter,) = ctx.saved_tensors
        return upstream[0].to(parameter.dtype), None


def is_plain(linear: nn.Module) -> bool:
    """Whether the map is a product with its matrix and nothing else: not quantised, with the forward of its class."""
    return type(linear) in (nn.Linear, Conv1D) and "forward" not in vars(linear) and is_matrix(linear)


def is_matrix(linear: nn.Module) -> bool:
    """Whether the weight itself is the matrix. In some quantised maps it is a tensor of another class."""
    weight = cast(Tensor, linear.weight)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


class MapGroup:
    """Plain maps that read the same tensor, such as q, k and v. The first one that is called computes all outputs.

    `install` replaces the `forward` of each map, and `remove` gives it back. The group knows a map by its place and not
    by its path. So the maps of all decoder layers look the same, and one compiled graph serves them all.
    """

    def __init__(
        self, linears: Mapping[str, nn.Module], adapters: AdapterGroup, scaling: float, shared_input: bool
    ) -> None:
        self._paths, self._linears, self._adapters = list(linears), list(linears.values()), adapters
        self._scaling, self._shared_input = scaling, shared_input
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets. Nothing is running in the copy."""
        return {**vars(self), "_input": None, "_waiting": {}}

    def install(self, rows: Callable[[], Rows]) -> None:
        for place, linear in enumerate(self._linears):
            linear.forward = _Member(self, place, rows).forward

    def remove(self) -> None:
        for linear in self._linears:
            del linear.forward

    def forget(self) -> None:
        """Drop outputs that no map has taken. A checkpointed layer leaves some when it runs again: it stops as soon as
        the backward has what it needs."""
        self._input, self._waiting = None, {}

    def output(self, place: int, x: Tensor, rows: Rows) -> Tensor:
        if rows is Rows.BASE:
            linear = self._linears[place]
            return type(linear).forward(linear, x)
        if self._input is not x or place not in self._waiting:
            self._input, self._waiting = x, self._run(place, x, self._shared_input and rows is Rows.SHARED)
        output = self._waiting.pop(place)
        if not self._waiting:
            self._input = None
        return output

    def _run(self, place: int, x: Tensor, shared: bool) -> dict[int, Tensor]:
        K = self._adapters.num_particles
        if x.shape[0] % K:
            raise _no_whole_sequences(self._paths[place], x, K)
        rows = _rows(x, K, shared)
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            rows = rows.to(torch.get_autocast_dtype(device_type))
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for linear in self._linears:
            weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
            weights.append((weight.mT if isinstance(linear, Conv1D) else weight).to(rows.dtype))
            biases.append(None if bias is None else bias.to(rows.dtype))
        outputs = lora_linears(
            rows,
            weights,
            biases,
            [stack.A for stack in self._adapters.stacks],
            [stack.B for stack in self._adapters.stacks],
            self._scaling,
            copies=self._adapters.copies_in(rows.dtype),
            gradients=self._adapters.gradients_in_place if self._adapters.holds_its_own else None,
        )
        return {j: y.view(*x.shape[:-1], -1) for j, y in enumerate(outputs)}


class _Member:
    """One map of a group. torch.compile sees that the bound `forward` is the same code in all groups; it would not see
    that of a partial or of a callable object."""

    def __init__(self, group: MapGroup, place: int, rows: Callable[[], Rows]) -> None:
        self._group, self._place, self._rows = group, place, rows

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._place, x, self._rows())


class OpaqueMap:
    """A map that only its own forward can run, such as a quantised one. A hook adds the update to its output."""

    def __init__(
        self, path: str, linear: nn.Module, adapters: AdapterGroup, scaling: float, shared_input: bool
    ) -> None:
        self._path, self._linear, self._adapters = path, linear, adapters
        self._scaling, self._shared_input = scaling, shared_input
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self, rows: Callable[[], Rows]) -> None:
        self._handles = [
            self._linear.register_forward_pre_hook(partial(self._before, rows)),
            self._linear.register_forward_hook(partial(self._after, rows)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        pass

    def _before(self, rows: Callable[[], Rows], linear: nn.Module, args: tuple) -> tuple | None:
        if rows() is Rows.BASE:
            return None
        K, x = self._adapters.num_particles, args[0]
        shared = self._shared_input and rows() is Rows.SHARED
        if x.shape[0] % K:
            raise _no_whole_sequences(self._path, x, K)
        return (x[: x.shape[0] // K],) if shared else None

    def _after(self, rows: Callable[[], Rows], linear: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if rows() is Rows.BASE:
            return None
        K, x = self._adapters.num_particles, args[0]
        A, B = self._in_dtype(x.dtype)
        if self._shared_input and rows() is Rows.SHARED:
            out = grouped_lora(x.flatten(0, -2), A, B, self._scaling, output.flatten(0, -2))
            return out.view(K * output.shape[0], *output.shape[1:])
        by_particle, base = x.reshape(K, -1, x.shape[-1]), output.reshape(K, -1, output.shape[-1])
        return grouped_lora(by_particle, A, B, self._scaling, base).view(output.shape)

    def _in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        (stack,), copies = self._adapters.stacks, self._adapters.copies_in(dtype)
        if copies is None or dtype == stack.A.dtype:
            return stack.A.to(dtype), stack.B.to(dtype)
        block, (B,) = copies
        return _Copied.apply(stack.A, block), _Copied.apply(stack.B, B)


def by_input(linears: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """The paths of linear maps, in groups. Plain maps that read the same tensor are in one group; any other map is
    alone. Mappings are by path."""
    groups: dict[int | str, list[str]] = {}
    for path, linear in linears.items():
        groups.setdefault(id(inputs[path]) if is_plain(linear) else path, []).append(path)
    return list(groups.values())


def adapted(
    linears: Mapping[str, nn.Module], adapters: AdapterGroup, scaling: float, shared_input: bool
) -> MapGroup | OpaqueMap:
    """One group of `by_input` with its adapters. `shared_input`: what it reads is still the same for every particle."""
    path, linear = next(iter(linears.items()))
    if is_plain(linear):
        return MapGroup(linears, adapters, scaling, shared_input)
    return OpaqueMap(path, linear, adapters, scaling, shared_input)


def _rows(x: Tensor, num_particles: int, shared_input: bool) -> Tensor:
    """[K*B, T, I] as [K, B*T, I], or as [B*T, I] if all particles have the same rows."""
    by_particle = x.reshape(num_particles, -1, x.shape[-1])
    return by_particle[0] if shared_input else by_particle


def _no_whole_sequences(path: str, x: Tensor, num_particles: int) -> RuntimeError:
    return RuntimeError(
        f"{path} was given {x.shape[0]} rows, which cannot be shared out among {num_particles} particles; if the model "
        "was called directly, give it rows for every particle, or call it inside disable_adapters(); if this map does "
        "not read whole sequences, as in a mixture of experts, leave it out of target_modules"
    )
