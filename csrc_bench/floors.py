"""The floors of a training step: the frozen base alone, and its bare matrix products.

K particles, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from csrc_bench.batches import Batch, Family, sequences_of, stacked
from csrc_bench.measure import Shape, device_type, graphed
from csrc_bench.training_steps import Read, Way, build_model, compiler_of, predicting
from renyi_engine.data import packed_length


class FrozenBase(Way):
    """The frozen base forward and backward on the same tokens, and the two products of its head.

    The layers below the first adapted one run forward only, once for all particles. The others run forward and backward
    on all rows. All attention is causal, also to padding.
    """

    def __init__(self, shape: Shape, read: Read = stacked, *, fast: bool = False) -> None:
        """`fast`: with compiled layers, and on a GPU as one CUDA graph."""
        self.read, self.fast, self.K = read, fast, shape["K"]
        self.model = build_model(shape["model"])
        layers = list(self.model.base_model.layers)
        self.below = len(layers) - shape["adapted_layers"]
        if fast:
            torch._dynamo.reset()
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=compiler_of(shape))
        self.layers = [compiled(layer.forward) for layer in layers] if fast else layers

    def batches(self, of_families: list[list[Family]]) -> list[Callable[[], object]]:
        works = [self.work(self.read(families)) for families in of_families]
        return graphed(works) if self.fast else works

    def work(self, batch: Batch) -> Callable[[], Tensor]:
        """A function that gives the gradient of the rows of all particles."""
        ids = batch["input_ids"].to(device_type())
        labelled = predicting(batch["labels"].repeat(self.K, 1)).to(device_type())
        embed, head = self.model.get_input_embeddings(), self.model.get_output_embeddings().weight
        positions = torch.arange(ids.shape[1], device=ids.device)[None]

        def run() -> Tensor:
            hidden = embed(ids)
            # the layers are called here, because the model would make a mask, and look into it in Python
            rotary = self.model.base_model.rotary_emb(hidden, positions)
            for layer in self.layers[: self.below]:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            rows = out = hidden.repeat(self.K, 1, 1).requires_grad_()
            for layer in self.layers[self.below :]:
                out = layer(out, attention_mask=None, position_embeddings=rotary)
            out = self.model.base_model.norm(out)
            with torch.no_grad():
                gradient = torch.zeros_like(out).flatten(0, 1)
                for places in labelled.split(2048):
                    gradient[places] = out.flatten(0, 1)[places] @ head.mT @ head
            return torch.autograd.grad(out, rows, gradient.view_as(out))[0]

        return run

    def step(self, work: Callable[[], object]) -> None:
        work()


class Gemms(Way):
    """A floor: the bare matrix products, one after the other, of the tokens that have to be read.

    These are the frozen maps of the layers below the first adapted one, forward; those of the adapted layers, forward
    and backward to their inputs, for K particles; and the two products of the head where there is a label. The first
    adapted q, k and v read what all particles share: they run forward once, and nothing below them needs a gradient.
    On a GPU the products are one CUDA graph.
    """

    def __init__(self, shape: Shape) -> None:
        model = build_model(shape["model"])
        layers = [[m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in model.base_model.layers]
        below = len(layers) - shape["adapted_layers"]
        attention = model.base_model.layers[below].self_attn
        shared = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.K = shape["K"]
        self.once = [m.weight for layer in layers[:below] for m in layer] + [m.weight for m in shared]
        self.of_all = [m.weight for layer in layers[below:] for m in layer if m not in shared]
        self.head = model.get_output_embeddings().weight

    def batches(self, of_families: list[list[Family]]) -> list[Callable[[], object]]:
        return graphed([self.products(families) for families in of_families])

    def products(self, families: list[Family]) -> Callable[[], object]:
        tokens = sum(map(packed_length, families))
        labelled = self.K * sum(sequence.num_labels for sequence in sequences_of(families))

        @cache
        def rows(number: int, width: int) -> Tensor:
            return torch.randn(number, width, dtype=self.head.dtype, device=self.head.device)

        @torch.no_grad()
        def run() -> None:
            for weight in self.once:
                rows(tokens, weight.shape[1]) @ weight.mT
            for weight in self.of_all:
                rows(self.K * tokens, weight.shape[1]) @ weight.mT
            for weight in self.of_all:
                rows(self.K * tokens, weight.shape[0]) @ weight
            for part in rows(labelled, self.head.shape[1]).split(2048):
                part @ self.head.mT @ self.head

        run()  # makes the inputs
        return run

    def step(self, products: Callable[[], object]) -> None:
        products()
