"""The frame of examples/evidence, and its experiments about contested questions and about people who disagree."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from examples.evidence import __main__ as command, page, summary
from examples.evidence.cells import Work
from examples.evidence.contested.experiment import EXPERIMENT as CONTESTED, Contested, by_particle
from examples.evidence.experiment import Answers, Metric, Setting, Variant
from examples.evidence.measures import auroc
from examples.evidence.methods import METHODS
from examples.evidence.people import experiment as people


def test_auroc_is_torchmetrics_also_with_ties():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(5, size=50) / 4, rng.random(50) < 0.3
    expected = binary_auroc(torch.from_numpy(score), torch.from_numpy(positive).long())
    assert auroc(score, positive) == pytest.approx(expected.item())
    assert math.isnan(auroc(score, np.ones(50, dtype=bool)))


# ------------------------------------------------------------------ the frame, with a tiny model


class Tiny(Contested):
    name = "tiny"

    def variants(self, setting):
        methods = ("lora", "mc_dropout", "deep_ensemble", "alpha_0.8", "learned", "fitted")
        return [replace(super().variants(setting)[0], num_particles=2, methods=methods)]

    def data(self, options, seed, source):
        data = super().data(options, seed, source)
        asked = slice(6, 18)  # 6 questions on which people agree, 6 that are contested
        facts = {name: values[asked] for name, values in data.facts.items()}
        too_long = {"prompt": "long " * 3000, "completion": "yes"}  # no method can train on this one
        rows = [*data.rows, too_long]
        return replace(data, rows=rows, questions=data.questions[asked], facts=facts, held_out=data.held_out[:6])


@pytest.fixture(scope="module")
def work(model_folder, tmp_path_factory):
    experiment = Tiny()
    experiment.settings = {"cpu": Setting(str(model_folder), 1, "float32", 1e-2, 2, batch_size=2, lora_r=2, seeds=2)}
    return Work(experiment, "cpu", tmp_path_factory.mktemp("evidence"), None)


@pytest.mark.usefixtures("without_report")
def test_an_experiment_that_is_started_again_trains_only_what_is_missing(work, monkeypatch):
    assert work.run() == 0
    kept = {path: path.stat().st_mtime_ns for path in work.folder.rglob("*.npz")}
    # of each seed: two single adapters, dropout, and two runs of two particles
    assert len(kept) == 2 * (2 + 1 + 2)
    lost = next(path for path in kept if path.name == "alpha_0.8-1.npz")
    lost.unlink()
    (variant,) = work.experiment.variants("cpu")
    assert not work.is_done(variant)
    assert work.seeds_done(variant) == [0]
    assert summary.summarise(work, "a machine")["variants"] == []  # one seed is not enough
    monkeypatch.setattr(summary, "LEAST_SEEDS", 1)
    monkeypatch.setattr(summary, "NUM_RESAMPLES", 2)
    (part,) = summary.summarise(work, "a machine")["variants"]
    assert part["seeds"] == [0]
    assert len(part["methods"]["lora"]["metrics"]["nll"]["seeds"]) == 1
    assert work.run() == 0
    again = {path: path.stat().st_mtime_ns for path in work.folder.rglob("*.npz")}
    assert {path for path in kept if again[path] != kept[path]} == {lost}
    monkeypatch.setattr(work, "_load", lambda: pytest.fail("nothing is left to do"))
    assert work.run() == 0


@pytest.mark.usefixtures("without_report")
def test_results_are_the_metrics_of_each_method_and_their_paired_differences(work, monkeypatch):
    monkeypatch.setattr(summary, "NUM_RESAMPLES", 50)
    work.run()
    results = summary.summarise(work, "a machine")
    assert results["variants"][0]["seeds"] == [0, 1]
    methods = results["variants"][0]["methods"]
    assert list(methods) == list(work.experiment.variants("cpu")[0].methods)
    variant = work.experiment.variants("cpu")[0]
    for name in methods:
        answers = [work.answers(variant, name, seed)[0] for seed in (0, 1)]
        found = methods[name]["metrics"]["nll"]
        assert found["seeds"] == [CONTESTED.metrics["nll"].of(one) for one in answers]
        assert found["mean"] == pytest.approx(np.mean(found["seeds"]))
        assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    difference = methods["alpha_0.8"]["metrics"]["nll"]["difference"]["mean"]
    means = [methods[name]["metrics"]["nll"]["mean"] for name in ("alpha_0.8", "deep_ensemble")]
    assert difference == pytest.approx(means[0] - means[1])
    assert methods["deep_ensemble"]["costs"]["parameters"] == 2 * methods["lora"]["costs"]["parameters"]
    # one adapter of the ensemble is the one that is shown alone
    one, together = (work.answers(variant, name, 0)[0].logp for name in ("lora", "deep_ensemble"))
    assert torch.equal(one[0], together[0])
    assert not torch.equal(together[0], together[1])
    learned, fitted = (work.answers(variant, name, 0)[0].weights for name in ("learned", "fitted"))
    assert learned.sum().item() == pytest.approx(1) == fitted.sum().item()
    assert not torch.equal(learned, torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.usefixtures("without_report")
def test_answers_of_another_setting_are_not_used(work, monkeypatch):
    work.run()
    other = replace(work, experiment=Tiny())
    other.experiment.settings = {"cpu": replace(work.setting, max_steps=3)}
    with pytest.raises(SystemExit, match="remove it"):
        other.answers(other.experiment.variants("cpu")[0], "lora", 0)
    monkeypatch.setattr(other, "_load", lambda: pytest.fail("nothing may be trained"))
    next(other.folder.rglob("alpha_0.8-1.npz")).unlink()
    with pytest.raises(SystemExit, match="remove it"):
        other.run()


def test_a_change_of_the_setting_holds_in_every_part_and_its_answers_are_not_taken_for_others(tmp_path):
    plain = Work(people.EXPERIMENT, "cpu", tmp_path, None)
    changed = replace(plain, changes={"model": "a-model", "dtype": "float32"})
    rows = set()
    for variant in people.EXPERIMENT.variants("cpu"):
        before, after = plain.setting_of(variant), changed.setting_of(variant)
        assert after == replace(before, model="a-model", dtype="float32") != before
        rows.add(after.batch_size)
        assert all(plain._made_with(cell) != changed._made_with(cell) for cell in plain.cells_of(variant))
    assert rows == {2, 8}  # what a part says of its own setting still holds
    assert changed.model_path == "a-model"


def test_what_is_computed_of_some_questions_is_part_of_what_is_computed_of_all():
    logp = torch.randn(3, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answers = Answers(logp, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), {})
    rows = np.array([3, 3, 7, 12, 0])
    part = answers.of(rows).of(np.array([True, True, False, True, True]))
    alone = Answers(part.logp, part.weights, {})
    assert torch.equal(part.logp, logp[:, [3, 3, 12, 0]])
    assert torch.equal(part.mixture, alone.mixture)
    assert torch.equal(part.particles, alone.particles)
    for name, values in vars(alone.among).items():
        torch.testing.assert_close(getattr(part.among, name), values, rtol=1e-12, atol=1e-12)


NUMBER = Metric("a number", "", lambda answers: float(answers.facts["number"].mean()))
SQUARE = Metric("its variance", "", lambda answers: float(answers.facts["number"].var()), centred=True, of_members=True)


def seeds_with(numbers, asked):
    """Answers of several seeds, of which nothing is known but a number for each question."""
    weights = torch.ones(1, dtype=torch.float64)
    return [
        Answers(torch.zeros(1, len(of), 2), weights, {"number": of, "asked": np.array(names)})
        for of, names in zip(numbers, asked, strict=True)
    ]


@pytest.mark.parametrize("same", [True, False])
def test_an_interval_is_that_of_the_theory_whether_seeds_were_asked_the_same_questions_or_others(monkeypatch, same):
    monkeypatch.setattr(summary, "NUM_RESAMPLES", 2000)
    number = np.random.default_rng(0).normal(size=60)
    answers = seeds_with([number, number], [range(60), range(60) if same else range(60, 120)])
    drawn = [summary._resampled(answers, {"number": NUMBER})["number"] for _ in range(2)]
    assert np.array_equal(*drawn)  # so a method that is compared with itself differs by nothing
    # twice the same question is no more than once; other questions halve the variance where both seeds are drawn
    error = number.std() / math.sqrt(60) * (1 if same else math.sqrt(0.75))
    low, high = summary._interval(drawn[0], None)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_an_interval_that_is_centred_lies_around_the_number_though_draws_of_it_are_larger(monkeypatch):
    monkeypatch.setattr(summary, "NUM_RESAMPLES", 400)
    answers = seeds_with([np.arange(5.0)], [range(5)])
    drawn = summary._resampled(answers, {"square": SQUARE})["square"]
    low, high = summary._interval(drawn, 2.0)
    plain = summary._interval(drawn, None)
    assert high - low == pytest.approx(plain[1] - plain[0])
    assert low - plain[0] == pytest.approx(2.0 - drawn.mean())


def test_a_star_needs_an_interval_without_0_and_seeds_that_agree():
    def cell(interval, p):
        difference = {"mean": 0.5, "interval": interval, "p": p}
        found = {"mean": 1.0, "seeds": [0.8, 1.2], "interval": [0.5, 1.5], "difference": difference}
        return page._cell(NUMBER, found)

    assert cell([0.2, 0.8], 0.03).endswith("\\*")
    assert cell([-0.8, -0.2], 0.03).endswith("\\*")
    for interval, p in (([0.2, 0.8], 0.06), ([-0.1, 0.8], 0.03), ([0.2, 0.8], float("nan"))):
        assert not cell(interval, p).endswith("*")


def test_a_mean_of_fewer_seeds_than_the_others_says_so():
    found = {"mean": 1.0, "seeds": [1.0, float("nan"), 1.0], "interval": [0.5, 1.5]}
    assert page._cell(NUMBER, found) == "1.000 [2 of 3 seeds] (0.500 to 1.500)"


def test_the_picture_is_of_the_last_results_that_have_the_part_it_shows():
    first, other = ({"name": variant.name} for variant in CONTESTED.variants("gpu")[:2])
    small, large = ({"setting": name, "variants": [first, other]} for name in ("cpu", "gpu"))
    assert page.pictured(CONTESTED, [small, large]) is large
    assert page.pictured(CONTESTED, [small, large | {"variants": [other]}]) is small
    with pytest.raises(SystemExit, match="contested: the results lack the first part"):
        page.pictured(CONTESTED, [large | {"variants": [other]}])


def test_without_training_what_is_there_is_summed_up(work, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "load", lambda name: work.experiment)
    monkeypatch.setattr(command, "HERE", tmp_path)
    (tmp_path / "contested").mkdir()
    monkeypatch.setattr(Work, "run", lambda self: pytest.fail("nothing may be trained"))
    monkeypatch.setattr("sys.argv", ["evidence", "run", "contested", "--no_training", "--output_dir", str(tmp_path)])
    command.main()
    assert json.loads((tmp_path / "contested" / "results" / "cpu.json").read_text())["variants"] == []


def test_the_p_value_of_a_difference_is_that_of_the_paired_t_test():
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.5])
    d = ours - theirs
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    assert summary.p_value(ours, theirs) == pytest.approx(1 - t / math.sqrt(2 + t * t))  # with 2 degrees of freedom
    assert math.isnan(summary.p_value(ours, ours))
    assert math.isnan(summary.p_value([1.0], [2.0]))
    assert summary.p_value([1.0, 1.0, 1.0], [0.5, 0.5, 0.5]) == 0


def test_passes_with_dropout_are_not_compared_from_question_to_question():
    metrics = {"number": NUMBER, "square": SQUARE}
    assert list(summary._meant_for("mc_dropout", metrics)) == ["number"]
    assert list(summary._meant_for("lora", metrics)) == ["number", "square"]
    assert page._cell(SQUARE, None) == "-"


def test_the_page_is_made_of_the_committed_results():
    assert page.PAGE.read_text(encoding="utf-8") == page.page_text()
    assert page.shown(), "no experiment has results"


def test_the_command_of_a_section_names_the_dtype_if_it_is_not_the_settings():
    for name, results in page.shown().items():
        for trained, option in (("bfloat16", ""), ("float32", " --dtype float32")):
            of = results[0] | {"training": results[0]["training"] | {"dtype": trained}}
            setting = page._section(page.load(name), [of]).split("**Setting.**")[1].splitlines()[0]
            assert setting.endswith(f"--setting {of['setting']}{' --data FOLDER' * ('FOLDER' in setting)}{option}`")


def test_a_folder_without_the_data_is_refused_by_name(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["evidence", "run", "people", "--data", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    assert "--data: expected a folder that holds hs_brexit.jsonl.gz" in capsys.readouterr().err


# ------------------------------------------------------------------ contested questions


@pytest.mark.parametrize("variant", CONTESTED.variants("cpu"), ids=lambda variant: variant.name)
def test_camps_have_their_exact_shares_and_nothing_that_is_asked_was_trained_on(variant):
    data = CONTESTED.data(variant.data, 1, None)
    said = [row["completion"][0]["content"] for row in data.rows]
    asked = [row["prompt"][-1]["content"] for row in data.rows]
    assert len(data.rows) == 60
    contested = [answer for answer in said if answer not in ("Always.", "Never.")]
    assert len(contested) == variant.data["contested"]
    assert sum(answer.startswith("No") for answer in contested) == pytest.approx(
        variant.data["minority"] * len(contested), abs=1
    )
    tested = [question.prompt[-1]["content"] for question in data.questions]
    held_out = [row["prompt"][-1]["content"] for row in data.held_out]
    assert len({*asked, *tested, *held_out}) == len(asked) + len(tested) + len(held_out)
    if "fitted" in variant.methods:  # weights are fitted to rows such as those of the training
        share = np.mean([row["completion"][0]["content"] not in ("Always.", "Never.") for row in data.held_out])
        assert share == variant.data["contested"] / 60
    assert data.facts["contested"].sum() == 16 * variant.data["topics"]
    assert CONTESTED.data(variant.data, 2, None).rows != data.rows


def test_by_camp_is_one_for_camps_and_small_for_sides_taken_question_by_question():
    def answers(p):
        logp = torch.from_numpy(np.log(np.stack([p, 1 - p], axis=-1)))
        return Answers(logp, torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), {})

    camps = np.repeat([[0.9], [0.2], [0.1]], 40, axis=1)
    assert by_particle(answers(camps)) == pytest.approx(1.0)
    shuffled = np.random.default_rng(0).permuted(camps, axis=0)
    assert by_particle(answers(shuffled)) < 0.1


# ------------------------------------------------------------------ people who disagree


def answers_of_people(p_yes, weights, labels, groups):
    """Answers of two choices, no and yes."""
    p = np.asarray(p_yes)[..., None]
    num = len(labels)
    facts = {
        "labels": np.asarray(labels),
        "groups": np.asarray([groups] * num),
        "given": np.asarray(labels),
        "yes": np.asarray([[False, True]] * num),
    }
    logp = torch.from_numpy(np.log(np.concatenate([1 - p, p], axis=-1)))
    return Answers(logp, torch.tensor(weights, dtype=torch.float64), facts)


def test_cross_entropy_is_that_of_the_weighted_mixture():
    answers = answers_of_people([[0.9, 0.2], [0.5, 0.4]], [0.75, 0.25], [[1, 1, 0, 1], [0, 0, 0, 0]], "aabb")
    p = [0.75 * 0.9 + 0.25 * 0.5, 0.75 * 0.2 + 0.25 * 0.4]
    expected = -(0.75 * math.log(p[0]) + 0.25 * math.log(1 - p[0]) + math.log(1 - p[1])) / 2
    assert people.cross_entropy(answers) == pytest.approx(expected)


def test_f1_is_the_accuracy_where_most_people_agree():
    answers = answers_of_people(
        [[0.9, 0.9, 0.2, 0.1]], [1.0], [[1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0] * 4], "aabb"
    )
    assert people.f1(answers) == pytest.approx(2 / 3)


def test_particles_that_stand_for_groups_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    hard = rng.random(60) < 0.5
    labels = np.where(hard[:, None], [0, 0, 0, 1, 1, 1], 0)
    sided = np.stack([np.full(60, 0.02), np.where(hard, 0.98, 0.02)])
    found = answers_of_people(sided, [0.5, 0.5], labels, ["a"] * 3 + ["b"] * 3)
    assert people.rank(found) == 1
    alike = answers_of_people(np.full((2, 60), 0.3), [0.5, 0.5], labels, ["a"] * 3 + ["b"] * 3)
    assert people.information(alike) == pytest.approx(0.0, abs=1e-12)
    mixed = rng.permuted(labels, axis=1)
    assert people.information(found) > 10 * people.information(
        answers_of_people(sided, [0.5, 0.5], mixed, ["a"] * 3 + ["b"] * 3)
    )
    # particles that stand for single annotators are none for groups: other halves hold as much
    one = np.where(hard[:, None], [0, 0, 0, 0, 0, 1], 0)
    assert people.rank(answers_of_people(sided, [0.5, 0.5], one, ["a"] * 3 + ["b"] * 3)) == pytest.approx(5.5)
    assert math.isnan(people.rank(answers_of_people(sided[:1], [1.0], labels, ["a"] * 3 + ["b"] * 3)))
    assert math.isnan(people.information(answers_of_people(sided, [0.5, 0.5], labels, ["a"] * 6)))
    # certain particles: the information of a perfect split is the entropy of the group
    sure = answers_of_people([[1e-9] * 4, [1 - 1e-9] * 4], [0.5, 0.5], [[0, 0, 1, 1]] * 4, ["a", "a", "b", "b"])
    assert people.information(sure) == pytest.approx(math.log(2), rel=1e-6)


@pytest.fixture
def tweets(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    with gzip.open(tmp_path / "hs_brexit.jsonl.gz", "wt") as file:
        for number in range(40):
            labels = [int(label) for label in rng.integers(2, size=6)]
            tweet = {
                "split": ("train", "train", "dev", "test")[number % 4],
                "text": f"tweet number {number}",
                "annotators": [f"Ann{i}" for i in range(6)],
                "labels": labels,
                "groups": ["group1"] * 3 + ["group2"] * 3,
                "aggressive": labels,
                "offensive": [None, *labels[1:]],
            }
            file.write(json.dumps(tweet) + "\n")
    return tmp_path


@pytest.mark.parametrize("form", people.FORMS)
def test_rows_hold_what_annotators_said_and_no_tweet_that_is_asked(tweets, form):
    data = people.EXPERIMENT.data({"source": "hs_brexit", "form": form}, 0, tweets)
    together = 4 if form == "four tweets" else 1
    assert len(data.rows) == 6 * 20 // together
    trained = " ".join(row["prompt"] for row in data.rows) + "\n"
    for number, question in enumerate(data.questions):
        first = question.prompt.split("\n")[0].split(": ", 1)[1]
        assert f"{first}\n" not in trained
        # what an annotator said is among the answers, and the facts say which answer it is
        for label, given in zip(data.facts["labels"][number], data.facts["given"][number], strict=True):
            assert question.answers[given].endswith("yes" if label else "no")
            assert data.facts["yes"][number][given] == bool(label)
    said = sum(row["completion"].count("hate yes") for row in data.rows)
    with gzip.open(tweets / "hs_brexit.jsonl.gz", "rt") as file:
        kept = [json.loads(line) for line in file]
    assert said == sum(sum(tweet["labels"]) for tweet in kept if tweet["split"] == "train")


def test_every_variant_of_every_experiment_names_methods_that_exist():
    for name in page.EXPERIMENTS:
        experiment = page.load(name)
        for setting in experiment.settings:
            for variant in experiment.variants(setting):
                assert isinstance(variant, Variant)
                assert set(variant.methods) <= set(METHODS)
