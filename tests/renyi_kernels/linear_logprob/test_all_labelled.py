"""linear_logprob where every label counts: the same bits, and nothing looks for labels.

Layout: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from renyi_kernels import head_chunks, linear_logprob, renyi_loss

from ..marks import every_backend, fast_paths
from .heads import HEADS, IGNORE, cast, every_head, mib_of_rows

PRECISIONS = [torch.float64, torch.float32, torch.bfloat16]


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [(0,), (11,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("D", [13, 32])
@every_backend
def test_it_gives_what_the_default_gives_if_all_labels_count(
    case, score, value_and_grads, uneven, head, dtype, lead, D, backend
):
    """The default copies a chunk's rows, and this does not. So the bits are compared where each row begins at a
    multiple of 64 bytes: elsewhere, those of a CPU's product can depend on the address. (Low precision is widened
    first, into memory of its own.)"""
    hidden, weight, labels, head = case(lead, D, 101, head, labelled=1.0)
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter gets bf16 wrong")
    options = {"chunk_mib": mib_of_rows(4, 101, 6), "backend": backend, **cast(head, dtype)}
    (value, grads), (expected, expected_grads) = (
        value_and_grads(
            lambda hidden, every=every: score(hidden, weight.to(dtype), labels, all_labelled=every, **options),
            [hidden.to(dtype)],
            uneven(lead),
        )
        for every in (True, False)
    )
    any_address = dtype == torch.float32 and D == 13
    tolerance = {"rtol": 0, "atol": 1e-5} if any_address else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(value, expected, **tolerance)
    torch.testing.assert_close(grads[0], expected_grads[0], **tolerance)


@fast_paths
def test_strided_rows_give_the_bits_of_the_default(device_of, case, value_and_grads, uneven, backend):
    hidden, weight, labels, _ = case((12,), 26, 101, labelled=1.0)
    hidden, weight = hidden.to(device_of(backend), torch.float32)[::2, ::2], weight.float().to(device_of(backend))
    labels, upstream = labels[::2].to(hidden.device), uneven((6,)).to(hidden.device)
    runs = [
        value_and_grads(
            lambda hidden, every=every: linear_logprob(
                hidden, weight[:, ::2], labels, all_labelled=every, backend=backend
            ),
            [hidden],
            upstream,
        )
        for every in (True, False)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1][0], runs[1][1][0])


def test_the_fused_loss_takes_it_too(case):
    hidden, weight, labels, _ = case((3, 2, 4), 5, 7, labelled=1.0)
    every, default = (renyi_loss(hidden, weight, labels[0], 0.8, all_labelled=each).loss for each in (True, False))
    assert torch.equal(every, default)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("need_grad", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_what_the_operator_does_asks_the_device_for_nothing(dtype, need_grad, head):
    """Fake tensors have no values: any question for one raises. They pass by what an operator does, so it is called."""
    head = dict(head)
    with FakeTensorMode():
        hidden, weight = torch.zeros(10, 13, dtype=dtype), torch.zeros(101, 13, dtype=dtype)
        labels, bias = torch.zeros(10, dtype=torch.int64), torch.zeros(101, dtype=dtype) if "bias" in head else None
        rest = (bias, head.get("logit_softcap"), head.get("logit_scale", 1.0), mib_of_rows(4, 101, 8))
        logprob, gradient = head_chunks.linear_logprob(hidden, weight, labels, *rest, True, need_grad, "torch")
        assert logprob.shape == (10,)
        assert gradient.shape == (10 if need_grad else 0, 13)
        with pytest.raises(Exception, match="nonzero"):  # the default does ask
            head_chunks.linear_logprob(hidden, weight, labels, *rest, False, need_grad, "torch")


@pytest.mark.parametrize("stray", [IGNORE, -1, 7])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_label_that_does_not_count_is_a_value_error_on_the_cpu(backend, stray):
    labels = torch.tensor([0, 3, stray])
    with pytest.raises(ValueError, match=rf"labels: expected a token id in \[0, 7\); got {stray}.*all_labelled=False"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(7, 4), labels, all_labelled=True, backend=backend)


def test_the_kernels_give_nan_to_a_label_that_does_not_count(device, case):
    hidden, weight, labels, _ = case((6,), 5, 7, labelled=1.0)
    hidden, weight, labels = hidden.float().to(device), weight.float().to(device), labels.to(device)
    run = lambda labels: head_chunks.linear_logprob(
        hidden, weight, labels, None, None, 1.0, 1.0, True, False, "triton"
    )[0]
    expected = run(labels)
    labels[2] = IGNORE
    ours = run(labels)
    assert ours.isnan().tolist() == [n == 2 for n in range(6)]
    assert torch.equal(ours[3:], expected[3:])
