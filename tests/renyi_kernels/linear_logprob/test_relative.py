"""The gradient relative to the target: d logp / d h = a w_y - b E W, with E_v = exp(z_v - c) for v != y and E_y = 0.

Its error in each row, and what becomes of rows whose E would not fit. Layout: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

from renyi_kernels import linear_logprob
from renyi_kernels.head_chunks import passes_of

from ..marks import fast_paths, low_precision_paths
from .heads import HEADS, LOW_PRECISION, cast, every_head

V = 5000  # two whole blocks of the kernel and a part of a third
# the largest relative error of a number that a dtype rounds
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def row_errors(gradient, gold):
    """How long the error of each row is, in lengths of that row."""
    return (gradient.double() - gold).norm(dim=1) / gold.norm(dim=1)


# the error in low precision


@pytest.fixture(scope="module")
def likely_targets(normals):
    """(hidden, weight, labels) in a dtype, mean logp -0.6 nats. Rows of the weight may share a large part."""

    def build(dtype, shared=0.0, N=256, D=64, V=8192):
        draw = normals(0)
        weight = ((draw(V, D) + shared * draw(D)) / math.sqrt(D)).to(dtype)
        labels = torch.arange(N) * 31 % V
        towards_target = weight.double()[labels] - weight.double().mean(dim=0)
        return (draw(N, D) + 11.85 * towards_target).to(dtype), weight, labels

    return build


def gold_of(hidden, weight, labels):
    """(logp, d logp / d h) in fp64, by (onehot - p) W with the target's 1 - p as a sum of the others."""
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.T
    others = torch.softmax(logits, dim=1).scatter(1, labels[:, None], 0.0)
    logp = torch.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
    return logp, others.sum(dim=1, keepdim=True) * weight[labels] - others @ weight


every_share = pytest.mark.parametrize("shared", [0.0, 5.0], ids=["unlike_rows", "rows_with_much_in_common"])


def check_low_precision(logp, gradient, problem):
    gold, gold_gradient = gold_of(*problem)
    assert -0.7 < gold.mean() < -0.5
    assert (logp - gold).abs().max() <= 1e-5
    assert row_errors(gradient, gold_gradient).max() <= (5e-3 if gradient.dtype == torch.bfloat16 else 1e-3)


@every_share
@low_precision_paths
def test_a_gradient_errs_by_half_a_percent_of_its_row_at_most(
    likely_targets, score, value_and_grads, backend, dtype, shared
):
    hidden, weight, labels = problem = likely_targets(dtype, shared, N=256 if backend == "torch" else 64)
    f = lambda hidden: score(hidden, weight, labels, backend=backend)
    logp, (gradient,) = value_and_grads(f, [hidden], torch.ones(len(hidden)))
    check_low_precision(logp, gradient, problem)


