"""What `import renyi_kernels` does to a fresh interpreter: nothing but define the ops."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FRESH = """
import json, logging, os, random, signal, sys, warnings
import torch

def state():
    matmul = torch.backends.mkldnn.matmul
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "fp32 precision": [torch.get_float32_matmul_precision(), matmul.fp32_precision, torch.backends.fp32_precision],
        "grad": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark],
        "cuda": torch.cuda.is_initialized(),
        "rng": [torch.get_rng_state().tolist(), random.getstate()],
        "environment": dict(os.environ),
        "warnings": repr(warnings.filters),
        "logging": [logging.root.level, len(logging.root.handlers)],
        "interrupt": repr(signal.getsignal(signal.SIGINT)),
    }

before, modules = state(), set(sys.modules)
print("importing", flush=True)
import renyi_kernels
print("imported", flush=True)
new = {name.split(".")[0] for name in set(sys.modules) - modules} - set(sys.stdlib_module_names)
after = state()
changed = [name for name in before if after[name] != before[name]]
print(json.dumps([sorted(new), "triton" in sys.modules, "transformers" in sys.modules, changed]))
"""

WITHOUT = """
import importlib.abc, json, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers"):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
import torch
from renyi_kernels import grouped_lora, renyi_loss

try:
    import triton
except ImportError:
    missing = True
x = torch.zeros(2, 3, 4, requires_grad=True)
hidden = grouped_lora(x, torch.ones(2, 1, 4), torch.ones(2, 4, 1), 1.0).view(2, 1, 3, 4)
out = renyi_loss(hidden, torch.ones(5, 4), torch.zeros(1, 3, dtype=torch.int64), 0.8)
out.loss.sum().backward()
print(json.dumps([missing, out.loss.item(), out.ess.item(), list(x.grad.shape)]))
"""


def run(code):
    """The lines that `code` prints, in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.fixture(scope="module")
def fresh():
    return run(FRESH)


def test_import_brings_in_torch_and_the_standard_library_alone(fresh):
    new, triton, transformers, _ = json.loads(fresh[-1])
    assert new == ["renyi_kernels"]
    assert not triton
    assert not transformers


def test_import_sets_no_global_state(fresh):
    assert json.loads(fresh[-1])[3] == []


def test_import_prints_nothing(fresh):
    start = fresh.index("importing")
    assert fresh[start + 1] == "imported"


def test_the_ops_work_where_triton_cannot_be_imported():
    loss, ess = pytest.approx(3 * 1.6094379), pytest.approx(2.0)
    assert json.loads(run(WITHOUT)[-1]) == [True, loss, ess, [2, 3, 4]]
