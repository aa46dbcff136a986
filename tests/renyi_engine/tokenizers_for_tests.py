"""Byte-level BPE tokenizers, trained in a moment: they merge across seams as real ones do, and take any template."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

# the control tokens of the templates that are tried here
CONTROL = re.compile(
    r"<\|[^|<>\s']+\|?>|<[^|<>\s']+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|</?s>|\[gMASK\]|<sop>"
    r"|\[/?INST\]|</?think>|</?tool_call>"
)


def byte_pair_tokenizer(
    template: str | None = None,
    *,
    texts: Sequence[str] = (),
    control: Sequence[str] = (),
    adds: str = "$A",
    bos: str | None = "<bos>",
    eos: str | None = "<eos>",
    words: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer with this chat template, whose control tokens are tokens of their own. `texts`: what else it learns
    merges from. `adds`: what it puts around a text, $A. `bos`, `eos`: None for a tokenizer without. `words`: a token
    is part of one word."""
    special = sorted({"<pad>", "<bos>", "<eos>", *control, *CONTROL.findall(template or "")})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain = [piece for piece in CONTROL.split(template or "") if piece]
    backend.train_from_iterator([*plain, *texts] * 3, trainer)
    pieces = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>") if token in adds]
    backend.post_processor = TemplateProcessing(single=adds, special_tokens=pieces)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer: PreTrainedTokenizerFast, input_ids: Sequence[int], labels: Sequence[int]) -> list[str]:
    """The text of every stretch that is learnt. Asserts that labels are the tokens themselves."""
    assert len(input_ids) == len(labels)
    stretches: list[list[int]] = [[]]
    for token, label in zip(input_ids, labels, strict=True):
        if label == -100:
            stretches.append([])
        else:
            assert label == token
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]
