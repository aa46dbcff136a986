"""The parts of a training step beside its forward and backward: what is done to all adapters, one part after the other.

K particles, P numbers of a particle, R rank. The adapters lie in hundreds of tensors, an A and a B for each adapted map
with all particles stacked, or in one matrix [K, P]. The same loops run on both. `python -m csrc_bench.bench_step_parts`
prints how many operators each part calls.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from csrc_bench.compare import table
from csrc_bench.measure import Point, Shape, Variant, copies, device_type, num_input_sets, require_close
from csrc_bench.training_steps import CONFIGS, MAPS

MAX_NORM = 1.0
LEARNING_RATE = 0.1  # so large that the check sees a step
BYTES = {"optimizer": 28, "norms_and_clipping": 12, "casts": 6, "zero_grad": 4, "health": 4}
"""What a part must read and write, for each number of the adapters; health only for those of the sick particle."""


def shapes(device: str, tiny: bool) -> list[Shape]:
    sizes = {"model": "tiny", "K": 2, "R": 2} if tiny else {"model": "smollm2", "K": 8, "R": 8}
    return [{"name": f"bar_{part}", **sizes, "dtype": "float32"} for part in BYTES]


def part_of(shape: Shape) -> str:
    return shape["name"].removeprefix("bar_")


def sizes_of(shape: Shape) -> list[int]:
    """How many numbers of a particle each A and each B has, on all linear maps of the model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[shape["model"]]())
    maps = [module for path, module in model.named_modules() if path.rpartition(".")[2] in MAPS]
    return [shape["R"] * width for m in maps for width in (m.in_features, m.out_features)]


class Adapters:
    """Random adapters, a tensor [K, size] for each of the sizes, and what training keeps beside them. Particle 0 is
    sick."""

    def __init__(self, shape: Shape, sizes: list[int], kind_of_adamw: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw() -> list[Tensor]:
            matrix = torch.randn(shape["K"], sum(sizes), generator=generator)
            return [part.contiguous().to(device_type()) for part in matrix.split(sizes, dim=1)]

        self.parameters, self.gradients = [nn.Parameter(part) for part in draw()], draw()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        self.copies = [p.detach().to(torch.bfloat16) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, **{kind_of_adamw: True})
        self.sick = (torch.arange(shape["K"]) == 0).to(device_type())

    @property
    def num_numbers(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def state(self) -> dict[str, Tensor]:
        """Everything that a part may change, each [K, P]."""
        kept = {"parameters": self.parameters, "gradients": self.gradients, "copies": self.copies}
        return {name: torch.cat([part.detach() for part in parts], dim=1) for name, parts in kept.items()}


class Loops:
    """Each part as a loop over the tensors of the adapters, however many there are."""

    adamw = "fused"

    @staticmethod
    def optimizer(adapters: Adapters) -> None:
        adapters.optimizer.step()

    @staticmethod
    def norms_and_clipping(adapters: Adapters) -> None:
        norms = torch.stack([gradient.norm(dim=1) for gradient in adapters.gradients]).norm(dim=0)
        factors = (MAX_NORM / (norms + 1e-6)).clamp(max=1.0)
        for gradient in adapters.gradients:
            gradient.mul_(factors[:, None])

    @staticmethod
    @torch.no_grad()
    def casts(adapters: Adapters) -> None:
        """The copies in the base's dtype, which the products read."""
        for copy, p in zip(adapters.copies, adapters.parameters, strict=True):
            copy.copy_(p)

    @staticmethod
    def zero_grad(adapters: Adapters) -> None:
        for gradient in adapters.gradients:
            gradient.zero_()

    @staticmethod
    def health(adapters: Adapters) -> None:
        """The gradient of a sick particle becomes zero. The host does not learn which one is sick."""
        for gradient in adapters.gradients:
            gradient.masked_fill_(adapters.sick[:, None], 0.0)


class Foreach:
    """Each part by PyTorch's operators on lists of tensors, and a particle by itself where particles differ."""

    adamw = "foreach"
    optimizer = staticmethod(Loops.optimizer)

    @staticmethod
    def norms_and_clipping(adapters: Adapters) -> None:
        for k in range(len(adapters.sick)):
            gradients = [gradient[k] for gradient in adapters.gradients]
            norm = nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))

    @staticmethod
    @torch.no_grad()
    def casts(adapters: Adapters) -> None:
        torch._foreach_copy_(adapters.copies, adapters.parameters)

    @staticmethod
    def zero_grad(adapters: Adapters) -> None:
        torch._foreach_zero_(adapters.gradients)

    @staticmethod
    def health(adapters: Adapters) -> None:
        for k in adapters.sick.nonzero().flatten().tolist():
            torch._foreach_zero_([gradient[k] for gradient in adapters.gradients])


def way(parts: type, one_matrix: bool, shape: Shape) -> tuple[Adapters, Callable[[], None]]:
    """(adapters, what does the part of `shape` to them)."""
    sizes = sizes_of(shape)
    adapters = Adapters(shape, [sum(sizes)] if one_matrix else sizes, parts.adamw)
    return adapters, partial(getattr(parts, part_of(shape)), adapters)


def floor(shape: Shape) -> Callable[[], None]:
    """A copy of as many bytes as the part has to read and write."""
    num_numbers = sum(sizes_of(shape)) * (1 if part_of(shape) == "health" else shape["K"])
    return copies(BYTES[part_of(shape)] * num_numbers, device_type())


VARIANTS = {
    "matrix": Variant("ours", partial(way, Loops, True), backend="torch"),
    "per_tensor": Variant("naive", partial(way, Loops, False)),
    "foreach": Variant("peer", partial(way, Foreach, False)),
    "copy": Variant("floor", floor),
}


class PartsSuite:
    op = "step_parts"

    def variants(self, device: str) -> dict[str, Variant]:
        return VARIANTS

    def points(self, device: str, tiny: bool) -> list[Point]:
        return [Point(self, shape, "call", name) for shape in shapes(device, tiny) for name in VARIANTS]

    @contextlib.contextmanager
    def prepared(self, point: Point) -> Iterator[tuple[list[Callable[[], None]], str | None]]:
        variant = VARIANTS[point.variant]
        if variant.kind == "floor":
            yield [variant.build(point.shape)], None
            return
        adapters, call = variant.build(point.shape)
        expected, naive = VARIANTS["per_tensor"].build(point.shape)
        call()
        naive()
        for (name, got), want in zip(adapters.state().items(), expected.state().values(), strict=True):
            require_close(name, got, want, 1e-4)
        del expected, naive, got, want
        count = num_input_sets(4 * adapters.num_numbers, device_type())
        yield [call, *(variant.build(point.shape)[1] for _ in range(1, count))], variant.backend


SUITE = PartsSuite()


def test_speed(point, measured):
    measured(point)


def main() -> None:
    """Print how many operators of PyTorch each part calls."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of a few numbers")
    names = [name for name, variant in VARIANTS.items() if variant.kind != "floor"]
    lines = [["part", *names]]
    for shape in shapes(device_type(), parser.parse_args().tiny):
        calls = [VARIANTS[name].build(shape)[1] for name in names]
        lines.append([part_of(shape), *(str(num_operators(call)) for call in calls)])
    print(table(lines))


def num_operators(call: Callable[[], None]) -> int:
    """How many operators a call runs, those that other operators call included. It runs once before it is counted."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return sum(event.name.startswith("aten::") for event in profiler.events())


if __name__ == "__main__":
    main()
