"""Training runs of a tiny model: what is learnt, what is written, and that a stopped run goes on bit for bit."""

from __future__ import annotations

import json
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import renyi_engine.training.loop as loop
import renyi_engine.training.train_step as train_step
from renyi_engine import DoesNotFit, EnsembleConfig, LoraEnsemble, TrainingDiverged, base_model, train
from renyi_engine.core import files
from renyi_engine.core.files import read_json, sha256_of
from renyi_engine.data.batches import collate
from renyi_engine.data.rows import content_hash
from renyi_engine.objectives.alpha import EssController
from renyi_engine.objectives.sft import SftTask
from renyi_engine.training import checkpoint
from renyi_engine.training.export import export_particles
from renyi_engine.training.watchdog import HISTORY
from renyi_kernels import renyi_reduce

TIMINGS = {"tokens_per_s", "elapsed_s"}


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def fingerprint(run: Path, step: int) -> dict[str, str]:
    folder = run / f"checkpoint-{step}"
    return {name: sha256_of(folder / name) for name in ("adapters.safetensors", "optimizer.safetensors", "state.json")}


def skips(run: Path) -> list[tuple]:
    """Step, particles, number of rows and reason of every update that was not made."""
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    return [(line["step"], line["particles"], len(line["rows"]), line["why"]) for line in lines]


