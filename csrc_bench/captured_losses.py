"""Whether captured steps learn what eager steps learn: the losses of 50 steps, and how far they are apart.

How much rounding alone does is seen beside it: the eager steps on another path of the ops, which rounds elsewhere.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from csrc_bench import bench_training_step as suite
from csrc_bench.batches import equal_lengths
from csrc_bench.measure import Shape, device_type
from csrc_bench.training_steps import Ensemble, build_model, stacked, vocabulary_of


def losses(steps: int, model, shape: Shape, *path: object, **ways: bool) -> Tensor:
    """[steps] nats a token. Each step has a batch of its own, the same in every way."""
    way = Ensemble(model, shape, *path, **ways)
    batches = way.batches([equal_lengths(shape, vocabulary_of(shape), seed) for seed in range(steps)])
    found = torch.stack([way.step(batch).loss.mean() for batch in batches]).cpu()
    way.close()
    return found / (shape["T"] - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of a few numbers")
    device, tiny = device_type(), parser.parse_args().tiny
    shape, path = suite.shapes(device, tiny)[0], "triton" if device == "cuda" else "torch"
    learn = partial(losses, 3 if tiny else 50, build_model(shape["model"]), shape)
    eager = learn(path)
    print(f"{len(eager)} steps at {shape}: eager, {eager[0]:.4f} nats a token at first, {eager[-1]:.4f} at last")
    others = {
        "captured": learn(path, captured=True),
        "captured, compiled": learn(path, captured=True, compiled=True),
        "eager, naive ops": learn("reference", stacked),
    }
    for name, found in others.items():
        print(f"{name}: at most {(found - eager).abs().max():.1e} nats a token from eager, at last {found[-1]:.4f}")


if __name__ == "__main__":
    main()
