"""The ways to make a training step: each computes what the naive step computes, those that are left to a GPU too."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from csrc_bench.bench_training_step import StepSuite, shapes
from csrc_bench.training_steps import Peft, Vmap, build_model


@pytest.fixture(scope="module")
def step():
    """(suite, shape, model, gold) of the tiny shape."""
    suite, shape = StepSuite(), shapes("cpu", tiny=True)[0]
    model = build_model(shape["model"])
    return suite, shape, model, suite._reference(model, shape)


@pytest.mark.parametrize("way", [Vmap, Peft])
def test_a_peers_step_has_the_log_probabilities_and_the_gradient_of_the_naive_one(step, way):
    suite, shape, model, gold = step
    made = way(model, shape)
    try:
        suite._check(made, shape, gold)
    finally:
        made.close()


def test_vmap_runs_no_attention_that_would_keep_nothing_for_its_backward(step):
    """On a GPU cuDNN's and the memory-efficient one ask tensors whether a gradient is wanted; in vmap none says so."""
    _, shape, model, _ = step
    x = torch.ones(2, 3, requires_grad=True)
    assert torch.vmap(lambda row: torch.as_tensor(row.requires_grad))(x).tolist() == [False, False]

    made, allowed = Vmap(model, shape), []
    cuda = torch.backends.cuda
    layer = made.model.get_submodule("base_model.model.model.layers.0.self_attn")
    hook = layer.register_forward_pre_hook(
        lambda *_: allowed.append(
            (cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.flash_sdp_enabled())
        )
    )
    try:
        made.logp(torch.ones(1, 4, dtype=torch.int64))
    finally:
        hook.remove()
        made.close()
    assert allowed == [(False, False, True)]
    assert cuda.cudnn_sdp_enabled()
