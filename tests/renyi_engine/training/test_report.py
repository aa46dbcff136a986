"""The report is one self-contained page that shows what the run folders hold and refuses the broken ones by name."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from renyi_engine import SftConfig, train
from renyi_engine.reports.pictures import COLOURS, HEAT, order_examples, particle_colours
from renyi_engine.training.report import Table, write_report
from renyi_engine.training.report_pictures import responsibilities
from renyi_kernels import renyi_reduce

from ..html_page import Page, assert_only_our_script, pictures_of, read_values

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str, K: int = 3, N: int = 12, alpha: float = 0.8, steps: int = 40, **config: Any) -> Path:
        folder, rng = tmp_path / name, np.random.default_rng(0)
        folder.mkdir()
        settings = {"model_name_or_path": "tiny", "dataset_name": "toy", "num_particles": K, "alpha": alpha, **config}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        lines: list[dict[str, Any]] = []
        for step in range(1, steps + 1):
            nll = (2 + np.exp(-step / 10) + 0.1 * rng.random(K)).tolist()
            line = {
                "step": step,
                "epoch": step / 10,
                "loss_nats": 9.0 - step / 10,
                "alpha": alpha,
                "elapsed_s": step * 2.0,
            }
            line |= {"mixture_nll_nats_per_token": min(nll), "mean_particle_nll_nats_per_token": sum(nll) / K}
            line |= {"particle_nll_nats_per_token": nll, "ess_particles": 1 + (K - 1) / step}
            line |= {"grad_norm": rng.random(K).tolist(), "skipped_updates": [0] * K, "unknown_key": "ignored"}
            lines.append(line)
            if step % 10 == 0:
                lines.append({"step": step, "eval_mixture_nll_nats_per_token": 2.34567, "eval_ess_particles": 1.25})
        write_metrics(folder, lines)
        logp = (-20 * rng.random((K, N))).tolist()
        found = {
            "step": steps,
            "split": "held-out",
            "alpha": alpha,
            "example_ids": list(range(N)),
            "texts": [f"text of {i}" for i in range(N)],
            "num_labels": [5] * N,
        }
        (folder / "evaluation.json").write_text(json.dumps({**found, "logp_nats": logp}))
        facts = {"command": f"renyi-engine sft --alpha {alpha}", "versions": {"torch": "2.13"}, "status": "finished"}
        (folder / "run.json").write_text(json.dumps({**facts, "elapsed_s": 3725.0, "dropped_rows": {"too long": 2}}))
        return folder

    return make


@pytest.fixture
def make_preference_run(make_run: MakeRun) -> MakeRun:
    """A run on preference pairs, in which the particles' accuracies and margins are 0, 1/K, 2/K, ..."""

    def make(name: str, K: int = 3, **settings: Any) -> Path:
        folder = make_run(name, K, kind="dpo", **settings)
        shares = [k / K for k in range(K)]
        lines = []
        for line in read_metrics(folder):
            prefix = "eval_" if "eval_ess_particles" in line else ""
            line = {key: value for key, value in line.items() if "nll" not in key}
            for key in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"):
                line |= {f"{prefix}{key}": 0.8125 if prefix else sum(shares) / K, f"{prefix}particle_{key}": shares}
            nll = {f"{prefix}{who}_nll_nats_per_pair": 0.4321 for who in ("mixture", "mean_particle")}
            lines.append({**line, **nll, f"{prefix}particle_nll_nats_per_pair": [0.5] * K})
        write_metrics(folder, lines)
        return folder

    return make


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logp_of(folder: Path) -> np.ndarray:
    return np.array(json.loads((folder / "evaluation.json").read_text())["logp_nats"])


