"""The whole training step: K coupled adapters, forward, backward and AdamW, on random tokens and weights.

K particles, B sequences, T tokens, R rank. The adapters are on all linear maps of all layers, or of the last quarter.
`python -m csrc_bench.bench_training_step` prints a profile of our step at the first shape.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from csrc_bench.measure import Point, Shape, Skipped, Variant, device_type, require_close, require_path
from csrc_bench.training_steps import (
    CONFIGS,
    Compiled,
    CompiledLayers,
    Ensemble,
    FrozenBase,
    Peft,
    Vmap,
    build_model,
    layers_of,
    random_ids,
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
        make("bar_qwen2_all", "qwen2", 16, 4, 256),
        make("bar_qwen2_last7", "qwen2", 16, 4, 256, adapted=7),
        *smollm2,
        make("llama3_all", "llama3", 8, 2, 256),
        make("llama3_last8", "llama3", 8, 2, 256, adapted=8),
        *(make(f"smollm2_k{K}", "smollm2", K, 2, 256) for K in (1, 2, 4, 8, 16, 32, 64)),
        *(make(f"smollm2_t{B * 512}", "smollm2", 8, B, 512) for B in (2, 4, 8, 16)),
        make("smollm2_r16", "smollm2", 8, 4, 256, R=16),
        *(make(f"qwen2_k{K}", "qwen2", K, 2, 256) for K in (1, 2, 4, 8, 32)),
        make("qwen2_r16", "qwen2", 16, 4, 256, R=16),
        make("qwen2_t4096_last7", "qwen2", 8, 8, 512, adapted=7),
        make("llama3_k4_last8", "llama3", 4, 2, 512, adapted=8),
    ]


def not_on_cpu(build: Callable) -> Callable:
    def run(model, shape):
        if device_type() == "cpu":
            raise Skipped("left to GPU runs")
        return build(model, shape)

    return run


def variants(device: str) -> dict[str, Variant]:
    ours = lambda backend: Variant("ours", lambda model, shape: Ensemble(model, shape, backend), backend)
    path = "triton" if device == "cuda" else "torch"
    return {
        "ours": ours(path),
        "ours_compile": Variant(
            "other", lambda model, shape: CompiledLayers(model, shape, path), backend=path, slow=True
        ),
        "frozen_base": Variant("floor", lambda model, shape: FrozenBase(shape)),
        "peft": Variant("peer", Peft, needs="peft"),
        "peft_bf16": Variant("peer", lambda model, shape: Peft(model, shape, fp32=False), needs="peft", slow=True),
        "peft_all_layers": Variant(
            "other", lambda model, shape: Peft(model, shape, everywhere=True), needs="peft", slow=True
        ),
        **({"ours_torch": ours("torch")} if device == "cuda" else {}),
        "naive": Variant("naive", lambda model, shape: Ensemble(model, shape, "reference")),
        "vmap": Variant("peer", not_on_cpu(Vmap), needs="peft", slow=True),
        "compile": Variant("peer", not_on_cpu(Compiled), slow=True),
    }


@dataclass
class StepSuite:
    """The steps of one shape share a model. Each step restores it at the end."""

    op: str = "training_step"
    _model: tuple = (None, None)
    _gold: tuple = (None, None)

    def variants(self, device: str) -> dict[str, Variant]:
        return variants(device)

    def points(self, device: str, tiny: bool) -> list[Point]:
        def fits(shape, name, variant):
            if name == "peft_all_layers" and layers_of(shape) is None:
                return False  # the same as peft
            if name == "ours_compile" and tiny:
                return False  # compiling takes longer than everything else together
            return not variant.slow or shape["name"].startswith("bar")

        return [
            Point(self, shape, "step", name)
            for shape in shapes(device, tiny)
            for name, variant in variants(device).items()
            if fits(shape, name, variant)
        ]

    @contextlib.contextmanager
    def prepared(self, point: Point) -> Iterator[tuple[list[Callable[[], None]], str | None]]:
        shape, variant = point.shape, variants(device_type())[point.variant]
        way = None
        if self._model[0] != shape["model"]:
            self._model = (None, None)
            self._model = (shape["model"], build_model(shape["model"]))
        model = self._model[1]
        path = None
        if variant.backend:
            for op in ("lora_linears", "grouped_lora", "linear_logprob"):
                path = require_path(op, model.get_input_embeddings().weight, variant.backend)
        try:
            if variant.kind != "floor":
                gold = self._reference(model, shape)
            way = variant.build(model, shape)
            if variant.kind != "floor" and point.variant != "peft_all_layers":
                self._check(way, shape, gold)
            calls = [partial(way.step, random_ids(shape, seed)) for seed in range(3)]
            yield calls, path
        except BaseException:
            # a step that failed may have left the model changed
            self._model = (None, None)
            raise
        finally:
            if way is not None and self._model[1] is not None:
                way.close()

    def _reference(self, model, shape: Shape) -> tuple[Tensor, Tensor]:
        """The log-probabilities and gradients of the naive step, on few tokens."""
        if self._gold[0] != shape:
            way = Ensemble(model, shape, "reference")
            self._gold = (shape, way.score(self._few(shape)))
            way.close()
        return self._gold[1]

    @staticmethod
    def _few(shape: Shape) -> Tensor:
        return random_ids(shape, seed=99, num_tokens=min(shape["T"], 32))

    def _check(self, way, shape: Shape, gold: tuple[Tensor, Tensor]) -> None:
        logp, gradient = way.score(self._few(shape))
        require_close("logp", logp, gold[0], 1e-2)
        # bf16 errors grow through all layers, but the particles differ by far more
        require_close("gradient", gradient, gold[1], 0.1)


SUITE = StepSuite()


def test_speed(point, measured):
    measured(point)


def main() -> None:
    """Print where the time of our step goes, at the first shape."""
    from torch.profiler import ProfilerActivity, profile

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of a few numbers")
    device = device_type()
    shape = shapes(device, parser.parse_args().tiny)[0]
    way = variants(device)["ours"].build(build_model(shape["model"]), shape)
    ids = random_ids(shape, 0)
    for _ in range(2):
        way.step(ids)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        way.step(ids)
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"one step at {shape} on the path {way.backend!r}")
    rows = profiler.key_averages()
    print(rows.table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=70))
    if device == "cuda":
        print("time spent launching:")
        print(rows.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=70))


if __name__ == "__main__":
    main()
