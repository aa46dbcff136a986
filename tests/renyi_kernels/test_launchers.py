"""The launchers of the kernels, handed tensors that lie in memory in any way: as steps of wider ones, in any order.

Around each entry of such a tensor stands something else (NaN, or the opposite of a mask). Gold is the same pass in
plain PyTorch, in fp64. Layout as in the kernels: K particles, M rows, I/O in/out features, R rank, B sequences,
T tokens, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

import renyi_kernels.torch_ops.grouped_lora as torch_passes
import renyi_kernels.triton_ops.grouped_lora as lora_passes
import renyi_kernels.triton_ops.linear_logprob as logprob_passes
import renyi_kernels.triton_ops.renyi_reduce as reduce_passes
from renyi_kernels import reference

# shrinking is slow in the interpreter
fuzz = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
FLOATS = st.sampled_from([torch.float32, torch.float16])
MASKS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32]
ANY = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
PACKED = st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(1), st.sampled_from([0, 2]))
ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]  # 0 and 2 leave the last dimension last


def lie(tensor, layout, between=math.nan):
    """The same values as every so many entries of a wider tensor whose dimensions are in another order in memory."""
    steps, order = layout[: tensor.dim()], [d for d in ORDERS[layout[3]] if d < tensor.dim()]
    if layout[2] == 1 and tensor.dim() < 3:
        steps = (*steps[: tensor.dim() - 1], 1)
    shape = [size * step + 1 for size, step in zip(tensor.shape, steps, strict=True)]
    memory = torch.full([shape[d] for d in order], between, dtype=tensor.dtype, device=tensor.device)
    wide = memory.permute([order.index(d) for d in range(tensor.dim())])
    return wide[tuple(slice(1, None, step) for step in steps)].copy_(tensor)


@pytest.fixture(scope="module")
def draw(normals, device):
    return lambda seed, dtype: lambda *shape: normals(seed)(*shape).to(device, dtype)


def assert_close(ours, gold, dtype):
    relative = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(ours.double(), gold, rtol=0, atol=relative * max(1.0, gold.abs().max().item()))


SHAPES = {
    "shrink": ("KMI", "KRI", "KMR"),
    "expand": ("KMR", "KOR", "KMO", "KMO"),
    "up_backward": ("KMO", "KMR", "KOR", "KMR", "KOR"),
    "down_backward": ("KMI", "KMR", "KRI"),
}
# those that are written, and those whose last dimension has to be packed
WRITTEN = {"shrink": {2}, "expand": {3}, "up_backward": {3, 4}, "down_backward": {2}}
LAST_IS_PACKED = {"shrink": {2}, "expand": {0, 3}, "up_backward": {1, 3}, "down_backward": set()}


def counters_for(passes, like, ranks, K):
    """What the kernels count in, as `shrink` leaves it."""
    return passes.new_counters(like, ranks, K).zero_()


@pytest.mark.parametrize("kernel", SHAPES)
@fuzz
@given(
    data=st.data(),
    dtype=FLOATS,
    gradients=FLOATS,
    M=st.sampled_from([1, 5, 70]),
    seed=st.integers(0, 2**31),
    add=st.booleans(),
)
def test_a_low_rank_pass_takes_any_layout(draw, kernel, data, dtype, gradients, M, seed, add):
    sizes = {"K": 2, "M": M, "I": 9, "O": data.draw(st.sampled_from([1, 70])), "R": data.draw(st.sampled_from([1, 3]))}
    normal = draw(seed, dtype)
    given_, gold = [], []
    for place, letters in enumerate(SHAPES[kernel]):
        tensor = normal(*(sizes[letter] for letter in letters))
        if place in WRITTEN[kernel] and kernel.endswith("backward") and letters != "KMR":
            tensor = tensor.to(gradients)
        gold.append(tensor.cpu().double())
        given_.append(lie(tensor, data.draw(PACKED if place in LAST_IS_PACKED[kernel] else ANY)))
    if kernel == "expand" and data.draw(st.booleans()):
        given_[2], gold[2] = given_[3], gold[3]
    launch(kernel, lora_passes, given_, sizes, add)
    launch(kernel, torch_passes, gold, sizes, add)
    for ours, truth in zip(given_, gold, strict=True):  # what is only read is as it was, too
        assert_close(ours.cpu(), truth, torch.float16 if torch.float16 in (dtype, gradients) else torch.float32)


def launch(kernel, passes, tensors, sizes, add):
    """The pass on these tensors, with a map of its own where it takes several."""
    counters = counters_for(passes, tensors[0], [sizes["R"]], sizes["K"])
    of_maps = [[tensor] for tensor in tensors]
    if kernel == "shrink":
        passes.shrink(*tensors, counters)
    elif kernel == "expand":
        passes.expand(*of_maps[:2], 1.75, *of_maps[2:])
    elif kernel == "up_backward":
        passes.up_backward(*of_maps[:3], 1.75, *of_maps[3:], add, counters)
    else:
        passes.down_backward(*tensors, add, counters)
    assert not counters.any()


@pytest.mark.parametrize("mask_dtype", [None, *MASKS], ids=str)
@settings(fuzz, max_examples=12)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    layouts=st.tuples(*[ANY] * 6),
    shape=st.sampled_from([(1, 1, 1), (3, 2, 5), (2, 4, 1)]),
    alpha=st.sampled_from([0.0, 0.8]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_reduction_and_its_gradient_take_any_layout(draw, mask_dtype, dtype, layouts, shape, alpha, weighted, seed):
    normal, mask = draw(seed, dtype), None
    tokens, counts = -normal(*shape).abs(), torch.ones(shape[1:], dtype=torch.bool)
    if mask_dtype is not None:
        counts = draw(seed + 1, torch.float32)(*shape[1:]).cpu() > 0
        mask = lie(counts.to(tokens.device, mask_dtype), layouts[1], between=1)
        mask = lie((~counts).to(tokens.device, mask_dtype), layouts[1], 1).copy_(counts) if seed % 2 else mask
    upstream = draw(seed + 2, torch.float32)(shape[1])
    s = (tokens.cpu().double() * counts).sum(dim=-1).requires_grad_()
    weights = torch.softmax(draw(seed + 3, torch.float32)(shape[0]).double(), dim=0) if weighted else None
    gold = reference.renyi_reduce(s, alpha, None if weights is None else weights.cpu())
    (gradient,) = torch.autograd.grad(gold[0], s, upstream.cpu().double())

    given_alpha = torch.tensor(alpha, dtype=torch.float64, device=tokens.device)
    relative = None if weights is None else lie(reference.relative_weights(weights), layouts[5])
    ours = reduce_passes.forward(lie(tokens, layouts[0]), mask, given_alpha, relative)
    for x, truth in zip(ours, (*gold, s), strict=True):
        assert_close(x.cpu(), truth.detach(), torch.float32)
    pairs = [lie(x, layout) for x, layout in ((ours[1], layouts[2]), (ours[3], layouts[3]))]
    found = reduce_passes.backward(lie(upstream, layouts[4]), *pairs, mask, shape[2], dtype)
    assert found.dtype == dtype
    assert_close(found.cpu(), gradient[..., None] * counts, dtype)


@fuzz
@given(
    gradient_dtype=st.sampled_from([None, torch.float32, torch.float16]),
    bias_dtype=st.sampled_from([None, torch.float16, torch.float32, torch.float64]),
    layouts=st.tuples(PACKED, ANY, ANY, PACKED),
    softcap=st.sampled_from([None, 2.0]),
    N=st.integers(1, 4),
    V=st.sampled_from([1, 7, 300]),
    seed=st.integers(0, 2**31),
)
def test_the_log_probability_pass_takes_any_layout(draw, gradient_dtype, bias_dtype, layouts, softcap, N, V, seed):
    products = draw(seed, torch.float32)(N, V)
    target = (draw(seed + 1, torch.float32)(N).abs() * 1e4).long() % V
    bias = None if bias_dtype is None else draw(seed + 2, torch.float16)(V).to(bias_dtype)
    z = products.cpu().double().requires_grad_()
    logits = 1.5 * (z if bias is None else z + bias.cpu().double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    gold = torch.log_softmax(logits, dim=-1).gather(1, target.cpu()[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(gold.sum(), z)

    rows_stay_rows = lambda layout: (*layout[:3], 0)
    rows = lie(products, rows_stay_rows(layouts[0]))
    E = None
    if gradient_dtype is not None:
        E = lie(torch.full((N, V), math.nan, dtype=gradient_dtype, device=rows.device), rows_stay_rows(layouts[3]))
    given_ = (rows, lie(target, layouts[1], between=0), None if bias is None else lie(bias, layouts[2]))
    logprob, a, b = logprob_passes.logprob_pass(*given_, softcap, 1.5, E)
    assert_close(logprob.cpu(), gold.detach(), torch.float32)
    assert torch.equal(rows, products)
    assert (a is None) == (b is None) == (E is None)
    if E is not None:
        assert not E.gather(1, target[:, None]).any()
        found = (-b[:, None] * E).scatter_(1, target[:, None], a[:, None])
        assert_close(found.cpu(), gradient, gradient_dtype)


@fuzz
@given(
    dtype=FLOATS,
    layouts=st.tuples(PACKED, ANY, ANY, PACKED),
    N=st.integers(1, 4),
    D=st.sampled_from([1, 7, 1100]),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_pass_takes_any_layout(draw, dtype, layouts, N, D, seed):
    P, a, b = draw(seed, torch.float32)(N, D), *draw(seed + 1, torch.float32)(2, N)
    weight, target = draw(seed + 2, dtype)(3, D), (draw(seed + 3, torch.float32)(N).abs() * 1e4).long() % 3
    gold = a[:, None].double() * weight[target].double() - b[:, None].double() * P.double()
    rows_stay_rows = lambda layout: (*layout[:3], 0)
    out = lie(torch.empty_like(P, dtype=dtype), rows_stay_rows(layouts[3]))
    given_ = lie(P, rows_stay_rows(layouts[0])), lie(weight, layouts[1]), lie(target, layouts[2], between=0)
    logprob_passes.gradient_pass(*given_, a, b, out)
    assert_close(out.cpu(), gold.cpu(), dtype)
