"""Launches that are remembered, so that Python is quick to launch a kernel again.

What a launcher decides, and what Triton's own launcher looks for in every argument of every call, depends on the form
of the tensors alone: their shapes, strides and dtypes, and whether they begin at a multiple of 16 bytes. For a form
that was launched before, the kernel that Triton compiled for it is launched at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from renyi_kernels.triton_ops import tuning

_MOST_FORMS = 10_000
_known: dict[tuple, Launch | None] = {}


class Launch:
    """A kernel with everything that it is launched with but its tensors and its scale, which come first.

    `numbers`: of the arguments, ints and tuples of them. `constants`: its constexpr arguments, which come last, and the
    options of the compiler. `scratch`: the size of the memory for partial sums.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], numbers: tuple, constants: dict[str, Any], scratch: int = 0
    ) -> None:
        self.scratch = scratch
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._constexprs = [constants[name] for name in kernel.arg_names if name in constants]
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self._compiled is None:
            # the interpreter has nothing to give back
            self._compiled = self._kernel[self._grid](*arguments, *self._numbers, **self._constants)
            return
        # a compiled kernel takes all arguments by position, constants too
        self._compiled[self._grid](*arguments, *self._numbers, *self._constexprs)


def remembered(
    decide: Callable[..., Launch | None], *groups: Sequence[Tensor] | None, **options: bool
) -> Launch | None:
    """What `decide(*groups, **options)` says, which is asked once for each form of the tensors. All are on one device,
    and the first group is not empty."""
    assert groups[0] is not None
    device = groups[0][0].device
    forms = [None if group is None else tuple([_form(tensor) for tensor in group]) for group in groups]
    key = (decide.__name__, device, tuning.architecture(device), *options.values(), *forms)
    try:
        return _known[key]
    except KeyError:
        if len(_known) >= _MOST_FORMS:
            _known.clear()
        launch = _known[key] = decide(*groups, **options)
        return launch


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16 == 0
