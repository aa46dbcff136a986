"""linear_logprob holds little memory, gives the same bits twice, and leaves everything else alone.

Layout: B sequences, N or T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from csrc_bench.measure import cpu_peak_mib
from renyi_kernels import linear_logprob

from ..marks import fast_paths
from .heads import HEADS, LOW_PRECISION

# memory


N, D, V, CHUNK_MIB = 600, 32, 50_000, 16.0


def forward_backward(normals, dtype, softcap, backend, requires_grad=True):
    draw = normals(0)
    hidden, weight = draw(N, D).to(dtype).requires_grad_(requires_grad), draw(V, D).to(dtype)
    labels, upstream = torch.arange(N) * 83 % V, torch.linspace(-1, 1, N)

    def step():
        logprob = linear_logprob(hidden, weight, labels, logit_softcap=softcap, chunk_mib=CHUNK_MIB, backend=backend)
        if requires_grad:
            logprob.backward(upstream)
        return logprob, hidden.grad

    return step


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_hold_less_than_one_and_a_half_chunks(normals, dtype, softcap):
    outputs = (4 * N + 2 * N * D * dtype.itemsize) / 2**20  # log-probabilities; d logp / d hidden; hidden's gradient
    peak = cpu_peak_mib(forward_backward(normals, dtype, softcap, "torch"))
    assert 0.5 * CHUNK_MIB < peak < 1.5 * CHUNK_MIB + outputs


def test_forward_alone_holds_less_than_one_and_a_half_chunks(normals):
    peak = cpu_peak_mib(forward_backward(normals, torch.float32, None, "torch", requires_grad=False))
    assert 0.5 * CHUNK_MIB < peak < 1.5 * CHUNK_MIB + 4 * N / 2**20


def test_the_memory_measure_sees_the_whole_logits_of_the_reference(normals):
    whole_logits = 4 * N * V / 2**20
    peak = cpu_peak_mib(forward_backward(normals, torch.float32, None, "reference"))
    assert peak > 2 * whole_logits > 10 * CHUNK_MIB


# determinism and global state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@fast_paths
def test_two_runs_are_bitwise_equal(two_threads, case, score, value_and_grads, uneven, dtype, backend):
    lead = (4, 50) if backend == "torch" else (4, 10)
    hidden, weight, labels, _ = case(lead, 65, 1001)
    f = lambda hidden: score(hidden, weight.to(dtype), labels, chunk_mib=0.1, backend=backend)
    first, second = (value_and_grads(f, [hidden.to(dtype)], uneven(lead)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@fast_paths
def test_inputs_are_left_alone(device_of, case, value_and_grads, uneven, backend):
    hidden, weight, labels, head = case((3, 4), 5, 7, HEADS["all"])
    on = device_of(backend)
    hidden, weight, labels = hidden.to(on, torch.float32), weight.to(on, torch.float32), labels.to(on)
    head["bias"] = head["bias"].to(on, torch.float32)
    before = [x.clone() for x in (hidden, weight, labels, head["bias"])]
    f = lambda hidden: linear_logprob(hidden, weight, labels, backend=backend, **head)
    value_and_grads(f, [hidden], uneven((3, 4)).to(on))
    assert all(torch.equal(x, y) for x, y in zip((hidden, weight, labels, head["bias"]), before, strict=True))


def settings_of_the_process():
    precision = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return (
        *precision,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_setting_of_the_process_is_changed_not_even_for_a_moment(case, monkeypatch, dtype, backend):
    """Another thread would compute with it, and two that put it back in turn would leave it changed for good."""
    hidden, weight, labels, _ = case((3, 4), 16, 50)
    before, seen = settings_of_the_process(), []
    for name in ("mm", "tanh_", "matmul"):
        owner = torch if hasattr(torch, name) else torch.Tensor
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, w=work, **k: seen.append(settings_of_the_process()) or w(*a, **k))
    leaf = hidden.to(dtype).requires_grad_()
    linear_logprob(leaf, weight.to(dtype), labels, backend=backend).sum().backward()
    assert set(seen) <= {before}
    assert seen or backend == "reference"
    assert settings_of_the_process() == before
