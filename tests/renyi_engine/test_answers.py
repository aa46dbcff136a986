"""renyi-engine generate: what stands under each prompt is what the particles say."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.cli import main


@pytest.fixture
def flags(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=2, rank=2, init="spread"))
    with torch.no_grad():
        for _, B in ensemble.stacked().values():
            B.mul_(60)
    ensemble.save_pretrained(tmp_path / "particles")
    return ["generate", f"--model_name_or_path={model_folder}", f"--ensemble={tmp_path / 'particles'}"]


def test_each_prompt_is_answered_by_every_particle_and_by_the_base(flags, model_folder, tokenizer, tmp_path, capsys):
    assert main([*flags, "--prompts", "abc", "d", "--temperature=0", "--max_new_tokens=6"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert [line.split(":")[0] for line in lines] == ["# abc", "p000", "p001", "base", "# d", "p000", "p001", "base"]
    # alone and unpadded, by Hugging Face
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor(
        [tokenizer.apply_chat_template([{"role": "user", "content": "d"}], add_generation_prompt=True)["input_ids"]]
    )
    said = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert lines[-1] == f"base: {tokenizer.decode(said, skip_special_tokens=True).strip()}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompts"], "expected at least one argument"),
        ([], "prompts: needed, but not given"),
        (["--prompts", "a", " "], "prompts: number 1 is empty"),
        (["--prompts", "a", "--top_p=0"], "top_p: expected a number above 0"),
        (["--prompts", "a", "--ensemble="], "ensemble: needed"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(flags, change, message, capsys):
    assert main([*flags, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