def test_the_page_is_whole_html_and_loads_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    path = write_report([make_run("a"), make_run("b", alpha=0.0)], tmp_path / "sub" / "report.html")
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert "http:" not in source
    assert "https:" not in source
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert_only_our_script(path)
    assert "@import" not in source
    loaded = page.values("src", "href", "xlink:href")
    assert loaded
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loaded)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_ids_are_unique_and_every_reference_has_its_target(make_run: MakeRun, tmp_path: Path) -> None:
    path = write_report([make_run("a"), make_run("b")], tmp_path / "report.html")
    page = Page(path)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [value[1:] for value in page.values("href", "xlink:href") if value.startswith("#")]
    references += re.findall(r"url\(#([^)]+)\)", path.read_text())
    assert references
    assert set(references) <= set(ids)


def test_text_from_outside_is_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = make_run("a <b>", dataset_name=evil, output_dir=f'"{evil}', **{evil: 1})
    (run / "run.json").write_text(json.dumps({"command": evil, "versions": {evil: evil}, "status": evil}))
    evaluation = json.loads((run / "evaluation.json").read_text())
    texts = [evil] * len(evaluation["example_ids"])
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "split": evil, "texts": texts}))
    table = Table(evil, [evil], [[evil]], evil)
    path = write_report([run, run], tmp_path / "report.html", title=evil, tables=[table])
    source = path.read_text()
    assert_only_our_script(path)
    assert source.count("<script") == 1
    assert "a <b>" not in source
    assert source.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert evil in Page(path).text


def test_runs_stand_side_by_side_with_their_numbers_and_tables(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("coupled", alpha=0.8), make_run("independent", alpha=0.0)]
    table = Table(
        "Answers", ["Run", "Score"], [["coupled", "91.5 %"], ["independent", "\u2013"]], note="Of 12 questions."
    )
    path = write_report(runs, tmp_path / "report.html", title="Two runs", tables=[table])
    page = Page(path)
    for expected in ("Two runs", "coupled", "independent", "alpha = 0.8, K = 3", "alpha = 0, K = 3", "2.3457", "1.25"):
        assert expected in page.text
    for expected in ("1 h 02 min", "Answers", "91.5 %", "Of 12 questions.", "renyi-engine sft --alpha 0.0", "too long"):
        assert expected in page.text
    # six sections of two pictures; the score column is to the right, the names are not
    assert sum(tag == "svg" for tag, _ in page.tags) == 12
    classes = [attrs.get("class") for tag, attrs in page.tags if tag == "td" and "class" in attrs]
    assert classes[:4] == ["", "num", "", "num"]


def test_runs_share_the_y_axis(make_run: MakeRun, tmp_path: Path) -> None:
    low, high = make_run("low"), make_run("high")
    write_metrics(high, [{**line, "loss_nats": 500.0} for line in read_metrics(high)])
    source = write_report([low, high], tmp_path / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)[:2]
    assert all(">500</text>" in picture for picture in pictures)


def test_a_preference_run_shows_its_rewards(make_preference_run: MakeRun, tmp_path: Path) -> None:
    path = write_report([make_preference_run("preferences")], tmp_path / "report.html")
    page = Page(path)
    for heading in ("Negative log-likelihood of a preference pair", "Reward accuracy", "Reward margin"):
        assert heading in page.text
    assert "Held-out NLL, mixture (nats/pair) 0.4321" in page.text
    assert "Held-out reward accuracy (fraction of pairs) 0.8125" in page.text
    assert "Held-out reward margin (nats) 0.8125" in page.text
    assert "(nats/token)" not in page.text
    nll = pictures_of(path)[1]
    circles = re.findall(r'<use [^>]*y="([^"]+)" style="fill: var\(--paper\)', nll)
    np.testing.assert_allclose(read_values(nll, "y", np.array(circles, float)), 4 * [0.4321], atol=1e-5)
    for picture, limit in zip(pictures_of(path)[2:4], (0.5, 0.0), strict=True):
        # held-out circles, then the last points of dashed line, particles and mean, as the axis has them
        circles = re.findall(r'<use [^>]*y="([^"]+)" style="fill: var\(--paper\)', picture)
        np.testing.assert_allclose(read_values(picture, "y", np.array(circles, float)), 4 * [0.8125], atol=1e-5)
        lines = {
            "stroke-dasharray: 3.2": limit,
            COLOURS[0]: 0,
            COLOURS[1]: 1 / 3,
            COLOURS[2]: 2 / 3,
            "var(--ink)": 1 / 3,
        }
        for style, expected in lines.items():
            ends = re.findall(rf'([\d.]+) \n"[^>]*style="fill: none; [^"]*{re.escape(style)}', picture)
            np.testing.assert_allclose(read_values(picture, "y", np.array(ends[-1:], float)), [expected], atol=1e-5)


