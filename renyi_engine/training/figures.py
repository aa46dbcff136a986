"""The measurements of a step on their way from the device to the host.

A GPU computes a step while Python already prepares the next one. Whoever asks for a value of a step waits until it is
there, and the GPU then waits for Python. So the copies are ordered with the step, and read when the next one runs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from renyi_engine.training.train_step import StepResult


class Figures:
    """The measurements of one step. On a CPU they are there at once."""

    def __init__(self, result: StepResult) -> None:
        values = {field.name: getattr(result, field.name) for field in fields(result)}
        details = {name: _begin_copy(tensor) for name, tensor in values.pop("details").items()}
        self._result = StepResult(details=details, **{name: _begin_copy(tensor) for name, tensor in values.items()})
        self._arrived: torch.cuda.Event | None = None
        if result.loss.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(result.loss.device))

    def read(self) -> StepResult:
        """The measurements, on the CPU. This waits for their step, and for no later one."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._result


@dataclass(frozen=True)
class MadeStep:
    """A step that was made, whose measurements may still be on their way.

    Attributes:
        number: counted from 1.
        alpha: the one that it was trained with.
        rows: the numbers of the rows of its examples.
        num_labels, num_tokens: of all its examples together.
    """

    number: int
    alpha: float
    rows: list[int]
    num_labels: int
    num_tokens: int
    figures: Figures


def _begin_copy(tensor: Tensor) -> Tensor:
    """A copy on the host, in pinned memory, that is filled when the device gets there. On a CPU: the tensor itself."""
    return tensor.to("cpu", non_blocking=True)
