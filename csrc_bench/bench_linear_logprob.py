"""The fused loss, renyi_loss: from hidden states to the coupled loss, through linear_logprob.

K particles, B sequences, T tokens, D hidden size, V vocabulary. `forward` runs without gradients. In `both`, the
forward already computes the gradient, so that `backward` has almost nothing left to do.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.nn.functional as F

from csrc_bench.measure import OpSuite, Skipped, Variant, variants_of_op
from renyi_kernels import head_chunks, reference, renyi_loss

ALPHA = 0.8
QUACK_ROWS = 4096  # of a chunk; its default


def shapes(device, tiny):
    def make(name, K, B, T, D, V):
        return {"name": name, "K": K, "B": B, "T": T, "D": D, "V": V, "dtype": "bfloat16"}

    if tiny:
        return [make("bar_tiny", 2, 2, 3, 8, 50)]
    smollm2 = make("bar_smollm2", 8, 2, 128, 576, 49152)
    if device == "cpu":
        return [smollm2]
    return [
        make("bar_qwen2", 16, 1, 512, 1536, 151936),
        make("bar_llama3", 8, 2, 512, 4096, 128256),
        smollm2,
        *(make(f"qwen2_n{16 * T}", 16, 1, T, 1536, 151936) for T in (128, 256)),
        *(make(f"smollm2_n{16 * T}", 16, 1, T, 576, 49152) for T in (512, 2048)),
    ]


def inputs(shape, device, generator):
    K, B, T, D, V = (shape[k] for k in "KBTDV")
    dtype = getattr(torch, shape["dtype"])
    hidden = torch.randn(K, B, T, D, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator, device=device) * D**-0.5).to(dtype)
    return [hidden, weight, torch.randint(V, (B, T), generator=generator, device=device)]


def from_logprob(logprob):
    """The loss of token log-probabilities [K, B, T], by the reference."""
    return reference.renyi_reduce(logprob.sum(-1), ALPHA)[0]


def naive(shape):
    def run(hidden, weight, labels):
        labels = labels.expand(hidden.shape[:3])
        return from_logprob(reference.linear_logprob(hidden, weight, labels, None, None, 1.0))

    return run


def ours(shape, backend):
    return lambda hidden, weight, labels: renyi_loss(hidden, weight, labels, ALPHA, backend=backend).loss


def with_epilogue(shape):
    """Ours, with a product that writes no logits in place of the vendor's and the pass over them."""

    def run(*tensors):
        with patch.object(head_chunks, "PRODUCT_WITH_EPILOGUE", True):
            return ours(shape, "triton")(*tensors)

    return run


def with_cross_entropy(cross_entropy):
    """The loss, by the cross_entropy(hidden [N, D], weight, labels [N]) -> [N] of another library."""

    def run(hidden, weight, labels):
        nll = cross_entropy(hidden.flatten(0, 2), weight, labels.expand(hidden.shape[:3]).flatten())
        return from_logprob(-nll.float().view(hidden.shape[:3]))

    return run


def liger(shape):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return with_cross_entropy(lambda hidden, weight, labels: loss(weight, hidden, labels))


def cut_cross_entropy(shape):
    from cut_cross_entropy import linear_cross_entropy

    return with_cross_entropy(lambda *tensors: linear_cross_entropy(*tensors, reduction="none"))


def liger_sm90(shape):
    """Liger's kernels for one kind of GPU. They compute a gradient of the weight too."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    _require_sm90()
    return with_cross_entropy(LigerFusedLinearScaledCrossEntropyFunction.apply)


def quack_sm90(shape):
    """QuACK's scaled-exp loss, without a gradient of the weight. Its public function knows one loss for all tokens, so
    this calls what that calls, and the backward scales each token's gradient."""
    _require_sm90()
    from quack.epilogue.library import lse_target_epi
    from quack.linear_cross_entropy import scaled_exp_lce_supported, scaled_exp_linear_cross_entropy_fwd

    class OfEachToken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels):
            nll, gradient, _ = scaled_exp_linear_cross_entropy_fwd(hidden, weight, labels, QUACK_ROWS, need_dw=False)
            ctx.save_for_backward(gradient[: len(hidden)])
            return nll[: len(hidden)]

        @staticmethod
        def backward(ctx, upstream):
            (gradient,) = ctx.saved_tensors
            return torch.mul(gradient, upstream[:, None], out=torch.empty_like(gradient)), None, None

    def nll(hidden, weight, labels):
        if not scaled_exp_lce_supported(hidden, weight, QUACK_ROWS, "sum"):
            raise Skipped("QuACK's scaled-exp loss does not take these sizes")
        if torch.is_grad_enabled():
            return OfEachToken.apply(hidden, weight, labels)
        found = lse_target_epi(hidden, weight.mT, store_d=False, target=labels, tuned=False)
        return found["lse"] - found["target_logit"]

    return with_cross_entropy(nll)


def _require_sm90():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise Skipped("it runs on a GPU of kind sm_90 only")


def torch_chunked(shape):
    """PyTorch's own chunked loss, which exists from version 2.13 on."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Skipped(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return with_cross_entropy(lambda *tensors: F.linear_cross_entropy(*tensors, reduction="none", options=options))


def gemms(shape, direction):
    """The product for the logits [N, V], and that of their gradient and the weight. bf16 in and out, nothing else."""
    kept = {}

    def run(hidden, weight, labels):
        rows = hidden.detach().flatten(0, 2)
        if not kept:
            kept["logits"], kept["gradient"] = rows.new_zeros(len(rows), len(weight)), torch.empty_like(rows)
        if direction != "backward":
            torch.mm(rows, weight.mT, out=kept["logits"])
        if direction != "forward":
            torch.mm(kept["logits"], weight, out=kept["gradient"])

    return run


def variants(device):
    epilogue = {"ours_epilogue": Variant("other", with_epilogue, "triton")} if device == "cuda" else {}
    return (
        variants_of_op(device, ours, naive, gemms)
        | epilogue
        | {
            "torch_chunked": Variant("peer", torch_chunked),
            "liger": Variant("peer", liger, needs="liger_kernel"),
            "liger_sm90": Variant("peer", liger_sm90, needs="liger_kernel"),
            "quack_sm90": Variant("peer", quack_sm90, needs="quack"),
            "cut_cross_entropy": Variant("peer", cut_cross_entropy, needs="cut_cross_entropy"),
        }
    )


SUITE = OpSuite("renyi_loss", shapes, inputs, naive, variants)


def test_speed(point, measured):
    measured(point)