def test_runs_on_pairs_and_on_text_stand_side_by_side(
    make_run: MakeRun, make_preference_run: MakeRun, tmp_path: Path
) -> None:
    pairs, text = make_preference_run("pairs"), make_run("text")
    write_metrics(text, [{**line, "loss_nats": 500.0} for line in read_metrics(text)])
    path = write_report([pairs, text], tmp_path / "report.html")
    page = Page(path)
    assert page.text.count("No picture: this run did not train on preferences.") == 2
    assert "Negative log-likelihood of a token or a preference pair" in page.text
    loss_of_pairs, loss_of_text, nll_of_pairs, nll_of_text, *_ = pictures_of(path)
    assert ">500</text>" in loss_of_text
    assert ">500</text>" not in loss_of_pairs  # another unit, another axis
    assert ">nats a pair</text>" in nll_of_pairs
    assert ">nats a token</text>" in nll_of_text


def steered(run: Path, every: int = 4, **more: Any) -> list[float]:
    """Give the run an alpha that moves from step to step, in lines of `every` steps; returns those alphas."""
    lines = read_metrics(run)
    training = [line for line in lines if "loss_nats" in line][every - 1 :: every]
    alphas = [0.2 + 0.01 * step for step in range(1, training[-1]["step"] + 1)]
    for line in training:
        of_steps = alphas[line["step"] - every : line["step"]]
        line |= {"alpha": of_steps[-1], "alpha_of_steps": of_steps, **more}
    write_metrics(run, [*training, *(line for line in lines if "loss_nats" not in line)])
    return alphas


def test_an_alpha_that_varied_is_shown_at_every_step_beside_one_that_did_not(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("steered", alpha_controller="ess:0.5"), make_run("constant")]
    alphas = steered(runs[0])
    write_metrics(runs[1], [line | {"alpha_of_steps": [0.8]} for line in read_metrics(runs[1])])
    path = write_report(runs, tmp_path / "report.html")
    page, picture, flat = Page(path), *pictures_of(path)[6:8]
    for expected in (
        "Coupling: alpha at each step", "Set by ess:0.5.", "Constant at 0.8.", "alpha ess:0.5 0.8",
        "alpha by ess:0.5, K = 3", "alpha = 0.8, K = 3",
    ):  # fmt: skip
        assert expected in page.text
    for svg, expected_alphas in ((picture, alphas), (flat, [0.8] * 40)):
        line = re.search(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: var\(--accent\)', svg)
        assert line
        points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[1]), float)
        assert len(points) >= 2
        ends = read_values(svg, "y", points[[0, -1], 1])
        np.testing.assert_allclose(ends, [expected_alphas[0], expected_alphas[-1]], atol=1e-4)
        np.testing.assert_allclose(read_values(svg, "x", points[[0, -1], 0]), [1, 40], atol=1e-2)


def test_the_picture_of_the_ess_has_the_target_it_was_steered_to(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("steered", alpha_controller="ess:0.5"), make_run("above", alpha_controller="alpha-star:0.5")]
    path = write_report(runs, tmp_path / "report.html")
    with_target = pictures_of(path)[4]
    assert Page(path).text.count("stays at 1.5, the dashed line between the limits (ess:0.5).") == 1
    dashes = re.findall(r'<path d="M [\d.]+ ([\d.]+) \nL [^"]*"[^>]*stroke-dasharray', with_target)
    np.testing.assert_allclose(sorted(read_values(with_target, "y", np.array(dashes, float))), [1, 1.5, 3], atol=1e-3)


