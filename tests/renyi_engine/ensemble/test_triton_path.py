"""An ensemble on the kernels is the ensemble on the reference: on a GPU, or on the CPU in Triton's interpreter.

Layout: K particles, B sequences, T tokens.
"""

from __future__ import annotations

import pytest
import torch

from renyi_kernels import renyi_reduce, use_backend

from .attaching import attach

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(ensemble, batch, backend):
    """Log-probabilities [K, B], loss [B], and the gradient of every stacked adapter, on the CPU."""
    ensemble.zero_grad()
    with use_backend(backend):
        logp = ensemble.sequence_logprob(batch)
        loss = renyi_reduce(logp, 0.3).loss
        loss.mean().backward()
    return [logp.detach().cpu(), loss.detach().cpu(), *(p.grad.clone().cpu() for p in ensemble.parameters())]


# all layers; the last alone, whose input all particles share; maps that run as groups and a Conv1D
@pytest.mark.parametrize(
    ("architecture", "layers"), [("llama", None), ("llama", [2]), ("gemma2", [2]), ("gpt2", [2])], ids=str
)
def test_logprobs_and_gradients_on_the_kernels_equal_those_of_the_reference(
    tiny_model, make_batch, architecture, layers
):
    ensemble = attach(tiny_model(architecture).to(DEVICE), 2, layers_to_transform=layers)
    batch = {name: tensor.to(DEVICE) for name, tensor in make_batch([6, 4]).items()}
    ours, theirs = step(ensemble, batch, "triton"), step(ensemble, batch, "reference")
    assert (theirs[0][0] - theirs[0][1]).abs().max() > 0.01, "the particles are too alike to test anything"
    for x, truth in zip(ours, theirs, strict=True):
        assert truth.any()
        torch.testing.assert_close(x, truth, rtol=0, atol=1e-4 * max(1.0, truth.abs().max().item()))


def test_the_kernels_of_every_op_ran(monkeypatch, tiny_model, make_batch):
    """Else the test above compares the reference with itself."""
    from renyi_kernels.triton_ops import grouped_lora, linear_logprob, renyi_reduce

    ran = set()
    for module, names in (
        (grouped_lora, ("shrink", "expand", "up_backward", "down_backward")),
        (linear_logprob, ("logprob_pass", "gradient_pass")),
        (renyi_reduce, ("forward", "backward")),
    ):
        for name in names:
            spied = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, name=name, spied=spied: ran.add(name) or spied(*a))
    model = tiny_model("llama").to(DEVICE)
    ensemble = attach(model, 2, apart=False, layers_to_transform=[2], target_modules=["q_proj", "o_proj"])
    step(ensemble, {name: tensor.to(DEVICE) for name, tensor in make_batch([4]).items()}, "triton")
    assert ran == {
        "shrink",
        "expand",
        "up_backward",
        "down_backward",
        "logprob_pass",
        "gradient_pass",
        "forward",
        "backward",
    }
