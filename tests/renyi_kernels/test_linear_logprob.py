"""Log-probability under a frozen head. Layout: K particles, B sequences, N or T tokens, D hidden size, V vocabulary.

Gold is the reference path in fp64, and that path in turn is held to cross_entropy.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from csrc_bench.measure import cpu_peak_mib
from renyi_kernels import linear_logprob

from .marks import every_backend, fast_paths, no_bf16_in_the_interpreter

IGNORE = -100
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 4.0},
    "scale": {"logit_scale": 0.4},
    "all": {"bias": True, "logit_softcap": 3.0, "logit_scale": 1.7},
    "negative_scale": {"bias": True, "logit_softcap": 7.5, "logit_scale": -0.6},
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@pytest.fixture
def case(normals):
    """(hidden, weight, labels, head with its bias drawn), in fp64; logits have standard deviation `size`."""

    def build(lead, D, V, head=(), *, size=3.0, seed=0, labelled=0.8):
        draw, head = normals(seed), dict(head)
        hidden, weight = draw(*lead, D), draw(V, D) * size / math.sqrt(D)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, V, lead, generator=generator)
        labels[torch.rand(lead, generator=generator) >= labelled] = IGNORE
        if head.get("bias"):
            head["bias"] = draw(V)
        return hidden, weight, labels, head

    return build


LOW_PRECISION = [torch.bfloat16, torch.float16]
# the kernels have no fp64; the tolerance is absolute, in nats, as are fp32's 1e-5
precise_paths = pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("torch", torch.float64, 1e-12), ("triton", torch.float32, 1e-5)], ids=str
)


@pytest.fixture(scope="session")
def score(device_of):
    """score(hidden, weight, labels, ..., backend=...): the op run where that path runs, its result on the CPU."""

    def run(*tensors, backend, **head):
        on = device_of(backend)
        head = {name: x.to(on) if isinstance(x, torch.Tensor) else x for name, x in head.items()}
        return linear_logprob(*(x.to(on) for x in tensors), backend=backend, **head).cpu()

    return run


def cast(head, dtype):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in head.items()}


def mib_of_rows(rows, V, itemsize):
    return rows * V * itemsize / 2**20


# values and gradients


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


# low precision


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


# what the derivative refuses


@pytest.mark.parametrize(
    "loss_of", [lambda logprob: -logprob.sum(), lambda logprob: logprob.square().sum()], ids=["linear", "nonlinear"]
)
@pytest.mark.parametrize("through", ["backward", "grad"])
@pytest.mark.parametrize("alone", [True, False], ids=["penalty", "loss_and_penalty"])
@fast_paths
def test_second_derivative_raises(case, score, loss_of, through, alone, backend):
    hidden, weight, labels, _ = case((6,), 5, 7)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    loss = loss_of(score(hidden, weight, labels, backend=backend))
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    penalised = grad.square().sum() if alone else loss + grad.square().sum()
    with pytest.raises(RuntimeError):
        penalised.backward() if through == "backward" else torch.autograd.grad(penalised, hidden)


@every_head
def test_second_derivative_of_the_reference_path_agrees_with_finite_differences(case, head):
    hidden, weight, labels, head = case((3,), 4, 5, head)
    f = lambda hidden: linear_logprob(hidden, weight, labels, backend="reference", **head)
    assert gradcheck(f, hidden.requires_grad_())
    assert gradgradcheck(f, hidden)


@pytest.mark.parametrize("hidden_requires_grad", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
@fast_paths
def test_a_trainable_head_is_refused_in_the_backward_by_name(case, score, hidden_requires_grad, name, backend):
    hidden, weight, labels, head = case((6,), 5, 7, HEADS["bias"])
    hidden, weight, bias = hidden.float(), weight.float(), head["bias"].float()
    expected = score(hidden, weight, labels, bias=bias, backend=backend)
    hidden.requires_grad_(hidden_requires_grad)
    {"weight": weight, "bias": bias}[name].requires_grad_()
    logprob = score(hidden, weight, labels, bias=bias, backend=backend)
    assert torch.equal(logprob, expected)
    with pytest.raises(RuntimeError, match=f"linear_logprob: the head's {name}"):
        logprob.sum().backward()


@fast_paths
def test_backward_can_run_twice_with_other_upstreams(case, score, backend):
    hidden, weight, labels, _ = case((6,), 5, 7)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    logprob = score(hidden, weight, labels, backend=backend)
    once = torch.autograd.grad(logprob.sum(), hidden, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * logprob.sum(), hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)


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


# errors

FITTING = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2, 3, dtype=torch.int64)}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("stray", [5, -1, -101, 2**40])
def test_a_label_outside_the_vocabulary_is_a_value_error_that_shows_it(backend, stray):
    labels = torch.tensor([[0, 4, IGNORE], [1, 2, stray]])
    with pytest.raises(ValueError, match=f"labels.*got {stray}"):
        linear_logprob(**FITTING | {"labels": labels}, backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("weight", ValueError, {"weight": torch.zeros(5, 3)}),
        ("weight", ValueError, {"weight": torch.zeros(4)}),
        ("weight", TypeError, {"weight": torch.zeros(5, 4).double()}),
        ("weight", TypeError, {"hidden": torch.zeros(2, 3, 4).bfloat16()}),
        ("labels", ValueError, {"labels": torch.zeros(3).long()}),
        ("labels", ValueError, {"labels": torch.zeros(6).long()}),
        ("labels", TypeError, {"labels": torch.zeros(2, 3).int()}),
        ("labels", TypeError, {"labels": torch.zeros(2, 3)}),
        ("bias", ValueError, {"bias": torch.zeros(4)}),
        ("bias", ValueError, {"bias": torch.zeros(5, 1)}),
        ("logit_softcap", ValueError, {"logit_softcap": 0.0}),
        ("logit_softcap", ValueError, {"logit_softcap": -3.0}),
        ("logit_softcap", ValueError, {"logit_softcap": math.nan}),
        ("logit_softcap", ValueError, {"logit_softcap": 1e31}),
        ("logit_softcap", ValueError, {"logit_softcap": 1e-31}),
        ("logit_scale", ValueError, {"logit_scale": math.nan}),
        ("logit_scale", ValueError, {"logit_scale": -math.inf}),
        ("logit_scale", ValueError, {"logit_scale": 1e39}),
        ("hidden", TypeError, {"hidden": torch.zeros(2, 3, 4).long()}),
        ("weight", ValueError, {"weight": torch.zeros(0, 4)}),
        ("weight", ValueError, {"hidden": torch.zeros(2, 3, 0), "weight": torch.zeros(5, 0)}),
        ("bias", TypeError, {"bias": torch.zeros(5).long()}),
        ("chunk_mib", ValueError, {"chunk_mib": 0.0}),
        ("chunk_mib", ValueError, {"chunk_mib": math.nan}),
    ],
)
def test_what_does_not_fit_is_named(backend, name, error, change):
    with pytest.raises(error, match=f"^{name}:"):
        linear_logprob(**FITTING | change, backend=backend)