def test_estimates_of_the_critical_alpha_are_circles_where_they_were_logged(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("above", alpha_controller="alpha-star:0.25")
    steered(run, alpha_star=-0.125)
    path = write_report([run], tmp_path / "report.html")
    assert (
        "Set by alpha-star:0.25; circles are the estimates of the critical alpha, at the next logged step."
        in Page(path).text
    )
    picture = pictures_of(path)[3]
    circles = re.findall(r'<use [^>]*y="([^"]+)" style="fill: var\(--paper\)', picture)
    np.testing.assert_allclose(read_values(picture, "y", np.array(circles, float)), [-0.125] * 10, atol=1e-4)


def test_learned_weights_are_drawn_and_said(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("learned", particle_weights="learned"), make_run("uniform", particle_weights="uniform")]
    w = lambda step: [0.5, 0.5 - step / 100, step / 100]
    more = [
        {"particle_weights": w(line["step"])} if "loss_nats" in line else {"eval_mean_particle_nll_nats_per_token": 2.5}
        for line in read_metrics(runs[0])
    ]
    write_metrics(runs[0], [line | extra for line, extra in zip(read_metrics(runs[0]), more, strict=True)])
    path = write_report(runs, tmp_path / "report.html")
    page, picture = Page(path), pictures_of(path)[6]
    assert "Weights of the particles" in page.text
    assert "In the end the particles count in the mixture with the weights 0.500, 0.100, 0.400." in page.text
    assert "No picture: the weights of this run were not learned, but 1/3 all the time." in page.text
    for k, colour in enumerate(COLOURS[:3]):
        line = re.search(rf'<path d="([^"]+)"[^>]*style="fill: none; stroke: {colour}', picture)
        assert line
        points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[1]), float)
        assert read_values(picture, "y", points[:, 1])[-5] == pytest.approx(w(36)[k], abs=0.01)
    assert "Weights of the particles" not in Page(write_report(runs[1:], tmp_path / "other.html")).text


def test_the_heat_maps_are_of_the_weights_that_the_evaluation_had(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("learned", particle_weights="learned")
    found = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(found | {"particle_weights": [0.5, 0.5, 0.0]}))
    assert re.search(r"Each particle leads 0 to \d+ examples", Page(write_report([run], tmp_path / "a.html")).text)
    (run / "evaluation.json").write_text(json.dumps(found | {"particle_weights": [0.5, 0.6, 0.0]}))
    with pytest.raises(ValueError, match="particle_weights are not 3 numbers of at least 0 with the sum 1"):
        write_report([run], tmp_path / "b.html")


def test_a_schedule_is_said_and_alpha_that_never_varied_has_no_picture(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("rising", alpha_schedule="cosine", alpha_0=0.1)
    assert "alpha cosine schedule from 0.1 to 0.8 " in Page(write_report([run], tmp_path / "a.html")).text
    constant = make_run("constant", alpha_schedule="constant", alpha_0=0.1, alpha_controller=None)
    steered(constant)
    page = Page(write_report([constant], tmp_path / "b.html"))
    assert "Coupling:" not in page.text
    assert re.search(r"alpha 0.8\s+Steps", page.text)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused_by_name(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    run = make_run("broken")
    (run / name).unlink()
    with pytest.raises(ValueError, match=rf"broken: no {name}; pass the output_dir of a run"):
        write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "", "empty, or without a training step"),
        (
            "metrics.jsonl",
            '{"step": 1, "loss_nats": 2.0}\n\n{"step": 2, "lo',
            "line 3 is not a JSON object with a step",
        ),
        ("metrics.jsonl", '{"step": 1, "loss_nats": 2.0}\n[1]\n', "line 2 is not a JSON object with a step"),
        ("metrics.jsonl", '{"loss_nats": 2.0}\n', "line 1 is not a JSON object with a step"),
        ("config.yaml", "alpha: 0.5\n", "num_particles and alpha cannot be read"),
        ("config.yaml", "num_particles: 3\nalpha: 1\nalpha_controller: ess\n", "alpha_controller: expected ess:TARGET"),
        ("config.yaml", "a: [1\nb: {\n", "not a readable YAML file"),
        ("config.yaml", 'seed: !!int ""\n', "not a readable YAML file"),
        ("config.yaml", "a: &a [x]\nb: [*a, *a]\n", "line 2: an alias"),  # eight such lines stand for gigabytes
        ("config.yaml", "num_particles: 3\nalpha: 1" + "0" * 400, "num_particles and alpha cannot be read"),
        ("run.json", "[]", "expected a JSON object"),
        ("evaluation.json", "{}", "not an evaluation"),
        ("evaluation.json", '{"step": 1, "split": "s", "alpha": 1, "logp_nats": [[1.0]]}', "not one row for each of 3"),
        (
            "evaluation.json",
            '{"step": 1, "split": "s", "alpha": 1, "logp_nats": [[1], [1, 2], [1]]}',
            "not an evaluation",
        ),
    ],
)
def test_a_broken_file_is_refused_in_one_line_and_the_old_report_stays(
    make_run: MakeRun, tmp_path: Path, name: str, content: str, message: str
) -> None:
    run, output = make_run("broken"), tmp_path / "report.html"
    (run / name).write_text(content)
    output.write_text("old")
    with pytest.raises(ValueError, match=message) as refusal:
        write_report([run], output)
    assert str(run / name) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert output.read_text() == "old"


