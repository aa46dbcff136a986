"""linear_logprob: log-probability of the labels under a frozen language-model head, without the logits.

Layout: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from renyi_kernels import reference, torch_ops
from renyi_kernels.backend import resolve
from renyi_kernels.reference import IGNORE_INDEX

PATHS: dict[str, Callable[..., Tensor]] = {
    "torch": torch_ops.linear_logprob,
    "reference": reference.linear_logprob,
}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_mib: float = 256.0,
    backend: str | None = None,
) -> Tensor:
    """Log-probability, in nats, of each label: ``log softmax(z)[label]``, ``z = softcap(scale * (h W^T + b))``.

    ``softcap(z) = c tanh(z / c)`` (Gemma-2). The head is frozen: nobody computes a gradient of `weight` or `bias`,
    so d logp / d hidden is formed in the forward, chunk by chunk, and the backward only scales it. Logits are
    accumulated and kept in fp32 for every input dtype.

    Args:
        hidden: ``[..., D]``, final-norm output.
        weight: ``[V, D]``, in the dtype of hidden. bias: ``[V]`` or None.
        labels: ``[...]`` int64, already shifted to the position that predicts them. -100: no label; the result
            there is 0.0 and no work is done.
        logit_softcap: c > 0, or None. logit_scale: multiplies the logits.
        chunk_mib: MiB of logits (and their copies) held at any moment, on the "torch" path.
        backend: "auto", "triton", "torch" or "reference"; None takes the one of `use_backend`.

    Returns:
        Like labels, fp32 (fp64 for an fp64 hidden). Differentiable once in hidden; a second derivative raises,
        except with ``backend="reference"``, which supports any order.

    Raises:
        ValueError: a shape or value does not fit. TypeError: a dtype does not.
        RuntimeError: in the backward, if the weight or the bias requires a gradient.
    """
    _check(hidden, weight, labels, bias, logit_softcap, chunk_mib)
    path = resolve("linear_logprob", PATHS, hidden.device, backend)
    head = (bias, logit_softcap, float(logit_scale))
    if path == "reference":
        return reference.linear_logprob(hidden, weight, labels, *head)
    return PATHS[path](hidden, weight, labels, *head, chunk_mib)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_softcap: float | None,
    chunk_mib: float,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected [V, D] with D the last size of hidden {list(hidden.shape)}; got {list(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected the dtype of hidden, {hidden.dtype}; got {weight.dtype}; cast it once")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected the shape {list(hidden.shape[:-1])}; got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64; got {labels.dtype}; use labels.long()")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected [V] = [{weight.shape[0]}]; got {list(bias.shape)}")
    if logit_softcap is not None and not (logit_softcap > 0 and math.isfinite(logit_softcap)):
        raise ValueError(f"logit_softcap: expected a finite number above 0, or None; got {logit_softcap}")
    if not (chunk_mib > 0 and math.isfinite(chunk_mib)):
        raise ValueError(f"chunk_mib: expected a finite number of MiB above 0; got {chunk_mib}")
    # on a GPU this look would stall the stream; there the gather itself asserts
    if labels.device.type == "cpu" and labels.numel():
        stray = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= weight.shape[0]))]
        if stray.numel():
            raise ValueError(
                f"labels: expected -100 or a token id in [0, {weight.shape[0]}); got {int(stray[0])}; "
                "does the tokenizer belong to this model?"
            )
