from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ..unwritten_memory import unwritten_memory_is_nan
from .alone import MARKER, is_wanted, run_alone

# csrc_bench, which knows how to measure memory, is found from the root of the checkout, not installed
ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", f"{MARKER}: could, on a GPU, break whatever runs after it in the same process")


def pytest_collection_modifyitems(items):
    items.sort(key=is_wanted)  # what takes a process of its own comes last: if the time is short, the most has run


def pytest_pyfunc_call(pyfuncitem):
    if not is_wanted(pyfuncitem):
        return None  # as ever
    run_alone(pyfuncitem.nodeid, pyfuncitem.config.rootpath)
    return True


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # most tensors here are tiny, and threads that wait for each other are slow on a busy machine
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device():
    """Where the kernels run: on the GPU, or without one on the CPU, in Triton's interpreter (`tests/conftest.py`)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device_of(device):
    """device_of(backend): where that path is run; all but the kernels on the CPU."""
    return lambda backend: device if backend == "triton" else "cpu"


@pytest.fixture(scope="session")
def normals():
    """normals(seed) is a function of a shape that draws standard normals, in fp64."""

    def with_seed(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)

    return with_seed


@pytest.fixture(scope="session")
def value_and_grads():
    """(f(*inputs), its gradients at `upstream`); None where an input is None. Strides of the inputs are kept."""

    def run(f, inputs, upstream):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        value = f(*leaves)
        present = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(value, present, upstream.to(value.dtype)))
        return value.detach(), [None if x is None else next(found) for x in leaves]

    return run


@pytest.fixture(scope="session")
def uneven():
    """An upstream gradient of a shape, in fp64: no two entries alike, of both signs, none above 2."""

    def like(shape):
        count = torch.Size(shape).numel()
        return 2 * torch.sin(torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)

    return like


@pytest.fixture
def poison():
    """Memory that nobody has written yet holds NaN."""
    with unwritten_memory_is_nan():
        yield


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
