"""Batches of random tokens: of one length, or with the lengths of real data.

lengths.json holds the lengths, and nothing else of the data. An example there is [prompt, completion], or [prompt,
chosen, rejected], in tokens. From each data set 1000 examples were drawn at random. They were encoded with the
tokenizer of SmolLM2-135M-Instruct by SftTask and DpoTask: a completion ends with one EOS, and the tokens beyond the
first 1024 were cut off.

    hh_rlhf        anthropics/hh-rlhf, harmless-base, test; the prompt is what chosen and rejected begin with
    mmlu           hendrycks/test, test; the prompt is a question and its four choices, a line each; a letter answers
    tweets         HS-Brexit and MD-Agreement of Le-Wi-Di; a tweet is learnt as a whole, so there is no prompt
    instructions   rasbt/LLMs-from-scratch, instruction-data-with-preference; the prompt is instruction and input

B sequences, T tokens of the longest one, N tokens of all.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from csrc_bench.measure import Shape
from renyi_engine.data import Example, StepSampler, collate
from renyi_kernels import IGNORE_INDEX

Family = tuple[Example, ...]
"""Sequences that share a beginning: one, or chosen and rejected."""

Lengths = tuple[int, ...]
"""The tokens of a prompt, and those of each of its completions."""

Batch = dict[str, Tensor]

_EPOCHS = 10  # from whose steps those are chosen that stand for all


@functools.cache
def lengths_of(data: str, pairs: bool) -> list[Lengths]:
    """The examples of a data set. Without `pairs`, of a pair the chosen completion alone."""
    examples = json.loads(Path(__file__).with_name("lengths.json").read_text())[data]
    return [tuple(example if pairs else example[:2]) for example in examples]


def longest(example: Lengths) -> int:
    prompt, *completions = example
    return prompt + max(completions)


def batches_of(shape: Shape, by_length: bool) -> list[list[Lengths]]:
    """The batches of ten epochs, drawn as training draws them: at random, or grouped by length. A smaller batch at the
    end of an epoch is left out."""
    examples = lengths_of(shape["data"], shape["pairs"])
    sampler = StepSampler(list(map(longest, examples)), shape["B"], seed=0, group_by_length=by_length)
    steps = [sampler.examples(step) for step in range(_EPOCHS * sampler.steps_per_epoch)]
    return [[examples[i] for i in step] for step in steps if len(step) == shape["B"]]


def counts(batch: list[Lengths], shape: Shape) -> dict[str, int]:
    """How many tokens a batch has: `real`, `padded` to the longest sequence, and with a label, `labelled`.

    A prompt counts once for each of its completions.
    """
    completions = [(prompt, tokens) for prompt, *both in batch for tokens in both]
    return {
        "real": sum(map(sum, completions)),
        "padded": len(completions) * max(map(sum, completions)),
        "labelled": sum(num_labels(*lengths, shape["labels"]) for lengths in completions),
    }


def num_labels(prompt: int, completion: int, labels: str) -> int:
    """How many tokens of a sequence are learnt. Nothing predicts the first one."""
    learnt = prompt + completion if labels == "all" else completion
    return learnt - (learnt == prompt + completion)


def typical(shape: Shape, by_length: bool, number: int = 3) -> list[list[Lengths]]:
    """The batches whose counts of tokens are nearest the mean of all batches.

    Batches differ by far more than the ways to run them. So the time of these stands for the mean time of a step.
    """
    return _typical(*(shape[name] for name in ("data", "labels", "pairs", "B")), by_length, number)


@functools.cache
def _typical(data: str, labels: str, pairs: bool, B: int, by_length: bool, number: int) -> list[list[Lengths]]:
    shape = {"data": data, "labels": labels, "pairs": pairs, "B": B}
    batches = batches_of(shape, by_length)
    table = torch.tensor([list(counts(batch, shape).values()) for batch in batches], dtype=torch.float64)
    distance = (table / table.mean(dim=0) - 1).abs().amax(dim=1)
    return [batches[i] for i in distance.argsort(stable=True)[:number].tolist()]


def shortened(batch: list[Lengths], max_length: int) -> list[Lengths]:
    """The batch with all lengths divided by one number, so that no sequence is longer than `max_length`. What is not
    empty keeps a token, and a sequence keeps two."""
    factor = min(1.0, max_length / max(map(longest, batch)))
    few = [tuple(math.ceil(factor * tokens) for tokens in lengths) for lengths in batch]
    return [(prompt, *(max(tokens, 2 - prompt) for tokens in completions)) for prompt, *completions in few]


def random_families(batch: list[Lengths], vocabulary: int, labels: str, seed: int) -> list[Family]:
    """Random tokens of these lengths. `labels` says what is learnt: "all" tokens, or the "completion"."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda tokens: torch.randint(vocabulary, (tokens,), generator=generator).tolist()

    def family(row: int, lengths: Lengths) -> Family:
        prompt = draw(lengths[0])
        first = prompt if labels == "all" else [IGNORE_INDEX] * len(prompt)
        completions = list(map(draw, lengths[1:]))
        return tuple(Example(row, prompt + tokens, first + tokens) for tokens in completions)

    return [family(row, lengths) for row, lengths in enumerate(batch)]


def equal_lengths(shape: Shape, vocabulary: int, seed: int) -> list[Family]:
    """B sequences of T random tokens, all of them learnt."""
    return random_families([(0, shape["T"])] * shape["B"], vocabulary, "all", seed)


# what the model is given of a batch, on the CPU, where a data loader would leave it


def sequences_of(families: list[Family]) -> list[Example]:
    return [sequence for family in families for sequence in family]


def stacked(families: list[Family]) -> Batch:
    """Sequences of one length: input_ids and labels [B, T]."""
    ids = torch.tensor([sequence.input_ids for sequence in sequences_of(families)])
    return {"input_ids": ids, "labels": ids}


def padded(families: list[Family]) -> Batch:
    """A row for each sequence: input_ids, attention_mask and labels [B, T]."""
    return collate(sequences_of(families), pad_token_id=0)


def padding_free(families: list[Family]) -> Batch:
    """TRL's padding_free: one row, in which position_ids begin again with every sequence. All are [1, N]."""
    sequences = sequences_of(families)
    join = lambda parts: torch.tensor([[value for part in parts for value in part]])
    return {
        "input_ids": join(s.input_ids for s in sequences),
        "position_ids": join(range(len(s.input_ids)) for s in sequences),
        "labels": join([IGNORE_INDEX, *s.labels[1:]] for s in sequences),
    }
