"""The parts of a training step beside its forward and backward: what is done to all adapters, one part after the other.

K particles, P numbers of a particle, R rank. The adapters lie in one matrix [K, P], as in training, or in hundreds of
tensors, an A and a B for each adapted map with all particles stacked. `python -m csrc_bench.bench_step_parts` prints
how many operators each part calls.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from csrc_bench.compare import table
from csrc_bench.measure import Point, Shape, Variant, copies, device_type, num_input_sets, require_close
from csrc_bench.training_steps import CONFIGS, MAPS
from renyi_engine.ensemble import ParticleMatrix
from renyi_engine.training.particle_optim import clip_grad_norms_, step_healthy

MAX_NORM = 1.0
LEARNING_RATE = 0.1  # so large that the check sees a step
BYTES = {"optimizer": 28, "norms_and_clipping": 12, "casts": 6, "zero_grad": 4}
"""What a part must read and write, for each number of the adapters."""


def shapes(device: str, tiny: bool) -> list[Shape]:
    sizes = {"model": "tiny", "K": 2, "R": 2} if tiny else {"model": "smollm2", "K": 8, "R": 8}
    return [{"name": f"bar_{part}", **sizes, "dtype": "float32"} for part in BYTES]


def part_of(shape: Shape) -> str:
    return shape["name"].removeprefix("bar_")


@functools.cache
def sizes_of(name: str) -> dict[str, tuple[int, int]]:
    """(in, out features) of every linear map of the model of that name, by path."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    return {
        path: (linear.in_features, linear.out_features)
        for path, linear in model.named_modules()
        if path.rpartition(".")[2] in MAPS
    }


def num_numbers(shape: Shape) -> int:
    return shape["K"] * shape["R"] * sum(map(sum, sizes_of(shape["model"]).values()))


def random_adapters(shape: Shape, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [K, R, I], B [K, O, R]) of every linear map of the model, by path."""
    generator, K, R = torch.Generator().manual_seed(seed), shape["K"], shape["R"]
    draw = lambda *sizes: torch.randn(sizes, generator=generator).to(device_type())
    return {path: (draw(K, R, i), draw(K, o, R)) for path, (i, o) in sizes_of(shape["model"]).items()}


# Each way has a method for each part, and state(): everything that a part may change, each [K, P].


class Matrix:
    """One matrix, and the functions that training calls."""

    def __init__(self, shape: Shape) -> None:
        adapters, gradients = random_adapters(shape, seed=0), random_adapters(shape, seed=1)
        # which maps read one input changes nothing here
        self.particles = ParticleMatrix([[path] for path in adapters], adapters, torch.device(device_type()))
        self.zero_grad()
        for path, pair in self.particles.named(self.particles.gradients).items():
            for view, gradient in zip(pair, gradients[path], strict=True):
                view.copy_(gradient)
        self.casts()
        self.adamw = torch.optim.AdamW([self.particles.values], lr=LEARNING_RATE, fused=True)
        self.healthy = torch.ones(shape["K"], dtype=torch.bool, device=device_type())

    def optimizer(self) -> None:
        step_healthy(self.adamw, self.healthy)

    def norms_and_clipping(self) -> None:
        clip_grad_norms_(self.particles.gradients, self.particles.gradient_norms(), MAX_NORM)

    def casts(self) -> None:
        self.particles.refresh(torch.bfloat16)

    def zero_grad(self) -> None:
        self.particles.zero_gradients()

    def state(self) -> dict[str, Tensor]:
        of_all = lambda matrix: joined(side for pair in self.particles.named(matrix).values() for side in pair)
        copied = [(A, B) for A, (B,) in (group.copies for group in self.particles.groups)]
        return {
            "parameters": of_all(self.particles.values.detach()),
            "gradients": of_all(self.particles.gradients),
            "copies": joined(side for pair in copied for side in pair),
        }


class PerTensor:
    """A tensor for each A and B, and a plain loop over them."""

    kind_of_adamw = "fused"

    def __init__(self, shape: Shape) -> None:
        adapters, gradients = random_adapters(shape, seed=0), random_adapters(shape, seed=1)
        self.parameters = [nn.Parameter(side) for pair in adapters.values() for side in pair]
        self.gradients = [side for pair in gradients.values() for side in pair]
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        self.copies = [p.detach().to(torch.bfloat16) for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, **{self.kind_of_adamw: True})
        self.healthy = torch.ones(shape["K"], dtype=torch.bool, device=device_type())

    def optimizer(self) -> None:
        """The host asks the device whether all particles are healthy. Here they are."""
        if self.healthy.all():
            self.adamw.step()

    def norms_and_clipping(self) -> None:
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in self.gradients]).norm(dim=0)
        factors = (MAX_NORM / (norms + 1e-6)).clamp(max=1.0)
        for gradient in self.gradients:
            gradient.mul_(factors[:, None, None])

    @torch.no_grad()
    def casts(self) -> None:
        """The copies in the base's dtype, which the products read."""
        for copy, p in zip(self.copies, self.parameters, strict=True):
            copy.copy_(p)

    def zero_grad(self) -> None:
        for gradient in self.gradients:
            gradient.zero_()

    def state(self) -> dict[str, Tensor]:
        of_all = {"parameters": self.parameters, "gradients": self.gradients, "copies": self.copies}
        return {name: joined(tensors) for name, tensors in of_all.items()}


class Foreach(PerTensor):
    """The same by PyTorch's operators on lists of tensors, and a particle by itself where particles differ."""

    kind_of_adamw = "foreach"

    def norms_and_clipping(self) -> None:
        for k in range(len(self.healthy)):
            gradients = [gradient[k] for gradient in self.gradients]
            norm = nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))

    @torch.no_grad()
    def casts(self) -> None:
        torch._foreach_copy_(self.copies, self.parameters)

    def zero_grad(self) -> None:
        torch._foreach_zero_(self.gradients)


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """[K, P] of tensors [K, ...]."""
    return torch.cat([tensor.detach().flatten(1) for tensor in tensors], dim=1)


def floor(shape: Shape) -> Callable[[], None]:
    """A copy of as many bytes as the part has to read and write."""
    return copies(BYTES[part_of(shape)] * num_numbers(shape), device_type())


VARIANTS = {
    "matrix": Variant("ours", Matrix, backend="torch"),
    "per_tensor": Variant("naive", PerTensor),
    "foreach": Variant("peer", Foreach),
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
        part, shape = part_of(point.shape), point.shape
        way, naive = variant.build(shape), PerTensor(shape)
        for made in (way, naive):
            getattr(made, part)()
        for (name, got), want in zip(way.state().items(), naive.state().values(), strict=True):
            require_close(name, got, want, 1e-4)
        del naive, got, want, made
        count = num_input_sets(4 * num_numbers(shape), device_type())
        ways = [way, *(variant.build(shape) for _ in range(1, count))]
        yield [getattr(way, part) for way in ways], variant.backend


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
        ways = [VARIANTS[name].build(shape) for name in names]
        lines.append([part_of(shape), *(str(num_operators(getattr(way, part_of(shape)))) for way in ways)])
    print(table(lines))


def num_operators(call: Callable[[], None]) -> int:
    """How many operators a call runs, those that other operators call included. It runs once before it is counted."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return sum(event.name.startswith("aten::") for event in profiler.events())


if __name__ == "__main__":
    main()
