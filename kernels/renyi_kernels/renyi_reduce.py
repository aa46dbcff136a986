"""renyi_reduce: the one alpha-Renyi reduction of the code base.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from renyi_kernels import reference
from renyi_kernels.backend import refuse_tangents, resolve
from renyi_kernels.reference import at_least_fp32, relative_weights

# below this alpha, and above its inverse, the loss does not change any more. But the gradient has the factor 1/alpha,
# which would overflow or vanish
_LEAST_ALPHA = 1e-200


class RenyiOutput(NamedTuple):
    """What `renyi_reduce` returns. Only `loss` carries a gradient."""

    loss: Tensor
    """[B], nats: the alpha-Renyi loss of each example."""
    responsibilities: Tensor
    """[K, B]: the softmax of alpha * logp over the particles. Each column sums to 1."""
    ess: Tensor
    """[B], particles: the effective sample size 1 / sum_k r^2, from 1 to K."""
    logp: Tensor
    """[K, B], nats: the log-likelihoods of the sequences, which were reduced."""


def renyi_reduce(
    logp: Tensor,
    alpha: float | Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> RenyiOutput:
    """Couple K particles: ``loss_i = -(1/alpha) log(sum_k w_k exp(alpha s_ki))``, eqs. (6), (18) of arXiv 2605.27747.

    There the weights w_k are 1/K, and so they are here without `weights`. alpha = 0 is the limit: the mean of the
    particles' nll. alpha = 1 is the nll of the predictive mixture (Lemma 1). alpha > 1 is still a loss, but not in the
    paper. The gradient is ``-r_ki`` with r_ki proportional to ``w_k exp(alpha s_ki)``, (8), (21). If all particles give
    an example zero mass (all -inf), its loss is +inf, its responsibilities are the weights, and its gradient is zero.

    >>> renyi_reduce(logp, 0.0).loss == -logp.mean(0)
    >>> renyi_reduce(logp, alpha, weights=torch.full((K,), 1 / K)).loss == renyi_reduce(logp, alpha).loss

    Args:
        logp: log-likelihoods in nats: ``[K, B]`` of sequences, or ``[K, B, T]`` of tokens, which are summed over T.
        alpha: finite, >= 0. Unless it is 0, it is brought into the range from 1e-200 to 1e200, so that 1 / alpha is a
            number too. Beyond that range the loss changes by less than 1e-199 nats, or only where it is above 1e100.
            It may be a floating tensor without dimensions, on the device of logp or on the CPU. Then nothing asks for
            its value, so a captured graph can be replayed with another one. If it is negative, NaN or infinite, the
            whole loss is NaN.
        mask: ``[B, T]`` of any dtype, nonzero where a token counts, for log-likelihoods of tokens. None: all count.
        weights: ``[K]``, floating, on the device of logp or on the CPU: how probable each particle is in the mixture.
            None: 1/K each. Each weight is at least 0. Their sum may differ from 1 by 1e-6, and they are divided by it.
            A particle of weight 0 does not count, whatever its logp is. Weights on the CPU are checked, except in
            compiled code. Nothing asks a GPU for their values: if they are no distribution, the whole loss is NaN, and
            a captured graph can be replayed with others in the same tensor.
        backend: "auto", "triton", "torch" or "reference"; None takes that of `use_backend`.

    Returns:
        RenyiOutput(loss ``[B]``, responsibilities ``[K, B]``, ess ``[B]``, logp ``[K, B]``), fp32, or fp64 for fp64.
        `loss` is differentiable in logp; the others are detached. Second derivatives and forward mode work too, except
        on the "triton" path, where they raise a RuntimeError.

    Raises:
        ValueError: a number alpha is negative, NaN or infinite; a tensor alpha has dimensions, lies on another device
            or requires a gradient; a shape does not fit; or weights on the CPU are below 0, or their sum is not 1.
        TypeError: alpha is neither a number nor a floating tensor, or logp or weights are not floating point.
    """
    alpha = check_alpha_for(logp, alpha)
    if not logp.is_floating_point():
        raise TypeError(f"logp: expected a floating-point tensor; got {logp.dtype}")
    if logp.dim() not in (2, 3) or logp.shape[0] < 1:
        raise ValueError(f"logp: expected [K, B] or [K, B, T] with K >= 1; got {list(logp.shape)}")
    if mask is not None and (logp.dim() != 3 or mask.shape != logp.shape[1:]):
        raise ValueError(
            f"mask: expected [B, T] beside logp [K, B, T]; got {list(mask.shape)} beside {list(logp.shape)}"
        )
    weights = check_weights_for(logp, weights)
    path = resolve("renyi_reduce", logp, backend)
    in_range = _in_range(alpha, logp.device)
    if path == "triton":
        refuse_tangents("renyi_reduce", logp)
        tokens = logp if logp.dim() == 3 else logp.unsqueeze(-1)
        relative = None if weights is None else relative_weights(weights)
        loss, responsibilities, ess, logp = _forward(tokens, mask, in_range, relative)
        return RenyiOutput(loss, responsibilities.detach(), ess.detach(), logp.detach())
    if logp.dim() == 3:
        logp = _sum_tokens(logp, mask)
    logp = logp.to(at_least_fp32(logp.dtype))
    # [K, B] is tiny, so the reference serves as the "torch" path too
    loss, responsibilities, ess = reference.renyi_reduce(logp, in_range, weights)
    return RenyiOutput(loss, responsibilities, ess, logp.detach())


def check_alpha(alpha: float) -> float:
    """alpha as a float. ValueError if it is negative or not finite, TypeError if it is no number."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha: expected a number; got {type(alpha).__name__} {alpha!r}")
    alpha = float(alpha)
    if not (math.isfinite(alpha) and alpha >= 0.0):
        raise ValueError(f"alpha: expected a finite number >= 0 (0 trains the particles independently); got {alpha}")
    return alpha


