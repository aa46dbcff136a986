"""Generating text: every one of K particles continues B prompts of T random tokens n times, by L tokens each.

No token ends a continuation. Tokens are drawn from the whole distribution, on random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_bench.batches import Family, equal_lengths
from csrc_bench.measure import Shape, Variant, Wrong, device_type
from csrc_bench.step_suite import StepSuite, shows_nothing
from csrc_bench.training_steps import CONFIGS, Peft, Way, as_asked, attach, vocabulary_of
from renyi_engine.ensemble import Rows
from renyi_kernels import use_backend

APART = 0.1
"""How much less likely, in nats, a token may be than the most likely one, if it was taken for that: bf16 rounds."""


def shapes(device: str, tiny: bool) -> list[Shape]:
    def make(model, K, B, n, T, L, R=8):
        sizes = {"model": model, "K": K, "B": B, "n": n, "T": T, "L": L, "R": R}
        sizes["adapted_layers"] = CONFIGS[model]().num_hidden_layers
        return {"name": f"bar_{model}", **sizes, "tokens": K * B * n * L, "dtype": "bfloat16"}

    if tiny:
        return [make("tiny", 2, 2, 2, 4, 3)]
    smollm2 = make("smollm2", 8, 2, 8, 64, 16)
    return [smollm2, make("qwen2", 8, 2, 8, 64, 16)] if device == "cuda" else [smollm2]


def prompts(families: list[Family]) -> Tensor:
    """[B, T]"""
    return torch.tensor([example.input_ids for (example,) in families], device=device_type())


class Ours(Way):
    """One call for all particles."""

    read = staticmethod(prompts)

    def __init__(self, model, shape: Shape, backend: str, captured: bool) -> None:
        self.shape, self.backend, self.ensemble = shape, backend, attach(model, shape).eval()
        if not captured:
            self.ensemble.decode_steps.usable = False

    def generate(self, ids: Tensor, n: int, L: int, temperature: float) -> Tensor:
        """The new tokens [K, B, n, L]."""
        how = {"num_samples": n, "max_new_tokens": L, "temperature": temperature, "eos_token_id": []}
        with use_backend(self.backend), as_asked():
            return self.ensemble.generate(ids, **how)

    def step(self, ids: Tensor) -> None:
        self.generate(ids, self.shape["n"], self.shape["L"], 1.0)

    def close(self) -> None:
        self.ensemble.detach()


def plainly(model, ids: Tensor, n: int, L: int, temperature: float) -> Tensor:
    """The new tokens [B, n, L] of a model, by transformers."""
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    how = {"do_sample": False, "num_return_sequences": n, "max_new_tokens": L, "pad_token_id": 0, **drawn}
    rows = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    return rows[:, ids.shape[1] :].view(len(ids), n, L)


class PeftLoop(Peft):
    """transformers' generate, for one particle after the other by PEFT's set_adapter."""

    read = staticmethod(prompts)

    def __init__(self, model, shape: Shape) -> None:
        super().__init__(model, shape, prompts, fp32=False)
        model.generation_config.eos_token_id = None

    def generate(self, ids: Tensor, n: int, L: int, temperature: float) -> Tensor:
        rows = []
        for name in self.names:
            self.model.set_adapter(name)
            rows.append(plainly(self.model, ids, n, L, temperature))
        return torch.stack(rows)

    def step(self, ids: Tensor) -> None:
        self.generate(ids, self.shape["n"], self.shape["L"], 1.0)


class Base(Way):
    """transformers' generate of the bare base, with as many rows in one batch."""

    read = staticmethod(prompts)

    def __init__(self, model, shape: Shape) -> None:
        self.model, self.shape = model, shape
        model.generation_config.eos_token_id = None

    def step(self, ids: Tensor) -> None:
        plainly(self.model, ids.repeat(self.shape["K"], 1), self.shape["n"], self.shape["L"], 1.0)


class GenerateSuite(StepSuite):
    """A way is right if the tokens that it takes for the most likely ones are that. From where it takes another token
    than the reference on, nothing is compared."""

    def reference(self, model, shape: Shape) -> Tensor:
        """The log-probabilities [K, B, 3, V] of three tokens, each the most likely one after those before it."""
        ensemble, found = attach(model, shape).eval(), []
        rows = prompts(self.few(shape)).repeat(shape["K"], 1)
        with use_backend("reference"), ensemble.running(Rows.OWN), torch.no_grad():
            for _ in range(3):
                found.append(ensemble.logits(ensemble(rows)[:, :, -1]).float().log_softmax(-1))
                rows = torch.cat([rows, found[-1].argmax(-1).view(-1, 1)], dim=1)
        ensemble.detach()
        return torch.stack(found, dim=2)

    def check(self, way: Ours | PeftLoop, shape: Shape, gold: Tensor) -> None:
        tokens = way.generate(prompts(self.few(shape)), 1, 3, 0.0)[:, :, 0]
        best, best_tokens = gold.max(-1)
        apart = best - gold.gather(-1, tokens[..., None]).squeeze(-1)
        differ = tokens != best_tokens
        beyond = differ.int().cumsum(-1) - differ.int() > 0
        worst = apart.masked_fill(beyond, 0.0).max().item()
        if worst > APART:
            raise Wrong(f"a token taken as the most likely one is {worst:.2g} nats less likely than another")


def variants(device: str) -> dict[str, Variant]:
    path = "triton" if device == "cuda" else "torch"
    ours = lambda captured: Variant("ours", lambda model, shape: Ours(model, shape, path, captured), path)
    return {
        "ours_captured": ours(True),
        "ours": ours(False),
        "base": Variant("other", Base),
        "peft_bf16": Variant("peer", PeftLoop, needs="peft"),
    }


def batches(shape: Shape, variant: str) -> list[list[Family]]:
    return [equal_lengths(shape, vocabulary_of(shape), seed) for seed in range(3)]


def few(shape: Shape) -> list[Family]:
    return equal_lengths(shape | {"T": 6}, vocabulary_of(shape), seed=99)


SUITE = GenerateSuite(
    "generate",
    shapes,
    variants,
    batches,
    few,
    prompts,
    left_out=shows_nothing,
    unchecked=("base",),
    direction="tokens",
)


def test_speed(point, measured):
    measured(point)