def as_the_kernels_do(products, weight, labels, dtype):
    """(logp, a, b, E, gradient) by the kernels' formulas in plain PyTorch. No row is careful. E in fp16 is 64 times."""
    y, factor = labels[:, None], 64.0 if dtype == torch.float16 else 1.0
    exact = factor * (products - products.gather(1, y)).exp().scatter(1, y, 0.0)
    E = exact.to(dtype)
    S, rounding = (exact / factor).sum(dim=1), (E.float() - exact).sum(dim=1) / factor
    a, b = (S + rounding) / (1 + S), 1 / (factor * (1 + S))
    P = E.float() @ weight.float()
    return -torch.log1p(S), a, b, E, (a[:, None] * weight[labels].float() - b[:, None] * P).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_kernels_compute_what_is_written_above(likely_targets, device, dtype):
    """Here in the precisions that the interpreter gets right."""
    hidden, weight, labels = (x.to(device) for x in likely_targets(dtype, 5.0, N=16))
    products = hidden.float() @ weight.float().T
    logp, a, b, E, gradient = as_the_kernels_do(products, weight, labels, dtype)
    kernels, ours, our_gradient = passes_of("triton"), torch.empty_like(E), torch.empty_like(gradient)
    found = kernels.logprob_pass(products, labels, None, None, 1.0, ours)
    kernels.gradient_pass(ours.float() @ weight.float(), weight, labels, *found[1:], our_gradient)
    for x, expected in zip(found, (logp, a, b), strict=True):
        torch.testing.assert_close(x, expected, rtol=2e-6, atol=0)
    for x, expected in ((ours, E), (our_gradient, gradient)):
        torch.testing.assert_close(x, expected, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


@every_share
def test_what_is_written_above_errs_by_half_a_percent_at_most_in_bf16(likely_targets, shared):
    hidden, weight, labels = problem = likely_targets(torch.bfloat16, shared)
    logp, *_, gradient = as_the_kernels_do(hidden.float() @ weight.float().T, weight, labels, torch.bfloat16)
    check_low_precision(logp, gradient, problem)


# rows of every kind in one batch

# by how many nats another logit exceeds the target's. Where that is more than 6.5 (fp16) or 44, E would not fit
GAPS = [-1e4, -120.0, -60.0, -20.0, -3.0, 0.0, 3.0, 6.4, 6.6, 12.0, 43.9, 44.1, 88.0, 89.0, 200.0, 1e4]


def rows_with_gaps(normals):
    """(products [N, V] in fp32, targets [N]): row n has its largest logit GAPS[n] above its target."""
    products, targets = normals(3)(len(GAPS), V).float(), torch.arange(len(GAPS)) * 333
    others = products.scatter(1, targets[:, None], -math.inf).amax(dim=1)
    return products.scatter_(1, targets[:, None], (others - torch.tensor(GAPS))[:, None]), targets


def pass_over(backend, products, targets, head, dtype, on):
    """(logprob, d logprob / d product) of a path's pass, on the CPU."""
    products, targets = products.clone().to(on), targets.to(on)
    bias = head["bias"].to(on) if "bias" in head else None
    E = torch.empty_like(products, dtype=dtype)
    if backend == "torch" and dtype == products.dtype:
        E = products
    head = (bias, head.get("logit_softcap"), head.get("logit_scale", 1.0), E)
    logprob, a, b = passes_of(backend).logprob_pass(products, targets, *head)
    gradient = -b[:, None] * E.float()
    if a is not None:
        gradient.scatter_add_(1, targets[:, None], a[:, None])
    return logprob.cpu(), gradient.cpu()


def gold_of_products(products, targets, bias=0.0, logit_softcap=None, logit_scale=1.0):
    z = products.double().requires_grad_()
    logits = logit_scale * (z + bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    y = targets[:, None]
    # the sum of the others, not 1 - p, so that a small one keeps its digits
    others = (logits - logits.gather(1, y)).scatter(1, y, -math.inf)
    top = others.detach().amax(dim=1, keepdim=True).clamp(min=0)
    odds = (others - top).exp().sum(dim=1) + torch.expm1(-top.squeeze(1))
    logprob = -top.squeeze(1) - torch.log1p(odds)
    return logprob.detach(), torch.autograd.grad(logprob.sum(), z)[0]


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@fast_paths
def test_rows_whose_logits_exceed_the_target_by_anything_are_exact_in_one_batch(
    normals, device_of, head, dtype, backend
):
    (products, targets), head = rows_with_gaps(normals), dict(head)
    if "bias" in head:
        head["bias"] = normals(4)(V).float()
    logprob, gradient = pass_over(backend, products, targets, head, dtype, device_of(backend))
    gold, gold_gradient = gold_of_products(products, targets, **head)
    # a soft cap costs digits where the logit comes near it
    digits = 1e-4 if "logit_softcap" in head else 1e-5
    torch.testing.assert_close(logprob.double(), gold, rtol=digits, atol=1e-37)
    gradient = gradient.double()
    largest = gold_gradient.abs().amax(dim=1, keepdim=True)
    smallest = 1e-37 if dtype == torch.float32 else 2.0**-24  # of what there is
    # what rounding changes in the others, the target's entry makes up for: the sum of a row does not know of it
    off = (gradient.sum(dim=1) - gold_gradient.sum(dim=1)).abs()
    assert (off <= digits * gold_gradient.abs().sum(dim=1) + 1e-37).all()
    target = targets[:, None]
    gradient, gold_gradient = (x.scatter(1, target, 0.0) for x in (gradient, gold_gradient))
    assert ((gradient - gold_gradient).abs() <= (digits + 2 * ROUNDING[dtype]) * largest + smallest).all()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@fast_paths
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(normals, device_of, dtype, backend):
    products, targets = rows_with_gaps(normals)
    together = pass_over(backend, products, targets, {}, dtype, device_of(backend))
    for n in range(len(GAPS)):
        alone = pass_over(backend, products[n : n + 1], targets[n : n + 1], {}, dtype, device_of(backend))
        assert all(torch.equal(x, y[n : n + 1]) for x, y in zip(alone, together, strict=True))


@fast_paths
def test_without_a_gradient_log_probabilities_are_as_exact(normals, device_of, backend):
    products, targets = rows_with_gaps(normals)
    on = device_of(backend)
    given = products.clone().to(on), targets.to(on), None, None, 1.0, None
    logprob, a, b = passes_of(backend).logprob_pass(*given)
    assert a is b is None
    torch.testing.assert_close(logprob.cpu().double(), gold_of_products(products, targets)[0], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@fast_paths
def test_infinite_and_nan_logits_give_what_log_softmax_gives(normals, device_of, dtype, backend):
    inf, nan = math.inf, math.nan
    # by row: the target's logit, another one, all the others. None leaves what is there
    rows = [(-inf, None, None), (None, None, -inf), (None, -inf, None)]  # defined
    rows += [(inf, None, None), (None, inf, None), (inf, inf, None), (-inf, inf, None), (-inf, None, -inf)]  # not so
    rows += [(nan, None, None), (None, nan, None), (None, None, nan), (None, None, None)]
    products, targets = normals(5)(len(rows), 2100).float(), torch.full((len(rows),), 2060)
    for row, (own, another, others) in zip(products, rows, strict=True):
        target = row[2060].clone()
        if others is not None:
            row.fill_(others)
        row[7] = row[7] if another is None else another
        row[2060] = target if own is None else own
    z = products.double().requires_grad_()
    gold = torch.log_softmax(z, dim=1).gather(1, targets[:, None]).squeeze(1)
    (gold_gradient,) = torch.autograd.grad(gold.sum(), z)
    logprob, gradient = pass_over(backend, products, targets, {}, dtype, device_of(backend))
    defined = [0, 1, 2, 11]
    torch.testing.assert_close(logprob[defined].double(), gold[defined].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[defined].double(), gold_gradient[defined], rtol=0, atol=1e-3)
    undefined = [n for n in range(len(rows)) if n not in defined]
    assert gold[undefined].isnan().all()
    assert logprob[undefined].isnan().all()
    assert gradient[undefined].isnan().any(dim=1).all()


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@fast_paths
def test_a_vocabulary_of_one_is_certain(case, score, value_and_grads, uneven, head, dtype, backend):
    hidden, weight, labels, head = case((4,), 5, 1, head, labelled=1.0)
    f = lambda hidden: score(hidden, weight.to(dtype), labels, backend=backend, **cast(head, dtype))
    logp, (gradient,) = value_and_grads(f, [hidden.to(dtype)], uneven((4,)))
    assert not logp.any()
    assert not gradient.any()


@fast_paths
def test_a_whole_head_with_rows_of_every_kind_equals_gold(normals, device_of, value_and_grads, uneven, backend):
    """Hidden states that point to a token of the head, or away from the label, by anything."""
    draw = normals(6)
    weight, labels = draw(300, 8), torch.arange(12) * 23
    pointed = torch.where(torch.arange(12) % 2 == 0, labels, labels.roll(1))
    hidden = draw(12, 8) + torch.logspace(-1, 2, 12)[:, None] * weight[pointed]
    on = device_of(backend)

    def run(dtype, backend, on):
        f = lambda h: linear_logprob(h, weight.float().to(on, dtype), labels.to(on), backend=backend)
        logp, (gradient,) = value_and_grads(f, [hidden.float().to(on, dtype)], uneven((12,)).to(on))
        return logp.cpu(), gradient.cpu()

    (logp, gradient), (gold, gold_gradient) = run(torch.float32, backend, on), run(torch.float64, "reference", "cpu")
    assert gold.min() < -100
    assert gold.max() > -1e-9
    torch.testing.assert_close(logp.double(), gold, rtol=1e-5, atol=1e-5)
    assert ((gradient - gold_gradient).norm(dim=1) <= 1e-4 * gold_gradient.norm(dim=1) + 1e-9).all()
