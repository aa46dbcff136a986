"""Peers of the fused loss that run on one kind of GPU only: skipped elsewhere, and called as their sources say.

Their kernels are replaced by plain PyTorch here.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytest_benchmark")

from csrc_bench import bench_linear_logprob as bench, measure

SHAPE = {"name": "bar", "K": 2, "B": 2, "T": 3, "D": 8, "V": 128, "dtype": "bfloat16"}


def scaled_exp(x, weight, target, chunk_size, *, need_dw):
    """(loss, dx, dw) as QuACK returns them: in more rows than there are."""
    assert not need_dw
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy((x @ weight.T).float(), target, reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
    return F.pad(loss.detach(), (0, 5), value=torch.nan), F.pad(dx, (0, 0, 0, 5), value=torch.nan), None


def lse_and_target(x, weight_T, *, store_d, target, tuned):
    assert not store_d
    logits = (x @ weight_T).float()
    return {"lse": logits.logsumexp(dim=1), "target_logit": logits.gather(1, target[:, None]).squeeze(1)}


@pytest.fixture
def stand_ins(monkeypatch):
    of_liger = SimpleNamespace(apply=lambda x, w, y: F.cross_entropy((x @ w.T).float(), y, reduction="none"))
    contents = {
        "quack": {},
        "quack.epilogue": {},
        "quack.epilogue.library": {"lse_target_epi": lse_and_target},
        "quack.linear_cross_entropy": {
            "scaled_exp_lce_supported": lambda x, weight, chunk_size, reduction: weight.shape[0] % 128 == 0,
            "scaled_exp_linear_cross_entropy_fwd": scaled_exp,
        },
        "liger_kernel": {},
        "liger_kernel.ops": {"LigerFusedLinearScaledCrossEntropyFunction": of_liger},
    }
    for name, found in contents.items():
        module = ModuleType(name)
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("peer", [bench.quack_sm90, bench.liger_sm90])
def test_the_coupled_loss_through_a_peer_passes_the_check_of_the_suite(monkeypatch, stand_ins, peer):
    monkeypatch.setattr(bench, "_require_sm90", lambda: None)
    run = peer(SHAPE)
    inputs, upstream, gold = bench.SUITE._sets(SHAPE, "cpu")
    bench.SUITE._check(run, inputs[0], upstream, gold)
    with torch.no_grad():
        measure.require_close("without gradients", run(*inputs[0]), gold[0], 3e-2)


def test_sizes_that_quack_does_not_take_are_skipped(monkeypatch, stand_ins):
    monkeypatch.setattr(bench, "_require_sm90", lambda: None)
    shape = SHAPE | {"V": 100}
    inputs = bench.inputs(shape, "cpu", torch.Generator().manual_seed(0))
    with pytest.raises(measure.Skipped, match="QuACK"):
        bench.quack_sm90(shape)(*inputs)


@pytest.mark.parametrize("peer", [bench.quack_sm90, bench.liger_sm90])
@pytest.mark.parametrize("capability", [None, (8, 0), (10, 0)])
def test_other_devices_are_skipped(monkeypatch, stand_ins, peer, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(measure.Skipped, match="sm_90"):
        peer(SHAPE)
