"""Frozen maps of one input with the update of K particles. Layout: M rows, I/O in/out features, R rank, j a map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import lora_linears, use_backend

from .closeness import assert_close, assert_errs_at_most_half_again_as_much
from .marks import every_backend, every_path, every_x, fast_paths, low_precision_paths

SCALING = 1.75
# what lora_linears gives is held together for comparison: all maps' outputs beside each other
O, R, BIASED = (7, 3, 6), (2, 5, 1), (True, False, True)


class Problem:
    """x, weights, biases, A, B: of one dtype, on one device, and the op on them."""

    def __init__(self, x, weights, biases, A, B):
        self.x, self.weights, self.biases, self.A, self.B = x, weights, biases, A, B

    def map(self, f):
        each = lambda tensors: [None if t is None else f(t) for t in tensors]
        return Problem(f(self.x), each(self.weights), each(self.biases), each(self.A), each(self.B))

    @property
    def trained(self):
        return [self.x, *self.A, *self.B]

    def with_trained(self, x, *adapters):
        n = len(self.A)
        return Problem(x, self.weights, self.biases, list(adapters[:n]), list(adapters[n:]))

    def maps(self, backend):
        return lora_linears(self.x, self.weights, self.biases, self.A, self.B, SCALING, backend=backend)

    def all_maps(self, backend):
        return lambda *trained: torch.cat(self.with_trained(*trained).maps(backend), dim=-1)


@pytest.fixture(scope="session")
def problem(normals):
    """In fp64 on the CPU, sized so that outputs are of order 1."""

    def build(K=3, M=4, I=5, O=O, R=R, biased=BIASED, shared_x=False, seed=0):
        draw = normals(seed)
        x = draw(M, I) if shared_x else draw(K, M, I)
        return Problem(
            x,
            [draw(o, I) / I**0.5 for o in O],
            [draw(o) if b else None for o, b in zip(O, biased, strict=True)],
            [draw(K, r, I) / I**0.5 for r in R],
            [draw(K, o, r) / r**0.5 for o, r in zip(O, R, strict=True)],
        )

    return build


@pytest.fixture(scope="session")
def place(device_of):
    """place(problem, backend, dtype): where that path runs."""
    return lambda problem, backend, dtype: problem.map(lambda t: t.to(device_of(backend), dtype))


@pytest.fixture(scope="session")
def run(value_and_grads, uneven):
    """run(problem, backend) -> [outputs beside each other, gradients of x, each A, each B], all on the CPU."""

    def both(problem, backend, order=slice(None)):
        K, M = problem.A[0].shape[0], problem.x.shape[-2]
        upstream = uneven((K, M, sum(w.shape[0] for w in problem.weights)))[order].to(problem.x.device)
        value, grads = value_and_grads(problem.all_maps(backend), problem.trained, upstream)
        return [value.cpu(), *(grad.cpu() for grad in grads)]

    return both


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


# values and gradients


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


# particles do not touch each other


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float32), ("triton", torch.float32)], ids=str)
@every_x
@pytest.mark.parametrize("to", [5.0, float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_changing_one_particle_changes_no_bit_of_another(problem, place, run, backend, dtype, shared_x, to):
    given_ = place(problem(M=33, I=10, shared_x=shared_x), backend, dtype)
    value, dx, *adapters = run(given_, backend)
    bystanders = [0, 2]
    for part in ("A", "B") if shared_x else ("x", "A", "B"):
        other = given_.map(torch.clone)
        for tensor in [other.x] if part == "x" else getattr(other, part):
            tensor[1] = to
        changed, changed_dx, *changed_adapters = run(other, backend)
        assert not torch.equal(changed[1], value[1])
        assert torch.equal(changed[bystanders], value[bystanders])
        assert all(torch.equal(x[bystanders], y[bystanders]) for x, y in zip(changed_adapters, adapters, strict=True))
        assert shared_x or torch.equal(changed_dx[bystanders], dx[bystanders])


@every_path
@every_x
def test_permuting_particles_permutes_results(problem, place, run, backend, dtype, relative, shared_x):
    given_ = place(problem(K=4, shared_x=shared_x), backend, dtype)
    order = [2, 0, 3, 1]
    permuted = Problem(
        given_.x if shared_x else given_.x[order],
        given_.weights,
        given_.biases,
        [a[order] for a in given_.A],
        [b[order] for b in given_.B],
    )
    expected = [x if shared_x and x.dim() == 2 else x[order] for x in run(given_, backend)]
    assert_close(run(permuted, backend, order), expected, relative)


@every_backend
@every_x
def test_inputs_are_left_alone(problem, place, backend, shared_x):
    given_ = place(problem(shared_x=shared_x), backend, torch.float32)
    before = given_.map(torch.clone)
    trained = [x.detach().requires_grad_() for x in given_.trained]
    outs = given_.with_trained(*trained).maps(backend)
    sum(out.sin().sum() for out in outs).backward()
    for out in outs:
        out.detach().add_(1.0)  # nor does a result share memory with them
    present = lambda p: [t for t in [*p.trained, *p.weights, *p.biases] if t is not None]
    assert all(torch.equal(x, y) for x, y in zip(present(given_), present(before), strict=True))


@fast_paths
@every_x
def test_two_runs_are_bitwise_equal(two_threads, problem, place, run, backend, shared_x):
    given_ = place(problem(K=2, M=65, I=34, O=(70, 7, 6), shared_x=shared_x), backend, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(run(given_, backend), run(given_, backend), strict=True))


# dtypes


@low_precision_paths
@every_x
@pytest.mark.parametrize("masters", [torch.float32, None], ids=["fp32_masters", "same_dtype"])
def test_low_precision_errs_at_most_half_again_as_much_as_naive(problem, place, run, backend, dtype, shared_x, masters):
    given_ = place(
        problem(K=3, M=40, I=65, O=(97, 33), R=(7, 2), biased=(True, False), shared_x=shared_x), backend, dtype
    )
    if masters:
        # not representable in low precision, so that a gradient or a value taken of the wrong ones shows
        given_.A, given_.B = ([1.001 * t.to(masters) for t in tensors] for tensors in (given_.A, given_.B))
    ours, naive = run(given_, backend), run(given_, "reference")
    gold = run(given_.map(torch.Tensor.double), "reference")
    assert [x.dtype for x in ours] == [dtype, dtype, *[masters or dtype] * 4]
    assert_errs_at_most_half_again_as_much(ours, naive, gold)


@fast_paths
def test_each_adapter_may_have_a_dtype_of_its_own(problem, place, run, backend):
    given_ = place(problem(), backend, torch.float32)
    expected = run(given_.map(lambda t: t.half().float()), backend)
    given_ = given_.map(lambda t: t.half().float())
    given_.A[1], given_.B[2] = given_.A[1].half(), given_.B[2].half()
    ours = run(given_, backend)
    assert [x.dtype for x in ours[2:]] == [torch.float16 if i in (1, 5) else torch.float32 for i in range(6)]
    assert_close(ours[:2], expected[:2], 1e-6)
    assert_close(ours[2:], expected[2:], 2e-3)


@fast_paths
@every_x
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_loses_nothing_to_the_dtype_of_another_map(problem, place, run, backend, shared_x, low):
    given_ = place(problem(shared_x=shared_x), backend, torch.float32)
    representable = given_.map(lambda t: t.to(low).float())
    expected = run(representable, backend)
    mixed = representable.map(torch.clone)
    mixed.A[0], mixed.A[2], mixed.B[0] = mixed.A[0].to(low), mixed.A[2].half(), mixed.B[0].to(low)
    mixed.A[2] = representable.A[2].half()
    ours = run(mixed, backend)
    assert [x.dtype for x in ours[2:]] == [low, torch.float32, torch.float16, low, torch.float32, torch.float32]
    if low == torch.float16:  # which holds fewer large numbers than bf16, so that A[2] would be another one
        assert_close(ours[:2], expected[:2], 1e-6)
        for x, truth in zip(ours[2:], expected[2:], strict=True):
            assert_close([x], [truth.to(x.dtype)], 1e-6 if x.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@fast_paths
@every_x
def test_a_scaling_of_zero_gives_the_frozen_maps_and_their_gradients(poison, problem, place, backend, dtype, shared_x):
    """Also in low precision, where a product that counts nothing may leave its memory as it was."""
    if dtype == torch.bfloat16 and backend == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter gets bf16 wrong")
    given_ = place(
        problem(K=2, M=70, I=64, O=(64, 70), R=(8, 5), biased=(True, False), shared_x=shared_x), backend, dtype
    )
    trained = [x.detach().requires_grad_() for x in given_.trained]
    x, n = trained[0], len(given_.A)
    outs = lora_linears(x, given_.weights, given_.biases, trained[1 : 1 + n], trained[1 + n :], 0.0, backend=backend)
    frozen = [F.linear(x, w, b).expand(2, 70, -1) for w, b in zip(given_.weights, given_.biases, strict=True)]
    assert_close([out.detach() for out in outs], [out.detach() for out in frozen], 1e-2)
    dx, *adapters = torch.autograd.grad(sum(out.sum() for out in outs), trained)
    (expected,) = torch.autograd.grad(sum(out.sum() for out in frozen), x)
    assert_close([dx], [expected], 1e-2)
    assert not any(grad.any() for grad in adapters)


@fast_paths
@every_x
def test_autocast_changes_nothing(problem, place, run, backend, shared_x):
    given_ = place(problem(shared_x=shared_x), backend, torch.float32)
    plain = run(given_, backend)
    with torch.autocast(given_.x.device.type, dtype=torch.bfloat16):
        cast = run(given_, backend)
    assert all(torch.equal(x, y) for x, y in zip(cast, plain, strict=True))


# what the derivative refuses


@fast_paths
@pytest.mark.parametrize("name", ["weights", "biases"])
@pytest.mark.parametrize("trains", [True, False], ids=["beside_adapters", "alone"])
def test_a_trainable_weight_or_bias_is_refused_in_the_backward_by_name(problem, place, backend, name, trains):
    given_ = place(problem(), backend, torch.float32)
    expected = given_.maps(backend)
    for x in given_.trained:
        x.requires_grad_(trains)
    getattr(given_, name)[2].requires_grad_()
    outs = given_.maps(backend)
    assert all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True))
    with pytest.raises(RuntimeError, match=f"lora_linears: the {name}.*frozen"):
        sum(out.sum() for out in outs).backward()


def test_the_reference_differentiates_weights_and_biases_too(problem):
    given_ = problem()
    wanted = [x.requires_grad_() for x in [*given_.weights, given_.biases[0], given_.biases[2]]]
    grads = torch.autograd.grad(sum(out.sum() for out in given_.maps("reference")), wanted)
    assert all(grad.any() for grad in grads)


@fast_paths
@pytest.mark.parametrize("second", [0, 1, 4], ids=["x", "A", "B"])
def test_a_second_derivative_raises(problem, place, backend, second):
    given_ = place(problem(), backend, torch.float32)
    trained = [x.requires_grad_() for x in given_.trained]
    value = given_.all_maps(backend)(*trained).square().sum()
    (grad,) = torch.autograd.grad(value, trained[second], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lora_linears.*second derivative.*backend='reference'"):
        grad.square().sum().backward()


# what becomes of the outputs, and of inputs without memory


@fast_paths
def test_outputs_may_be_changed_in_place(problem, place, backend):
    """As some attention layers clamp their projections."""
    given_ = place(problem(), backend, torch.float32)
    trained = [x.requires_grad_() for x in given_.trained]

    def gradients(path):
        outs = given_.maps(path)
        for out in outs:
            out.clamp_(-0.5, 0.5)
        return torch.autograd.grad(sum(out.square().sum() for out in outs), trained)

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("without_memory", [lambda t: t.to("meta"), FakeTensorMode().from_tensor], ids=["meta", "fake"])
def test_tensors_without_memory_get_their_shapes(problem, without_memory):
    outs = problem().map(without_memory).maps("torch")
    assert [out.shape for out in outs] == [out.shape for out in problem().maps("torch")]
    assert all(isinstance(out, FakeTensor) or out.is_meta for out in outs)


# errors


def fitting():
    return {
        "x": torch.zeros(2, 3, 4),
        "weights": [torch.zeros(6, 4), torch.zeros(5, 4)],
        "biases": [torch.zeros(6), None],
        "A": [torch.zeros(2, 1, 4), torch.zeros(2, 3, 4)],
        "B": [torch.zeros(2, 6, 1), torch.zeros(2, 5, 3)],
        "scaling": 1.0,
    }


@every_backend
@pytest.mark.parametrize(
    ("name", "error", "argument", "index", "value"),
    [
        ("x", ValueError, "x", None, torch.zeros(4)),
        ("x", ValueError, "x", None, torch.zeros(1, 2, 3, 4)),
        ("weights[0]", ValueError, "x", None, torch.zeros(2, 3, 5)),
        ("A[0]", ValueError, "x", None, torch.zeros(3, 3, 4)),
        ("A[0]", ValueError, "x", None, torch.zeros(1, 3, 4)),
        ("weights, biases, A, B", ValueError, "weights", None, [torch.zeros(6, 4)]),
        ("weights, biases, A, B", ValueError, "biases", None, [None] * 3),
        ("weights, biases, A, B", ValueError, "A", None, []),
        ("weights[1]", ValueError, "weights", 1, torch.zeros(4)),
        ("weights[1]", ValueError, "weights", 1, torch.zeros(4, 5)),
        ("biases[0]", ValueError, "biases", 0, torch.zeros(5)),
        ("biases[1]", ValueError, "biases", 1, torch.zeros(1)),
        ("A[1]", ValueError, "A", 1, torch.zeros(3, 4)),
        ("A[1]", ValueError, "A", 1, torch.zeros(1, 3, 4)),
        ("A[1]", ValueError, "A", 1, torch.zeros(2, 3, 5)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 5, 4)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 4, 3)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 3, 5)),
        ("x", TypeError, "x", None, torch.zeros(2, 3, 4).long()),
        ("x", ValueError, "x", None, torch.zeros(2, 3, 0)),
        ("weights[1]", ValueError, "weights", 1, torch.zeros(0, 4)),
        ("A[1]", ValueError, "A", 1, torch.zeros(2, 0, 4)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 5, 0)),
        ("weights[1]", TypeError, "weights", 1, torch.zeros(5, 4).double()),
        ("biases[0]", TypeError, "biases", 0, torch.zeros(6).half()),
        ("A[1]", TypeError, "A", 1, torch.zeros(2, 3, 4).long()),
        ("B[0]", TypeError, "B", 0, torch.zeros(2, 6, 1).bool()),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, backend, name, error, argument, index, value):
    arguments = fitting()
    if index is None:
        arguments[argument] = value
    else:
        arguments[argument][index] = value
    worked = []
    for module, name_ in ((F, "linear"), (torch, "mm"), (torch, "addmm")):
        monkeypatch.setattr(module, name_, lambda *a, **k: worked.append(a))
    with use_backend(backend), pytest.raises(error) as raised:
        lora_linears(**arguments)
    assert str(raised.value).startswith(f"{name}:")
    assert worked == []


@every_backend
def test_no_map_at_all_is_a_value_error(backend):
    with pytest.raises(ValueError, match="at least one map"):
        lora_linears(torch.zeros(2, 3, 4), [], [], [], [], 1.0, backend=backend)
