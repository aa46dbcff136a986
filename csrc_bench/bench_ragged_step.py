"""A training step on sequences of unequal length: random tokens and weights, with the lengths of real data.

K particles, B examples, R rank. The adapters are on all linear maps: of the last 8 layers on a CPU, of all on a GPU. A
row is the time of one step on a batch whose numbers of tokens are typical of the data: see `batches.typical`.
"""

from __future__ import annotations

from csrc_bench.batches import Family, padded, random_families, shortened, typical
from csrc_bench.floors import FrozenBase, Gemms
from csrc_bench.measure import Shape, Variant
from csrc_bench.step_suite import StepSuite, shows_nothing
from csrc_bench.training_steps import (
    CONFIGS,
    Ensemble,
    Peft,
    PeftPaddingFree,
    Read,
    vocabulary_of,
)
from renyi_engine.data import pack

DATA = [  # data set, what is learnt, whether an example is a pair
    ("hh_rlhf", "all", False),
    ("hh_rlhf", "completion", False),
    ("hh_rlhf", "completion", True),
    ("mmlu", "all", False),
    ("mmlu", "completion", False),
    ("tweets", "all", False),  # they have no prompt
    ("instructions", "all", False),
    ("instructions", "completion", False),
]


def shapes(device: str, tiny: bool) -> list[Shape]:
    def make(model, K, data, labels, pairs, adapted, B=8, R=8):
        layers = CONFIGS[model]().num_hidden_layers
        bar = "bar_" if tiny or (model == models[0] and K == 4 and data in ("hh_rlhf", "mmlu")) else ""
        name = f"{bar}{model}_{data}_{'pairs' if pairs else labels}_k{K}{f'_last{adapted}' if adapted else ''}"
        sizes = {"model": model, "K": K, "B": B, "R": R, "adapted_layers": adapted or layers}
        return {"name": name, **sizes, "data": data, "labels": labels, "pairs": pairs, "dtype": "bfloat16"}

    if tiny:
        return [make("tiny", 2, *data, adapted=1, B=2) for data in (DATA[2], DATA[-2])]
    models, adapted = (["smollm2"], 8) if device == "cpu" else (["qwen2", "smollm2"], None)
    return [make(model, K, *data, adapted) for model in models for K in (4, 1, 8) for data in DATA]


def variants(device: str) -> dict[str, Variant]:
    on_gpu = device == "cuda"
    path = "triton" if on_gpu else "torch"

    def ours(read: Read = pack, kind: str = "ours", slow: bool = False, **ways: bool) -> Variant:
        return Variant(kind, lambda model, shape: Ensemble(model, shape, path, read, **ways), path, slow=slow)

    def base(**ways: bool) -> Variant:
        # no floor for a step without padding
        return Variant("other", lambda model, shape: FrozenBase(shape, padded, **ways), slow=True)

    return {
        "ours_captured_compiled": ours(captured=True, compiled=True, slow=True),
        "ours_captured": ours(captured=True),
        "ours": ours(),
        "gemms": Variant("floor", lambda model, shape: Gemms(shape)),
        "frozen_base_captured_compiled": base(fast=True),
        "peft_padding_free": Variant("peer", PeftPaddingFree, needs="peft", slow=True),
        "frozen_base": base(),
        # on a CPU `train` compiles no layers
        "ours_compiled": ours(kind="ours" if on_gpu else "other", compiled=True, slow=True),
        "ours_padded": ours(padded),
        # other batches than those of the other rows: what a step costs in the mean if training draws so
        "ours_grouped": ours(padded, kind="other"),
        "peft": Variant("peer", lambda model, shape: Peft(model, shape, padded), needs="peft", slow=True),
    }


def batches(shape: Shape, variant: str) -> list[list[Family]]:
    drawn = typical(shape, by_length=variant == "ours_grouped")
    return [random_families(lengths, vocabulary_of(shape), shape["labels"], seed) for seed, lengths in enumerate(drawn)]


def few(shape: Shape) -> list[Family]:
    lengths = shortened(typical(shape, by_length=False)[0], max_length=32)
    return random_families(lengths, vocabulary_of(shape), shape["labels"], seed=99)


SUITE = StepSuite(
    "ragged_step",
    shapes,
    variants,
    batches,
    few,
    padded,
    left_out=shows_nothing,
    unchecked=("frozen_base", "frozen_base_captured_compiled"),
)


def test_speed(point, measured):
    measured(point)
