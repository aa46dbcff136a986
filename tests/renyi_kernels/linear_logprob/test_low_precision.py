"""In bf16 and fp16 linear_logprob is about as exact as plain PyTorch in that precision.

Layout: B sequences, N or T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

from renyi_kernels import linear_logprob

from ..marks import fast_paths, no_bf16_in_the_interpreter
from .heads import LOW_PRECISION, cast, every_head, mib_of_rows


@every_head
@pytest.mark.parametrize(
    ("backend", "dtype", "lead", "D", "V"),
    [
        *(("torch", dtype, *shape) for dtype in LOW_PRECISION for shape in [((2, 100), 33, 501), ((100,), 64, 9001)]),
        ("triton", torch.float16, (2, 12), 33, 501),
        ("triton", torch.float16, (8,), 64, 9001),
        pytest.param("triton", torch.bfloat16, (2, 100), 33, 501, marks=no_bf16_in_the_interpreter),
        pytest.param("triton", torch.bfloat16, (100,), 64, 9001, marks=no_bf16_in_the_interpreter),
    ],
    ids=str,
)
def test_low_precision_errs_at_most_half_again_as_much_as_naive(
    case, score, value_and_grads, uneven, head, backend, dtype, lead, D, V
):
    hidden, weight, labels, head = case(lead, D, V, head)
    hidden, weight, head, upstream = hidden.to(dtype), weight.to(dtype), cast(head, dtype), uneven(lead)

    def run(compute, **kwargs):
        f = lambda hidden: score(hidden, weight.to(compute), labels, **cast(head, compute), **kwargs)
        value, (grad,) = value_and_grads(f, [hidden.to(compute)], upstream)
        assert grad.dtype == compute
        return value, grad.double()

    gold, gold_grad = run(torch.float64, backend="reference")
    naive, naive_grad = run(dtype, backend="reference")
    value, grad = run(dtype, backend=backend, chunk_mib=mib_of_rows(11, V, 6))
    assert value.dtype == torch.float32
    error = lambda x, truth: (x - truth).abs().max()
    assert error(value, gold) <= 1.5 * error(naive, gold) + 1e-3
    assert error(grad, gold_grad) <= 1.5 * error(naive_grad, gold_grad) + 1e-3 * gold_grad.abs().max()


@pytest.mark.parametrize("V", [5, 97, 501, 1025])
@fast_paths
def test_a_bf16_gradient_has_nothing_in_it_of_what_stands_beside(case, score, value_and_grads, uneven, backend, V):
    """Not NaN either, on CPUs whose matrix product reads on beyond the last column."""
    N = 600 if backend == "torch" else 64
    hidden, weight, labels, _ = case((N,), 64, V, labelled=1.0)
    run = lambda dtype: value_and_grads(
        lambda hidden: score(hidden, weight.to(dtype), labels, backend=backend), [hidden.to(dtype)], uneven((N,))
    )[1][0]
    gold = run(torch.float32)
    torch.testing.assert_close(run(torch.bfloat16).float(), gold, rtol=0, atol=0.05 * float(gold.abs().max()))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(("backend", "V"), [("torch", 1001), ("torch", 9001), ("triton", 1001)])
def test_logits_between_16_and_32_are_not_rounded_to_low_precision(case, score, dtype, backend, V):
    hidden, weight, _, _ = case((100,), 64, V, size=8.0)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    logits = hidden.double() @ weight.double().T
    labels = logits.topk(3).indices[:, 2]
    assert ((logits.amax(dim=1) > 16) & (logits.amax(dim=1) < 64)).all()
    gold = linear_logprob(hidden.double(), weight.double(), labels, backend="reference")
    naive = linear_logprob(hidden, weight, labels, backend="reference")
    value = score(hidden, weight, labels, backend=backend)
    rms_of_naive = (naive - gold).square().mean().sqrt()
    # bf16 keeps 8 bits and fp16 keeps 11
    assert rms_of_naive > (1e-2 if dtype == torch.bfloat16 else 2e-3)
    assert (value - gold).abs().max() < 1e-4


@fast_paths
def test_fp16_gradient_survives_a_flat_distribution_over_a_large_vocabulary(
    case, score, value_and_grads, uneven, backend
):
    # unnormalised, the softmax sums to V, beyond the largest fp16
    _, weight, labels, _ = case((4,), 8, 70_000, labelled=1.0)
    hidden, weight = torch.zeros(4, 8, dtype=torch.float16), weight.half()
    run = lambda path: lambda hidden: score(hidden, weight.to(hidden.dtype), labels, backend=path)
    _, (grad,) = value_and_grads(run(backend), [hidden], uneven((4,)))
    _, (gold,) = value_and_grads(run("reference"), [hidden.double()], uneven((4,)))
    assert (grad.double() - gold).abs().max() <= 5e-3 * gold.abs().max()


@fast_paths
def test_autocast_changes_nothing(device_of, case, score, value_and_grads, uneven, backend):
    hidden, weight, labels, _ = case((3, 4), 16, 50)
    f = lambda hidden: score(hidden, weight.float(), labels, backend=backend)
    plain, (plain_grad,) = value_and_grads(f, [hidden.float()], uneven((3, 4)))
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        cast_, (cast_grad,) = value_and_grads(f, [hidden.float()], uneven((3, 4)))
    assert torch.equal(cast_, plain)
    assert torch.equal(cast_grad, plain_grad)
