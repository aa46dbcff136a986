"""A training step on sequences of unequal length: random tokens and weights, with the lengths of real data.

K particles, B examples, R rank. The adapters are on all linear maps of all layers, or of the last ones. A row is the
time of one step on a batch whose numbers of tokens are typical of the data: see `batches.typical`.
"""

from __future__ import annotations

from functools import partial

from csrc_bench.batches import Family, padded, random_families, shortened, typical
from csrc_bench.measure import Shape, Skipped, Variant
from csrc_bench.step_suite import StepSuite
from csrc_bench.training_steps import CONFIGS, Ensemble, FrozenBase, Gemms, Peft, PeftPaddingFree, vocabulary_of

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
    def make(model, K, adapted, data, labels, pairs, B=8, R=8):
        layers = CONFIGS[model]().num_hidden_layers
        bar = "bar_" if tiny or (K == 4 and data in ("hh_rlhf", "mmlu")) else ""
        name = f"{bar}{data}_{'pairs' if pairs else labels}_k{K}{'' if adapted == layers else f'_last{adapted}'}"
        sizes = {"model": model, "K": K, "B": B, "R": R, "adapted_layers": adapted}
        return {"name": name, **sizes, "data": data, "labels": labels, "pairs": pairs, "dtype": "bfloat16"}

    if tiny:
        return [make("tiny", 2, 1, *data, B=2) for data in (DATA[2], DATA[-2])]
    adapted = [8] if device == "cpu" else [30, 8]
    return [make("smollm2", K, layers, *data) for K in (4, 1, 8) for data in DATA for layers in adapted]


def packed(model, shape: Shape, backend: str) -> Ensemble:
    try:
        from renyi_engine.data import pack
    except ImportError:
        raise Skipped("renyi_engine.data has no pack") from None
    return Ensemble(model, shape, backend, pack)


def variants(device: str) -> dict[str, Variant]:
    path = "triton" if device == "cuda" else "torch"
    on_padded = lambda model, shape: Ensemble(model, shape, path, padded)
    return {
        "ours_padded": Variant("ours", on_padded, path),
        # other batches than those of the other rows: what a step costs in the mean if training draws so
        "ours_grouped": Variant("other", on_padded, path),
        "ours_packed": Variant("ours", partial(packed, backend=path), path),
        "peft": Variant("peer", lambda model, shape: Peft(model, shape, padded), needs="peft"),
        "peft_padding_free": Variant("peer", PeftPaddingFree, needs="peft"),
        # no floor for a step without padding
        "frozen_base": Variant("other", lambda model, shape: FrozenBase(shape, padded)),
        "gemms": Variant("floor", lambda model, shape: Gemms(shape)),
    }


def batches(shape: Shape, variant: str) -> list[list[Family]]:
    drawn = typical(shape, by_length=variant == "ours_grouped")
    return [random_families(lengths, vocabulary_of(shape), shape["labels"], seed) for seed, lengths in enumerate(drawn)]


def few(shape: Shape) -> list[Family]:
    lengths = shortened(typical(shape, by_length=False)[0], max_length=32)
    return random_families(lengths, vocabulary_of(shape), shape["labels"], seed=99)


SUITE = StepSuite("ragged_step", shapes, variants, batches, few, padded, unchecked=("frozen_base",))


def test_speed(point, measured):
    measured(point)