def forbid_the_model(monkeypatch) -> None:
    def load(config):
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(base_model, "load_model", load)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the software catches it."""


def kill_in_micro_batch(monkeypatch, number: int) -> None:
    """Die in the given training forward, counted over the whole run."""
    original, seen = train_step.data_term, []

    def data_term(*args):
        seen.append(None)
        if len(seen) == number:
            raise Killed
        return original(*args)

    monkeypatch.setattr(train_step, "data_term", data_term)


# ---------------------------------------------------------------------- one step


@pytest.mark.parametrize("alpha", [0.0, 0.8, 3.0])
def test_a_step_of_one_particle_is_a_plain_peft_step(sft_config, tokenizer, alpha):
    config = sft_config(num_particles=1, alpha=alpha, max_grad_norm=0.5, weight_decay=0.1, prior="none")
    task = SftTask(tokenizer, 64)
    rows = [{"prompt": f"q{i}", "completion": "a" * (i + 1)} for i in range(5)]
    examples = [task.example(i, row) for i, row in enumerate(rows)]
    batches = [collate(part, 0) for part in (examples[:2], examples[2:])]

    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    ensemble = LoraEnsemble.attach(model, config.ensemble_config())
    with torch.no_grad():
        for _, B in ensemble.stacked().values():
            B.normal_(0, 0.3, generator=torch.Generator().manual_seed(B.numel()))
    base = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    names = {path.rsplit(".", 1)[-1] for path in ensemble.paths}
    peft = get_peft_model(base, LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=names)).eval()
    weights = {}
    for path, (A, B) in ensemble.stacked().items():
        lora = peft.base_model.model.get_submodule(path)
        lora.lora_A["default"].weight.data.copy_(A[0])
        lora.lora_B["default"].weight.data.copy_(B[0])
        weights[path] = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)

    result = train_step.train_step(ensemble, task, adamw(ensemble.parameters()), batches, alpha, config, 5)

    trainable = [p for p in peft.parameters() if p.requires_grad]
    losses = []
    for batch in batches:
        logits = peft(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        token = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        losses.append(token.sum(dim=1))
    torch.cat(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable, 0.5)
    torch.testing.assert_close(result.loss, torch.cat(losses), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.norms[0], norm, rtol=1e-5, atol=1e-5)
    for path, (A, B) in ensemble.stacked().items():
        for ours, theirs in zip((A, B), weights[path], strict=True):
            torch.testing.assert_close(ours.grad[0], theirs.grad, rtol=1e-5, atol=1e-5)
    # Adam divides by the gradient's size: where that is near 0, rounding decides, so compare where it is not
    adamw(trainable).step()
    for path, (A, B) in ensemble.stacked().items():
        for ours, theirs in zip((A, B), weights[path], strict=True):
            clear = theirs.grad.abs() > 1e-4
            torch.testing.assert_close(ours[0][clear], theirs[clear], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prior", ["none", "potential"])
@pytest.mark.parametrize(("limit", "epsilon"), [(1.0, 1e-8), (55.0, 1e-8), (55.0, 1.0), (1000.0, 1.0)])
def test_at_alpha_0_three_particles_are_three_trainings_of_one(sft_config, tokenizer, prior, limit, epsilon):
    """Clipped always, at some steps, and never; with an epsilon that asks for the size of a gradient."""
    config = sft_config(
        alpha=0.0, init="spread", prior=prior, prior_lambda=5.0, weight_decay=0.1, max_grad_norm=limit,
        adam_epsilon=epsilon,
    )  # fmt: skip
    task = SftTask(tokenizer, 64)
    examples = [task.example(i, {"prompt": f"{i}: ", "completion": "yes" * (1 + i % 4)}) for i in range(20)]
    parts = [collate(examples[start : start + 2], 0) for start in range(0, 20, 2)]

    def trained(ensemble):
        optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-3, eps=epsilon, weight_decay=0.1)
        steps = [
            train_step.train_step(ensemble, task, optimizer, parts[at : at + 2], 0.0, config, 20)
            for at in range(0, 10, 2)
        ]
        return torch.stack([step.norms for step in steps])

    together, _ = _loaded(config)
    start = [p.detach().clone() for p in together.parameters()]
    norms = trained(together)
    assert (norms > limit).any() == (limit < 1000)
    assert (norms > limit).all() == (limit < 55)
    for k in range(3):
        alone, _ = _loaded(replace(config, num_particles=1))
        with torch.no_grad():
            for p, q in zip(alone.parameters(), start, strict=True):
                p.copy_(q[k : k + 1])
        norms_alone = trained(alone)[:, 0]
        for p, q in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p[k], q[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(norms[:, k], norms_alone, rtol=2e-6, atol=0)


def test_the_first_of_several_uncoupled_particles_is_the_one_of_a_run_of_one(sft_config, tmp_path):
    several = sft_config(alpha=0.0, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=40.0, adam_epsilon=1.0)
    ours = train(several).ensemble.stacked()
    theirs = train(replace(several, num_particles=1, output_dir=str(tmp_path / "one"))).ensemble.stacked()
    for path, pair in theirs.items():
        for p, q in zip(ours[path], pair, strict=True):
            torch.testing.assert_close(p[0], q[0], rtol=0, atol=1e-6)
    norms = [[line["grad_norm"][0] for line in metrics(tmp_path / run)[:6]] for run in ("run", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-6)


def test_splitting_a_batch_into_micro_batches_changes_nothing(sft_config, tmp_path):
    whole = sft_config(per_device_train_batch_size=8, max_steps=3)
    parts = sft_config(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3, output_dir=str(tmp_path / "parts")
    )
    ours, theirs = train(whole).ensemble, train(parts).ensemble
    for (_, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_prior_enters_once_a_step_whatever_the_accumulation(sft_config, tokenizer):
    config = sft_config(prior="potential", prior_lambda=50.0, prior_std=0.5, max_grad_norm=0.0)
    task = SftTask(tokenizer, 64)
    examples = [task.example(i, {"prompt": "q", "completion": "a" * (i + 1)}) for i in range(4)]
    gradients = {}
    for prior in ("none", "potential"):
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
        ensemble = LoraEnsemble.attach(model, replace(config.ensemble_config(), init="spread"))
        before = {name: p.detach().clone() for name, p in ensemble.named_parameters()}
        optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.0)
        batches = [collate(examples[:2], 0), collate(examples[2:], 0)]
        train_step.train_step(
            ensemble, task, optimizer, batches, 0.7, replace(config, prior=prior), num_train_examples=40
        )
        gradients[prior] = {name: p.grad for name, p in ensemble.named_parameters()}
    for name, value in before.items():
        # the gradient of the prior on one particle alone: without the 1/K of the mean over three
        expected = 50.0 / 40 * value / 0.5**2
        torch.testing.assert_close(
            gradients["potential"][name] - gradients["none"][name], expected, rtol=1e-3, atol=1e-5
        )


# ---------------------------------------------------------------------- a whole run


def test_training_lowers_the_loss_and_writes_everything(sft_config, data_file, tmp_path):
    config = sft_config(max_steps=12, eval_dataset_name=str(data_file), eval_steps=6, dataset_test_split="train")
    result = train(config)
    lines = metrics(result.output_dir)
    steps = [line for line in lines if "loss_nats" in line]
    evaluations = [line for line in lines if "eval_loss_nats" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in evaluations] == [6, 12]
    assert steps[-1]["loss_nats"] < 0.7 * steps[0]["loss_nats"]
    assert (
        evaluations[-1]["eval_mixture_nll_nats_per_token"] <= evaluations[-1]["eval_mean_particle_nll_nats_per_token"]
    )
    assert all(1 <= line["ess_particles"] <= 3 for line in steps)
    files = {path.name for path in result.output_dir.iterdir()}
    assert files == {
        "checkpoint-12", "config.yaml", "evaluation.json", "metrics.jsonl", "particles", "report.html", "run.json",
    }  # fmt: skip
    assert json.loads((result.output_dir / "run.json").read_text())["status"] == "finished"
    # what was written is what is in memory
    batch = collate([SftTask(*_tokenizer(config)).example(0, {"prompt": "1 and 1: ", "completion": "yes"})], 0)
    expected = result.ensemble.sequence_logprob(batch)
    again = LoraEnsemble.from_pretrained(result.ensemble.detach(), result.output_dir / "particles")
    assert torch.equal(again.sequence_logprob(batch), expected)


def _tokenizer(config):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model_name_or_path), 64


def test_metrics_average_over_the_window_between_two_lines(sft_config, tmp_path):
    fine = metrics(train(sft_config(max_steps=6)).output_dir)
    coarse = metrics(train(sft_config(max_steps=6, logging_steps=3, output_dir=str(tmp_path / "coarse"))).output_dir)
    assert [line["step"] for line in coarse] == [3, 6]
    # 22 examples in batches of 4: the sixth step has 2
    sizes = [4, 4, 4, 4, 4, 2]
    expected = sum(line["loss_nats"] * n for line, n in zip(fine[3:], sizes[3:], strict=True)) / sum(sizes[3:])
    assert coarse[1]["loss_nats"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(sft_config, schedule):
    config = sft_config(lr_scheduler_type=schedule, warmup_steps=2, max_steps=6, learning_rate=1e-3)
    rates = [line["learning_rate"] / 1e-3 for line in metrics(train(config).output_dir)]
    decay = {"constant": [1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.853553, 0.5, 0.146447]}
    assert rates == pytest.approx([0, 0.5, *decay[schedule]], abs=1e-5)


def test_two_runs_are_bitwise_equal(sft_config, tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # nothing may depend on it
        train(sft_config(output_dir=str(tmp_path / name), max_steps=4))
    assert fingerprint(tmp_path / "a", 4) == fingerprint(tmp_path / "b", 4)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_bfloat16_trains_and_keeps_fp32_masters(sft_config):
    result = train(sft_config(dtype="bfloat16", max_steps=3))
    assert result.ensemble.model.dtype == torch.bfloat16
    assert {p.dtype for p in result.ensemble.parameters()} == {torch.float32}


def test_train_can_run_outside_the_main_thread(sft_config):
    done = []
    thread = threading.Thread(target=lambda: done.append(train(sft_config(max_steps=1)).global_step))
    thread.start()
    thread.join()
    assert done == [1]


# ---------------------------------------------------------------------- alpha from step to step


def alphas(run: Path) -> list[float]:
    """Of every step, as metrics.jsonl has them."""
    return [alpha for line in metrics(run) for alpha in line.get("alpha_of_steps", [])]


@pytest.fixture
def fake_alpha_star(monkeypatch):
    """Stands for the estimate of the critical alpha; the list of what it was asked."""
    asked = []

    def estimate_alpha_star(ensemble, task, items, *, prior_curvature, seed):
        assert prior_curvature == pytest.approx(2.0 / (22 * 0.5**2))
        asked.append((len(items), seed))
        return seed % 97 / 97

    monkeypatch.setattr(loop, "estimate_alpha_star", estimate_alpha_star)
    return asked


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_schedule_sets_the_alpha_of_every_step_and_all_of_them_are_logged(sft_config, logging_steps):
    config = sft_config(
        alpha=0.9, alpha_schedule="linear", alpha_warmup_steps=0.5, max_steps=10, logging_steps=logging_steps
    )
    result = train(config)
    expected = [0.0, 0.18, 0.36, 0.54, 0.72, *[0.9] * 5]
    assert alphas(result.output_dir) == pytest.approx(expected)
    lines = [line for line in metrics(result.output_dir) if "loss_nats" in line]
    assert all(line["alpha"] == line["alpha_of_steps"][-1] for line in lines)
    assert all("alpha_star" not in line for line in lines)


def test_the_alpha_of_a_step_is_the_one_it_is_trained_with(sft_config, tmp_path):
    run = lambda name, **settings: train(
        sft_config(output_dir=str(tmp_path / name), init="spread", max_steps=3, **settings)
    )
    run("constant", alpha=0.4)
    run("flat", alpha=0.4, alpha_schedule="cosine", alpha_0=0.4, alpha_warmup_steps=2)
    run("rising", alpha=0.4, alpha_schedule="linear", alpha_warmup_steps=2)
    weights = {name: fingerprint(tmp_path / name, 3)["adapters.safetensors"] for name in ("constant", "flat", "rising")}
    assert weights["flat"] == weights["constant"] != weights["rising"]
    sizes = {name: [line["ess_particles"] for line in metrics(tmp_path / name)] for name in weights}
    assert sizes["rising"][0] == 3  # alpha is 0: all share alike
    assert sizes["constant"][0] < 2.99


def test_what_is_written_after_a_step_has_the_alpha_of_that_step(sft_config, data_file, tmp_path):
    config = sft_config(
        alpha=0.9, alpha_schedule="linear", alpha_warmup_steps=12, max_steps=8, save_steps=4, init="spread",
        eval_dataset_name=str(data_file), dataset_test_split="train",
    )  # fmt: skip
    result = train(config)
    evaluation = json.loads((result.output_dir / "evaluation.json").read_text())
    assert evaluation["alpha"] == pytest.approx(0.9 * 7 / 12)
    weighed = renyi_reduce(torch.tensor(evaluation["logp_nats"]), 0.9 * 7 / 12)
    assert metrics(result.output_dir)[-1]["eval_ess_particles"] == pytest.approx(weighed.ess.mean().item(), rel=1e-5)
    assert metrics(result.output_dir)[-1]["eval_loss_nats"] == pytest.approx(weighed.loss.mean().item(), rel=1e-5)
    for folder in (result.output_dir / "particles", export_particles(result.output_dir, tmp_path / "newest")):
        assert json.loads((folder / "ensemble.json").read_text())["alpha"] == pytest.approx(0.9 * 7 / 12)
    earlier = export_particles(result.output_dir / "checkpoint-4", tmp_path / "earlier")
    assert json.loads((earlier / "ensemble.json").read_text())["alpha"] == pytest.approx(0.9 * 3 / 12)


def test_the_effective_sample_size_is_steered_to_its_target(sft_config):
    config = sft_config(
        num_particles=4, init="spread", alpha=0.3, alpha_controller="ess:0.7", alpha_max=20.0, max_steps=60
    )
    result = train(config)
    sizes = [line["ess_particles"] for line in metrics(result.output_dir) if "loss_nats" in line]
    assert sum(sizes[30:]) / 30 == pytest.approx(0.7 * 4, abs=0.05 * 4)
    assert alphas(result.output_dir)[0] == 0.3


def test_alpha_keeps_its_margin_above_the_estimates_of_the_critical_alpha(sft_config, fake_alpha_star):
    config = sft_config(
        alpha_controller="alpha-star:0.25", alpha_star_steps=3, max_steps=7, logging_steps=2,
        prior_lambda=2.0, prior_std=0.5,
    )  # fmt: skip
    result = train(config)
    assert [items for items, _ in fake_alpha_star] == [22] * 3
    seeds = [seed for _, seed in fake_alpha_star]
    assert len(set(seeds)) == 3
    estimates = [seed % 97 / 97 for seed in seeds]
    assert alphas(result.output_dir) == pytest.approx([estimates[i // 3] + 0.25 for i in range(7)])
    # before steps 0, 3 and 6, in lines of two steps each
    lines = [line for line in metrics(result.output_dir) if "loss_nats" in line]
    assert [line.get("alpha_star") for line in lines] == pytest.approx([estimates[0], estimates[1], None, estimates[2]])


def test_the_plain_line_of_a_run_shows_alpha_where_it_varies(sft_config, tmp_path, capsys):
    train(sft_config(max_steps=1))
    train(sft_config(max_steps=1, alpha_controller="ess:0.5", output_dir=str(tmp_path / "steered")))
    constant, steered = re.findall(r"^step 1/1 .*", capsys.readouterr().err, re.M)
    assert "alpha" not in constant
    assert "alpha 0.7 " in steered


# ---------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"prior": "smoothed_kl"},
        {"alpha_schedule": "linear", "alpha_0": 0.1, "alpha_warmup_steps": 12},
        {"alpha_schedule": "cosine", "alpha_warmup_steps": 0.8},
        {"alpha_controller": "ess:0.7", "alpha_max": 20.0, "init": "spread"},
        # estimates before steps 0 and 7: the last step of the checkpoint, in the middle of a window
        {"alpha_controller": "alpha-star:0.2", "alpha_star_steps": 7},
    ],
    ids=["potential", "smoothed_kl", "linear", "cosine", "ess", "alpha-star"],
)
def test_killed_in_the_middle_of_an_accumulation_it_resumes_bitwise_equal(sft_config, tmp_path, monkeypatch, changed):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 14,  # 6 steps an epoch: the third epoch is begun
        "save_steps": 4,
        "logging_steps": 3,  # the window of metrics spans a checkpoint
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "group_by_length",
        "prior_lambda": 1.0,
    }
    whole = sft_config(output_dir=str(tmp_path / "whole"), **settings | changed)
    train(whole)
    broken = sft_config(output_dir=str(tmp_path / "broken"), **settings | changed)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_micro_batch(patch, 20)  # in step 11, after its first micro-batch; the last checkpoint is of step 8
        train(broken)
    assert not (tmp_path / "broken" / "checkpoint-12").exists()
    torch.manual_seed(123)
    train(replace(broken, resume_from_checkpoint="true"))
    assert fingerprint(tmp_path / "broken", 14) == fingerprint(tmp_path / "whole", 14)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    read = lambda run: (tmp_path / run / "evaluation.json").read_text()
    assert read("broken") == read("whole")
    assert (len(set(alphas(tmp_path / "whole"))) > 1) == whole.alpha_varies


def test_resuming_with_other_settings_is_refused_with_a_diff(sft_config):
    config = sft_config(max_steps=2)
    train(config)
    for name, value in {
        "num_particles": 2,
        "lora_r": 3,
        "alpha": 0.1,
        "alpha_schedule": "linear",
        "alpha_0": 0.1,
        "alpha_warmup_steps": 3.0,
        "alpha_controller": "ess:0.5",
        "alpha_max": 1.5,
        "alpha_star_steps": 5,
        "lora_target_modules": ["q_proj"],
        "model_name_or_path": config.model_name_or_path + "/.",
    }.items():
        with pytest.raises(ValueError, match=f"started with other settings:\n  {name}: .* then, .* now"):
            train(replace(config, resume_from_checkpoint="true", **{name: value}))
    train(replace(config, resume_from_checkpoint="true", max_steps=3, logging_steps=2))


def test_resuming_on_other_weights_under_the_same_name_is_refused(sft_config, model_folder, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    config = sft_config(max_steps=1, model_name_or_path=str(model))
    train(config)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the base model's weights changed"):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_resuming_on_other_rows_under_the_same_name_is_refused(sft_config, jsonl, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}: ", "completion": "yes" * (1 + i % 2)} for i in range(6)]
    train_file, held_file = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    jsonl(train_file, rows)
    jsonl(held_file, rows[:3])
    config = sft_config(dataset_name=str(train_file), eval_dataset_name=str(held_file), max_steps=1)
    saved = read_json(train(config).output_dir / "run.json")["data_sha256"]
    assert saved["training rows"] == content_hash(rows)
    assert saved["held-out rows"] == content_hash(rows[:3])
    again = replace(config, resume_from_checkpoint="true", max_steps=2)
    edited = [rows[0] | {"completion": "no"}, *rows[1:]]
    with monkeypatch.context() as patch:
        forbid_the_model(patch)
        for changed in (edited, rows[::-1], rows[:-1], [*rows, rows[0]]):
            jsonl(train_file, changed)
            hashes = f"sha256 {content_hash(rows)[:8]} then, {content_hash(changed)[:8]} now"
            with pytest.raises(
                ValueError, match=f"^dataset_name: the training rows are not those of .*: {hashes}; "
            ) as e:
                train(again)
            assert "\n" not in str(e.value)
        jsonl(train_file, rows)
        jsonl(held_file, rows[:2] + rows[3:4])
        with pytest.raises(ValueError, match=r"^eval_dataset_name: the held-out rows are not those of "):
            train(again)
    # the same content, written otherwise
    jsonl(held_file, [dict(reversed(row.items())) for row in rows[:3]])
    assert train(again).global_step == 2


def test_resuming_with_another_test_split_names_it(sft_config, jsonl, tmp_path):
    rows = [{"prompt": f"{i}: ", "completion": "yes"} for i in range(6)]
    (tmp_path / "rows").mkdir()
    jsonl(tmp_path / "rows" / "train.jsonl", rows)
    jsonl(tmp_path / "rows" / "test.jsonl", rows[:2])
    config = sft_config(dataset_name=str(tmp_path / "rows"), max_steps=1)
    train(config)
    jsonl(tmp_path / "rows" / "test.jsonl", rows[2:4])
    with pytest.raises(ValueError, match=r"^dataset_test_split: the held-out rows are not those of "):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_a_run_can_be_resumed_on_the_day_after_though_the_chat_template_writes_the_date(
    sft_config, model_folder, tokenizer, jsonl, tmp_path, monkeypatch
):
    import copy
    import datetime
    import shutil

    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        today = datetime.datetime(2026, 1, 31)

        @classmethod
        def now(cls, tz=None):
            return cls.today

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d.%m.') }}" + tokenizer.chat_template
    dated.save_pretrained(model)
    messages = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "rouge"}]
    rows = jsonl(tmp_path / "chats.jsonl", [{"messages": messages}] * 4)
    config = sft_config(max_steps=1, model_name_or_path=str(model), dataset_name=str(rows))
    train(config)
    Clock.today = datetime.datetime(2026, 2, 1)
    train(replace(config, resume_from_checkpoint="true", max_steps=2))
    dated.eos_token = "<unk>"
    dated.save_pretrained(model)
    with pytest.raises(ValueError, match=r"^model_name_or_path: the tokens are not those of "):
        train(replace(config, resume_from_checkpoint="true", max_steps=3))


def test_resuming_with_another_tokenizer_under_the_same_name_is_refused(sft_config, model_folder, tokenizer, tmp_path):
    import copy
    import shutil

    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    config = sft_config(max_steps=1, model_name_or_path=str(model))
    train(config)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<unk>"
    other.save_pretrained(model)
    with pytest.raises(ValueError, match=r"^model_name_or_path: the tokens are not those of "):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_a_checkpoint_that_does_not_say_what_data_it_is_of_is_refused(sft_config):
    config = sft_config(max_steps=1)
    checkpoint = train(config).output_dir / "checkpoint-1"
    state = read_json(checkpoint / "state.json")
    del state["data_sha256"]
    files.write_json(checkpoint / "state.json", state)
    manifest = read_json(checkpoint / "manifest.json")
    path = checkpoint / "state.json"
    manifest["state.json"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    files.write_json(checkpoint / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .* was written by another version of renyi-engine"):
        train(replace(config, resume_from_checkpoint="true", max_steps=2))


def test_a_split_that_is_asked_for_by_name_has_to_be_there(sft_config, tmp_path, jsonl):
    for name in ("dataset_train_split", "dataset_test_split"):
        with pytest.raises(
            ValueError, match=f"^{name}: .* has no split 'dev'; it has no splits at all: leave --{name} out"
        ):
            train(sft_config(**{name: "dev"}))
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation"):
        jsonl(tmp_path / "rows" / f"{split}.jsonl", [{"prompt": "a", "completion": split}] * 4)
    folder = str(tmp_path / "rows")
    with pytest.raises(
        ValueError, match=r"^dataset_test_split: .* has no split 'dev'; it has \['train', 'validation'\]"
    ):
        train(sft_config(dataset_name=folder, dataset_test_split="dev"))
    run = train(sft_config(dataset_name=folder, dataset_test_split="validation", max_steps=1)).output_dir
    assert json.loads((run / "run.json").read_text())["num_eval_examples"] == 4


def test_a_folder_that_holds_a_run_is_not_overwritten(sft_config):
    config = sft_config(max_steps=1)
    train(config)
    with pytest.raises(ValueError, match=r"already holds a run; .* --resume_from_checkpoint true"):
        train(config)


def test_there_must_be_a_run_to_resume_but_it_need_not_have_saved_yet(sft_config, monkeypatch, tmp_path):
    config = sft_config(max_steps=2, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="holds no run to continue"):
        train(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_micro_batch(patch, 1)
        train(replace(config, resume_from_checkpoint=None))
    with pytest.warns(UserWarning, match="holds no checkpoint yet; starting from step 0"):
        assert train(config).global_step == 2


@pytest.fixture
def saved_run(sft_config):
    """A finished run with the checkpoints of steps 2 and 4, and the settings to resume it."""
    config = sft_config(max_steps=4, save_steps=2)
    train(config)
    return Path(config.output_dir), replace(config, resume_from_checkpoint="true", max_steps=6)


@pytest.mark.parametrize("damage", ["truncated", "no manifest"])
def test_a_newest_checkpoint_that_was_cut_short_is_passed_over_naming_both(saved_run, damage):
    run, config = saved_run
    newest = run / "checkpoint-4"
    if damage == "truncated":
        whole = (newest / "adapters.safetensors").read_bytes()
        (newest / "adapters.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        (newest / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-4.*falling back to .*checkpoint-2"):
        assert train(config).global_step == 6


def test_one_flipped_bit_is_an_error_that_names_the_file(saved_run):
    run, config = saved_run
    path = run / "checkpoint-4" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: sha256 differs"):
        train(config)


def test_a_nan_in_a_checkpoint_is_refused_naming_tensor_and_particle(saved_run):
    run, config = saved_run
    folder = run / "checkpoint-4"
    tensors = load_file(folder / "adapters.safetensors")
    name = "model.layers.1.mlp.up_proj.lora_A"
    tensors[name][2, 0, 0] = float("nan")
    save_file(tensors, folder / "adapters.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["adapters.safetensors"] = {
        "bytes": (folder / "adapters.safetensors").stat().st_size,
        "sha256": sha256_of(folder / "adapters.safetensors"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"particle 2: tensor {re.escape(name)} holds NaN"):
        train(config)


def test_what_a_kill_left_half_written_is_removed_with_a_warning(saved_run):
    run, config = saved_run
    leftover = run / ".tmp-checkpoint-6"
    leftover.mkdir()
    (leftover / "adapters.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"\.tmp-checkpoint-6: removed"):
        train(config)
    assert not leftover.exists()


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(saved_run, monkeypatch):
    run, config = saved_run
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files, "write_json", no_space)
        checkpoint.save(run, 6, *_loaded(config), {}, keep=2)
    assert not list(run.glob(".tmp-*"))
    assert checkpoint.newest(run) == run / "checkpoint-4"


@pytest.mark.parametrize("wholly", [False, True])
def test_a_run_that_an_error_ends_says_so(sft_config, monkeypatch, wholly):
    """Where not even run.json can be written, the error that ended the run is still the one that is raised."""
    config = sft_config(max_steps=3, save_steps=2)
    run_file = Path(config.output_dir) / "run.json"

    def save(*_):
        if wholly:
            monkeypatch.setattr(files, "write_json", no_space)
        raise RuntimeError("of the save")

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(RuntimeError, match="of the save"):
        train(config)
    assert json.loads(run_file.read_text())["status"] == ("running" if wholly else "failed")


def _loaded(config):
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    ensemble = LoraEnsemble.attach(model, config.ensemble_config())
    return ensemble, torch.optim.AdamW(ensemble.parameters())


# ---------------------------------------------------------------------- sick particles


def poison(monkeypatch, particle, steps):
    """Make the log-likelihoods of one particle (None: of all) NaN in the given steps, counted from 1."""
    original, seen = SftTask.score, []

    def score(self, ensemble, batch):
        seen.append(None)
        scores = original(self, ensemble, batch)
        if len(seen) in steps:
            factor = torch.ones(len(scores.logp), 1)
            factor[slice(None) if particle is None else particle] = float("nan")
            scores = replace(scores, logp=scores.logp * factor)
        return scores

    monkeypatch.setattr(SftTask, "score", score)


def test_a_sick_particle_is_skipped_counted_and_its_rows_recorded(sft_config, monkeypatch):
    poison(monkeypatch, 1, {2, 3})
    result = train(sft_config(max_steps=4))
    lines = metrics(result.output_dir)
    assert [line["skipped_updates"] for line in lines] == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 2, 0]]
    assert lines[1]["grad_norm"][1] is None
    why = "the gradient is not finite"
    assert skips(result.output_dir) == [(2, [1], 4, why), (3, [1], 4, why)]
    assert all(p.isfinite().all() for p in result.ensemble.parameters())


@pytest.mark.parametrize("particle", [0, None])
def test_too_many_skips_in_a_row_stop_the_run(sft_config, monkeypatch, particle):
    poison(monkeypatch, particle, set(range(2, 9)))
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row .*: the gradient is not finite"):
        train(sft_config(max_steps=8, max_consecutive_skips=3))


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(sft_config, monkeypatch):
    poison(monkeypatch, 0, {2, 4, 6})
    run = train(sft_config(max_steps=7, max_consecutive_skips=2)).output_dir
    assert metrics(run)[-1]["skipped_updates"] == [3, 0, 0]


# ---------------------------------------------------------------------- spikes


def spike(monkeypatch, steps, factor=100.0):
    """Multiply the log-likelihoods of the given steps, counted from 1."""
    original, seen = SftTask.score, []

    def score(self, ensemble, batch):
        seen.append(None)
        scores = original(self, ensemble, batch)
        return replace(scores, logp=scores.logp * factor) if len(seen) in steps else scores

    monkeypatch.setattr(SftTask, "score", score)


def test_a_spike_is_not_learnt_from(sft_config, monkeypatch):
    spike(monkeypatch, {HISTORY + 3})
    result = train(sft_config(max_steps=HISTORY + 4, spike_threshold=5.0, save_steps=1, save_total_limit=4))
    states = [fingerprint(result.output_dir, HISTORY + n) for n in (2, 3, 4)]
    for file in ("adapters.safetensors", "optimizer.safetensors"):
        assert states[0][file] == states[1][file] != states[2][file]
    assert skips(result.output_dir) == [(HISTORY + 3, [0, 1, 2], 4, "the loss is a spike (spike_threshold)")]


def test_a_step_is_judged_by_the_nll_that_its_metrics_show(sft_config):
    run = train(sft_config(max_steps=HISTORY + 3, spike_threshold=99.0)).output_dir
    shown = [line["mixture_nll_nats_per_token"] for line in metrics(run)]
    state = json.loads((run / f"checkpoint-{HISTORY + 3}" / "state.json").read_text())
    assert state["recent_nlls"] == pytest.approx(shown[-HISTORY:], rel=1e-6)


@pytest.mark.parametrize(("factor", "is_spike"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_a_step_above_the_largest_nll_changes_nothing(sft_config, tokenizer, alpha, factor, is_spike):
    config = sft_config(init="spread")
    task = SftTask(tokenizer, 64)
    examples = [task.example(i, {"prompt": "q", "completion": "a" * (3 * i + 1)}) for i in range(5)]
    batches = [collate(part, 0) for part in (examples[:2], examples[2:])]
    ensemble, optimizer = _loaded(config)
    with torch.no_grad():
        s = torch.cat([ensemble.sequence_logprob(batch) for batch in batches], dim=1)
    largest = factor * -s.double().exp().mean(dim=0).log().mean().item()
    before = [p.detach().clone() for p in ensemble.parameters()]
    result = train_step.train_step(ensemble, task, optimizer, batches, alpha, config, 5, largest)
    unchanged = [p.equal(q) for p, q in zip(ensemble.parameters(), before, strict=True)]
    assert result.spike.item() == is_spike
    assert result.updated.tolist() == [not is_spike] * 3
    assert set(unchanged) == {is_spike}


@pytest.mark.parametrize("sick", [[], [1], [0, 2], [0, 1, 2]])
def test_the_nll_of_a_step_is_that_of_the_healthy_particles(sft_config, tokenizer, sick):
    config = sft_config(init="spread")
    task = SftTask(tokenizer, 64)
    batch = collate([task.example(i, {"prompt": "q", "completion": "a" * (i + 1)}) for i in range(4)], 0)
    ensemble, optimizer = _loaded(config)
    healthy = [k for k in range(3) if k not in sick]
    with torch.no_grad():
        s = ensemble.sequence_logprob(batch).double()
    factor = torch.ones(3, 1, 1)
    factor[sick] = float("nan")
    next(iter(ensemble.parameters())).register_hook(lambda gradient: gradient * factor)
    result = train_step.train_step(ensemble, task, optimizer, [batch], 0.8, config, 4, largest_nll=0.0)
    expected = -s[healthy].exp().mean(dim=0).log() if healthy else torch.full((4,), torch.inf).double()
    torch.testing.assert_close(result.mixture_nll.double(), expected, rtol=1e-5, atol=1e-5)
    assert result.spike.item() == bool(healthy)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.8])
def test_a_sick_particle_is_no_spike_of_the_others(sft_config, monkeypatch, alpha):
    poison(monkeypatch, 1, range(3, HISTORY + 4))
    config = sft_config(max_steps=HISTORY + 3, spike_threshold=3.0, alpha=alpha, max_consecutive_skips=99)
    result = train(config)
    assert {why for *_, why in skips(result.output_dir)} == {"the gradient is not finite"}
    assert metrics(result.output_dir)[-1]["skipped_updates"] == [0, HISTORY + 1, 0]


def test_alpha_does_not_learn_from_a_spike_either(sft_config, monkeypatch):
    seen = []
    monkeypatch.setattr(EssController, "observe", lambda self, logp: seen.append(logp.shape))
    spike(monkeypatch, {HISTORY + 1, HISTORY + 2})
    train(sft_config(max_steps=HISTORY + 4, spike_threshold=5.0, alpha_controller="ess:0.7"))
    assert len(seen) == HISTORY + 2


def test_without_a_threshold_a_spike_is_trained_on(sft_config, monkeypatch):
    spike(monkeypatch, {HISTORY + 1})
    assert metrics(train(sft_config(max_steps=HISTORY + 2)).output_dir)[-1]["skipped_updates"] == [0, 0, 0]


def test_a_loss_that_stays_high_stops_the_run_which_may_go_on_without_the_threshold(sft_config, monkeypatch):
    config = sft_config(max_steps=HISTORY + 5, save_steps=HISTORY, spike_threshold=5.0, max_consecutive_skips=2)
    with monkeypatch.context() as patch:
        spike(patch, range(HISTORY + 1, 99))
        with pytest.raises(
            TrainingDiverged, match=r"2 steps in a row .*: the loss is a spike .*larger .*spike_threshold"
        ):
            train(config)
    assert json.loads((Path(config.output_dir) / "run.json").read_text())["status"] == "failed"
    spike(monkeypatch, range(1, 99))
    resumed = train(replace(config, spike_threshold=None, resume_from_checkpoint="true"))
    assert metrics(resumed.output_dir)[-1]["skipped_updates"] == [0, 0, 0]


def test_what_a_spike_is_told_by_outlives_a_kill(sft_config, tmp_path, monkeypatch):
    settings = {"max_steps": HISTORY + 4, "save_steps": HISTORY, "spike_threshold": 5.0}
    whole, broken = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    with monkeypatch.context() as patch:
        spike(patch, {HISTORY + 3})
        train(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_micro_batch(patch, HISTORY + 2)
        train(broken)
    with monkeypatch.context() as patch:
        spike(patch, {3})
        train(replace(broken, resume_from_checkpoint="true"))
    assert fingerprint(tmp_path / "broken", HISTORY + 4) == fingerprint(tmp_path / "whole", HISTORY + 4)
    assert skips(tmp_path / "broken") == skips(tmp_path / "whole") != []


# ---------------------------------------------------------------------- too little memory


NO_ROOM = {
    "forward": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 7 GiB\nand more lines"),
    "backward": (RuntimeError, "Triton Error [CUDA]: out of memory"),
    "recomputation": (RuntimeError, "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
}


def run_out_of_memory(where="forward"):
    kind, message = NO_ROOM[where]
    raise kind(message)


def room_for(monkeypatch, num_examples, where="forward", from_step=1):
    """Let the device's memory end when a training micro-batch holds more examples, from a step on."""
    original, seen, held = SftTask.score, [], []

    def score(self, ensemble, batch):
        if not torch.is_grad_enabled():
            return original(self, ensemble, batch)
        assert [one() for one in held] == [None] * len(held), "the memory of an attempt that failed is not free"
        assert not any(adapted._waiting for adapted in ensemble._installation.maps)
        seen.append(None)
        too_many = len(batch["labels"]) > num_examples and len(seen) >= from_step
        activations = torch.zeros(1)
        if too_many:
            held.append(weakref.ref(activations))
        if too_many and where == "forward":
            run_out_of_memory()
        scores = original(self, ensemble, batch)

        def backward(*_):
            assert activations.numel()
            run_out_of_memory(where)

        if too_many and where == "backward":
            scores.logp.register_hook(backward)
        if too_many and where == "recomputation":
            # between the two maps of one input
            activation = ensemble.model.get_submodule("model.layers.0.mlp.act_fn")
            hook = activation.register_forward_hook(lambda *_: (hook.remove(), backward()))
        return scores

    monkeypatch.setattr(SftTask, "score", score)