def check_alpha_for(logp: Tensor, alpha: float | Tensor) -> float | Tensor:
    """alpha as a float or as the tensor that it is. The errors are those of `renyi_reduce`."""
    if not isinstance(alpha, Tensor):
        return check_alpha(alpha)
    if not alpha.is_floating_point():
        raise TypeError(f"alpha: expected a floating tensor; got {alpha.dtype}")
    if alpha.dim():
        raise ValueError(f"alpha: expected a tensor without dimensions; got the shape {list(alpha.shape)}")
    if alpha.device not in (logp.device, torch.device("cpu")):
        raise ValueError(f"alpha: expected a tensor on {logp.device} or on the CPU; got one on {alpha.device}")
    if alpha.requires_grad:
        raise ValueError("alpha: the loss has no derivative in it; pass alpha.detach()")
    return alpha


def check_weights_for(logp: Tensor, weights: Tensor | None) -> Tensor | None:
    """weights in fp64, on the device of logp. The errors are those of `renyi_reduce`."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating tensor; got {getattr(weights, 'dtype', type(weights).__name__)}")
    if weights.shape != logp.shape[:1]:
        raise ValueError(f"weights: expected [K] = {list(logp.shape[:1])}, one a particle; got {list(weights.shape)}")
    if weights.device not in (logp.device, torch.device("cpu")):
        raise ValueError(f"weights: expected a tensor on {logp.device} or on the CPU; got one on {weights.device}")
    if weights.requires_grad:
        raise ValueError("weights: the loss has no derivative in them; pass weights.detach()")
    _check_values(weights)
    return weights.to(logp.device, torch.float64, non_blocking=True)


# an operator, because torch.compile does not look into it, and fake tensors have no values to be checked


@torch.library.custom_op("renyi_kernels::check_weights", mutates_args=())
def _check_values(weights: Tensor) -> None:
    # on a GPU this check would wait for the device; there the loss is NaN
    if weights.device.type == "cpu" and relative_weights(weights).isnan().any():
        raise ValueError(
            f"weights: expected numbers of at least 0 with the sum 1; got {weights.tolist()}, whose sum is "
            f"{weights.double().sum().item():.9g}; divide them by their sum, in fp32 or fp64"
        )


@_check_values.register_fake
def _(weights: Tensor) -> None:
    return None


@_check_values.register_vmap
def _(info, in_dims, weights: Tensor) -> tuple[None, None]:
    for of_one in weights.unbind(in_dims[0]):
        _check_values(of_one)
    return None, None


def _in_range(alpha: float | Tensor, device: torch.device) -> Tensor:
    """alpha as an fp64 tensor on the device: 0, or from `_LEAST_ALPHA` to its inverse, or NaN for what is refused."""
    if isinstance(alpha, Tensor):
        alpha = alpha.to(device, torch.float64, non_blocking=True)
    else:
        alpha = torch.full((), alpha, dtype=torch.float64, device=device)
    alpha = alpha.where((alpha >= 0.0) & (alpha < torch.inf), torch.nan)
    return alpha.where(alpha == 0.0, alpha.clamp(_LEAST_ALPHA, 1 / _LEAST_ALPHA))


def _sum_tokens(logp: Tensor, mask: Tensor | None) -> Tensor:
    logp = logp.to(at_least_fp32(logp.dtype))
    if mask is not None:
        # no product with the mask, because a masked value may be -inf or NaN
        logp = logp.where(mask.bool(), 0.0)
    return logp.sum(dim=-1)


# the kernels as one operator, for autograd and torch.compile; log-likelihoods of tokens, [K, B, T]; alpha as
# `_in_range` gives it; weights as `relative_weights` gives them


@torch.library.custom_op("renyi_kernels::renyi_reduce", mutates_args=())
def _forward(
    token_logp: Tensor, mask: Tensor | None, alpha: Tensor, relative: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from renyi_kernels.triton_ops import renyi_reduce  # needs triton

    return renyi_reduce.forward(token_logp, mask, alpha, relative)


@_forward.register_fake
def _(
    token_logp: Tensor, mask: Tensor | None, alpha: Tensor, relative: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K, B, _ = token_logp.shape
    dtype = at_least_fp32(token_logp.dtype)
    per_example, per_pair = token_logp.new_empty(B, dtype=dtype), token_logp.new_empty((K, B), dtype=dtype)
    return per_example, per_pair, torch.empty_like(per_example), torch.empty_like(per_pair)


@torch.library.custom_op("renyi_kernels::renyi_reduce_backward", mutates_args=())
def _backward(
    upstream: Tensor, responsibilities: Tensor, logp: Tensor, mask: Tensor | None, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    from renyi_kernels.triton_ops import renyi_reduce  # needs triton

    return renyi_reduce.backward(upstream, responsibilities, logp, mask, num_tokens, dtype)


@_backward.register_fake
def _(
    upstream: Tensor, responsibilities: Tensor, logp: Tensor, mask: Tensor | None, num_tokens: int, dtype: torch.dtype
) -> Tensor:
    return upstream.new_empty((*responsibilities.shape, num_tokens), dtype=dtype)


def _keep(ctx, inputs, output):
    token_logp, mask, *_ = inputs
    _, responsibilities, _, logp = output
    ctx.num_tokens, ctx.dtype = token_logp.shape[2], token_logp.dtype
    ctx.save_for_backward(responsibilities, logp, mask)


def _differentiate(ctx, upstream, *_):
    refuse_tangents("renyi_reduce", upstream)
    responsibilities, logp, mask = ctx.saved_tensors
    return _backward(upstream, responsibilities, logp, mask, ctx.num_tokens, ctx.dtype), None, None, None


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError("renyi_reduce: the kernels have no second derivative; use backend='reference' or 'torch'")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse_second_derivative)
