"""Numbers about probabilities are their closed forms and those of torchmetrics.

Layout: N questions, C choices.
"""

from __future__ import annotations

import math
import runpy
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_calibration_error

from renyi_engine.evaluation import calibration
from renyi_engine.evaluation.calibration import accuracy, aurc, auroc, brier, ece, nll, reliability, risk_coverage

P = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.35, 0.4], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 2])


@st.composite
def questions(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [N, C] fp64 and labels [N]; some confidences on the edges of bins."""
    num_questions, num_choices = draw(st.integers(1, 60)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 2.0, 50.0]))
    p = (scale * torch.randn(num_questions, num_choices, generator=generator, dtype=torch.float64)).softmax(-1)
    if draw(st.booleans()):
        grid = torch.randint(16, (num_questions,), generator=generator).double() / 15
        p = torch.nn.functional.pad(torch.stack([grid, 1 - grid], -1), (0, num_choices - 2))
    return p, torch.randint(num_choices, (num_questions,), generator=generator)


@st.composite
def scores(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [N] with or without ties, and what is wrong [N]."""
    number = st.sampled_from([-3.0, 0.0, 0.5, 40.0, 41.0, math.inf]) | st.floats(-1e6, 1e6)
    rows = draw(st.lists(st.tuples(number, st.booleans()), min_size=1, max_size=30))
    return torch.tensor([score for score, _ in rows], dtype=torch.float64), torch.tensor([wrong for _, wrong in rows])


def test_closed_forms_of_four_questions():
    assert accuracy(P, LABELS) == 0.5
    assert nll(P.log(), LABELS) == pytest.approx(-math.log(0.7 * 0.35 * 1.0 * 0.2) / 4, rel=1e-14)
    squares = [0.09 + 0.04 + 0.01, 0.0625 + 0.4225 + 0.16, 0.0, 0.25 + 0.09 + 0.64]
    assert brier(P, LABELS) == pytest.approx(sum(squares) / 4, rel=1e-14)
    # 4 bins: 0.4 (wrong) | 0.5 (wrong) and 0.7 (right) | 1.0 (right)
    confidence, right, share = reliability(P, LABELS, bins=4)
    torch.testing.assert_close(confidence, torch.tensor([0.4, 0.6, 1.0], dtype=torch.float64), rtol=0, atol=1e-7)
    assert right.tolist() == [0.0, 0.5, 1.0]
    assert share.tolist() == [0.25, 0.5, 0.25]
    assert ece(P, LABELS, bins=4) == pytest.approx(0.25 * 0.4 + 0.5 * 0.1, abs=1e-7)


def test_the_best_and_the_worst_brier_score():
    sure = torch.eye(4)
    assert brier(sure, torch.arange(4)) == 0.0
    assert brier(sure, torch.tensor([1, 2, 3, 0])) == 2.0
    assert brier(torch.full((1, 4), 0.25), torch.tensor([2])) == 0.75


def test_nll_of_what_was_thought_impossible_is_infinite():
    assert nll(P.log(), torch.tensor([0, 1, 0, 2])) == math.inf


def test_nll_does_not_lose_what_underflows_as_a_probability():
    logp = torch.tensor([[0.0, -2e3], [0.0, -500.0]])
    assert nll(logp, torch.tensor([1, 1])) == 1250.0


@settings(deadline=None)
@given(rows=questions(), bins=st.sampled_from([1, 2, 10, 15, 16]))
def test_accuracy_and_calibration_error_are_those_of_torchmetrics(rows, bins):
    p, labels = rows
    expected = multiclass_calibration_error(p.clamp(max=1.0), labels, p.shape[1], n_bins=bins).item()
    assert ece(p, labels, bins) == pytest.approx(expected, abs=1e-6)
    assert accuracy(p, labels) == pytest.approx(
        multiclass_accuracy(p, labels, p.shape[1], average="micro").item(), abs=1e-6
    )


@settings(deadline=None)
@given(rows=questions(), bins=st.sampled_from([1, 2, 10, 15, 16]))
def test_the_calibration_error_can_be_read_off_the_reliability_bins(rows, bins):
    confidence, right, share = reliability(*rows, bins)
    assert ((confidence - right).abs() * share).sum().item() == pytest.approx(ece(*rows, bins), abs=1e-6)
    assert share.sum().item() == pytest.approx(1.0)
    assert (share > 0).all()
    assert confidence.equal(confidence.sort().values)
    assert (right * share).sum().item() == pytest.approx(accuracy(*rows))


def test_a_confidence_on_an_edge_belongs_to_the_bin_above_and_1_has_its_own():
    confidence = torch.tensor([0.5, 0.7, 0.75, 0.99, 1.0], dtype=torch.float64)
    p = torch.stack([confidence, 1 - confidence], dim=-1)
    _, _, share = reliability(p, torch.zeros(5, dtype=torch.int64), bins=4)
    torch.testing.assert_close(share, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64))


def test_a_probability_that_rounding_took_over_1_is_not_taken_for_a_logit():
    p = torch.tensor([[1.0 + 1e-6, 0.0], [0.2, 0.8]])
    assert ece(p, torch.tensor([0, 1])) == pytest.approx(0.1, abs=1e-6)