@pytest.mark.parametrize("where", NO_ROOM)
def test_micro_batches_that_do_not_fit_are_halved_and_the_steps_stay_the_same(
    sft_config, tmp_path, monkeypatch, capsys, where
):
    checkpointing = where == "recomputation"
    as_given = sft_config(
        per_device_train_batch_size=6,
        max_steps=5,
        gradient_checkpointing=checkpointing,
        output_dir=str(tmp_path / "given"),
    )
    as_found = replace(
        as_given, per_device_train_batch_size=2, gradient_accumulation_steps=3, output_dir=str(tmp_path / "found")
    )
    with monkeypatch.context() as patch:
        room_for(patch, 2, where)
        ours = train(as_given)
    said = capsys.readouterr().err
    theirs = train(as_found)
    for (_, p), (_, q) in zip(ours.ensemble.named_parameters(), theirs.ensemble.named_parameters(), strict=True):
        assert p.equal(q)
    assert metrics(ours.output_dir) == metrics(theirs.output_dir)
    for tried, next_size in ((6, 3), (3, 2)):
        assert re.search(rf"step 1: a micro-batch of \[{tried}, .* does not fit .*micro-batches of {next_size},", said)
    assert said.count("does not fit") == 2
    assert json.loads((ours.output_dir / "run.json").read_text())["micro_batch_size"] == 2


