"""lora_linears gives the right outputs and gradients.

Layout: K particles, M rows, I/O in/out features, R rank, j a map.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings, strategies as st
from torch.autograd import gradcheck, gradgradcheck

from ..closeness import assert_close
from ..marks import every_backend, every_path, every_x, fast_paths
from .problems import SCALING, O, Problem


def loop_of_linears(problem):
    """One F.linear at a time, as each adapter would run it alone."""
    outs = []
    for weight, bias, A, B in zip(problem.weights, problem.biases, problem.A, problem.B, strict=True):
        of_map = []
        for k in range(A.shape[0]):
            x = problem.x if problem.x.dim() == 2 else problem.x[k]
            of_map.append(F.linear(x, weight, bias) + SCALING * F.linear(F.linear(x, A[k]), B[k]))
        outs.append(torch.stack(of_map))
    return outs


@every_path
@every_x
def test_outputs_and_gradients_equal_a_loop_of_linears(
    problem, place, run, value_and_grads, uneven, backend, dtype, relative, shared_x
):
    gold = problem(shared_x=shared_x)
    given_ = place(gold, backend, dtype)
    by_hand = lambda *trained: torch.cat(loop_of_linears(gold.with_trained(*trained)), dim=-1)
    value, grads = value_and_grads(by_hand, gold.trained, uneven((3, 4, sum(O))))
    ours = run(given_, backend)
    assert all(x.dtype == dtype for x in ours)
    assert_close(ours, [value, *grads], relative)
    assert [tuple(out.shape) for out in given_.maps(backend)] == [(3, 4, o) for o in O]


any_shape = {
    "K": st.integers(1, 4),
    "M": st.integers(0, 6),
    "I": st.integers(1, 9),
    "shared_x": st.booleans(),
    "seed": st.integers(0, 2**31),
}
any_maps = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 3, 5, 8]), st.booleans()), min_size=1, max_size=3
)


@pytest.fixture(scope="session")
def against_gold(problem, place, run):
    """Hold outputs and gradients of a path at a shape to those of the reference in fp64."""

    def check(backend, dtype, relative, maps, **shape):
        O, R, biased = zip(*maps, strict=True)
        given_ = place(problem(O=O, R=R, biased=biased, **shape), backend, dtype)
        ours = run(given_, backend)
        assert all(x.dtype == dtype for x in ours)
        assert_close(ours, run(given_.map(torch.Tensor.double), "reference"), relative)

    return check


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=st.fixed_dictionaries(any_shape), maps=any_maps)
def test_the_torch_path_equals_gold_at_any_shape(against_gold, dtype, relative, shape, maps):
    against_gold("torch", dtype, relative, maps, **shape)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])  # shrinking is slow there
@given(shape=st.fixed_dictionaries(any_shape), maps=any_maps)
def test_the_kernels_equal_gold_at_any_shape(against_gold, shape, maps):
    against_gold("triton", torch.float32, 1e-5, maps, **shape)


@every_x
def test_the_kernels_equal_gold_where_ranks_and_maps_straddle_tiles(against_gold, shared_x):
    maps = [(33, 40, True), (31, 1, False), (65, 30, True)]  # of rank 71 together, in blocks of 64
    against_gold("triton", torch.float32, 1e-5, maps, K=2, M=33, I=34, shared_x=shared_x)


@every_x
def test_first_and_second_derivatives_of_the_reference_agree_with_finite_differences(problem, shared_x):
    given_ = problem(K=2, M=2, I=3, O=(2, 3), R=(1, 2), biased=(True, False), shared_x=shared_x)
    trained = [x.requires_grad_() for x in given_.trained]
    assert gradcheck(given_.all_maps("reference"), trained)
    assert gradgradcheck(given_.all_maps("reference"), trained)


@every_x
def test_the_derivative_of_the_torch_path_agrees_with_finite_differences(problem, shared_x):
    given_ = problem(K=2, M=2, I=3, O=(2, 3), R=(1, 2), biased=(True, False), shared_x=shared_x)
    assert gradcheck(given_.all_maps("torch"), [x.requires_grad_() for x in given_.trained])


@every_path
@every_x
def test_zero_b_gives_the_frozen_maps_alone_and_a_gradient_to_b(
    problem, place, run, backend, dtype, relative, shared_x
):
    given_ = place(problem(shared_x=shared_x), backend, dtype)
    given_.B = [torch.zeros_like(b) for b in given_.B]
    value, dx, *adapters = run(given_, backend)
    frozen = [F.linear(given_.x, w, b).expand(3, 4, -1) for w, b in zip(given_.weights, given_.biases, strict=True)]
    assert_close([value], [torch.cat(frozen, dim=-1).cpu()], relative)
    assert not any(dA.any() for dA in adapters[:3])
    assert all((dB.abs().amax(dim=(1, 2)) > 0).all() for dB in adapters[3:])
    assert dx.any()


@fast_paths
@every_x
def test_an_unused_map_gets_zero_and_leaves_the_gradients_of_the_others(problem, place, backend, shared_x):
    dtype, relative = (torch.float64, 1e-12) if backend == "torch" else (torch.float32, 1e-5)
    given_ = place(problem(shared_x=shared_x), backend, dtype)
    alone = Problem(given_.x, *([tensors[1]] for tensors in (given_.weights, given_.biases, given_.A, given_.B)))

    def grads(problem, j):
        trained = [x.detach().requires_grad_() for x in problem.trained]
        out = problem.with_trained(*trained).maps(backend)[j]
        return torch.autograd.grad(out.sin().sum(), trained)

    dx, *adapters = grads(given_, 1)
    assert_close([dx, adapters[1], adapters[4]], grads(alone, 0), relative)
    assert not any(adapters[j].any() for j in (0, 2, 3, 5))


# PyTorch's own matmul, and with it the reference, takes another product where no gradient of x is asked for
@fast_paths
@every_x
@pytest.mark.parametrize("asked", [["A"], ["B"], ["x"], ["x", "A"], ["x", "B"], ["A", "B"]], ids="".join)
def test_gradients_that_are_asked_for_do_not_depend_on_which_others_are(problem, place, backend, shared_x, asked):
    given_ = place(problem(shared_x=shared_x), backend, torch.float32)

    def grads(names):
        trained = [x.detach().clone() for x in given_.trained]
        groups = {"x": trained[:1], "A": trained[1:4], "B": trained[4:]}
        leaves = [x.requires_grad_() for name in names for x in groups[name]]
        found = torch.autograd.grad(given_.all_maps(backend)(*trained).sin().sum(), leaves)
        return dict(zip([(name, j) for name in names for j in range(len(groups[name]))], found, strict=True))

    everything, some = grads(["x", "A", "B"]), grads(asked)
    assert all(torch.equal(some[name], everything[name]) for name in some)


@every_backend
def test_without_a_gradient_asked_for_there_is_no_graph(problem, place, backend):
    given_ = place(problem(), backend, torch.float32)
    assert not any(out.requires_grad for out in given_.maps(backend))
    given_.A[0].requires_grad_()
    with torch.no_grad():
        assert not any(out.requires_grad for out in given_.maps(backend))


@every_path
@every_x
def test_strided_tensors_equal_contiguous_ones(problem, place, run, backend, dtype, relative, shared_x):
    given_ = place(problem(shared_x=shared_x), backend, dtype)

    def spread(t):  # the same values with a stride of 2 in the last dimension and of odd sizes in the others
        wide = torch.zeros(*(2 * size + 1 for size in t.shape), dtype=t.dtype, device=t.device)
        part = wide[tuple(slice(1, None, 2) for _ in t.shape)]
        return part.copy_(t)

    transpose = lambda t: t.mT.contiguous().mT  # as GPT-2's Conv1D keeps its weight
    strided, expected = given_.map(spread), run(given_, backend)
    assert not any(t.is_contiguous() for t in [*strided.trained, *strided.weights])
    assert_close(run(strided, backend), expected, relative)
    transposed = given_.map(lambda t: transpose(t) if t.dim() > 1 else t)
    assert not any(w.is_contiguous() for w in transposed.weights)
    assert_close(run(transposed, backend), expected, relative)


@fast_paths
@every_x
def test_the_gradient_from_above_may_be_strided(problem, place, uneven, backend, shared_x):
    given_ = place(problem(shared_x=shared_x), backend, torch.float32)
    grads = []
    for layout in (lambda t: t, lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        trained = [x.detach().requires_grad_() for x in given_.trained]
        outs = given_.with_trained(*trained).maps(backend)
        upstream = [layout(uneven(out.shape).to(out)) for out in outs]
        grads.append(torch.autograd.grad(outs, trained, upstream))
    assert_close(*grads, 1e-6)


@every_path
@every_x
def test_backward_can_run_twice(problem, place, backend, dtype, relative, shared_x):
    given_ = place(problem(shared_x=shared_x), backend, dtype)
    trained = [x.requires_grad_() for x in given_.trained]
    value = given_.all_maps(backend)(*trained)
    once = torch.autograd.grad(value.sum(), trained, retain_graph=True)
    thrice = torch.autograd.grad(3 * value.sum(), trained)
    assert_close(thrice, [3 * grad for grad in once], relative)