def test_a_number_that_no_float_holds_is_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("huge")
    write_metrics(run, [{**line, "loss_nats": 10**400} for line in read_metrics(run)])
    write_report([run], tmp_path / "report.html")


def test_a_report_replaces_an_earlier_one_and_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    page = write_report([run], tmp_path / "report.html")
    assert write_report([run], page) == page
    before = (run / "config.yaml").read_bytes()
    for output in (run / "config.yaml", run):
        with pytest.raises(ValueError, match=r"output: .* is no HTML page, and would be lost"):
            write_report([run], output)
    assert (run / "config.yaml").read_bytes() == before


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")


def test_only_config_and_metrics_are_needed(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("early")
    (run / "evaluation.json").unlink()
    (run / "run.json").unlink()
    page = Page(write_report([run], tmp_path / "report.html"))
    assert "No heat map: the run's folder has no evaluation.json." in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "1 min 20 s" in page.text  # elapsed, from the last logged step


def test_elapsed_of_a_run_in_progress_is_that_of_its_last_step(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("running")
    for facts in ({"status": "running", "elapsed_s": 0.01}, {"elapsed_s": None}):
        (run / "run.json").write_text(json.dumps(facts))
        assert "1 min 20 s" in Page(write_report([run], tmp_path / "report.html")).text
    write_metrics(run, [{"step": 1}])
    assert "Elapsed not recorded" in Page(write_report([run], tmp_path / "report.html")).text


def test_nulls_missing_keys_and_skipped_updates_survive(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("gaps")
    lines = read_metrics(run)
    for i, line in enumerate(lines):
        for key in line:
            if key != "step" and i % 3 == 0:
                line[key] = None
        if i % 5 == 0 and "loss_nats" in line:
            line |= {"loss_nats": float("nan"), "grad_norm": [None, 0.0, float("inf")]}
        line.pop("ess_particles", None)
        line.pop("eval_ess_particles", None)
    lines[-2]["skipped_updates"] = [0, 7, 0]
    write_metrics(run, lines)
    page = Page(write_report([run], tmp_path / "report.html"))
    assert "Updates skipped: 7 of particle 1." in page.text
    assert "No picture: this run did not record it." in page.text


def test_a_step_that_a_resumed_run_wrote_again_counts_once(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("resumed", steps=9)
    once = write_report([run], tmp_path / "once.html").read_bytes()
    lines = read_metrics(run)
    write_metrics(run, [*({**line, "loss_nats": 1e6} for line in lines[5:]), *lines])
    assert write_report([run], tmp_path / "again.html").read_bytes() == once


@pytest.mark.parametrize(
    ("K", "N", "steps", "alpha"), [(1, 1, 1, 1.0), (1, 5, 40, 0.0), (2, 1, 2, 0.5), (33, 700, 900, 0.5)]
)
def test_sizes_from_one_to_many(make_run: MakeRun, tmp_path: Path, K: int, N: int, steps: int, alpha: float) -> None:
    page = Page(write_report([make_run("sized", K, N, alpha, steps)], tmp_path / "report.html"))
    assert ("with one particle every responsibility is 1" in page.text) == (K == 1)
    assert ("The picture shows 600 of them" in page.text) == (N > 600)
    assert ("Each point averages about 2 logged steps." in page.text) == (steps > 400)


def test_the_same_folders_give_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b")]
    first = write_report(runs, tmp_path / "first.html").read_bytes()
    assert write_report(runs, tmp_path / "second.html").read_bytes() == first


@pytest.mark.parametrize("K", [1, 2, 8])
def test_ordering_keeps_every_example_and_one_block_a_leader(K: int) -> None:
    drawn = np.random.default_rng(K).dirichlet(np.full(K, 0.5), size=200).T
    order = order_examples(drawn)
    assert sorted(order) == list(range(200))
    leaders = drawn.argmax(axis=0)[order]
    assert (np.diff(leaders) >= 0).all()
    top = drawn.max(axis=0)[order]
    assert all((np.diff(top[leaders == k]) <= 0).all() for k in range(K))


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0, 3.0])
def test_responsibilities_are_those_of_the_reduction(make_run: MakeRun, alpha: float) -> None:
    logp = logp_of(make_run("a", K=4, N=30))
    expected = renyi_reduce(torch.from_numpy(logp), alpha).responsibilities.numpy()
    np.testing.assert_array_equal(responsibilities(logp, alpha), expected)
    logp[1, 3] = np.nan  # a missing value takes no share, as in training
    assert responsibilities(logp, alpha)[1, 3] == (0.25 if alpha == 0 else 0.0)


def test_the_heat_map_shows_the_responsibilities(make_run: MakeRun, tmp_path: Path) -> None:
    K, N = 3, 6
    run = make_run("a", K, N, alpha=0.1)
    source = write_report([run], tmp_path / "report.html").read_text()
    for name, alpha in (("trained0", 0.1), ("at-one0", 1.0)):
        encoded = re.findall(rf'base64,([^"]+)" id="{name}-[^"]*" transform="scale\(1 -1\)', source)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[0]))).convert("RGB"), dtype=float)[::-1]
        height, width, _ = pixels.shape
        shown = pixels[(2 * np.arange(K) + 1) * height // (2 * K)][:, (2 * np.arange(N) + 1) * width // (2 * N)]
        order = order_examples(responsibilities(logp_of(run), 1.0))
        expected = 255 * HEAT(responsibilities(logp_of(run), alpha)[:, order])[..., :3]
        np.testing.assert_allclose(shown, expected, atol=3)


def test_the_heat_maps_name_their_examples(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", 3, 6, alpha=0.1)
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [4, 9, 16, 25, 36, 49]
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "example_ids": rows}))
    path = write_report([run], tmp_path / "report.html")
    posterior = responsibilities(logp_of(run), 1.0)
    order = order_examples(posterior)
    for picture, alpha in zip(pictures_of(path)[-3:-1], (0.1, 1.0), strict=True):
        shown = responsibilities(logp_of(run), alpha)[:, order]
        expected = [
            f"row {rows[i]}: particle {shown[:, at].argmax()} leads, {shown[:, at].max():.2f}. text of {i}"
            for at, i in enumerate(order)
        ]
        assert re.findall(r"<title>(.*?)</title>", picture) == expected
    listed = " ".join(Page(path).text.split())
    for at, i in enumerate(order):
        leader = f"{posterior[:, i].argmax()} {posterior[:, i].max():.2f}"
        assert f" {at + 1} row {rows[i]} text of {i} {leader}" in listed


