"""The priors equal their formulas, written out particle by particle in fp64. K particles."""

from __future__ import annotations

import math

import pytest
import torch

from renyi_engine.objectives.prior import potential, prior_term, smoothed_kl, squared_distances


def particles(num_particles: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_particles)
    return scale * torch.randn(num_particles, 23, generator=generator, dtype=torch.float64)


def naive_smoothed_kl(phi: torch.Tensor, std: float, h: float) -> torch.Tensor:
    terms = []
    for k in range(len(phi)):
        kernel = torch.stack([torch.exp(-(phi[k] - phi[j]).square().sum() / (2 * h**2)) for j in range(len(phi))])
        log_prior = -phi[k].square().sum() / (2 * std**2)
        terms.append(kernel.mean().log() - log_prior)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_potential_is_the_mean_squared_norm_over_twice_the_variance(num_particles):
    phi = particles(num_particles)
    expected = phi.square().sum(dim=1).mean() / (2 * 0.7**2)
    torch.testing.assert_close(potential(phi, 0.7), expected)


@pytest.mark.parametrize("num_particles", [1, 2, 5])
def test_smoothed_kl_and_its_gradient_equal_the_formula(num_particles):
    phi = particles(num_particles, scale=0.4).requires_grad_()
    ours = smoothed_kl(phi, 0.7, 1.3)
    theirs = naive_smoothed_kl(phi, 0.7, 1.3)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, phi), torch.autograd.grad(theirs, phi))


@pytest.mark.parametrize("bandwidth", [2e-150, 1e-30, 1e30, 9e149])
def test_a_bandwidth_whose_square_fp32_does_not_hold_gives_the_limit(bandwidth):
    """Of a tiny one every particle is alone, of a huge one all are together: what pulls them apart has no gradient."""
    phi = particles(3).float().requires_grad_()
    ours, alone = smoothed_kl(phi, 0.7, bandwidth), potential(phi, 0.7)
    torch.testing.assert_close(ours, alone - (math.log(3) if bandwidth < 1 else 0.0))
    torch.testing.assert_close(torch.autograd.grad(ours, phi), torch.autograd.grad(alone, phi))


def test_median_heuristic_is_svgds_and_is_constant_to_the_derivative():
    phi = particles(4).requires_grad_()
    distances = torch.pdist(phi.detach()).square()
    h = math.sqrt(distances.median() / (2 * math.log(5)))
    ours = smoothed_kl(phi, 1.5, None)
    theirs = naive_smoothed_kl(phi, 1.5, h)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, phi), torch.autograd.grad(theirs, phi))


def test_one_particle_has_nothing_to_keep_away_from():
    phi = particles(1)
    torch.testing.assert_close(smoothed_kl(phi, 0.6, None), potential(phi, 0.6))


def test_descending_the_smoothed_kl_drives_close_particles_apart():
    apart = particles(3)
    phi = (apart[:1] + 0.05 * apart).requires_grad_()
    before = squared_distances(phi).sum()
    (gradient,) = torch.autograd.grad(smoothed_kl(phi, 1e6, 0.5), phi)
    after = squared_distances(phi - 1e-2 * gradient).sum()
    assert after > before


def test_distances_of_close_particles_far_from_zero_do_not_cancel_in_fp32():
    offsets = 1e-3 * torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    squared = squared_distances(100.0 + offsets)
    assert squared[0, 1].item() == pytest.approx(25e-6, rel=1e-2)


@pytest.mark.parametrize(("name", "function"), [("potential", potential), ("smoothed_kl", smoothed_kl)])
def test_the_term_is_scaled_by_lambda_over_n(name, function):
    phi = particles(3)
    rest = (2.0,) if name == "potential" else (2.0, 0.9)
    term = prior_term(name, phi, weight=0.3, num_examples=17, std=2.0, bandwidth=0.9)
    torch.testing.assert_close(term, 0.3 / 17 * function(phi, *rest))


def test_no_prior_is_zero_without_a_graph():
    phi = particles(2).requires_grad_()
    assert not prior_term("none", phi, weight=1.0, num_examples=1, std=1.0, bandwidth=None).requires_grad


# ---------------------------------------------------------------------- a sick particle

SICK = {
    "NaN": lambda p: p[3:4].fill_(torch.nan),
    "infinite": lambda p: p.fill_(torch.inf),
    "one infinite value": lambda p: p[0:1].fill_(-torch.inf),
    "its square is infinite": lambda p: p.fill_(1e19),
    "the square of its distance is infinite": lambda p: p.fill_(4e18),
}


@pytest.mark.parametrize("kind", SICK)
@pytest.mark.parametrize("sick", [[1], [0, 3]], ids=str)
@pytest.mark.parametrize(("name", "bandwidth"), [("potential", None), ("smoothed_kl", None), ("smoothed_kl", 0.7)])
def test_a_sick_particle_leaves_the_others_the_update_that_they_have_without_it(kind, sick, name, bandwidth):
    """The gradients of K times the term, as training takes them."""
    everyone = 7.0 + particles(5, scale=0.3).float()
    sound = [k for k in range(5) if k not in sick]

    def gradient(phi):
        leaf = phi.clone().requires_grad_()
        term = prior_term(name, leaf, weight=1.0, num_examples=1, std=0.8, bandwidth=bandwidth)
        assert term.isfinite()
        return torch.autograd.grad(len(phi) * term, leaf)[0]

    expected = gradient(everyone[sound])
    for k in sick:
        SICK[kind](everyone[k])
    torch.testing.assert_close(gradient(everyone)[sound], expected, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_with_a_sick_particle_does_not_reach_a_bit_of_the_others():
    everyone = particles(4, scale=0.3).float()

    def gradient(value):
        leaf = everyone.clone()
        leaf[2] = value
        leaf.requires_grad_()
        return torch.autograd.grad(smoothed_kl(leaf, 0.8, None), leaf)[0][[0, 1, 3]]

    first = gradient(torch.nan)
    for value in (torch.inf, 1e20, -1e30):
        assert torch.equal(gradient(value), first)


def test_one_sound_particle_among_sick_ones_has_nothing_to_keep_away_from():
    phi = particles(3)
    phi[:2] = torch.nan
    torch.testing.assert_close(smoothed_kl(phi, 0.6, None), potential(phi, 0.6))


def test_a_particle_that_is_far_away_leaves_the_others_their_distances():
    phi = particles(4, scale=0.3).float()
    truth = squared_distances(phi[:3].double())
    phi[3] = 1e12
    torch.testing.assert_close(squared_distances(phi)[:3, :3].double(), truth, rtol=1e-5, atol=1e-5)
