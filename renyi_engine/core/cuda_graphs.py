"""Work on a GPU that is recorded once for every shape of its inputs, and then replayed: CUDA graphs.

A GPU often waits for Python, which orders its work one operation after the other. A recording orders all of it at once.
It repeats the same operations on the same memory, so inputs are copied to where the recording reads them, and outputs
from where it writes them. No recording is used before its results were compared with those of the plain call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from renyi_engine.core.memory import is_out_of_memory
from renyi_engine.core.messages import reason

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]
Function = Callable[[Inputs], Outputs]

MOST_SHAPES = 8
"""A recording takes time to make, and some memory. Inputs of more shapes than this are run without one."""
_NOTHING = 1e-6
"""A tensor whose norm is below this counts as zero."""


@dataclass(frozen=True)
class Surroundings:
    """What else a function works with, beside its inputs and outputs. Every entry is asked anew at each call.

    Attributes:
        added_to: tensors that the function adds something to.
        read: tensors that it reads. If one of these, or of `added_to`, lies elsewhere than before, the recording is
            made anew.
        mode: whatever decides in Python what the function does. Every mode has recordings of its own.
    """

    added_to: Callable[[], Sequence[Tensor]] = list
    read: Callable[[], Sequence[Tensor]] = list
    mode: Callable[[], Hashable] = lambda: None


class Pool:
    """The memory of the intermediate results of all recordings that share it. One replay at a time uses it. A deep copy
    is another pool."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._handle: Any = None
        self._streams = dict[torch.device, torch.cuda.Stream]()
        self._graphs = weakref.WeakSet[Any]()
        self._failed: list[Any] = []
        self._recordings = weakref.WeakSet[Recordings]()
        self._last: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return Pool()

    def add(self, recordings: Recordings) -> None:
        """Let `drop` drop these too."""
        self._recordings.add(recordings)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream on which all graphs are made. Graphs that were made on several streams would share no memory."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def record(self, stream: torch.cuda.Stream, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """A function that repeats this call, by a CUDA graph whose intermediate results lie in this pool."""
        if not self._graphs:  # torch takes no pool again whose graphs are gone
            self._handle = None
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may pin memory meanwhile. The outer block leaves the stream again if torch's cannot
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=self._handle, stream=stream, capture_error_mode="thread_local"),
            ):
                outputs = call()
        except BaseException:
            # torch leaves the pool of a graph that failed open, and goes on asking the graph about it
            self._failed.append(graph)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._handle)
            graph.reset()  # if it ended before the error came here, as when memory runs out, this gives its memory back
            self._handle = None
            raise
        self._graphs.add(graph)

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

    def drop(self) -> None:
        """Drop all recordings that share this pool. They are made anew when they are needed."""
        for recordings in list(self._recordings):
            recordings.drop()

    @contextmanager
    def alone(self, device: torch.device) -> Iterator[None]:
        """A block in which nobody else uses the pool: no other thread, and no other stream of the device."""
        with self._lock:
            if device.type != "cuda":
                yield
                return
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream()
                if self._last is not None:
                    stream.wait_event(self._last)
                try:
                    yield
                finally:
                    self._last = self._last or torch.cuda.Event()
                    self._last.record(stream)


class Recordings:
    """Calls `function`, by a recording where there is one. On a CPU a recording is a plain call, with all else as it is
    on a GPU.

    Inputs may lie on the CPU, best in pinned memory. Those named in `constants` stay there, and Python may read them:
    each of their values has recordings of its own. The function must not look at the values of the others in Python,
    must not keep its inputs or outputs, and must do the same whenever it gets inputs of these shapes.

    `tolerance`: how far what the function adds, and the outputs that `compared` names, may be from those of the plain
    call, relative to their norm. If they are farther away, no recording is used. Threads may share these recordings.
    """

    def __init__(
        self,
        function: Function,
        device: torch.device,
        surroundings: Surroundings,
        *,
        tolerance: float,
        compared: Callable[[Outputs], Iterable[str]] = list,
        constants: Sequence[str] = (),
        pool: Pool,
    ) -> None:
        self._compared = compared
        self._function, self._device, self._surroundings = function, device, surroundings
        self._constants, self._tolerance, self._pool = tuple(constants), tolerance, pool
        self._stream = pool.stream(device) if device.type == "cuda" else None
        self._made: dict[Hashable, _Recording] = {}
        self._given_up = False
        pool.add(self)

    @property
    def num_made(self) -> int:
        """How many recordings there are."""
        return len(self._made)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        raise TypeError("recorded CUDA graphs cannot be copied; make new ones for the copy")

    def __call__(self, inputs: Inputs) -> Outputs:
        """What the function gives for these inputs.

        Raises:
            torch.OutOfMemoryError: a new recording does not fit into memory. All recordings are dropped then.
        """
        if self._given_up:
            return self._function(inputs)
        with self._pool.alone(self._device):
            shape = self._shape(inputs)
            recording = self._made.get(shape)
            if recording is not None and recording.addresses == self._current_addresses():
                return recording.replay(inputs)
            self._made.pop(shape, None)
            return self._record(shape, inputs)

    def drop(self) -> None:
        """Drop all recordings, and with them their memory. They are made anew when they are needed."""
        with self._pool.alone(self._device):
            self._made.clear()

    def _shape(self, inputs: Inputs) -> Hashable:
        shapes = tuple((name, inputs[name].shape, inputs[name].dtype) for name in sorted(inputs))
        constants = tuple(tuple(inputs[name].flatten().tolist()) for name in self._constants if name in inputs)
        return shapes, constants, self._surroundings.mode()

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self._surroundings.added_to(), *self._surroundings.read())]

    def _record(self, shape: Hashable, inputs: Inputs) -> Outputs:
        """Call the function, then make a recording of this call, and compare what both give."""
        before = [tensor.clone() if tensor.any() else None for tensor in self._surroundings.added_to()]
        try:
            with self._beside_the_others():
                outputs = self._function(inputs)  # it also does whatever is done once, such as compiling kernels
            if len(self._made) == MOST_SHAPES:
                self._give_up(f"there are more than {MOST_SHAPES} shapes of inputs")
                return outputs
            added_to = self._surroundings.added_to()
            truth = [tensor.clone() for tensor in added_to]
            addresses = self._current_addresses()
            try:
                recording = _Recording(
                    self._function, inputs, self._constants, self._device, self._stream, self._pool, addresses
                )
                _restore(added_to, before)
                problem = self._difference(outputs, recording.replay(inputs))
                for tensor, value, start in zip(added_to, truth, before, strict=True):
                    added, expected = (tensor, value) if start is None else (tensor - start, value - start)
                    if problem is None and _apart(added, expected) > self._tolerance:
                        problem = "a recording adds other values than a plain call"
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                cause: BaseException = error
                while cause.__context__ is not None:  # the first one; others say that nothing was recorded
                    cause = cause.__context__
                problem = f"{type(cause).__name__}: {reason(cause)}"
        except Exception as error:
            if is_out_of_memory(error):
                self._made.clear()
                _restore(self._surroundings.added_to(), before)
            raise
        _restore(added_to, truth)
        if problem is None:
            self._made[shape] = recording
        else:
            self._give_up(problem)
        return outputs

    def _difference(self, outputs: Outputs, replayed: Outputs) -> str | None:
        if outputs.keys() != replayed.keys():
            return "the function gave other outputs when it was called again"
        for name in self._compared(outputs):
            value = outputs[name]
            if value.shape != replayed[name].shape or _apart(replayed[name], value) > self._tolerance:
                return f"a recording gives other values of {name} than a plain call"
        return None

    def _give_up(self, problem: str) -> None:
        self._given_up = True
        self._made.clear()
        warnings.warn(
            f"the work on the GPU is not recorded as CUDA graphs ({problem}): it is ordered one operation after the "
            "other, which takes more time",
            stacklevel=4,
        )

    @contextmanager
    def _beside_the_others(self) -> Iterator[None]:
        """A block on the stream that recordings are made on: what is set up once for a stream is set up there."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # also if an error came: what was ordered before it still writes
            current.wait_stream(self._stream)


