"""The suite of a whole training step: every way to make it is checked against the naive step, then timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from csrc_bench.batches import Family
from csrc_bench.measure import Point, Shape, Variant, device_type, require_close, require_path
from csrc_bench.training_steps import Ensemble, Read, build_model


def shows_nothing(shape: Shape, variant: str) -> bool:
    """Whether a row is not worth its time: on a CPU nothing is captured, and compiling takes longer than all else that
    is tiny. Tiny rows show whether it runs; for what is compiled, one shape is enough."""
    if shape["model"] == "tiny":
        return "compiled" in variant and (shape["name"] != "bar_tiny_all" or "captured" not in variant)
    return "captured" in variant and device_type() == "cpu"


@dataclass
class StepSuite:
    """The steps of one shape share a model. Each step restores it at the end.

    Attributes:
        shapes: device type, tiny -> shapes.
        variants: device type -> variants by name; `build` of a variant: model, shape -> a way to make a step.
        batches: shape, name of the variant -> batches, whose steps take turns.
        few: shape -> a batch of few tokens, for the check.
        read: how the naive step reads a batch.
        left_out: shape, name of the variant -> whether that row is not wanted.
        unchecked: the names of variants that do other work than the naive step.
        direction: what a row is called.
    """

    op: str
    shapes: Callable[[str, bool], list[Shape]]
    variants: Callable[[str], dict[str, Variant]]
    batches: Callable[[Shape, str], list[list[Family]]]
    few: Callable[[Shape], list[Family]]
    read: Read
    left_out: Callable[[Shape, str], bool] = lambda shape, name: False
    unchecked: tuple[str, ...] = ()
    direction: str = "step"
    _model: tuple = field(default=(None, None), repr=False)
    _gold: tuple = field(default=(None, None), repr=False)

    def points(self, device: str, tiny: bool) -> list[Point]:
        return [
            Point(self, shape, self.direction, name)
            for shape in self.shapes(device, tiny)
            for name, variant in self.variants(device).items()
            if not self.left_out(shape, name) and (not variant.slow or shape["name"].startswith("bar"))
        ]

    @contextlib.contextmanager
    def prepared(self, point: Point) -> Iterator[tuple[list[Callable[[], None]], str | None]]:
        shape, variant = point.shape, self.variants(device_type())[point.variant]
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
            checked = variant.kind != "floor" and point.variant not in self.unchecked
            gold = self.reference(model, shape) if checked else None
            way = variant.build(model, shape)
            if gold is not None:
                self.check(way, shape, gold)
            calls = [partial(way.step, batch) for batch in way.batches(self.batches(shape, point.variant))]
            yield calls, path
        except BaseException:
            # a step that failed may have left the model changed
            self._model = (None, None)
            raise
        finally:
            if way is not None and self._model[1] is not None:
                way.close()

    def reference(self, model, shape: Shape) -> tuple[Tensor, Tensor]:
        """The log-probabilities and gradients of the naive step, on few tokens."""
        if self._gold[0] != shape:
            way = Ensemble(model, shape, "reference", self.read)
            self._gold = (shape, way.score(*way.batches([self.few(shape)])))
            way.close()
        return self._gold[1]

    def check(self, way, shape: Shape, gold: tuple[Tensor, Tensor]) -> None:
        logp, gradient = way.score(*way.batches([self.few(shape)]))
        require_close("logp", logp, gold[0], 1e-2)
        # bf16 errors grow through all layers, but the particles differ by far more
        require_close("gradient", gradient, gold[1], 0.1)
