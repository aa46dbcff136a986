"""How adapters begin, and what an EnsembleConfig may say.

Layout: K particles, I in features.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from renyi_engine import EnsembleConfig
from renyi_engine.ensemble.initial_adapters import initial_adapters

from .attaching import attach


@pytest.mark.parametrize("init", ["standard", "spread"])
def test_init_of_a_particle_does_not_depend_on_how_many_there_are(tiny_model, init):
    few = attach(tiny_model("llama"), 2, apart=False, init=init, seed=3).stacked()
    many = attach(tiny_model("llama"), 5, apart=False, init=init, seed=3).stacked()
    for path, (A, B) in few.items():
        assert torch.equal(A, many[path][0][:2])
        assert torch.equal(B, many[path][1][:2])


def test_init_does_not_depend_on_or_disturb_the_global_generator(tiny_model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = attach(tiny_model("llama"), apart=False).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = attach(tiny_model("llama"), apart=False).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(deadline=None)
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2, unique=True),
    init=st.sampled_from(["standard", "spread"]),
)
@example(seeds=[0, 1], init="standard")
@example(seeds=[0, 2**12], init="standard")
@example(seeds=[7, 7 + 2**31], init="standard")
def test_particles_and_seeds_all_start_apart(seeds, init):
    linear = {"q_proj": torch.nn.Linear(16, 8)}
    starts = []
    for seed in seeds:
        A, B = initial_adapters(linear, EnsembleConfig(num_particles=3, rank=2, init=init, seed=seed))["q_proj"]
        starts += list(A) if init == "standard" else list(B)
    for i, start in enumerate(starts):
        assert not any(torch.equal(start, other) for other in starts[:i]), "two particles are the same"


def test_standard_init_is_the_base(tiny_model, naive_logprob, batch):
    ensemble = attach(tiny_model("llama"), apart=False, init="standard")
    assert all((B == 0).all() for _, B in ensemble.stacked().values())
    truth = naive_logprob(tiny_model("llama"), batch)
    torch.testing.assert_close(ensemble.sequence_logprob(batch), truth.expand(3, -1), rtol=0, atol=1e-5)


def test_standard_init_of_a_is_kaiming_uniform_as_peft_has_it(tiny_model):
    """Bound 1 / sqrt(I), standard deviation bound / sqrt(3)."""
    for path, (A, _) in attach(tiny_model("llama"), 8, apart=False, init="standard", rank=16).stacked().items():
        bound = A.shape[-1] ** -0.5
        assert A.abs().max() <= bound
        assert A.abs().max() > 0.99 * bound, path
        assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_spread_init_starts_particles_apart_in_what_they_predict(llama, batch):
    ensemble = attach(llama, apart=False, init="spread")
    for _, B in ensemble.stacked().values():
        assert B.std().item() == pytest.approx(0.01, rel=0.25)
    logp = ensemble.sequence_logprob(batch)
    assert (logp.max(0).values - logp.min(0).values).min() > 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_particles": 0}, {"num_particles": 2.0}, {"num_particles": True}, {"rank": 0}, {"rank": -1},
        {"r": 0},
        {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"init": "zeros"}, {"seed": -1},
        {"seed": 2**32},
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EnsembleConfig(**wrong)


def test_rank_is_another_name_of_r():
    config = EnsembleConfig(3, 4)
    assert (config.num_particles, config.r, config.rank) == (3, 4, 4)
    assert EnsembleConfig(num_particles=3, rank=4) == EnsembleConfig(3, r=4) == EnsembleConfig(3, 4, rank=4) == config
    assert EnsembleConfig().rank == 8
    assert dataclasses.replace(config, r=5).rank == 5


def test_r_and_rank_that_differ_are_refused_by_both_names():
    with pytest.raises(ValueError, match=r"r, rank: .* r is 4 and rank is 5; give r alone"):
        EnsembleConfig(r=4, rank=5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_rslora": "no"}, "use_rslora: expected True or False; got 'no'"),
        ({"lora_alpha": True}, "lora_alpha: expected a number above 0; got True"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a number above 0; got '16'"),
        ({"seed": 1.5}, r"seed: expected a whole number from 0 to 2\^32 - 1; got 1.5"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        EnsembleConfig(**given)


def test_scaling_is_alpha_over_rank_or_its_root():
    assert EnsembleConfig(rank=4, lora_alpha=6).scaling == 1.5
    assert EnsembleConfig(rank=4, lora_alpha=6, use_rslora=True).scaling == 3.0