def test_examples_without_a_finite_logp_are_left_out_of_the_heat_maps(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", 3, 6, alpha=0.1)
    evaluation = json.loads((run / "evaluation.json").read_text())
    logp = [[None if i in (1, 4) else value for i, value in enumerate(row)] for row in evaluation["logp_nats"]]
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "logp_nats": logp}))
    path = write_report([run], tmp_path / "report.html")
    assert "2 examples are left out: no particle gave them a finite log-likelihood." in Page(path).text
    assert re.findall(r"text of (\d)</title>", pictures_of(path)[-2]) != []
    assert not {"1", "4"} & set(re.findall(r"text of (\d)</title>", pictures_of(path)[-2]))
    nothing = [[None] * len(row) for row in logp]
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "logp_nats": nothing}))
    assert "No heat map: the evaluation has no finite log-likelihood." in Page(write_report([run], path)).text


def test_a_run_writes_the_texts_that_its_heat_maps_show(sft_config: Callable[..., SftConfig]) -> None:
    config = sft_config(max_steps=1)
    train(config)
    run = Path(config.output_dir)
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in Path(config.dataset_name).read_text().splitlines()]
    expected = [f"{rows[i]['prompt']}[[{rows[i]['completion']}</s>]]" for i in evaluation["example_ids"]]
    assert evaluation["texts"] == expected
    assert all(text in Page(run / "report.html").text for text in expected)


