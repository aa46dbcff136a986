"""An adapter's derivatives of every example, against one example at a time.

Layout: K particles, N examples, P parameters of the adapter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.critical_alpha import curvature as adapter
from renyi_engine.critical_alpha.curvature import estimate_alpha_star, particle, project_adapter
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_engine.objectives.dpo import DpoTask
from renyi_engine.objectives.sft import SftTask

# the tokenizer knows more characters than this, the questions do not use them
DTYPES = (torch.float32, torch.bfloat16)
TEXTS = [("ab", "cd"), ("a", "bbbbb"), ("cc", "a"), ("abcabc", "ba"), ("b", "c")]


@pytest.fixture
def attached(tiny_model):
    def attach(num_particles=2, init="spread", architecture="llama", **model):
        config = EnsembleConfig(num_particles, rank=2, init=init, layers_to_transform=[1, 2], seed=5)
        ensemble = LoraEnsemble.attach(tiny_model(architecture, vocab_size=110, **model), config)
        if init == "spread":
            with torch.no_grad():
                for _, B in ensemble.stacked().values():
                    B.mul_(20)
        return ensemble.to(ensemble.model.dtype)

    return attach


@pytest.fixture
def sft(tokenizer):
    task = SftTask(tokenizer, 64)
    return task, [task.example(i, {"prompt": p, "completion": c}) for i, (p, c) in enumerate(TEXTS)]


@pytest.fixture
def dpo(tokenizer):
    task = DpoTask(tokenizer, 64, beta=0.7, min_score_gap=None, score_columns=["a", "b"])
    rows = [{"prompt": p, "chosen": c, "rejected": c + "a" * (1 + i)} for i, (p, c) in enumerate(TEXTS)]
    return task, [task.example(i, row) for i, row in enumerate(rows)]


def alone(ensemble: LoraEnsemble, task, item, k: int) -> Tensor:
    """s of one example under particle k, on the ordinary path."""
    return task.score(ensemble, task.collate([item])).logp[k, 0]


def flat(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_scores_and_curvature_are_those_of_one_example_at_a_time(
    kind, attn_implementation, attached, request, tmp_path
):
    task, items = request.getfixturevalue(kind)
    # GPT-2, as Llama's norms are fp32 in an fp64 model
    ensemble = attached(architecture="gpt2", dtype=torch.float64, attn_implementation=attn_implementation)
    items = task.prepare(ensemble, items, tmp_path, 2, "base")
    found, point = project_adapter(ensemble, particle(ensemble, 1), task, items, 6, curvature="hessian", quiet=True)
    parameters = list(ensemble.parameters())
    assert len(found.basis) == sum(p.numel() for p in point) == sum(p[1].numel() for p in parameters)
    for n, item in enumerate(items):
        score = flat(g[1] for g in torch.autograd.grad(alone(ensemble, task, item, 1), parameters))
        torch.testing.assert_close(found.scores[n], found.basis.mT @ score)
    # the Hessian by central differences of that gradient, along one direction of each kind
    for column in (0, 5):
        v = found.basis[:, column].split([p[1].numel() for p in parameters])
        slopes = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                for p, part, value in zip(parameters, v, point, strict=True):
                    p[1].copy_(value + step * part.view_as(value))
            gradients = torch.autograd.grad(alone(ensemble, task, items[3], 1), parameters)
            slopes.append(flat(g[1] for g in gradients) @ found.basis)
        difference = (slopes[1] - slopes[0]) / 2e-5
        torch.testing.assert_close(found.curvatures[3][column], difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("num_particles", [1, 3, 8])
def test_how_many_examples_are_met_at_a_time_does_not_matter(num_particles, curvature, attached, sft):
    task, items = sft
    options = {"architecture": "gpt2", "dtype": torch.float64}
    value = particle(one := attached(**options), 0)
    expected, _ = project_adapter(one, value, task, items, 4, curvature=curvature, quiet=True)
    found, _ = project_adapter(
        attached(num_particles, **options), value, task, items, 4, curvature=curvature, quiet=True
    )
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.curvatures, expected.curvatures, rtol=1e-5, atol=1e-7)


def test_gauss_newton_is_the_curvature_of_the_head_along_the_slope_of_the_hidden_states(attached, sft):
    task, items = sft
    ensemble = attached(architecture="gpt2", dtype=torch.float64)
    found, point = project_adapter(ensemble, particle(ensemble, 1), task, items, 8, quiet=True)
    assert torch.linalg.eigvalsh(found.curvatures).min() > -1e-9 * found.curvatures.abs().max()
    # s as a function of hidden states that move along J v, the parameters' effect on them to first order
    parameters = list(ensemble.parameters())
    batch = task.collate([items[1]])
    v = found.basis[:, 2].split([p[1].numel() for p in parameters])

    def hidden_at(step):
        with torch.no_grad():
            for p, part, value in zip(parameters, v, point, strict=True):
                p[1].copy_(value + step * part.view_as(value))
            return ensemble(batch["input_ids"], batch["attention_mask"])[1:]

    slope = (hidden_at(1e-5) - hidden_at(-1e-5)) / 2e-5
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    centre = hidden_at(0.0)
    s = [ensemble.label_logprob(centre + step * slope, labels).sum() for step in (1e-3, 0.0, -1e-3)]
    bend = -(s[0] - 2 * s[1] + s[2]) / 1e-6
    assert found.curvatures[1, 2, 2].item() == pytest.approx(bend.item(), rel=1e-4)


def test_where_B_is_zero_only_B_moves(attached, sft):
    task, items = sft
    ensemble = attached(init="standard")
    found, point = project_adapter(ensemble, particle(ensemble, 0), task, items, 4, quiet=True)
    assert [p.shape for p in point] == [B.shape[1:] for _, B in ensemble.stacked().values()]
    assert len(found.basis) == sum(B[0].numel() for _, B in ensemble.stacked().values())
    assert found.scores.abs().max() > 0.01


@pytest.mark.parametrize("fails", [False, True])
def test_the_ensemble_is_left_as_it_was_bit_for_bit(fails, attached, sft, monkeypatch):
    task, items = sft
    ensemble = attached(3).train()
    before = [p.detach().clone() for p in ensemble.parameters()]
    if fails:
        monkeypatch.setattr(adapter, "project", lambda point, s, m, **_: next(iter(s(point, ""))) and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            project_adapter(ensemble, particle(ensemble, 1), task, items, 4, quiet=True)
    else:
        estimate_alpha_star(ensemble, task, items, prior_curvature=0.0, seed=0)
    assert all(torch.equal(p, value) and p.grad is None for p, value in zip(ensemble.parameters(), before, strict=True))
    assert ensemble.training
    assert ensemble.rows is Rows.SHARED


def test_an_estimate_is_of_the_particle_that_explains_the_examples_best(attached, sft):
    task, items = sft
    ensemble = attached(3)
    with torch.no_grad():
        logp = torch.stack([task.score(ensemble, task.collate([item])).logp[:, 0] for item in items], dim=1)
    best = int(logp.mean(dim=1).argmax())
    value = particle(ensemble, best)
    found, _ = project_adapter(ensemble, value, task, items, 8, quiet=True)
    estimate = estimate_alpha_star(ensemble, task, items, prior_curvature=0.0, seed=3)
    assert estimate == pytest.approx(found.critical_alpha().alpha, rel=0.05)
    assert estimate == estimate_alpha_star(ensemble, task, items, prior_curvature=0.0, seed=3)


def test_rows_of_their_own_are_scored_by_their_own_particle(attached, make_batch, naive_logprob):
    ensemble = attached(3)
    batch = make_batch([6, 4, 7, 5, 3, 6])
    with torch.no_grad():
        shared = ensemble.sequence_logprob(batch)  # [3, 6]
        with ensemble.running(Rows.OWN):
            own = ensemble.sequence_logprob(batch)  # [3, 2]: rows 0 and 1 are particle 0's
    expected = torch.stack([shared[k, 2 * k : 2 * k + 2] for k in range(3)])
    torch.testing.assert_close(own, expected)


def test_a_base_in_bfloat16_gives_nearly_the_same(attached, sft):
    task, items = sft
    found = [
        estimate_alpha_star(attached(2, dtype=dtype).float(), task, items, prior_curvature=0.0, seed=1)
        for dtype in DTYPES
    ]
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_a_broken_particle_is_not_taken_for_the_best_one_nor_for_a_stable_one(attached, sft):
    task, items = sft
    ensemble = attached(3)
    with torch.no_grad():
        next(ensemble.parameters())[1] = torch.nan
    assert 0 < estimate_alpha_star(ensemble, task, items, prior_curvature=0.0, seed=1) < torch.inf
    with pytest.raises(ValueError, match="model: a derivative of its log-likelihoods is not finite"):
        project_adapter(ensemble, particle(ensemble, 1), task, items, 4, quiet=True)


def test_the_prior_of_a_run_counts_in_its_estimate(attached, sft):
    task, items = sft
    ensemble = attached(2)
    without, with_prior = (estimate_alpha_star(ensemble, task, items, prior_curvature=c, seed=1) for c in (0.0, 5.0))
    assert with_prior > 1.05 * without