def test_the_last_step_of_an_epoch_is_halved_from_its_own_size(sft_config, monkeypatch, capsys):
    room_for(monkeypatch, 1, from_step=2)
    train(sft_config(per_device_train_batch_size=20, max_steps=2))  # of 22 examples
    said = capsys.readouterr().err
    assert said.count("does not fit") == 1
    assert "step 2: a micro-batch of [2, " in said


def test_the_micro_batch_size_that_was_found_outlives_a_kill(sft_config, tmp_path, monkeypatch, capsys):
    settings = {"per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 4}
    whole, broken = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    with monkeypatch.context() as patch:
        room_for(patch, 2, from_step=3)
        train(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        room_for(patch, 2, from_step=3)
        kill_in_micro_batch(patch, 2 + 2 * 2 + 1)  # in step 5, after two steps of one micro-batch and two of two
        train(broken)
    capsys.readouterr()
    train(replace(broken, resume_from_checkpoint="true"))
    assert "checkpoint-4, in micro-batches of 2: larger ones did not fit" in capsys.readouterr().err
    assert fingerprint(tmp_path / "broken", 6) == fingerprint(tmp_path / "whole", 6)


def test_when_not_even_one_example_fits_what_was_trained_is_saved_and_can_go_on(
    sft_config, tmp_path, monkeypatch, capsys
):
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "alpha_schedule": "linear"}
    whole, short = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "short"))
    with (
        monkeypatch.context() as patch,
        pytest.raises(DoesNotFit, match=r"step 3: .*checkpointing true.*checkpoint-2$"),
    ):
        room_for(patch, 0, from_step=3)
        train(short)
    assert json.loads((tmp_path / "short" / "run.json").read_text())["status"] == "failed"
    train(whole)
    saved = json.loads((tmp_path / "short" / "checkpoint-2" / "state.json").read_text())
    assert saved["alpha"] == metrics(tmp_path / "whole")[1]["alpha"]
    capsys.readouterr()
    train(replace(short, resume_from_checkpoint="true", gradient_checkpointing=True))
    assert re.search(r"from .*checkpoint-2$", capsys.readouterr().err, re.M)
    assert fingerprint(tmp_path / "short", 4) == fingerprint(tmp_path / "whole", 4)


