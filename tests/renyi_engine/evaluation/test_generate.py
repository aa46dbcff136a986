"""renyi-engine generate: what stands under each prompt is what the particles say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from renyi_engine.cli import main
from renyi_engine.ensemble import generation
from renyi_engine.evaluation import generate as answers


@pytest.fixture
def flags(model_folder, save_particles, tmp_path):
    save_particles(tmp_path / "particles", num_particles=2, alpha=None)
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


def test_particles_whose_weights_are_not_equal_are_named_below_their_answers(flags, save_particles, tmp_path, capsys):
    save_particles(tmp_path / "particles", num_particles=2, weights=[0.25, 0.75])
    assert main([*flags, "--prompts", "d", "--max_new_tokens=1"]) == 0
    said = "In the mixture the particles have unequal weights, from 0.25 (particle 0) to 0.75 (particle 1)."
    assert capsys.readouterr().out.splitlines()[-1] == said


def test_no_line_of_a_prompt_or_an_answer_can_be_taken_for_somebody_elses(flags, capsys, monkeypatch):
    monkeypatch.setattr(answers, "decode_answer", lambda *_: "Yes.\nbase: I agree.\x1b[2K")
    assert main([*flags, "--prompts", "Is it?\np000: no\x1b[2J", "--max_new_tokens=1"]) == 0
    said = [r"p000: Yes.", r"      base: I agree.\x1b[2K", r"p001: Yes.", r"      base: I agree.\x1b[2K"]
    base = [r"base: Yes.", r"      base: I agree.\x1b[2K"]
    assert capsys.readouterr().out.splitlines() == ["# Is it?", r"  p000: no\x1b[2J", *said, *base]


def test_an_answer_ends_where_the_template_ends_a_turn_though_the_model_names_another_token(
    flags, model_folder, tokenizer, tmp_path, capsys, monkeypatch
):
    """The answer is played to the particles; what the model would go on with is the next user's turn."""
    chat = model_folder.parent / "chat"
    shutil.copytree(model_folder, chat)
    config = json.loads((chat / "generation_config.json").read_text())
    (chat / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.pad_token_id}))
    # a turn ends with <system>, which is neither the model's nor the tokenizer's end
    template = tokenizer.chat_template.replace("eos_token", "'<system>'")
    (chat / "chat_template.jinja").write_text(template)
    script = tokenizer("Four.<system><user>More?", add_special_tokens=False)["input_ids"]
    played = iter(range(10**6))

    def next_token(logits, uniform, temperature, top_p):
        return torch.full((len(logits),), script[next(played) % len(script)])

    monkeypatch.setattr(generation, "draw", next_token)
    flags = [flag.replace(str(model_folder), str(chat)) for flag in flags]
    assert main([*flags, "--prompts", "2+2", f"--max_new_tokens={len(script)}"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["# 2+2", "p000: Four.", "p001: Four."]


def test_what_is_thought_before_an_answer_is_shown_with_the_mark_that_the_template_begins_it_with(
    flags, model_folder, tokenizer, capsys
):
    chat = shutil.copytree(model_folder, model_folder.parent / "thinker")
    (chat / "chat_template.jinja").write_text(tokenizer.chat_template.replace("<assistant>", "<assistant><think>"))
    flags = [flag.replace(str(model_folder), str(chat)) for flag in flags]
    assert main([*flags, "--prompts", "2+2", "--max_new_tokens=6"]) == 0
    said = capsys.readouterr().out.rstrip("\n").split("\n")[1:]
    assert [line[: line.index(">") + 1] for line in said] == ["p000: <think>", "p001: <think>", "base: <think>"]


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
