"""Training runs of a tiny model: what is learnt, what is written, and what is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from renyi_engine import EnsembleConfig, LoraEnsemble, train
from renyi_engine.data.batches import collate
from renyi_engine.objectives.sft import SftTask

from .runs import (
    fingerprint,
    forbid_the_model,
    metrics,
)

pytestmark = pytest.mark.usefixtures("without_report")


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
def test_bad_data_is_told_before_the_model_isloaded(sft_config, jsonl, tmp_path, no_model, rows, message):
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