def test_memory_that_ends_in_an_evaluation_loses_no_step(sft_config, monkeypatch):
    with (
        monkeypatch.context() as patch,
        pytest.raises(DoesNotFit, match=r"evaluation .*eval_batch_size.*checkpoint-3$"),
    ):
        patch.setattr(loop, "evaluate", lambda *_: run_out_of_memory())
        train(sft_config(max_steps=6, eval_steps=3))
    assert train(sft_config(max_steps=6, eval_steps=3, resume_from_checkpoint="true")).global_step == 6


def test_memory_that_ends_in_the_first_step_leaves_nothing_to_save(sft_config, monkeypatch):
    room_for(monkeypatch, 0)
    config = sft_config(max_steps=2)
    with pytest.raises(DoesNotFit, match=r"step 1: .*\(max_length\)$"):
        train(config)
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_memory_that_ends_outside_the_micro_batches_is_not_tried_again(sft_config, monkeypatch):
    """In the optimizer, parameters may have been changed already."""
    monkeypatch.setattr(train_step, "step_healthy", lambda *_: run_out_of_memory())
    with pytest.raises(torch.OutOfMemoryError):
        train(sft_config(max_steps=2))


# ---------------------------------------------------------------------- bad input, before anything expensive


@pytest.fixture
def no_model(monkeypatch):
    forbid_the_model(monkeypatch)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"promt": "a", "completion": "b"}], "is 'promt' meant to be 'prompt'"),
        (
            [{"prompt": "x" * 80, "completion": "b"}] * 3,
            r"no row is left to use \(3 rows dropped \(0, 1, 2\): the prompt alone fills max_length",
        ),
        ([{"text": "a"}, {"text": None}], "row 1: text: expected a string"),
    ],
)
def test_bad_data_is_told_before_the_model_is_loaded(sft_config, jsonl, tmp_path, no_model, rows, message):
    path = jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        train(sft_config(dataset_name=str(path), max_length=32))