@settings(deadline=None)
@given(rows=scores())
def test_auroc_is_the_probability_that_the_wrong_one_scores_higher(rows):
    score, wrong = rows
    pairs = [(bad, good) for bad in score[wrong].tolist() for good in score[~wrong].tolist()]
    if not pairs:
        assert auroc(score, wrong) is None
        return
    wins = sum(1.0 if bad > good else 0.5 if bad == good else 0.0 for bad, good in pairs)
    assert auroc(score, wrong) == pytest.approx(wins / len(pairs), abs=1e-6)


def test_auroc_is_that_of_torchmetrics_for_scores_that_are_probabilities():
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(500, generator=generator)
    wrong = torch.rand(500, generator=generator) < score
    assert auroc(score, wrong) == pytest.approx(binary_auroc(score, wrong.long()).item(), abs=1e-6)
    # through a sigmoid in fp32 these would all be ties
    assert auroc(score + 30, wrong) == pytest.approx(auroc(score, wrong), abs=1e-3)


def test_auroc_is_not_defined_for_one_class_alone():
    assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([True, True])) is None
    assert auroc(torch.tensor([0.1, 0.2]), torch.tensor([False, False])) is None


def test_the_risk_coverage_curve_of_a_few_questions():
    score = torch.tensor([7.0, -1.0, 2.0, 2.0, 0.5])
    wrong = torch.tensor([True, False, True, False, False])
    coverage, risk = risk_coverage(score, wrong)
    torch.testing.assert_close(coverage, torch.tensor([0.2, 0.4, 0.8, 1.0], dtype=torch.float64))
    torch.testing.assert_close(risk, torch.tensor([0.0, 0.0, 0.25, 0.4], dtype=torch.float64))
    assert aurc(score, wrong) == pytest.approx(0.4 * 0.25 + 0.2 * 0.4)


@settings(deadline=None)
@given(rows=scores(), data=st.data())
def test_the_risk_coverage_curve_is_what_each_threshold_gives(rows, data):
    score, wrong = rows
    order = data.draw(st.permutations(range(len(score))))
    coverage, risk = risk_coverage(score[order], wrong[order])
    answered = [score <= threshold for threshold in score.unique().tolist()]
    assert coverage.tolist() == pytest.approx([keep.double().mean().item() for keep in answered])
    assert risk.tolist() == pytest.approx([wrong[keep].double().mean().item() for keep in answered])
    # the risk once each question is in, averaged over questions
    expected = torch.stack([wrong[score <= threshold].double().mean() for threshold in score]).mean()
    assert aurc(score, wrong) == pytest.approx(expected.item())


def test_scores_that_are_all_the_same_have_the_error_rate_as_area():
    assert aurc(torch.full((8,), 0.3), torch.arange(8) < 3) == 0.375


def test_the_best_order_has_the_least_area():
    wrong = torch.arange(10) >= 7
    best = sum(k / (7 + k) for k in (1, 2, 3)) / 10
    assert aurc(torch.arange(10.0), wrong) == pytest.approx(best)
    assert aurc(-torch.arange(10.0), wrong) > best


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (P.log(), LABELS, r"probabilities: .*question 0"),
        (torch.tensor([[0.4, 0.6], [1.2, -0.2]]), LABELS[:2], r"probabilities: .*question 1"),
        (P[0], LABELS, "probabilities: .*shape"),
        (P[:0], LABELS[:0], "probabilities: .*shape"),
        (P.where(P != 0.35, math.nan), LABELS, r"probabilities: .*question 1"),
        (P, LABELS[:3], r"labels: .*\[4\]"),
        (P, LABELS.double(), "labels: .*float64"),
        (P, torch.tensor([0, 1, 3, 2]), "labels: .*0 to 2; question 2 has 3"),
        (P, torch.tensor([0, 1, 1, -1]), "labels: .*question 3 has -1"),
    ],
)
@pytest.mark.parametrize("measure", [accuracy, brier, ece, reliability])
def test_rows_that_are_not_probabilities_with_labels_are_named(measure, p, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(p, labels)


def test_nll_refuses_probabilities():
    with pytest.raises(ValueError, match=r"exp\(logp\): .*question 0"):
        nll(P, LABELS)


@pytest.mark.parametrize(
    ("score", "wrong", "message"),
    [
        (torch.tensor([0.1, math.nan]), torch.tensor([True, False]), "score: .*1 of them NaN"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), "score"),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool), "score"),
        (torch.zeros(2), torch.zeros(2), "wrong: .*float32"),
        (torch.zeros(2), torch.zeros(3, dtype=torch.bool), r"wrong: .*\[2\]"),
    ],
)
@pytest.mark.parametrize("measure", [auroc, aurc, risk_coverage])
def test_scores_without_an_order_or_without_answers_are_refused(measure, score, wrong, message):
    with pytest.raises(ValueError, match=message):
        measure(score, wrong)


def test_importing_calibration_does_not_import_torchmetrics(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError now
    fresh = runpy.run_path(calibration.__file__)
    assert fresh["accuracy"](P, LABELS) == 0.5
    with pytest.raises(ImportError, match="torchmetrics"):
        fresh["ece"](P, LABELS)
