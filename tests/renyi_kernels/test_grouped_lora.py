"""The low-rank update of K particles. Layout: M rows, I/O in/out features, R rank."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings, strategies as st
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import grouped_lora, use_backend

from .closeness import assert_close, assert_errs_at_most_half_again_as_much, largest
from .marks import (
    every_backend,
    every_path,
    every_x,
    fast_paths,
    fp64_paths,
    low_precision_paths,
    no_bf16_in_the_interpreter,
)

SCALING = 1.75
PARTS = ["x", "A", "B", "base_out"]

every_base = pytest.mark.parametrize("base", [None, "own", "shared"])
any_shape = {
    "K": st.integers(1, 5),
    "M": st.integers(0, 6),
    "I": st.integers(1, 9),
    "O": st.integers(1, 9),
    "R": st.sampled_from([1, 2, 3, 5, 8]),
    "shared_x": st.booleans(),
    "base": st.sampled_from([None, "own", "shared"]),
    "seed": st.integers(0, 2**31),
}


@pytest.fixture(scope="session")
def inputs(normals):
    """[x, A, B, base_out] in fp64, sized so that the update is of order 1."""

    def build(K, M, I, O, R, shared_x, base, seed=0):
        draw = normals(seed)
        x, A, B = draw(*([M] if shared_x else [K, M]), I), draw(K, R, I) / I**0.5, draw(K, O, R) / R**0.5
        base_out = {None: None, "own": (K, M, O), "shared": (M, O)}[base]
        return [x, A, B, None if base_out is None else draw(*base_out)]

    return build


def cast(tensors, dtype):
    return [None if x is None else x.to(dtype) for x in tensors]


@pytest.fixture(scope="session")
def through(device_of):
    """through(backend): the op of x, A, B, base_out, run where that path runs, its result on the CPU."""

    def build(backend):
        def run(*tensors):
            on = device_of(backend)
            x, A, B, base_out = (None if x is None else x.to(on) for x in tensors)
            return grouped_lora(x, A, B, SCALING, base_out, backend=backend).cpu()

        return run

    return build


def loop_of_linears(x, A, B, base_out):
    """One F.linear at a time, as a single adapter would run it."""
    outs = []
    for k in range(A.shape[0]):
        update = SCALING * F.linear(F.linear(x if x.dim() == 2 else x[k], A[k]), B[k])
        base = 0.0 if base_out is None else base_out if base_out.dim() == 2 else base_out[k]
        outs.append(base + update)
    return torch.stack(outs)


# values and gradients


@pytest.fixture(scope="session")
def against_gold(inputs, through, value_and_grads, uneven):
    """Hold value and gradients of a path at a shape to those of the reference in fp64."""

    def check(backend, dtype, relative, shape):
        given_, out_shape = cast(inputs(**shape), dtype), (shape["K"], shape["M"], shape["O"])
        value, grads = value_and_grads(through(backend), given_, uneven(out_shape))
        gold, gold_grads = value_and_grads(through("reference"), cast(given_, torch.float64), uneven(out_shape))
        assert value.shape == out_shape
        assert all(x is None or x.dtype == dtype for x in [value, *grads])
        assert_close([value, *grads], [gold, *gold_grads], relative)

    return check


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(shape=st.fixed_dictionaries(any_shape))
def test_value_and_all_gradients_equal_gold_at_any_shape(against_gold, dtype, relative, shape):
    against_gold("torch", dtype, relative, shape)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking is slow there
@given(shape=st.fixed_dictionaries(any_shape))
def test_the_kernels_equal_gold_at_any_shape(against_gold, shape):
    against_gold("triton", torch.float32, 1e-5, shape)


@every_x
@pytest.mark.parametrize(
    ("K", "M", "I", "O", "R"),
    # one beside a tile or two, in each size; more rank than one block of it
    [(1, 33, 31, 65, 17), (2, 65, 33, 31, 33), (3, 1, 97, 33, 70), (1, 31, 1, 129, 1), (5, 64, 32, 64, 16)],
)
def test_the_kernels_equal_gold_about_the_edges_of_their_tiles(against_gold, K, M, I, O, R, shared_x):
    shape = {"K": K, "M": M, "I": I, "O": O, "R": R, "shared_x": shared_x, "base": "own"}
    against_gold("triton", torch.float32, 1e-5, shape)


@every_path
@every_x
@every_base
def test_value_and_all_gradients_equal_a_loop_of_linears(
    inputs, through, value_and_grads, uneven, backend, dtype, relative, shared_x, base
):
    given_, upstream = cast(inputs(3, 4, 5, 7, 2, shared_x, base), dtype), uneven((3, 4, 7))
    value, grads = value_and_grads(through(backend), given_, upstream)
    expected, expected_grads = value_and_grads(loop_of_linears, cast(given_, torch.float64), upstream)
    assert_close([value, *grads], [expected, *expected_grads], relative)


@fp64_paths
@every_x
@every_base
def test_first_and_second_derivatives_agree_with_finite_differences(inputs, through, backend, shared_x, base):
    given_ = [None if x is None else x.requires_grad_() for x in inputs(2, 3, 3, 2, 1, shared_x, base)]
    assert gradcheck(through(backend), given_)
    assert gradgradcheck(through(backend), given_)


@pytest.mark.parametrize("second", ["x", "A", "B"])
def test_the_kernels_refuse_a_second_derivative(inputs, through, second):
    given_ = dict(zip(PARTS, cast(inputs(2, 3, 3, 2, 1, False, "own"), torch.float32), strict=True))
    given_[second].requires_grad_()
    (grad,) = torch.autograd.grad(through("triton")(*given_.values()).square().sum(), given_[second], create_graph=True)
    with pytest.raises(RuntimeError, match=r"grouped_lora.*second derivative.*backend='reference'"):
        grad.square().sum().backward()


@every_path
@every_x
@every_base
def test_zero_b_gives_the_base_output_exactly_and_a_gradient_to_b_alone(
    inputs, through, value_and_grads, uneven, backend, dtype, relative, shared_x, base
):
    x, A, B, base_out = cast(inputs(3, 4, 5, 7, 2, shared_x, base), dtype)
    value, grads = value_and_grads(through(backend), [x, A, torch.zeros_like(B), base_out], uneven((3, 4, 7)))
    assert torch.equal(value, torch.zeros(3, 4, 7, dtype=dtype) if base is None else base_out.expand(3, 4, 7))
    grads = dict(zip(PARTS, grads, strict=True))
    assert largest(grads["A"]) == largest(grads["x"]) == 0
    assert (grads["B"].abs().amax(dim=(1, 2)) > 0).all()


@every_path
def test_base_output_passes_the_upstream_gradient_through_unscaled(
    inputs, through, value_and_grads, uneven, backend, dtype, relative
):
    upstream = uneven((3, 4, 7))
    for base, expected in (("own", upstream), ("shared", upstream.sum(dim=0))):
        _, grads = value_and_grads(through(backend), cast(inputs(3, 4, 5, 7, 2, False, base), dtype), upstream)
        assert_close(grads[-1:], [expected], relative)


@every_path
def test_without_a_base_output_it_is_zero(inputs, through, backend, dtype, relative):
    x, A, B, _ = cast(inputs(3, 4, 5, 7, 2, False, None), dtype)
    zero = torch.zeros(3, 4, 7, dtype=dtype)
    assert_close([through(backend)(x, A, B, None)], [through(backend)(x, A, B, zero)], relative)


@every_path
@every_x
def test_strided_inputs_equal_contiguous_ones(
    device_of, inputs, value_and_grads, uneven, backend, dtype, relative, shared_x
):
    op = lambda x, A, B, base_out: grouped_lora(x, A, B, SCALING, base_out, backend=backend)
    on = device_of(backend)
    x, A, B, base_out = (x.to(on) for x in cast(inputs(6, 8, 10, 14, 4, shared_x, "own"), dtype))
    strided = [x[..., ::2, 1::2] if shared_x else x[::2, ::2, 1::2], A[::2, :, ::2], B[::2].mT.contiguous().mT]
    strided.append(base_out[::2, ::2].transpose(1, 2).contiguous().transpose(1, 2))
    assert not any(x.is_contiguous() for x in strided)
    # nor need the gradient from above be contiguous
    upstream = uneven((4, 14, 3)).to(on).permute(2, 0, 1)
    value, grads = value_and_grads(op, strided, upstream)
    expected, expected_grads = value_and_grads(op, [x.contiguous() for x in strided], upstream.contiguous())
    assert_close([value, *grads], [expected, *expected_grads], relative)


@every_path
@every_x
@every_base
def test_permuting_particles_permutes_results(
    inputs, through, value_and_grads, uneven, backend, dtype, relative, shared_x, base
):
    order = [2, 0, 3, 1]
    given_, upstream = cast(inputs(4, 5, 6, 7, 3, shared_x, base), dtype), uneven((4, 5, 7))
    permute = lambda x: x[order] if x is not None and x.dim() == 3 else x
    value, grads = value_and_grads(through(backend), given_, upstream)
    permuted, permuted_grads = value_and_grads(through(backend), list(map(permute, given_)), upstream[order])
    assert_close([permuted, *permuted_grads], map(permute, [value, *grads]), relative)


# particles do not touch each other


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("triton", torch.float32),
        pytest.param("triton", torch.bfloat16, marks=no_bf16_in_the_interpreter),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("changed", "shared_x"), [*((part, False) for part in PARTS), *((part, True) for part in PARTS[1:])]
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("to", [5.0, float("nan"), float("inf")])
def test_changing_one_particle_changes_no_bit_of_another(
    inputs, through, value_and_grads, uneven, backend, dtype, changed, to, shared_x
):
    K, M, I, O = (4, 33, 65, 70) if backend == "torch" else (3, 33, 18, 20)
    given_, upstream = cast(inputs(K, M, I, O, 5, shared_x, "own"), dtype), uneven((K, M, O))
    other = [x.clone() for x in given_]
    other[PARTS.index(changed)][1] = to
    value, grads = value_and_grads(through(backend), given_, upstream)
    changed_value, changed_grads = value_and_grads(through(backend), other, upstream)
    bystanders = [0, *range(2, K)]
    assert not torch.equal(changed_value[1], value[1])
    assert torch.equal(changed_value[bystanders], value[bystanders])
    for ours, theirs in zip(changed_grads, grads, strict=True):
        if ours.shape[0] == K and ours.dim() == 3:
            assert torch.equal(ours[bystanders], theirs[bystanders])


@every_backend
@every_x
@every_base
def test_inputs_are_left_alone(device_of, inputs, backend, shared_x, base):
    on, dtype = device_of(backend), torch.float32 if backend == "triton" else torch.float64
    given_ = [None if x is None else x.to(on) for x in cast(inputs(3, 4, 5, 7, 2, shared_x, base), dtype)]
    before = [None if x is None else x.clone() for x in given_]
    x, A, B, base_out = given_
    out = grouped_lora(x, A, B, SCALING, base_out, backend=backend)
    assert all(x is None or torch.equal(x, y) for x, y in zip(given_, before, strict=True))
    out.add_(1.0)  # nor does the result share memory with them
    assert all(x is None or torch.equal(x, y) for x, y in zip(given_, before, strict=True))


@fast_paths
def test_two_runs_are_bitwise_equal(two_threads, inputs, through, value_and_grads, uneven, backend):
    given_ = cast(inputs(4, 33, 65, 70, 5, True, "shared"), torch.float32)
    first, second = (value_and_grads(through(backend), given_, uneven((4, 33, 70))) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, y) for x, y in zip(first[1], second[1], strict=True))


# low precision


@low_precision_paths
@every_x
@every_base
def test_low_precision_errs_at_most_half_again_as_much_as_naive(
    inputs, through, value_and_grads, uneven, backend, dtype, shared_x, base
):
    given_ = cast(inputs(4, 64, 65, 97, 7, shared_x, base), dtype)
    upstream = uneven((4, 64, 97)).to(dtype).double()
    gold, gold_grads = value_and_grads(through("reference"), cast(given_, torch.float64), upstream)
    naive, naive_grads = value_and_grads(through("reference"), given_, upstream)
    value, grads = value_and_grads(through(backend), given_, upstream)
    assert all(x is None or x.dtype == dtype for x in [value, *grads])
    assert_errs_at_most_half_again_as_much([value, *grads], [naive, *naive_grads], [gold, *gold_grads])


# errors

FITTING = {
    "x": torch.zeros(2, 3, 4),
    "A": torch.zeros(2, 5, 4),
    "B": torch.zeros(2, 6, 5),
    "scaling": 1.0,
    "base_out": torch.zeros(2, 3, 6),
}


@every_backend
@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("x", ValueError, {"x": torch.zeros(4)}),
        ("x", ValueError, {"x": torch.zeros(2, 3, 5)}),
        ("x", ValueError, {"x": torch.zeros(3, 3, 4)}),
        ("x", ValueError, {"x": torch.zeros(1, 3, 4)}),
        ("x", ValueError, {"x": torch.zeros(1, 2, 3, 4)}),
        ("A", ValueError, {"A": torch.zeros(5, 4)}),
        ("B", ValueError, {"B": torch.zeros(6, 5)}),
        ("B", ValueError, {"B": torch.zeros(1, 6, 5)}),
        ("B", ValueError, {"B": torch.zeros(2, 6, 4)}),
        ("base_out", ValueError, {"base_out": torch.zeros(6)}),
        ("base_out", ValueError, {"base_out": torch.zeros(1, 3, 6)}),
        ("base_out", ValueError, {"base_out": torch.zeros(2, 3, 5)}),
        ("x", TypeError, {"x": torch.zeros(2, 3, 4).long()}),
        ("A", ValueError, {"A": torch.zeros(0, 5, 4)}),
        ("A", ValueError, {"A": torch.zeros(2, 0, 4)}),
        ("A", ValueError, {"A": torch.zeros(2, 5, 0)}),
        ("B", ValueError, {"B": torch.zeros(2, 0, 5)}),
        ("A", TypeError, {"A": torch.zeros(2, 5, 4).double()}),
        ("B", TypeError, {"B": torch.zeros(2, 6, 5).bfloat16()}),
        ("base_out", TypeError, {"base_out": torch.zeros(2, 3, 6).double()}),
    ],
)
def test_what_does_not_fit_is_named(backend, name, error, change):
    with use_backend(backend), pytest.raises(error, match=f"^{name}:"):
        grouped_lora(**FITTING | change)