class _Recording:
    """One recording, and the memory from which it reads its inputs."""

    def __init__(
        self,
        function: Function,
        inputs: Inputs,
        constants: Sequence[str],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        pool: Pool,
        addresses: list[int],
    ) -> None:
        self.addresses = addresses
        # nobody could write to tensors of the inference mode later
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = {
                name: tensor.clone() if name in constants else torch.empty_like(tensor, device=device, pin_memory=False)
                for name, tensor in inputs.items()
            }
        self._copied = [name for name in inputs if name not in constants]
        self._fill(inputs)
        call = partial(function, self._inputs)
        self._replay = call if stream is None else pool.record(stream, call)

    def replay(self, inputs: Inputs) -> Outputs:
        self._fill(inputs)
        # the next replay, also one of another recording with the same pool, writes over what this one gives
        return {name: tensor.clone() for name, tensor in self._replay().items()}

    def _fill(self, inputs: Inputs) -> None:
        for name in self._copied:
            self._inputs[name].copy_(inputs[name], non_blocking=True)


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Give the tensors these values; None is zero."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.zero_() if value is None else tensor.copy_(value)


def _apart(value: Tensor, truth: Tensor) -> float:
    """How far a tensor is from the true one, relative to the norm of that. Entries that are not finite are no distance
    where both have the same."""
    wide = torch.promote_types(truth.dtype, torch.float32)  # the norm of many fp16 values may be beyond fp16
    value, truth = value.to(wide), truth.to(wide)
    same = (value == truth) | (value.isnan() & truth.isnan())
    distance = torch.linalg.vector_norm(torch.where(same, 0.0, value - truth))
    size = torch.linalg.vector_norm(truth.nan_to_num(0.0, 0.0, 0.0))
    return float((distance / (size + _NOTHING)).nan_to_num(torch.inf))
