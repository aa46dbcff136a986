"""Training without padding is the training with padding: the same losses, responsibilities and particles.

The models are those whose attention differs: full, windowed, with soft caps, sinks, and learnt positions.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import train
from renyi_engine.objectives import DpoTask

from .. import tiny_models
from .runs import metrics

pytestmark = pytest.mark.usefixtures("without_report")

MODELS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "gpt_oss", "olmo2"]
STEPS = 20
SETTINGS = {
    "init": "spread",
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": STEPS,
}


@pytest.fixture(scope="module", params=MODELS)
def settings(request, tmp_path_factory, tokenizer):
    """Of a run on a tiny model, which sees 5 tokens back in layers that have a window."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_models.tiny_model(request.param)
    if request.param in ("gemma2", "gemma3_text", "mistral", "phi3", "gpt_oss"):
        model.config.sliding_window = 5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.to_dict().get("sliding_window") in (5, None)
    attention = "eager" if request.param in ("gemma2", "gpt_oss") else "sdpa"  # the only one of these two
    return SETTINGS | {"model_name_or_path": str(folder), "attn_implementation": attention}


def both_ways(config):
    """The results of training, packed and padded."""
    results, packed = [], []
    for padding_free in (True, False):
        result = train(config(padding_free=padding_free, output_dir=f"{config().output_dir}-{padding_free}"))
        packed.append(result.ensemble.packs)
        results.append(result)
    assert packed == [True, False]
    return results


def assert_same(results, model=""):
    """To 1e-5. Gradient norms of gpt_oss to 3e-5: its experts multiply in fp32 at most, its gradients are near 300, and
    with padding, too, they move by up to 7e-6 if micro-batches are cut in half."""
    packed, padded = results
    relative = {"grad_norm": 3e-5} if model == "gpt_oss" else {}
    for ours, theirs in zip(metrics(packed.output_dir), metrics(padded.output_dir), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=relative.get(name, 1e-5), abs=1e-5), (theirs["step"], name)
    for (path, ours), theirs in zip(packed.ensemble.stacked().items(), padded.ensemble.stacked().values(), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=path)


def test_sft(settings, sft_config, request):
    assert_same(both_ways(lambda **s: sft_config(**settings | s)), request.node.callspec.params["settings"])


def test_dpo(settings, dpo_config, request):
    assert_same(both_ways(lambda **s: dpo_config(**settings | s)), request.node.callspec.params["settings"])


def test_a_limit_of_tokens_cuts_micro_batches_and_changes_no_step(dpo_config, monkeypatch):
    """Of pairs, the prompts of which stand in a row once."""
    rows = []
    whole_pack = DpoTask.pack

    def pack(task, items):
        batch = whole_pack(task, items)
        if threading.current_thread() is not threading.main_thread():  # not for an evaluation
            rows.append((batch["input_ids"].numel(), len(items)))
        return batch

    monkeypatch.setattr(DpoTask, "pack", pack)
    results = []
    for limit in (None, 40):
        rows.clear()
        config = dpo_config(**SETTINGS | {"packed_row_tokens": limit, "per_device_train_batch_size": 6})
        results.append(train(replace(config, output_dir=f"{config.output_dir}-{limit}")))
    assert all(tokens <= 40 for tokens, items in rows)
    assert any(items > 1 for _, items in rows)
    assert_same(results)