def test_an_evaluation_of_an_earlier_version_holds_no_texts_and_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["texts"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "row 11" in Page(write_report([run], tmp_path / "report.html")).text


def test_the_page_says_first_how_each_run_ended(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("several"), make_run("one", 1), make_run("training"), make_run("nothing")]
    for run in runs[:2]:
        lines = read_metrics(run)
        lines[-1] |= {"eval_mixture_nll_nats_per_token": 1.5, "eval_mean_particle_nll_nats_per_token": 2.25}
        write_metrics(run, lines)
    in_training = [line for line in read_metrics(runs[2]) if "loss_nats" in line]
    write_metrics(runs[2], in_training)
    path = write_report(runs, tmp_path / "report.html")
    text = " ".join(Page(path).text.split())
    never_saw = "after 40 steps: on examples that training never saw,"
    nll = "the particles together (the mixture) have an NLL of {:.3g} nats a token, a particle by itself {:.3g}."
    for expected in (
        f"Found for several, {never_saw} {nll.format(1.5, 2.25)} An example is divided among 1.2 of the 3 particles.",
        f"Found for one, {never_saw} its one particle has an NLL of 2.25 nats a token.",
        "Found for training, after 40 steps: on its last training examples, "
        + nll.format(*(in_training[-1][f"{who}_nll_nats_per_token"] for who in ("mixture", "mean_particle"))),
        f"Found for nothing, {never_saw} nothing was recorded.",
    ):
        assert expected in text
    assert text.index("Found for several") < text.index("Words on this page")


def test_titles_tell_runs_apart(make_run: MakeRun, make_preference_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("one", model_name_or_path="org/small"), make_preference_run("two", model_name_or_path="big")]
    both = "one and two: sft and dpo of small and big"
    for chosen, title in ((runs[:1], "one: sft of small"), (runs[1:], "two: dpo of big"), (runs, both)):
        source = write_report(chosen, tmp_path / "report.html").read_text()
        for tag in ("title", "h1"):
            assert f"<{tag}>{title}</{tag}>" in source


def test_the_words_stand_above_the_tables_that_use_them(make_run: MakeRun, tmp_path: Path) -> None:
    tags = [tag for tag, _ in Page(write_report([make_run("a")], tmp_path / "report.html")).tags]
    assert tags.index("dl") < tags.index("table")


@pytest.mark.parametrize("K", [1, 8, 9, 64])
def test_each_particle_has_its_own_colour(K: int) -> None:
    colours = particle_colours(K)
    assert len(set(colours)) == len(colours) == K
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "evaluation.json"])
def test_a_file_that_is_nested_without_end_is_refused_in_one_line(make_run, tmp_path, name):
    run = make_run("deep")
    (run / name).write_text("[" * (1500 if name == "config.yaml" else 100_000))
    with pytest.raises(ValueError, match=f"^{run / name}: ") as error:
        write_report([run], tmp_path / "report.html")
    assert "\n" not in str(error.value)
