"""Which examples are contested, and which nobody explains.

Layout: K particles, N examples.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from renyi_engine.evaluation.nll.diagnosis import (
    CONTESTED,
    OUT_OF_SUPPORT,
    PLAIN,
    diagnose,
    support_limit,
    token_disagreement,
)


def test_every_number_is_its_formula():
    generator = np.random.default_rng(0)
    logp, base = -generator.gamma(2.0, 4.0, (4, 30)), -generator.gamma(2.0, 2.0, 30)
    disagreement, tokens, alpha = generator.uniform(0, 0.6, 30), generator.integers(1, 9, 30), 0.6
    w = np.array([0.5, 0.1, 0.3, 0.1])
    given = map(torch.tensor, (logp, base, disagreement, tokens))
    found = diagnose(*given, alpha, 0.3, -0.2, torch.tensor(w))
    r = w[:, None] * np.exp(alpha * logp) / (w @ np.exp(alpha * logp))
    ess, entropy = 1 / (r**2).sum(0), -(r * np.log(r)).sum(0)
    best, gain = -logp.max(0) / tokens, (logp.max(0) - base) / tokens
    mixture = -np.log(w @ np.exp(logp)) / tokens
    for i, (flag, *numbers) in enumerate(found):
        expected = [disagreement[i], gain[i], ess[i], entropy[i], logp[:, i].argmax()]
        assert numbers == pytest.approx([*expected, best[i], mixture[i], -base[i] / tokens[i], tokens[i]], rel=1e-6)
        assert flag == (OUT_OF_SUPPORT if gain[i] < -0.2 else CONTESTED if disagreement[i] >= 0.3 else PLAIN)
    assert {flag for flag, *_ in found} == {CONTESTED, OUT_OF_SUPPORT, PLAIN}


def flags_of(p, base, min_disagreement=0.2):
    """Flags of N examples of T tokens, from probabilities p [K, N, T] and base [N, T]."""
    logp, base_logp = torch.tensor(p).double().log(), torch.tensor(base).double().log()
    num_tokens = torch.full((logp.shape[1],), logp.shape[2])
    disagreement = token_disagreement(logp)
    found = diagnose(
        logp.sum(-1),
        base_logp.sum(-1),
        disagreement,
        num_tokens,
        0.8,
        min_disagreement,
        0.0,
        torch.full((len(logp),), 1 / len(logp)),
    )
    return [flag for flag, *_ in found]


def test_what_one_particle_knows_is_contested_and_what_none_knows_is_out_of_support():
    # columns: all know it, one knows it, all are as unsure of it, nobody knows it
    p = [[[0.9], [0.72], [0.5], [0.001]], [[0.9], [0.01], [0.5], [0.002]], [[0.9], [0.01], [0.5], [0.001]]]
    assert flags_of(p, [[0.01], [0.01], [0.01], [0.01]]) == [PLAIN, CONTESTED, PLAIN, OUT_OF_SUPPORT]


def test_both_camps_answers_are_equally_contested():
    first = np.array([[0.99], [0.66]])
    both = np.stack([first, 1 - first], axis=1)
    assert flags_of(both, [[0.001], [0.001]], 0.32) == [CONTESTED, CONTESTED]
    assert flags_of(both, [[0.001], [0.001]], 0.34) == [PLAIN, PLAIN]


def test_small_differences_of_many_tokens_are_no_dispute_and_one_token_among_many_is():
    p = np.full((2, 2, 400), 0.95)
    p[1] = 0.9  # 22 nats between the particles over all the tokens
    p[1, 1, 123] = 0.6
    assert flags_of(p, np.full((2, 400), 0.5)) == [PLAIN, CONTESTED]


def test_particles_that_learnt_nothing_find_nothing_whatever_the_base_says():
    base = np.array([[0.9, 0.8], [1e-9, 0.3], [0.2, 1e-30]])
    assert flags_of(np.stack([base] * 3), base) == [PLAIN] * 3


def test_what_one_particle_forgot_and_another_kept_is_not_out_of_support():
    assert flags_of([[[0.4]], [[0.01]]], [[0.4]]) == [CONTESTED]
    assert flags_of([[[0.39]], [[0.01]]], [[0.4]]) == [OUT_OF_SUPPORT]


@given(st.lists(st.floats(-5, 5), min_size=19, max_size=60), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_rows_like_the_calibration_set_at_most_the_share_is_out_of_support(gains, share):
    # left out one by one: each row is as likely as the others to be the new one, and the rest calibrates
    new = torch.tensor(gains, dtype=torch.float64)
    rest = [torch.cat([new[:i], new[i + 1 :]]) for i in range(len(new))]
    if math.floor(share * len(new)) < 1:
        with pytest.raises(ValueError, match="calibration_dataset_name: a calibration_share of"):
            support_limit(rest[0], share)
    else:
        flagged = sum(gain.item() < support_limit(others, share) for gain, others in zip(new, rest, strict=True))
        assert flagged <= share * len(new)


@given(
    arrays(np.float64, (3, 4, 5), elements=st.floats(-30, 0)),
    arrays(np.float64, 4, elements=st.floats(-60, 0)),
    st.permutations(range(3)),
    st.lists(st.integers(0, 3), min_size=1),
)
def test_a_kind_depends_neither_on_the_order_of_particles_nor_on_the_other_rows(logp, base, order, rows):
    logp, base = torch.tensor(logp), torch.tensor(base)

    def found(logp, base):
        tokens = torch.full((len(base),), 5)
        out = diagnose(logp.sum(-1), base, token_disagreement(logp), tokens, 0.8, 0.1, 0.0, torch.full((3,), 1 / 3))
        return [(flag, disagreement, gain) for flag, disagreement, gain, *_ in out]

    alone = found(logp, base)
    assert found(logp[order], base) == alone
    assert found(logp[:, rows], base[rows]) == [alone[row] for row in rows]


def test_disagreement_is_at_most_the_distance_in_total_variation_of_two_predictions():
    logits = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(dim=-1)
    labels = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(1))
    taken = p.gather(-1, labels.expand(4, -1, -1)[..., None])[..., 0]
    distances = 0.5 * (p[:, None] - p[None]).abs().sum(-1).amax(dim=(0, 1)).amax(dim=-1)
    disagreement = token_disagreement(taken.log())
    assert (disagreement <= distances + 1e-12).all()
    # a position without a label has logp 0.0
    unlabelled = torch.cat([taken.log(), torch.zeros(4, 6, 2)], dim=-1)
    assert torch.equal(token_disagreement(unlabelled), disagreement)