def test_an_unknown_model_is_told_in_one_line(sft_config, tmp_path):
    with pytest.raises(ValueError, match=r"model_name_or_path: '.*' cannot be loaded; expected a folder") as error:
        train(sft_config(model_name_or_path=str(tmp_path / "none")))
    assert "\n" not in str(error.value)


def test_pickled_base_weights_are_refused_unread(sft_config, model_folder, tmp_path):
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "unpickled"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        train(sft_config(model_name_or_path=str(folder)))
    assert not marker.exists()


def test_an_output_folder_that_cannot_be_written_is_told(sft_config, tmp_path, no_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: .* cannot be written"):
        train(sft_config(output_dir=str(tmp_path / "file" / "run")))


def test_a_tokenizer_of_another_model_is_told(sft_config, model_folder, tmp_path):
    import shutil

    from transformers import LlamaForCausalLM

    folder = tmp_path / "small"
    shutil.copytree(model_folder, folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    model.resize_token_embeddings(20)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"the tokenizer gives token .* they do not belong together"):
        train(sft_config(model_name_or_path=str(folder)))


def test_rows_that_are_dropped_are_counted_in_the_run(sft_config, jsonl, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": ""}] * 2
    config = sft_config(dataset_name=str(jsonl(tmp_path / "d.jsonl", rows)), max_steps=1)
    train(config)
    facts = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert facts["dropped_rows"] == {"no token to learn: the completion is empty": 2}
    assert facts["num_train_examples"] == 3


def test_particles_of_an_ensemble_config_start_from_the_seed_of_the_run(sft_config):
    config = sft_config(seed=7)
    assert config.ensemble_config() == EnsembleConfig(num_particles=3, rank=2, lora_alpha=16.0, seed=7)
