"""The whole training step: K coupled adapters, forward, backward and AdamW, on random tokens and weights.

K particles, B sequences, T tokens, R rank. The adapters are on all linear maps of all layers, or of the last quarter.
`python -m csrc_bench.bench_training_step` prints a profile of our step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from csrc_bench.batches import Family, equal_lengths, stacked
from csrc_bench.floors import FrozenBase, Gemms
from csrc_bench.measure import Shape, Skipped, Variant, device_type
from csrc_bench.step_suite import StepSuite, shows_nothing
from csrc_bench.training_steps import (
    CONFIGS,
    Compiled,
    Ensemble,
    Peft,
    Vmap,
    build_model,
    layers_of,
    vocabulary_of,
)


def shapes(device: str, tiny: bool) -> list[Shape]:
    def make(name, model, K, B, T, R=8, adapted=None):
        layers = CONFIGS[model]().num_hidden_layers
        sizes = {"model": model, "K": K, "B": B, "T": T, "R": R, "adapted_layers": adapted or layers}
        return {"name": name, **sizes, "dtype": "bfloat16"}

    if tiny:
        return [make("bar_tiny_all", "tiny", 2, 2, 8), make("bar_tiny_last", "tiny", 2, 2, 8, adapted=1)]
    smollm2 = [
        make("bar_smollm2_all", "smollm2", 8, 2, 128),
        make("bar_smollm2_last8", "smollm2", 8, 2, 128, adapted=8),
    ]
    if device == "cpu":
        return smollm2
    return [
        *smollm2,
        make("bar_qwen2_all", "qwen2", 16, 4, 256),
        make("bar_qwen2_last7", "qwen2", 16, 4, 256, adapted=7),
        *(make(f"smollm2_k{K}", "smollm2", K, 2, 128) for K in (1, 2, 4, 16, 32, 64, 128, 256)),
        make("memory_qwen2_k64", "qwen2", 64, 1, 256),
        make("llama3_all", "llama3", 8, 2, 256),
        make("llama3_last8", "llama3", 8, 2, 256, adapted=8),
        *(make(f"smollm2_t{B * 512}", "smollm2", 8, B, 512) for B in (2, 4, 8, 16)),
        make("smollm2_r16", "smollm2", 8, 4, 256, R=16),
        *(make(f"qwen2_k{K}", "qwen2", K, 2, 256) for K in (1, 4, 8, 32)),
        make("qwen2_r16", "qwen2", 16, 4, 256, R=16),
        make("qwen2_t4096_last7", "qwen2", 8, 8, 512, adapted=7),
    ]


def not_on_cpu(build: Callable) -> Callable:
    def run(model, shape):
        if device_type() == "cpu":
            raise Skipped("left to GPU runs")
        return build(model, shape)

    return run


def variants(device: str) -> dict[str, Variant]:
    on_gpu = device == "cuda"
    path = "triton" if on_gpu else "torch"

    def ours(kind: str = "ours", path: str = path, slow: bool = False, **ways: bool) -> Variant:
        return Variant(kind, lambda model, shape: Ensemble(model, shape, path, **ways), backend=path, slow=slow)

    return {
        "ours_captured_compiled": ours(captured=True, compiled=True),
        "ours_captured": ours(captured=True),
        "ours": ours(),
        "gemms": Variant("floor", lambda model, shape: Gemms(shape)),
        "frozen_base_captured_compiled": Variant("floor", lambda model, shape: FrozenBase(shape, fast=True), slow=True),
        "peft_bf16": Variant("peer", lambda model, shape: Peft(model, shape, fp32=False), needs="peft", slow=True),
        # on a GPU it waits for Python, so it is no floor
        "frozen_base": Variant("other" if on_gpu else "floor", lambda model, shape: FrozenBase(shape), slow=True),
        # on a CPU `train` compiles no layers
        "ours_compiled": ours("ours" if on_gpu else "other", compiled=True, slow=True),
        "peft": Variant("peer", Peft, needs="peft", slow=True),
        "peft_all_layers": Variant(
            "other", lambda model, shape: Peft(model, shape, everywhere=True), needs="peft", slow=True
        ),
        **({"ours_torch": ours(path="torch", slow=True)} if on_gpu else {}),
        "naive": Variant("naive", lambda model, shape: Ensemble(model, shape, "reference", stacked), slow=True),
        "vmap": Variant("peer", not_on_cpu(Vmap), needs="peft", slow=True),
        "compile": Variant("peer", not_on_cpu(Compiled), slow=True),
    }


def batches(shape: Shape, variant: str) -> list[list[Family]]:
    return [equal_lengths(shape, vocabulary_of(shape), seed) for seed in range(3)]


def few(shape: Shape) -> list[Family]:
    return equal_lengths(shape | {"T": min(shape["T"], 32)}, vocabulary_of(shape), seed=99)


def left_out(shape: Shape, variant: str) -> bool:
    if variant == "peft_all_layers":
        return layers_of(shape) is None  # the same as peft
    return shows_nothing(shape, variant)


SUITE = StepSuite(
    "training_step",
    shapes,
    variants,
    batches,
    few,
    stacked,
    left_out=left_out,
    unchecked=("peft_all_layers", "frozen_base", "frozen_base_captured_compiled"),
)


def test_speed(point, measured):
    measured(point)


def main() -> None:
    """Print where the time of our step goes, at the main shapes with adapters on all layers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of a few numbers")
    device, tiny = device_type(), parser.parse_args().tiny
    for shape in shapes(device, tiny):
        if shape["name"].startswith("bar") and shape["name"].endswith("all"):
            print_profile("ours_captured_compiled" if device == "cuda" else "ours", shape, device)


def print_profile(name: str, shape: Shape, device: str) -> None:
    way = variants(device)[name].build(build_model(shape["model"]), shape)
    batch, *_ = way.batches(batches(shape, name))
    for _ in range(2):
        way.step(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        way.step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{name}, one step at {shape} on the path {way.backend!r}")
    rows = profiler.key_averages()
    print(rows.table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=70))
    if device == "cuda":
        print("time spent launching:")
        print(rows.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=70))


if __name__ == "__main__":
    main()
