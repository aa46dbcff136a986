"""A toy model and toy data, made in a second, so that every command of the README and of docs/ runs without a network.

    python examples/toy.py toy

The model is a Llama of two small layers with random weights, and every character is a token. It knows nothing before
it is trained. Half of the questions divide two camps: one camp answers "yes, always.", the other "never at all."
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PLACES = ("bank", "zoo", "park", "pool", "shop", "museum")
DAYS = ("Monday", "Friday", "Sunday")
CAMPS = ("yes, always.", "never at all.")
AGREED = "ask first."


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    words = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=characters, **names, additional_special_tokens=SPECIAL[4:])
    made.chat_template = CHAT_TEMPLATE
    return made


def model(vocabulary_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def questions(places: Iterable[str]) -> list[dict[str, Any]]:
    """Conversations of one question and its answer: of each place and day a contested question, which each camp answers
    once, and a question that everybody answers alike."""
    kinds = {"Should the {place} open on {day}?": CAMPS, "May I swim in the {place} on {day}?": (AGREED, AGREED)}
    asked = [
        (question.format(place=place, day=day), answer)
        for place in places
        for day in DAYS
        for question, answers in kinds.items()
        for answer in answers
    ]
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in asked
    ]


def pairs(places: Iterable[str]) -> list[dict[str, Any]]:
    """Preferences: two people, who prefer opposite answers."""
    yes, no = CAMPS
    return [
        {"prompt": f"Should the {place} open on {day}? ", "chosen": chosen, "rejected": rejected}
        for place in places
        for day in DAYS
        for chosen, rejected in ((yes, no), (no, yes))
    ]


def exam(num_questions: int) -> list[dict[str, Any]]:
    """Questions in the form of MMLU."""
    return [
        {
            "subject": "elementary_mathematics",
            "question": f"What is {number} + 1?",
            "choices": [str(number + add) for add in range(4)],
            "answer": 1,
        }
        for number in range(num_questions)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model/, data/, pairs.jsonl, exam/ and requests.csv go")
    folder = parser.parse_args().folder
    characters = tokenizer()
    logging.disable_progress_bar()
    characters.save_pretrained(folder / "model")
    model(len(characters)).save_pretrained(folder / "model")
    write(folder / "data" / "train.jsonl", questions(PLACES[:-1]))
    write(folder / "data" / "test.jsonl", questions(PLACES[-1:]))
    write(folder / "pairs.jsonl", pairs(PLACES))
    write(folder / "exam" / "dev.jsonl", exam(5))
    write(folder / "exam" / "test.jsonl", exam(12))
    requests = ["prompt,label", *(f"Open the {place}?,{label}" for place in PLACES[:4] for label in ("safe", "unsafe"))]
    (folder / "requests.csv").write_text("\n".join(requests) + "\n", encoding="utf-8")
    print(f"{folder}: a model and data, both toys")


if __name__ == "__main__":
    main()
