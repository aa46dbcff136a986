"""linear_logprob gives the right values and gradients.

Gold is the reference path in fp64, and that path in turn is held to cross_entropy.

Layout: B sequences, N or T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings, strategies as st
from torch.autograd import gradcheck

from renyi_kernels import linear_logprob

from ..marks import every_backend, fast_paths
from .heads import HEADS, IGNORE, cast, every_head, mib_of_rows, precise_paths


@every_head
def test_reference_is_cross_entropy_of_the_capped_and_scaled_logits(case, value_and_grads, uneven, head):
    hidden, weight, labels, head = case((4, 5), 7, 11, head)

    def by_hand(hidden):
        logits = head.get("logit_scale", 1.0) * F.linear(hidden, weight, head.get("bias"))
        if "logit_softcap" in head:
            logits = torch.tanh(logits / head["logit_softcap"]) * head["logit_softcap"]
        return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")

    ours = lambda hidden: linear_logprob(hidden, weight, labels, backend="reference", **head)
    upstream = uneven((4, 5))
    value, (grad,) = value_and_grads(ours, [hidden], upstream)
    expected, (expected_grad,) = value_and_grads(by_hand, [hidden], upstream)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


any_shape_option_and_chunk = {
    "lead": st.lists(st.integers(0, 4), max_size=3).map(tuple),
    "D": st.integers(1, 9),
    "V": st.integers(1, 40),
    "head": st.sampled_from(list(HEADS.values())),
    "labelled": st.sampled_from([0.0, 0.5, 1.0]),
    "rows": st.sampled_from([1, 3, 1000]),
    "seed": st.integers(0, 2**31),
}


@pytest.fixture(scope="session")
def against_gold(normals, score, value_and_grads, uneven):
    """Hold values and gradients of a path, in a dtype, to those of the reference in fp64."""

    def check(backend, dtype, tolerance, *, lead, D, V, head, labelled, rows, seed):
        draw, head = normals(seed), dict(head)
        hidden, weight = draw(*lead, D).to(dtype), draw(V, D).to(dtype)
        labels = (draw(*lead).abs() * 1e6).long() % V
        labels = labels.where(torch.special.ndtr(draw(*lead)) < labelled, IGNORE)
        if "bias" in head:
            head["bias"] = draw(V).to(dtype)
        chunk_mib = mib_of_rows(rows, V, 8)

        def run(backend, dtype):
            options = {"chunk_mib": chunk_mib, "backend": backend, **cast(head, dtype)}
            f = lambda hidden: score(hidden, weight.to(dtype), labels, **options)
            return value_and_grads(f, [hidden.to(dtype)], uneven(lead))

        (value, (grad,)), (gold, (gold_grad,)) = run(backend, dtype), run("reference", torch.float64)
        assert value.shape == labels.shape
        assert value.dtype == grad.dtype == dtype
        torch.testing.assert_close(value.double(), gold, rtol=0, atol=tolerance)
        torch.testing.assert_close(grad.double(), gold_grad, rtol=0, atol=tolerance)

    return check


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=st.fixed_dictionaries(any_shape_option_and_chunk))
def test_fp64_equals_gold_at_any_shape_option_and_chunk(against_gold, drawn):
    against_gold("torch", torch.float64, 1e-10, **drawn)


@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking is slow there
@given(drawn=st.fixed_dictionaries(any_shape_option_and_chunk))
def test_the_kernel_equals_gold_at_any_shape_option_and_chunk(against_gold, drawn):
    against_gold("triton", torch.float32, 1e-5, **drawn)


@pytest.mark.parametrize("V", [4095, 4096, 4097, 8193])
def test_the_kernel_equals_gold_about_the_edges_of_its_tiles(against_gold, V):
    options = {"head": HEADS["all"], "labelled": 1.0, "rows": 3, "seed": V}
    against_gold("triton", torch.float32, 1e-5, lead=(4,), D=5, V=V, **options)


@every_head
@pytest.mark.parametrize("rows", [1, 4, 1000])
@every_backend
def test_fp32_is_within_1e5_nats_and_gradients_within_5e4_of_the_largest(
    case, score, value_and_grads, uneven, head, rows, backend
):
    hidden, weight, labels, head = case((2, 3, 5), 13, 101, head)
    hidden, weight, head, upstream = hidden.float(), weight.float(), cast(head, torch.float32), uneven((2, 3, 5))

    def run(dtype, **kwargs):
        f = lambda hidden: score(hidden, weight.to(dtype), labels, **cast(head, dtype), **kwargs)
        return value_and_grads(f, [hidden.to(dtype)], upstream)

    value, (grad,) = run(torch.float32, backend=backend, chunk_mib=mib_of_rows(rows, 101, 4))
    gold, (gold_grad,) = run(torch.float64, backend="reference")
    assert value.dtype == grad.dtype == torch.float32
    assert (value - gold).abs().max() <= 1e-5
    assert (grad - gold_grad).abs().max() <= 5e-4 * gold_grad.abs().max()


@pytest.mark.parametrize("softcap", [1e-30, 0.3, 2.0, 30.0, 1e3, 1e6, 1e30])
@every_backend
def test_any_soft_cap_is_as_exact_as_none(case, score, value_and_grads, uneven, softcap, backend):
    """A cap far above the logits multiplies what was lost of tanh near zero. Logits go from 1e-3 to 10."""
    hidden, weight, labels, _ = case((60,), 13, 101, labelled=1.0)
    hidden, weight = (hidden * torch.logspace(-3, 0.5, 60)[:, None]).float(), weight.float()

    def run(dtype, backend):
        f = lambda hidden: score(hidden, weight.to(dtype), labels, logit_softcap=softcap, backend=backend)
        return value_and_grads(f, [hidden.to(dtype)], uneven((60,)))

    (value, (grad,)), (gold, (gold_grad,)) = run(torch.float32, backend), run(torch.float64, "reference")
    assert (value - gold).abs().max() <= 1e-5
    assert (grad - gold_grad).abs().max() <= 5e-4 * gold_grad.abs().max()


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_backend
def test_the_bias_may_have_a_dtype_of_its_own_and_never_changes_that_of_the_result(
    case, score, value_and_grads, uneven, dtype, bias_dtype, backend
):
    hidden, weight, labels, head = case((6,), 5, 7, HEADS["bias"])
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), head["bias"].half()

    def run(bias):
        return value_and_grads(lambda h: score(h, weight, labels, bias=bias, backend=backend), [hidden], uneven((6,)))

    (value, (grad,)), (expected, (expected_grad,)) = run(bias.to(bias_dtype)), run(bias.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@every_head
def test_gradient_agrees_with_finite_differences(case, head):
    hidden, weight, labels, head = case((2, 3), 5, 7, head)
    f = lambda hidden: linear_logprob(hidden, weight, labels, chunk_mib=mib_of_rows(2, 7, 8), backend="torch", **head)
    assert gradcheck(f, hidden.requires_grad_())


@precise_paths
def test_each_token_takes_its_own_upstream_gradient(case, score, backend, dtype, tolerance):
    hidden, weight, labels, _ = case((6,), 5, 7, labelled=1.0)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype)
    logprob = score(hidden, weight, labels, backend=backend)
    one_by_one = []
    for n in range(6):
        (grad,) = torch.autograd.grad(logprob, hidden, 2.0 * F.one_hot(torch.tensor(n), 6).to(dtype), retain_graph=True)
        assert torch.equal(grad[torch.arange(6) != n], torch.zeros(5, 5, dtype=dtype))
        one_by_one.append(grad[n])
    upstream = torch.arange(6.0, dtype=dtype) - 2
    (grad,) = torch.autograd.grad(logprob, hidden, upstream)
    torch.testing.assert_close(grad, torch.stack(one_by_one) * upstream[:, None] / 2)


@fast_paths
def test_a_single_token_needs_no_leading_dimension(case, score, backend):
    hidden, weight, labels, _ = case((1,), 5, 7, labelled=1.0)
    hidden, weight = hidden.float(), weight.float()
    whole = score(hidden, weight, labels, backend=backend)
    assert torch.equal(score(hidden[0], weight, labels[0], backend=backend), whole[0])


@pytest.mark.parametrize("lead", [(0,), (3, 0, 4), (2, 3, 4)], ids=str)
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_labels_all_is_zero(case, score, value_and_grads, uneven, lead, backend, dtype):
    hidden, weight, labels, _ = case(lead, 5, 7, labelled=0.0)
    f = lambda hidden: score(hidden, weight.to(dtype), labels, backend=backend)
    value, (grad,) = value_and_grads(f, [hidden.to(dtype)], uneven(lead))
    assert torch.equal(value, torch.zeros(lead))
    assert torch.equal(grad, torch.zeros(*lead, 5, dtype=dtype))


@every_head
@precise_paths
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_an_unlabelled_token_is_exactly_zero_whatever_its_hidden_state(
    case, score, value_and_grads, uneven, head, backend, dtype, tolerance, junk
):
    hidden, weight, labels, head = case((3, 4), 5, 7, head, labelled=0.5)
    hidden, weight, head = hidden.to(dtype), weight.to(dtype), cast(head, dtype)
    off, upstream = labels == IGNORE, uneven((3, 4))
    f = lambda hidden: score(hidden, weight, labels, chunk_mib=mib_of_rows(2, 7, 8), backend=backend, **head)
    clean, (clean_grad,) = value_and_grads(f, [hidden], upstream)
    hidden[off] = junk
    value, (grad,) = value_and_grads(f, [hidden], upstream.where(~off, junk))
    assert 0 < off.sum() < off.numel()
    assert torch.equal(value[off], torch.zeros(int(off.sum()), dtype=dtype))
    assert torch.equal(value, clean)
    assert torch.equal(grad[off], torch.zeros(int(off.sum()), 5, dtype=dtype))
    assert torch.equal(grad, clean_grad)


@precise_paths
def test_strided_inputs_equal_contiguous_ones(device_of, case, value_and_grads, uneven, backend, dtype, tolerance):
    on = device_of(backend)
    wide_hidden, wide_weight, wide_labels, _ = case((4, 6), 10, 22)
    wide_hidden, wide_weight, wide_labels = wide_hidden.to(on, dtype), wide_weight.to(on, dtype), wide_labels.to(on)
    hidden, weight = wide_hidden.transpose(0, 1)[:, :, ::2], wide_weight[::2, 1::2]
    labels = (wide_labels.T // 2).where(wide_labels.T != IGNORE, IGNORE)
    bias = torch.linspace(-1, 1, 22, dtype=dtype, device=on)[::2]
    assert not any(x.is_contiguous() for x in (hidden, weight, labels, bias))

    def run(hidden, weight, labels, bias, upstream):
        f = lambda hidden: linear_logprob(hidden, weight, labels, bias=bias, backend=backend)
        return value_and_grads(f, [hidden], upstream)

    upstream = uneven((4, 6)).to(on).T
    value, (grad,) = run(hidden, weight, labels, bias, upstream)
    tensors = (hidden, weight, labels, bias, upstream)
    expected, (expected_grad,) = run(*(x.contiguous() for x in tensors))
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance)


@every_backend
def test_logits_of_1e4_neither_overflow_nor_give_nan(case, score, value_and_grads, uneven, backend):
    hidden, weight, labels, _ = case((20,), 8, 31, size=1e4, labelled=1.0)
    hidden, weight = hidden.float(), weight.float()
    run = lambda path: lambda hidden: score(hidden, weight.to(hidden.dtype), labels, backend=path)
    value, (grad,) = value_and_grads(run(backend), [hidden], uneven((20,)))
    gold, (gold_grad,) = value_and_grads(run("reference"), [hidden.double()], uneven((20,)))
    torch.testing.assert_close(value.double(), gold, rtol=1e-5, atol=1e-2)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), gold_grad, rtol=0, atol=1e-2 * gold_grad.abs().max().item())


@precise_paths
def test_tokens_banned_by_a_bias_of_minus_inf_take_no_mass(
    case, score, value_and_grads, uneven, backend, dtype, tolerance
):
    hidden, weight, labels, _ = case((20,), 5, 7)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels[labels >= 0] %= 4
    bias = torch.tensor([0.0] * 4 + [-math.inf] * 3, dtype=dtype)
    banned = lambda hidden: score(hidden, weight, labels, bias=bias, backend=backend)
    shorter = lambda hidden: score(hidden, weight[:4], labels, backend=backend)
    value, (grad,) = value_and_grads(banned, [hidden], uneven((20,)))
    expected, (expected_grad,) = value_and_grads(shorter, [hidden], uneven((20,)))
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance)


@every_backend
def test_a_label_that_is_banned_has_log_probability_minus_inf(case, score, backend):
    hidden, weight, labels, _ = case((5,), 5, 7, labelled=1.0)
    bias = torch.zeros(7).index_fill(0, labels[2], -math.inf)
    logprob = score(hidden.float(), weight.float(), labels, bias=bias, backend=backend)
    assert logprob.isneginf().tolist() == (labels == labels[2]).tolist()
    assert not logprob.isnan().any()
