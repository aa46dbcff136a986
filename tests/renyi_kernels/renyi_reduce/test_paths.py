"""What renyi_reduce takes: tokens and masks, dtypes, strides, on every path; and what it refuses.

Layout: K particles, B sequences, T tokens; numbers are those of arXiv 2605.27747.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from renyi_kernels import renyi_reduce

from ..marks import ALPHAS, every_alpha, fast_paths
from .definitions import DTYPES, RELATIVE, TINY, every_path, log_likelihoods, property_test

# tokens


@pytest.mark.parametrize(
    ("backend", "dtype", "alpha"),
    [
        *(("torch", dtype, alpha) for dtype in DTYPES for alpha in ALPHAS),
        ("triton", torch.float32, 0.0),
        ("triton", torch.float32, 0.8),
    ],
    ids=str,
)
@property_test
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 5)),
    seed=st.integers(0, 2**31),
    junk=st.sampled_from([math.nan, -math.inf, math.inf]),
)
def test_tokens_reduce_as_their_masked_sums_whatever_stands_under_the_mask(
    normals, uneven, reduce, gradient, alpha, backend, dtype, shape, seed, junk
):
    draw, upstream = normals(seed), uneven(shape[1:2]).to(dtype)
    tokens, mask = -draw(*shape).abs().to(dtype), draw(*shape[1:]) > -0.3
    sums = (tokens.double() * mask).sum(dim=-1)
    tokens = torch.where(mask, tokens, junk)
    out = reduce(tokens, alpha, backend, mask)
    torch.testing.assert_close(out.logp.double(), sums, rtol=RELATIVE[dtype], atol=0)
    for ours, theirs in zip(out, reduce(out.logp, alpha, backend), strict=True):
        assert torch.equal(ours, theirs)
    expected = gradient(out.logp, alpha, upstream, backend)[..., None] * mask
    assert torch.equal(gradient(tokens, alpha, upstream, backend, mask), expected)


@every_alpha
@every_path
def test_a_fully_masked_example_has_log_likelihood_zero_and_no_token_gradient(
    normals, reduce, gradient, alpha, backend, dtype
):
    tokens, mask = normals(5)(3, 2, 4).to(dtype), torch.tensor([[True] * 4, [False] * 4])
    tokens[:, 1] = math.nan
    out = reduce(tokens, alpha, backend, mask)
    assert torch.equal(out.logp[:, 1], torch.zeros(3, dtype=dtype))
    assert out.loss[1] == 0
    assert torch.equal(out.responsibilities[:, 1], torch.full((3,), 1 / 3, dtype=dtype))
    grad = gradient(tokens, alpha, torch.tensor([1.0, 2.0]), backend, mask)
    assert torch.equal(grad[:, 1], torch.zeros(3, 4, dtype=dtype))


@fast_paths
def test_without_a_mask_every_token_counts(normals, reduce, backend):
    tokens = normals(6)(3, 2, 4).float()
    everything = torch.ones(2, 4, dtype=torch.bool)
    for ours, theirs in zip(reduce(tokens, 0.8, backend), reduce(tokens, 0.8, backend, everything), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(reduce(tokens[..., :1], 0.8, backend).loss, reduce(tokens[..., 0], 0.8, backend).loss)


MASK_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32]


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("part", ["all", "slice", "steps", "transposed"])
@fast_paths
def test_a_mask_of_zeros_and_ones_is_a_boolean_one(normals, reduce, gradient, uneven, backend, mask_dtype, part):
    """Also where it is a part of a wider one: its conversion to a boolean lies in memory in another way than it did."""
    tokens, mask = normals(7)(3, 2, 4).float(), torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])
    wide = (1 - mask).repeat_interleave(3, dim=1).to(mask_dtype)  # where the mask does not lie stands its opposite
    if part == "transposed":
        wide = wide.T.contiguous().T
    given_ = mask.to(mask_dtype) if part == "all" else (wide[:, 2:6] if part == "slice" else wide[:, 1::3]).copy_(mask)
    assert given_.is_contiguous() == (part == "all")
    expected = reduce(tokens, 0.8, backend, mask.bool())
    assert torch.equal(reduce(tokens, 0.8, backend, given_).loss, expected.loss)
    expected = gradient(tokens, 0.8, uneven((2,)), backend, mask.bool())
    assert torch.equal(gradient(tokens, 0.8, uneven((2,)), backend, given_), expected)


@every_alpha
@fast_paths
def test_no_examples_give_empty_results_and_gradient(reduce, alpha, backend):
    for shape in ((3, 0), (3, 0, 5)):
        s = torch.zeros(shape, requires_grad=True)
        out = reduce(s, alpha, backend)
        assert [tuple(x.shape) for x in out] == [(0,), (3, 0), (0,), (3, 0)]
        out.loss.sum().backward()
        assert s.grad.shape == shape


# backends, dtypes and layouts


@fast_paths
def test_no_tokens_are_a_certain_outcome(reduce, gradient, backend):
    tokens = torch.zeros(3, 2, 0)
    out = reduce(tokens, 0.8, backend)
    assert not out.logp.any()
    assert torch.equal(out.loss, torch.zeros(2))
    assert gradient(tokens, 0.8, torch.ones(2), backend).shape == (3, 2, 0)


def test_sums_longer_than_a_tile_of_the_kernel_are_right(normals, uneven, reduce, gradient):
    tokens, mask = (
        -normals(16)(300, 2, 40).abs().float(),
        normals(17)(2, 40) > 0,
    )  # 16 tokens of 300 particles at a time
    gold = reduce(tokens.double(), 0.01, "reference", mask)
    out = reduce(tokens, 0.01, "triton", mask)
    torch.testing.assert_close(out.logp.double(), gold.logp, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss.double(), gold.loss, rtol=1e-6, atol=0)
    grad = gradient(tokens, 0.01, uneven((2,)), "triton", mask)
    expected = gradient(tokens.double(), 0.01, uneven((2,)), "reference", mask)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-8)


@every_alpha
def test_torch_and_reference_paths_agree_bitwise(normals, uneven, gradient, alpha):
    s, upstream = normals(14)(4, 3).float(), uneven((3,))
    outs = [renyi_reduce(s, alpha, backend=backend) for backend in ("torch", "reference")]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outs, strict=True))
    grads = [gradient(s, alpha, upstream, backend) for backend in ("torch", "reference")]
    assert torch.equal(*grads)


@every_alpha
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@fast_paths
def test_low_precision_input_gives_what_its_fp32_copy_gives(normals, reduce, gradient, alpha, dtype, backend):
    s = (3 * normals(8)(4, 3)).to(dtype)
    out = reduce(s, alpha, backend)
    assert all(field.dtype == torch.float32 for field in out)
    for ours, theirs in zip(out, reduce(s.float(), alpha, backend), strict=True):
        assert torch.equal(ours, theirs)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    grad = gradient(s, alpha, upstream, backend)
    torch.testing.assert_close(grad, (-out.responsibilities * upstream).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@fast_paths
def test_low_precision_tokens_are_summed_in_fp32(normals, reduce, dtype, backend):
    tokens = -normals(9)(2, 3, 700).abs().to(dtype)
    logp = reduce(tokens, 0.8, backend).logp
    torch.testing.assert_close(logp.double(), tokens.double().sum(dim=-1), rtol=1e-6, atol=0)


@every_alpha
@every_path
def test_strided_input_equals_contiguous(device_of, normals, uneven, gradient, alpha, backend, dtype):
    slack = {"rtol": RELATIVE[dtype], "atol": RELATIVE[dtype]}
    on, upstream = device_of(backend), uneven((3,))  # as the loss that `gradient` differentiates, on the CPU
    draw = lambda *shape: normals(10)(*shape).to(on, dtype)
    for strided in (draw(3, 4).T, draw(8, 6)[::2, 1::2], draw(4, 1).expand(4, 3)):
        assert not strided.is_contiguous()
        contiguous = strided.contiguous()
        out, expected = (renyi_reduce(s, alpha, backend=backend) for s in (strided, contiguous))
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **slack)
        grad = gradient(strided, alpha, upstream, backend)
        torch.testing.assert_close(grad, gradient(contiguous, alpha, upstream, backend), **slack)


@every_path
def test_strided_tokens_mask_and_upstream_equal_contiguous_ones(device_of, normals, uneven, backend, dtype):
    slack = {"rtol": RELATIVE[dtype], "atol": RELATIVE[dtype]}
    on = device_of(backend)
    tokens, mask = normals(11)(4, 3, 2).to(on, dtype).permute(2, 1, 0), (normals(12)(4, 3) > 0).to(on).T
    upstream = uneven((6,)).to(on, dtype)[::2]
    assert not any(x.is_contiguous() for x in (tokens, mask, upstream))

    def run(tokens, mask, upstream):
        tokens = tokens.detach().requires_grad_()
        out = renyi_reduce(tokens, 0.8, mask=mask, backend=backend)
        return [*out, *torch.autograd.grad(out.loss, tokens, upstream)]

    expected = run(tokens.contiguous(), mask.contiguous(), upstream.contiguous())
    for strided in ((tokens, mask, upstream), (tokens, mask.long(), upstream)):
        for ours, theirs in zip(run(*strided), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **slack)


@fast_paths
def test_two_runs_are_bitwise_equal_and_leave_the_input_alone(device_of, normals, backend):
    on = device_of(backend)
    tokens, mask = normals(13)(4, 3, 50).to(on, torch.float32), (normals(15)(3, 50) > 0).to(on)
    before = tokens.clone(), mask.clone()
    runs = [renyi_reduce(tokens, 0.8, mask=mask, backend=backend) for _ in range(2)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs, strict=True))
    assert torch.equal(tokens, before[0])
    assert torch.equal(mask, before[1])


def test_the_kernels_refuse_a_second_derivative(reduce):
    s = torch.tensor([[-1.0, -2.0], [-3.0, -1.5]], requires_grad=True)
    (grad,) = torch.autograd.grad(reduce(s, 0.8, "triton").loss.sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match=r"renyi_reduce.*second derivative.*backend='reference'"):
        grad.square().sum().backward()


@every_alpha
def test_only_the_loss_of_the_kernels_carries_a_gradient(reduce, alpha):
    out = reduce(torch.zeros(2, 3, requires_grad=True), alpha, "triton")
    assert [field for field in out._fields if getattr(out, field).requires_grad] == ["loss"]


@property_test
@given(s=log_likelihoods(), seed=st.integers(0, 2**31))
def test_permuting_particles_permutes_what_the_kernels_give(reduce, s, seed):
    order = torch.randperm(s.shape[0], generator=torch.Generator().manual_seed(seed))
    out, permuted = (reduce(x.float(), 0.8, "triton") for x in (s, s[order]))
    torch.testing.assert_close(permuted.loss, out.loss, rtol=1e-6, atol=TINY)
    torch.testing.assert_close(permuted.responsibilities, out.responsibilities[order], rtol=0, atol=1e-6)
    assert torch.equal(permuted.logp, out.logp[order])


# errors


@pytest.mark.parametrize("alpha", [-1e-9, -1.0, math.nan, math.inf, -math.inf])
def test_alpha_out_of_range_is_a_value_error(alpha):
    with pytest.raises(ValueError, match="alpha"):
        renyi_reduce(torch.zeros(2, 3), alpha)


@pytest.mark.parametrize("alpha", [True, "0.5", None, 1j, [0.5]], ids=repr)
def test_alpha_that_is_no_number_is_a_type_error(alpha):
    with pytest.raises(TypeError, match="alpha"):
        renyi_reduce(torch.zeros(2, 3), alpha)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4), (0, 3), (0, 3, 2)], ids=str)
def test_logp_of_another_shape_is_a_value_error(shape):
    with pytest.raises(ValueError, match="logp"):
        renyi_reduce(torch.zeros(shape), 0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_logp_that_is_not_floating_point_is_a_type_error(dtype):
    with pytest.raises(TypeError, match="logp"):
        renyi_reduce(torch.zeros(2, 3, dtype=dtype), 0.5)


@pytest.mark.parametrize(
    ("shape", "mask_shape"), [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 3, 4), (3,)), ((2, 3, 4), (2, 3, 4))], ids=str
)
def test_a_mask_that_does_not_fit_is_a_value_error(shape, mask_shape):
    with pytest.raises(ValueError, match="mask"):
        renyi_reduce(torch.zeros(shape), 0.5, mask=torch.ones(mask_shape, dtype=torch.bool))
