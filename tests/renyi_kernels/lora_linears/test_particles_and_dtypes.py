"""Particles do not touch each other in lora_linears, and each adapter may have a dtype of its own.

Layout: K particles, M rows, I/O in/out features, R rank, j a map.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from renyi_kernels import lora_linears

from ..closeness import assert_close, assert_errs_at_most_half_again_as_much
from ..marks import every_backend, every_path, every_x, fast_paths, low_precision_paths
from .problems import Problem

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
