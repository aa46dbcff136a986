"""A tiny model folder with a character tokenizer, and data files: what training needs, in milliseconds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# off a GPU the kernels run in Triton's interpreter; it has to be chosen before anything imports triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

CHARACTERS = [chr(c) for c in range(32, 127)]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    """A Llama of 3 layers with random weights, saved with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def jsonl():
    return write_jsonl


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """22 short prompt + completion rows of uneven lengths: no multiple of any batch size used."""
    rows = [{"prompt": f"{i} and {i * i}: ", "completion": "yes" * (1 + i % 4)} for i in range(22)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture
def sft_config(model_folder, data_file, tmp_path):
    """A factory of quick SftConfigs."""
    from renyi_engine import SftConfig

    def make(**overrides):
        settings = {
            "model_name_or_path": str(model_folder),
            "dataset_name": str(data_file),
            "output_dir": str(tmp_path / "run"),
            "num_particles": 3,
            "alpha": 0.7,
            "lora_r": 2,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "logging_steps": 1,
            "use_cpu": True,
        }
        return SftConfig(**settings | overrides)

    return make


@pytest.fixture
def without_report(monkeypatch):
    """Trainings of this process draw no pictures. These take half of the time of a short run, and other tests look at
    them."""
    import renyi_engine.training.loop as loop

    def write_nothing(runs, output):
        output.write_text("")
        return output

    monkeypatch.setattr(loop, "write_report", write_nothing)


@pytest.fixture
def dpo_config(sft_config, jsonl, tmp_path):
    """A factory of quick DpoConfigs, on 18 pairs and 6 held-out ones."""
    from renyi_engine import DpoConfig

    def row(i):
        pair = {"prompt": f"{i}? ", "chosen": "yes" * (1 + i % 3), "rejected": "no" * (1 + i % 2)}
        return pair | {"score_chosen": 5, "score_rejected": i % 5}

    rows = [row(i) for i in range(24)]
    path, held_out = jsonl(tmp_path / "pairs.jsonl", rows[:18]), jsonl(tmp_path / "held_out.jsonl", rows[18:])

    def make(**overrides):
        settings = vars(sft_config(dataset_name=str(path), eval_dataset_name=str(held_out), max_steps=8))
        return DpoConfig(**settings | overrides)

    return make
