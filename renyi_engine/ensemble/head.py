"""What a model does between its final hidden states and its logits. It is measured, and not looked up in a list.

Layout: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from renyi_engine.core import is_out_of_memory, reason
from renyi_engine.ensemble.adapted_maps import is_matrix
from renyi_kernels import linear_logprob

EXACT = 1e-5
"""How far the head that was found may be from the model's own, relative to the largest value. Both are in fp32."""


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale * (h W^T + bias))."""

    output: nn.Linear
    num_tokens: int
    bias_scale: float
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        return self.output.weight[: self.num_tokens]

    @property
    def bias(self) -> Tensor | None:
        bias = self.output.bias
        return None if bias is None else bias[: self.num_tokens] * self.bias_scale

    @classmethod
    def of(cls, model: PreTrainedModel, decoder: nn.Module, input_ids: Tensor) -> Head:
        """The model's head. To find it, the model is given known numbers in place of its hidden states, and in place of
        the product with the head's matrix. So rounding hides nothing, in whatever precision the model is.

        Raises:
            ValueError: before the product the model does something other than a multiplication, or after the product
                something other than a multiplication and a soft cap.
        """
        output = model.get_output_embeddings()
        if output is None:
            raise ValueError(
                f"model: {type(model).__name__} has no head that turns hidden states into logits; load it as a causal "
                "language model"
            )
        if not isinstance(output, nn.Linear) or not is_matrix(output):
            raise ValueError(
                f"model: {type(model).__name__} has a head of type {type(output).__name__}; expected a linear map with "
                "a plain matrix; if the head is quantised, leave it out of the quantisation"
            )
        hidden, product = _known_numbers(input_ids, output)
        read, logits = _ask(model, decoder, output, input_ids, hidden, product)
        product = product[..., : logits.shape[-1]]  # some models cut off tokens that only pad their vocabulary
        if read.shape != hidden.shape or product.shape != logits.shape:
            raise _not_understood(model)
        before = float((read * hidden).sum() / (hidden * hidden).sum())
        after = float(logits[0, 0, 0] / product[0, 0, 0])
        limit = float(logits[0, 1, 0])
        softcap = limit if 0 < limit < 0.5 * after * float(product[0, 1, 0]) else None
        if not (before and after and _same(read, before * hidden) and _same(logits, _cap(after * product, softcap))):
            raise _not_understood(model)
        # scale (h W^T + bias) = after (before h W^T + the head's own bias)
        return cls(output, logits.shape[-1], 1 / before, before * after, softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], in the dtype of hidden."""
        return _cap(nn.functional.linear(hidden, self.weight, self.bias) * self.scale, self.softcap)

    def logprob(self, hidden: Tensor, labels: Tensor, *, all_labelled: bool = False) -> Tensor:
        """Log-probabilities of the labels, fp32, in nats; see `linear_logprob`."""
        return linear_logprob(
            hidden,
            self.weight.to(hidden.dtype),
            labels,
            bias=self.bias,
            logit_softcap=self.softcap,
            logit_scale=self.scale,
            all_labelled=all_labelled,
        )


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _known_numbers(input_ids: Tensor, output: nn.Linear) -> tuple[Tensor, Tensor]:
    """(hidden states [B, T, D], products [B, T, V]) in fp32, for at least two tokens."""
    device = output.weight.device
    place = torch.arange(input_ids.numel() * output.in_features, device=device).view(*input_ids.shape, -1)
    # powers of two with both signs: every floating-point type holds them exactly
    hidden = 2.0 ** (place * 7 % 5 - 2) * (1 - place // 3 % 2 * 2)
    # a product near zero shows the multiplication, one far from zero shows the soft cap, and the others show that
    # there is nothing else
    product = torch.linspace(-64.0, 64.0, output.out_features, device=device).repeat(*input_ids.shape, 1).flip(-1)
    product[..., 0] = 1.0  # now they are not sorted any more
    product[0, 0], product[0, 1] = 2.0**-10, 2.0**20
    return hidden, product


def _ask(
    model: PreTrainedModel, decoder: nn.Module, output: nn.Linear, input_ids: Tensor, hidden: Tensor, product: Tensor
) -> tuple[Tensor, Tensor]:
    """(what the head is given if the decoder returns `hidden`, the logits if the head returns `product`), in fp32."""
    given: list[Tensor] = []

    def end(decoder: nn.Module, args: tuple, result: dict) -> dict:
        result["last_hidden_state"] = hidden
        return result

    def multiply(x: Tensor) -> Tensor:
        given.append(x)
        return product.to(x.device)

    handle = decoder.register_forward_hook(end)
    before = vars(output).get("forward")
    vars(output)["forward"] = multiply
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"model: {type(model).__name__} cannot turn the hidden states of text alone into logits "
            f"({type(error).__name__}: {reason(error)})"
        ) from error
    finally:
        handle.remove()
        del vars(output)["forward"]
        if before is not None:  # accelerate puts a forward of its own there
            vars(output)["forward"] = before
    if len(given) != 1:
        raise _not_understood(model)
    return given[0].float(), logits.float().to(product.device)


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two tensors agree at every token, up to `EXACT`."""
    return bool(((theirs - ours).abs().amax(-1) <= EXACT * ours.abs().amax(-1)).all())


def _not_understood(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"model: {type(model).__name__} transforms its logits in an unknown way; between its final hidden states and "
        "its logits there may only be the head's matrix, a multiplication and a soft cap"
    )
