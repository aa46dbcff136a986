"""Tokens without an embedding and sequences without a position are told, by every command, before it runs anything."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble, train
from renyi_engine.cli import EXIT_BAD_INPUT, main
from renyi_engine.data.examples import Example
from renyi_engine.ensemble.architecture import LONG
from renyi_engine.ensemble.model_limits import num_positions, use_a_pad_token_within
from renyi_engine.evaluation.choices import Choices, encode_choices, score_choices
from renyi_engine.objectives.task import check_fits

POSITIONS = 48
COMMON = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TABLES = {
    "gpt2": {},
    "opt": {},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gpt_bigcode": {},
    "biogpt": {},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 24},
}


def reads(model, length):
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 7), attention_mask=torch.ones(1, length, dtype=torch.int64))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("architecture", TABLES)
def test_a_table_of_positions_ends_where_the_models_own_forward_fails(architecture):
    own = TABLES[architecture]
    config = AutoConfig.for_model(architecture, **(own if architecture == "mpt" else COMMON | own))
    model = AutoModelForCausalLM.from_config(config).eval()
    assert num_positions(model) == 24
    assert reads(model, 24)
    assert not reads(model, 25)
    with torch.device("meta"):
        assert num_positions(AutoModelForCausalLM.from_config(config)) == 24


@pytest.mark.parametrize("architecture", ["llama", "phi", "gpt_neox", "bloom", "falcon", "mamba", "xglm"])
def test_positions_that_are_computed_have_no_end(architecture):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **COMMON)).eval()
    assert num_positions(model) is None
    assert reads(model, 60)


# ---------------------------------------------------------------------- positions that depend on the batch

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **FACTORS}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.fixture
def phi3(tiny_model):
    return tiny_model("phi3", rope_parameters=LONG_ROPE, original_max_position_embeddings=16)


def test_rows_that_would_change_the_others_of_their_batch_are_refused(phi3, tiny_model, make_batch):
    ensemble = LoraEnsemble.attach(phi3, EnsembleConfig(2, 2))
    batch = make_batch([9, 20])
    alone = {name: value[:1, :9] for name, value in batch.items()}
    with torch.no_grad():
        together, apart = ensemble.sequence_logprob(batch)[0, 0], ensemble.sequence_logprob(alone)[0, 0]
    assert (together - apart).abs() > 0.01, "the model has changed: nothing is wrong with such rows any more"
    items = lambda *lengths: [Example(i, [5] * n, [5] * n) for i, n in enumerate(lengths)]
    with pytest.raises(ValueError, match=r"max_length: 1 of 3 sequences are longer than 16 tokens, .*'longrope'"):
        check_fits(phi3, items(9, 20, 16))
    check_fits(phi3, items(9, 16))
    check_fits(phi3, items(18, 20))  # all of one kind
    with pytest.raises(ValueError, match=r"max_length: 2 of 2 sequences are longer than 16 tokens, .*'longrope'"):
        check_fits(phi3, items(17, 20))  # a packed row leaves out the last token
    dynamic = tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=16)
    check_fits(dynamic, items(9, 16))
    with pytest.raises(ValueError, match=r"max_length: 2 of 2 sequences are longer than 16 tokens, .*'dynamic'"):
        check_fits(dynamic, items(17, 20))


def test_choices_of_both_kinds_are_scored_as_each_alone(phi3):
    ensemble = LoraEnsemble.attach(phi3, EnsembleConfig(2, 2, init="spread"))
    for completions in ([[7], [8]], [[7, 9], [8, 4]]):
        choices = [Choices([5 + n % 3] * n, completions) for n in (9, 15, 16, 17, 20)]
        alone = torch.cat([score_choices(ensemble, [one], batch_size=1) for one in choices], dim=1)
        torch.testing.assert_close(score_choices(ensemble, choices, batch_size=4), alone, rtol=1e-5, atol=1e-5)


def test_a_long_completion_does_not_change_a_short_one_of_the_same_prompt(phi3):
    ensemble = LoraEnsemble.attach(phi3, EnsembleConfig(2, 2, init="spread"))
    short, long = [7, 9], [8, 4, 6, 5, 3, 9]
    together = score_choices(ensemble, [Choices([5] * 12, [short, long])], batch_size=1)
    alone = [score_choices(ensemble, [Choices([5] * 12, [ids])], batch_size=1) for ids in (short, long)]
    torch.testing.assert_close(together, torch.cat(alone, dim=2), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- every command


@pytest.fixture(scope="module")
def short_model(tmp_path_factory, tokenizer):
    """A GPT-2 with `POSITIONS` positions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory, model_folder):
    """A model with fewer embeddings than the tokenizer beside it has tokens."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(model_folder, folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    model.resize_token_embeddings(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, jsonl, capsys, monkeypatch):
    """run(command, model, length, *extra) -> what it says as it refuses a row, or a prompt, of so many characters."""

    def make(command, model, length, *extra):
        text = "ab" * 99
        rows = [
            {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"},
            {"prompt": text[: length - 2], "completion": "b", "chosen": "c", "rejected": "d"},
        ]
        data = jsonl(tmp_path / "rows.jsonl", rows)
        questions = tmp_path / "mmlu"
        questions.mkdir(exist_ok=True)
        one = {"subject": "anatomy", "question": text[:length], "choices": ["1", "2", "3", "4"], "answer": 1}
        jsonl(questions / "test.jsonl", [one])
        ensemble = LoraEnsemble.attach(AutoModelForCausalLM.from_pretrained(model), EnsembleConfig(2, 2))
        ensemble.save_pretrained(tmp_path / "particles", alpha=0.8)
        ensemble.detach()
        output, particles = f"--output_dir={tmp_path / 'out'}", f"--ensemble={tmp_path / 'particles'}"
        training = [f"--dataset_name={data}", output, "--num_particles=2", "--lora_r=2", "--max_steps=1"]
        flags = {
            "sft": ["sft", *training],
            "dpo": ["dpo", *training],
            "sft --dry_run": ["sft", *training, "--dry_run"],
            "dpo --dry_run": ["dpo", *training, "--dry_run"],
            "eval nll": ["eval", "nll", f"--dataset_name={data}", output, particles],
            "alpha-star": ["alpha-star", f"--dataset_name={data}", output, particles],
            "generate": ["generate", particles, "--prompts", "a", text[:length]],
            "eval refusal": ["eval", "refusal", f"--dataset_name={data}", output, particles, "--num_samples=1"],
            "eval mmlu": ["eval", "mmlu", f"--dataset_name={questions}", output, particles],
        }[command]

        forward = LoraEnsemble.forward

        def probes_only(self, input_ids, *args, **kwargs):
            assert input_ids.shape[1] <= LONG, "a model ran on more than what is tried when adapters come on"
            return forward(self, input_ids, *args, **kwargs)

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(LoraEnsemble, "forward", probes_only)
            assert main([*flags, f"--model_name_or_path={model}", "--use_cpu=true", *extra]) == EXIT_BAD_INPUT
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said.removeprefix(f"renyi-engine {command.split()[0]}: ")

    return make


@pytest.mark.parametrize(
    "command",
    ["sft", "dpo", "sft --dry_run", "dpo --dry_run", "eval nll", "alpha-star", "generate", "eval refusal", "eval mmlu"],
)
def test_a_token_without_an_embedding_is_told(run, foreign_model, command):
    said = run(command, foreign_model, 20)
    assert said.startswith("model_name_or_path: ")
    assert "the model has 20 embeddings, so they do not belong together" in said


@pytest.mark.parametrize("command", ["sft", "dpo", "sft --dry_run", "dpo --dry_run", "eval nll", "alpha-star"])
def test_a_row_longer_than_the_table_of_positions_names_max_length(run, short_model, command):
    said = run(command, short_model, POSITIONS + 1)
    assert said == (
        f"max_length: row 1 has {POSITIONS + 1} tokens, but the model has {POSITIONS} positions; "
        f"lower --max_length to at most {POSITIONS}"
    )


@pytest.mark.parametrize("command", ["generate", "eval refusal"])
def test_an_answer_that_would_outgrow_the_positions_names_max_new_tokens(run, short_model, command):
    # the user's turn adds three tokens to a prompt
    said = run(command, short_model, 30, "--max_new_tokens=40")
    assert said.startswith("max_new_tokens: prompt 1 ")
    assert "lower" in said
    said = run(command, short_model, POSITIONS + 9, "--max_new_tokens=1")
    assert said.startswith("max_new_tokens: prompt 1 ")


def test_what_just_fits_is_used_whole(short_model, sft_config, jsonl, tmp_path, capsys):
    data = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * (POSITIONS - 2), "completion": "b"}] * 2)
    config = sft_config(model_name_or_path=str(short_model), dataset_name=str(data), max_steps=1)
    particles = train(config).output_dir / "particles"
    # three tokens around the prompt; the last of the four new ones is not read
    argv = ["generate", f"--model_name_or_path={short_model}", f"--ensemble={particles}", "--use_cpu=true"]
    argv += ["--prompts", "a" * (POSITIONS - 6)]
    assert main([*argv, "--max_new_tokens=4"]) == 0
    assert main([*argv, "--max_new_tokens=5"]) == EXIT_BAD_INPUT
    assert "45 tokens and 5 new ones" in capsys.readouterr().err


def test_a_library_call_is_told_too(foreign_model, tokenizer):
    ensemble = LoraEnsemble.attach(AutoModelForCausalLM.from_pretrained(foreign_model), EnsembleConfig(2, 2))
    with pytest.raises(ValueError, match=r"prompt 0: the tokenizer gives token .*, but the model has 20 embeddings"):
        score_choices(ensemble, [encode_choices(tokenizer, "a", ["b"])], batch_size=1)


# ---------------------------------------------------------------------- padding


@pytest.fixture
def beyond(model_folder, tmp_path):
    """The tiny model with a pad token that was added to the tokenizer alone."""
    folder = tmp_path / "beyond"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    num_embeddings = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == num_embeddings
    return folder


def test_training_and_answers_are_those_with_a_pad_token_that_fits(model_folder, beyond, sft_config, tmp_path, capsys):
    adapters, answers = [], []
    for name, model in (("fits", model_folder), ("beyond", beyond)):
        config = sft_config(model_name_or_path=str(model), output_dir=str(tmp_path / f"run-{name}"), max_steps=2)
        adapters.append(dict(train(config).ensemble.named_parameters()))
        capsys.readouterr()
        argv = [
            "generate",
            f"--model_name_or_path={model}",
            f"--ensemble={tmp_path}/run-{name}/particles",
            "--use_cpu=true",
        ]
        assert main([*argv, "--prompts", "a", "a longer one", "--max_new_tokens=20"]) == 0
        answers.append(capsys.readouterr().out)
    for name, parameter in adapters[0].items():
        torch.testing.assert_close(parameter, adapters[1][name], rtol=0, atol=0)
    assert answers[0] == answers[1]


def test_the_token_that_takes_its_place_is_the_first_special_one_with_an_embedding(beyond):
    def pad(num_embeddings):
        tokenizer = AutoTokenizer.from_pretrained(beyond)
        use_a_pad_token_within(tokenizer, num_embeddings)
        return tokenizer.pad_token_id

    whole = AutoTokenizer.from_pretrained(beyond)
    assert pad(len(whole)) == whole.pad_token_id
    assert pad(len(whole) - 1) == whole.eos_token_id == 2
    assert pad(2) == whole.bos_token_id == 1
    assert pad(1) == 0
