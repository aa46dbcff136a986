"""The command alpha-star: what it finds, what it writes, and what it refuses before any expensive work."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi_engine import EnsembleConfig, LoraEnsemble, SftConfig, train
from renyi_engine.cli import main
from renyi_engine.core.files import read_tensors
from renyi_engine.critical_alpha.findings import Driver, num_drivers, plainly
from renyi_engine.objectives.sft import SftTask
from renyi_kernels import renyi_reduce


@pytest.fixture(scope="module")
def trained(model_folder, jsonl, tmp_path_factory):
    """One particle at a minimum of data that contradict each other: half of the people say a, half of them b."""
    rows = [{"prompt": f"{i}", "completion": "ab"[i % 2]} for i in range(10)]
    folder = tmp_path_factory.mktemp("contested")
    config = SftConfig(
        model_name_or_path=str(model_folder), dataset_name=str(jsonl(folder / "contested.jsonl", rows)),
        output_dir=str(folder / "run"), num_particles=1, lora_r=2, alpha=0.0, prior="none", max_steps=60,
        learning_rate=3e-2, per_device_train_batch_size=10, logging_steps=60, use_cpu=True,
    )  # fmt: skip
    train(config)
    return config


@pytest.fixture
def command(trained, tmp_path):
    def run(*extra, ensemble=True):
        argv = ["alpha-star", f"--model_name_or_path={trained.model_name_or_path}", "--use_cpu=true"]
        argv += [f"--dataset_name={trained.dataset_name}", f"--output_dir={tmp_path / 'found'}"]
        argv += [f"--ensemble={trained.output_dir}/particles"] if ensemble else ["--lora_r=2"]
        return main([*argv, "--subspace_dims=6", "--per_device_eval_batch_size=4", *extra])

    return run


def test_particles_at_the_adapter_part_above_what_it_says_and_not_below(command, trained, tmp_path, capsys):
    assert command("--curvature=hessian") == 0
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    out = capsys.readouterr().out
    assert f"alpha* = {found['alpha_star']:.4g}" in out
    assert found["num_dims"] == 6
    # two particles, one step to either side along the direction that was saved
    direction = read_tensors(tmp_path / "found" / "direction.safetensors")
    assert math.sqrt(sum(part.square().sum().item() for part in direction.values())) == pytest.approx(1, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(trained.model_name_or_path).double()
    one = LoraEnsemble.from_pretrained(model, f"{trained.output_dir}/particles")
    config, centre = one.config, {path: (A[0], B[0]) for path, (A, B) in one.stacked().items()}
    one.detach()
    pair = LoraEnsemble.attach(model, EnsembleConfig(**{**vars(config), "num_particles": 2})).double()
    task = SftTask(AutoTokenizer.from_pretrained(trained.model_name_or_path), 64)
    rows = [json.loads(line) for line in Path(trained.dataset_name).read_text().splitlines()]
    batch = task.collate([task.example(i, row) for i, row in enumerate(rows)])

    def logp(step):
        with torch.no_grad():
            for path, values in pair.stacked().items():
                for kind, stack, value in zip(("lora_A", "lora_B"), values, centre[path], strict=True):
                    for k, sign in enumerate((1, -1)):
                        stack[k] = value + sign * step * direction[f"{path}.{kind}"]
            return pair.sequence_logprob(batch)

    step = 0.01 / math.sqrt(max(found["squared_slope_along_direction"], abs(found["curvature_along_direction"])))
    together, apart = logp(0.0), logp(step)
    for alpha in (0.5, 2.0):
        gain = (renyi_reduce(apart, alpha).loss - renyi_reduce(together, alpha).loss).mean().item() / step**2
        expected = (found["curvature_along_direction"] - alpha * found["squared_slope_along_direction"]) / 2
        assert gain == pytest.approx(expected, rel=0.05)


def test_everything_it_writes_says_the_same(command, trained, tmp_path, capsys):
    assert command("--alpha=0.9", "--num_resamples=50") == 0
    folder = tmp_path / "found"
    found = json.loads((folder / "results.json").read_text())
    low, high = found["alpha_star_interval"]
    assert 0 < low <= found["alpha_star"] * 1.2
    assert low < high
    by_dims = found["alpha_star_by_dims"]
    assert by_dims == sorted(by_dims, reverse=True)
    assert by_dims[-1] == found["alpha_star"]
    assert (found["spectrum_of_S_alpha"][0] < 0) == (found["alpha_star"] < 0.9)
    with (folder / "examples.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == found["num_examples"] == 10
    assert sum(float(row["share"]) for row in table) == pytest.approx(1)
    slopes = [float(row["slope"]) for row in table]
    squared = sum(slope**2 for slope in slopes) / 10
    assert squared == pytest.approx(found["squared_slope_along_direction"], rel=1e-5)
    curvature = sum(float(row["curvature"]) for row in table) / 10
    assert curvature == pytest.approx(found["curvature_along_direction"], rel=1e-5)
    assert curvature / squared == pytest.approx(found["alpha_star"], rel=1e-4)
    page = (folder / "report.html").read_text()
    assert f"lpha* = {found['alpha_star']:.4g}" in page
    # what was found stands first, in words
    part = "part" if found["alpha_star"] < 0.9 else "stay together"
    answer = re.search(rf"Found: the copies would {part}\. .*? than (\S+) times as strongly as here\.", page)
    assert answer
    assert float(answer[1]) == pytest.approx(found["alpha_star"] / 0.9, rel=0.06)
    assert answer.start() < page.index("<h2>") < page.index("alpha*")
    assert "<title>found: alpha-star of tiny</title>" in page
    assert html.escape(table[0]["text"]) in page


def test_a_prior_adds_its_curvature(command, tmp_path):
    command()
    without = json.loads((tmp_path / "found" / "results.json").read_text())
    command("--prior_lambda=30", "--prior_std=2", f"--output_dir={tmp_path / 'prior'}")
    prior = json.loads((tmp_path / "prior" / "results.json").read_text())
    assert prior["prior_curvature"] == pytest.approx(30 / (10 * 2**2))
    assert prior["spectrum_of_H"][0] >= 30 / 40 - 1e-6
    assert prior["alpha_star"] > without["alpha_star"]


def test_without_an_adapter_it_is_of_a_fresh_one_and_a_downward_curve_is_told(command, tmp_path, capsys):
    assert command("--curvature=hessian", ensemble=False) == 0
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert found["only_B"]
    assert all(name.endswith("lora_B") for name in read_tensors(tmp_path / "found" / "direction.safetensors"))
    assert (found["alpha_star"] <= 0) == ("curves downwards" in capsys.readouterr().out)


APART = "would move apart"


@pytest.mark.parametrize(
    ("alpha", "critical", "interval", "answer"),
    [
        (0.8, 0.2, (0.1, 0.3), f"{APART}. They would stay together only if they were coupled less than 0.25 times"),
        (0.8, 1.6, (1.2, 2.0), f"would stay together. They {APART} only if they were coupled more than 2 times"),
        (0.8, 96.0, (64.0, 99.0), f"{APART} only if they were coupled more than 120 times"),
        (0.0, 0.2, (0.1, 0.3), "would stay together, as they are not coupled at all. Other"),
        (0.8, -0.1, (-0.3, 0.3), f"{APART}, however weakly they are coupled. The adapter is at no minimum"),
        (0.8, 0.2, (0.1, 0.3), "very probably give the same answer. 2 of 9 examples make up half"),
        (0.8, 0.2, (0.1, 0.9), "might well give the opposite answer. 2 of 9 examples make up half"),
    ],
)
def test_what_was_found_is_said_in_words(alpha, critical, interval, answer):
    results = {"alpha": alpha, "alpha_star": critical, "alpha_star_interval": interval, "num_examples": 9}
    assert answer in plainly(results, num_drivers=2)
    assert "*" not in plainly(results, num_drivers=2)


def test_an_answer_that_rests_on_one_example_says_so():
    results = {"alpha": 0.8, "alpha_star": 0.2, "alpha_star_interval": (0.1, 0.3), "num_examples": 9}
    said = plainly(results, num_drivers=1)
    assert f"{APART}. They would stay together only" in said
    assert "But one example makes up half or more of what pulls the copies apart" in said
    assert "very probably" not in said


@pytest.mark.parametrize("of_one", [False, True])
def test_the_command_says_so_too(command, jsonl, tmp_path, capsys, of_one):
    """Ten rows with one prompt have like shares; of the rows that the adapter has learned, one has most of it."""
    same_prompt = [{"prompt": "0", "completion": answer} for answer in "ab" * 5]
    assert command(*([] if of_one else [f"--dataset_name={jsonl(tmp_path / 'rows.jsonl', same_prompt)}"])) == 0
    with (tmp_path / "found" / "examples.csv").open(encoding="utf-8") as file:
        largest = float(next(csv.DictReader(file))["share"])
    assert (largest >= 0.5) == of_one
    assert ("one example makes up half or more of what pulls" in capsys.readouterr().out) == of_one


def test_as_many_examples_drive_it_as_make_up_half_of_the_pull():
    shares = [0.3, 0.25, 0.25, 0.2]
    assert num_drivers([Driver(i, share, 1.0, 1.0, "") for i, share in enumerate(shares)]) == 2
    assert num_drivers([Driver(0, 1.0, 1.0, 1.0, "")]) == 1


def test_a_particle_of_no_ensemble_is_refused(command, capsys):
    assert command("--particle=3", ensemble=False) == 2
    assert "particle: expected --ensemble, the folder that it is in; got 3" in capsys.readouterr().err


def test_more_examples_than_wanted_are_drawn_and_the_prior_counts_them_all(command, tmp_path):
    command("--max_examples=4", "--prior_lambda=1")
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert found["num_examples"] == 4
    assert found["prior_curvature"] == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dtype=bfloat16"], "dtype: expected float32"),
        (["--particle=1"], "particle: expected 0 to 0, the particles that .* holds; got 1"),
        (["--subspace_dims=1"], "subspace_dims: expected a whole number of at least 2; got 1"),
        (["--curvature=fisher"], "curvature"),
        (["--prior_std=0"], "prior_std: expected a number above 0"),
        (["--lora_r=4"], "lora_r: the adapters in .* have their own; leave it out"),
    ],
)
def test_what_does_not_do_is_one_line_and_exit_code_2(command, extra, message, capsys):
    assert command(*extra) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, err)
