"""All particles in one matrix: row k holds every A and B of particle k.

So whatever is done to all parameters is one operation on one tensor: the optimizer's step, the norms and the clipping
of the particles' gradients, the priors, and the copy in the base's dtype that the products read. To everybody else, the
A and B of a map are ordinary parameters. They are views of the matrix, and their gradients are views of a second one.

Maps that read one input lie side by side: first all of their A, which are one block [K, R_1 + ... + R_n, I], then each
B. Every block begins at a multiple of `ALIGNMENT` numbers, as the kernels' loads like it; what is left free stays zero.

Layout: K particles, P numbers of one particle, I/O in/out features, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from renyi_engine.ensemble.adapted_maps import AdapterGroup, Gradients, OneBackward, StackedAdapter

ALIGNMENT = 64


class ParticleMatrix:
    """The matrix of some adapters, and what is done to all of them at once.

    Attributes:
        values: ``[K, P]``, fp32. It is a leaf, so an optimizer takes it.
        groups: the adapters of maps that read one input, in the order of the matrix. paths: of the maps of each group.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        adapters: Mapping[str, tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        """`groups`: the paths of maps that read one input. `adapters`: (A [K, R, I], B [K, O, R]) of every map."""
        self.paths = groups
        self._places: list[_Places] = []
        end = 0
        for paths in groups:
            of_A, of_B = [], []
            for path in paths:
                of_A.append(_Place(end, adapters[path][0].shape[1:]))
                end = of_A[-1].end
            block = _Place(of_A[0].start, torch.Size([sum(place.shape[0] for place in of_A), of_A[0].shape[1]]))
            for path in paths:
                of_B.append(_Place(_aligned(end), adapters[path][1].shape[1:]))
                end = of_B[-1].end
            end = _aligned(end)
            self._places.append(_Places(block, of_A, of_B))
        K = len(next(iter(adapters.values()))[0])
        self.values = nn.Parameter(torch.zeros(K, end, dtype=torch.float32, device=device))
        self._gradients: Tensor | None = None
        self._backward = OneBackward()
        self._copy: Tensor | None = None
        self.groups: list[AdapterGroup] = []
        self.stacks: dict[str, StackedAdapter] = {}
        for paths, views in zip(groups, self._views(self.values.detach()), strict=True):
            stacks = []
            for path, A, B in zip(paths, *views, strict=True):
                A.copy_(adapters[path][0])
                B.copy_(adapters[path][1])
                stacks.append(StackedAdapter(A, B))
            self.groups.append(AdapterGroup(stacks, self._backward))
            self.stacks |= dict(zip(paths, stacks, strict=True))
        self.stacks = {path: self.stacks[path] for path in adapters}  # in the model's order
        self._own = self._parameters()

    def named(self, matrix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The part of every map, by path, of a matrix ``[K, P]`` that is laid out as `values`: views like A and B."""
        found = {
            path: (A, B)
            for paths, views in zip(self.paths, self._views(matrix), strict=True)
            for path, A, B in zip(paths, *views, strict=True)
        }
        return {path: found[path] for path in self.stacks}

    # ------------------------------------------------------------------ the copy that the products read

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Bring the copy in `dtype` up to date. It is called before every forward, because nobody can see all the ways
        in which parameters are changed."""
        self.link()
        if dtype == self.values.dtype:
            source = self._copy = self.values.detach()
        else:
            if self._copy is None or self._copy.dtype != dtype or self._copy.device != self.values.device:
                with torch.inference_mode(False):  # training could not write into a tensor of the inference mode
                    self._copy = torch.empty_like(self.values, dtype=dtype, requires_grad=False)
            # autograd would take this for a change of what it keeps for a backward that is still to come; it does see
            # changes of the parameters themselves
            with torch.autograd._unsafe_preserve_version_counter(self._copy):
                source = self._copy.copy_(self.values)
        if (copies := self.groups[0].copies) is not None and _share_memory(copies[0], source):
            return
        for group, places in zip(self.groups, self._places, strict=True):
            group.copies = places.block.of(source), [place.of(source) for place in places.B]

    @property
    def copy(self) -> Tensor | None:
        """The copy ``[K, P]`` that `refresh` made last."""
        return self._copy

    # ------------------------------------------------------------------ gradients

    def zero_gradients(self) -> None:
        """Set all gradients to zero, and let the next ones be added into one matrix."""
        self._make_gradients()
        self.gradients.zero_()
        for group in self.groups:
            group.link_gradients()

    @torch.no_grad()
    def attach_gradients(self) -> None:
        """Let the next gradients be added into one matrix, to those that the parameters have."""
        self._make_gradients()
        for group in self.groups:
            group.link_gradients(keep=True)

    def _make_gradients(self) -> None:
        self.link()
        if self._gradients is None or self._gradients.device != self.values.device:
            self._gradients = held = torch.zeros_like(self.values, requires_grad=False)
            for group, places, views in zip(self.groups, self._places, self._views(held), strict=True):
                group.gradients = Gradients(places.block.of(held), *views)
        self.values.grad = self._gradients

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar, to `gradients`.

        The ops of the adapted maps add theirs in place. Autograd gets those of parameters that have hooks, and of maps
        that have another op, and adds them itself.
        """
        with warnings.catch_warnings():
            # a parameter that is strided over K, as its gradient is: torch says that this may be slower
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            self._backward.of(loss)

    @property
    def gradients(self) -> Tensor:
        """The gradients ``[K, P]``, fp32, of everything since they were set to zero."""
        assert self._gradients is not None, "zero_gradients or attach_gradients comes first"
        return self._gradients

    @property
    def learning(self) -> tuple[bool, ...]:
        """Of every A and B, whether it requires a gradient."""
        return tuple([parameter.requires_grad for parameter in self._own])

    def gradient_norms(self) -> Tensor:
        """The norm of each particle's gradient, ``[K]``: of each stretch of `ALIGNMENT` numbers first, then of these
        norms, because a CPU that adds up a million squares in fp32 one after the other loses three digits."""
        stretches = self.gradients.unflatten(1, (-1, ALIGNMENT))
        return torch.linalg.vector_norm(torch.linalg.vector_norm(stretches, dim=2), dim=1)

    # ------------------------------------------------------------------ parameters that were put elsewhere

    def link(self) -> None:
        """Let every parameter be a view of the matrix again. A copy of a module, `module.to` and `parameter.data = ...`
        give a parameter memory of its own. Its values are taken over."""
        values = self.values
        memory = _memory_of(values)  # asked once: every step comes here, and there are hundreds of parameters
        if all(_memory_of(parameter) == memory for parameter in self._own):
            return
        first = self._own[0]
        with torch.no_grad():
            if first.device != values.device or first.dtype != values.dtype:
                values.data = values.to(first.device, first.dtype)
                values.grad = self._gradients = self._copy = None
            views = [view for pair in self.named(values.detach()).values() for view in pair]
            for parameter, view in zip(self._own, views, strict=True):
                if not _share_memory(parameter, values):
                    view.copy_(parameter)
                    gradient, parameter.grad = parameter.grad, None
                    parameter.data = view
                    parameter.grad = gradient

    def adopt(self) -> None:
        """Take the parameters that the adapters hold now in place of those that they held before."""
        self._own = self._parameters()
        for group in self.groups:
            group.adopt()
        self.link()

    def _parameters(self) -> list[nn.Parameter]:
        return [side for stack in self.stacks.values() for side in (stack.A, stack.B)]

    def _views(self, matrix: Tensor) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Of every group (its A, its B), as views of `matrix`."""
        return [([A.of(matrix) for A in places.A], [B.of(matrix) for B in places.B]) for places in self._places]


class _Place(NamedTuple):
    """Where a block of numbers lies in a row of the matrix, and its shape."""

    start: int
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.start + self.shape.numel()

    def of(self, matrix: Tensor) -> Tensor:
        """This part [K, *shape] of a matrix [K, P], as a view."""
        return matrix[:, self.start : self.end].unflatten(1, self.shape)


class _Places(NamedTuple):
    """Where a group of maps lies: each A, all of them as one block, and each B."""

    block: _Place
    A: list[_Place]
    B: list[_Place]


def _share_memory(first: Tensor, second: Tensor) -> bool:
    return _memory_of(first) == _memory_of(second)


def _memory_of(tensor: Tensor) -> int:
    """Where the memory of the tensor begins, which its views have too."""
    return tensor.untyped_storage().data_ptr()


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT
