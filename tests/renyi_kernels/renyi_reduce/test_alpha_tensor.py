"""alpha as a tensor: the values of the number, and nothing asks for its value.

Layout: K particles, B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import renyi_loss, renyi_reduce

from ..marks import ALPHAS, every_alpha, every_backend, fast_paths, fp64_paths
from .definitions import DTYPES, RELATIVE

EXTREMES = [5e-324, 1e-300, 1e-200, 1e-12, 1e200, 1.7e308]
OUTSIDE = [-1e-9, -1.0, math.nan, math.inf, -math.inf]
WITHOUT_MASS = [[-1.0, -math.inf, -math.inf], [-2.0, -math.inf, -3.0]]  # of all particles; of one particle


def tensor(alpha, dtype=torch.float64):
    return torch.tensor(alpha, dtype=dtype)


@pytest.fixture
def results(reduce):
    """results(s, alpha, backend): [loss, responsibilities, ess, logp, gradient of s], for an uneven upstream."""

    def run(s, alpha, backend):
        s = s.detach().requires_grad_()
        out = reduce(s, alpha, backend)
        upstream = torch.linspace(-1, 2, len(out.loss), dtype=out.loss.dtype)
        return [*(x.detach() for x in out), torch.autograd.grad(out.loss, s, upstream)[0]]

    return run


@pytest.mark.parametrize("alpha", [*ALPHAS, *EXTREMES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@fp64_paths
def test_a_tensor_gives_the_bits_of_the_number(normals, results, alpha, dtype, backend):
    for s in (-normals(0)(4, 5).abs().to(dtype), torch.tensor(WITHOUT_MASS, dtype=dtype)):
        pairs = zip(results(s, tensor(alpha), backend), results(s, alpha, backend), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("alpha", [*ALPHAS, *EXTREMES])
def test_the_kernels_take_a_tensor_too(normals, results, alpha):
    for s in (-normals(0)(4, 5).abs().float(), torch.tensor(WITHOUT_MASS)):
        # the reference works in fp64 inside and rounds its results to fp32 too, beyond which a loss may be
        for x, truth in zip(results(s, tensor(alpha), "triton"), results(s, alpha, "reference"), strict=True):
            torch.testing.assert_close(x, truth, rtol=RELATIVE[torch.float32], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every_backend
def test_alpha_of_any_floating_dtype_has_the_value_that_it_holds(normals, results, dtype, backend):
    s, alpha = -normals(1)(4, 5).abs().float(), tensor(0.8, dtype)
    pairs = zip(results(s, alpha, backend), results(s, float(alpha), backend), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@every_alpha
def test_derivatives_agree_with_finite_differences(normals, alpha):
    s = (1.5 * normals(2)(4, 3) - 2.0).requires_grad_()
    loss = lambda s: renyi_reduce(s, tensor(alpha)).loss
    assert gradcheck(loss, s)
    assert gradgradcheck(loss, s)


@every_backend
def test_at_alpha_zero_what_has_no_mass_gives_the_gradient_of_the_mean(results, backend):
    """The formula that is not used would multiply zero and infinity."""
    loss, responsibilities, _, _, gradient = results(torch.tensor(WITHOUT_MASS), tensor(0.0), backend)
    assert loss.tolist() == [1.5, math.inf, math.inf]
    assert torch.equal(responsibilities, torch.full((2, 3), 0.5))
    assert gradient.tolist() == [[0.5, 0.0, -1.0], [0.5, 0.0, -1.0]]


@pytest.mark.parametrize("alpha", OUTSIDE)
@every_backend
def test_a_tensor_out_of_range_makes_the_whole_loss_nan(results, alpha, backend):
    """A number raises a ValueError. A tensor cannot, but no loss may look as if all was well."""
    for s in (torch.tensor(WITHOUT_MASS), torch.zeros(1, 2)):
        loss, responsibilities, ess, _, _ = results(s, tensor(alpha), backend)
        assert all(x.isnan().all() for x in (loss, responsibilities, ess))


@fp64_paths
@every_alpha
def test_nothing_asks_for_the_value_of_alpha_or_of_the_loss(backend, alpha):
    """Fake tensors have no values: any question for one raises."""
    with FakeTensorMode():
        for given_ in (tensor(alpha), alpha):
            tokens = torch.zeros(3, 4, 5, requires_grad=True)
            out = renyi_reduce(tokens, given_, mask=torch.ones(4, 5, dtype=torch.bool), backend=backend)
            out.loss.sum().backward()
            assert [x.shape for x in out] == [(4,), (3, 4), (4,), (3, 4)]
            assert tokens.grad.shape == tokens.shape


def test_one_compiled_graph_serves_every_alpha(normals):
    s = -normals(3)(3, 4).abs()
    torch._dynamo.reset()
    loss = torch.compile(
        lambda alpha: renyi_reduce(s, alpha, backend="torch").loss, fullgraph=True, backend="aot_eager"
    )
    loss(tensor(0.5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha in ALPHAS:
            torch.testing.assert_close(loss(tensor(alpha)), renyi_reduce(s, alpha).loss, rtol=1e-12, atol=0)
    torch._dynamo.reset()


@fast_paths
def test_the_fused_loss_takes_a_tensor(normals, device_of, backend):
    on, draw = device_of(backend), normals(4)
    hidden, weight = draw(3, 2, 4, 5).to(on, torch.float32), draw(7, 5).to(on, torch.float32)
    labels = torch.arange(8, device=on).view(2, 4) % 7
    losses = [renyi_loss(hidden, weight, labels, alpha, backend=backend).loss for alpha in (0.8, tensor(0.8))]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="alpha"):
        renyi_loss(hidden, weight, labels, tensor([0.8]), backend=backend)


@pytest.mark.parametrize(
    ("alpha", "error"),
    [
        (torch.tensor([0.8]), ValueError),
        (torch.tensor(1), TypeError),
        (torch.tensor(True), TypeError),
        (torch.tensor(0.8, requires_grad=True), ValueError),
        (torch.tensor(0.8, device="meta"), ValueError),
    ],
    ids=["with_a_dimension", "int", "bool", "trained", "elsewhere"],
)
def test_a_tensor_that_does_not_fit_is_named(alpha, error):
    with pytest.raises(error, match=r"^alpha:"):
        renyi_reduce(torch.zeros(2, 3), alpha)
