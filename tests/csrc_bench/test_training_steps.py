"""The ways to make a training step: each computes what the naive step computes, those that are left to a GPU too."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("peft")

from torch.utils.flop_counter import FlopCounterMode

from csrc_bench import bench_ragged_step, bench_training_step
from csrc_bench.batches import random_families, sequences_of
from csrc_bench.floors import FrozenBase, Gemms
from csrc_bench.measure import Wrong
from csrc_bench.training_steps import (
    CONFIGS,
    Ensemble,
    Peft,
    PeftPaddingFree,
    Vmap,
    as_asked,
    build_model,
)
from renyi_engine.data import packed_length


@pytest.fixture(scope="module")
def step():
    """(suite, shape, model, gold) of the tiny shape."""
    return prepared(bench_training_step.SUITE, 0)


@pytest.fixture(scope="module", params=[0, 1], ids=["single", "pairs"])
def ragged_step(request):
    return prepared(bench_ragged_step.SUITE, request.param)


def prepared(suite, number):
    shape = suite.shapes("cpu", True)[number]
    model = build_model(shape["model"])
    return suite, shape, model, suite.reference(model, shape)


def check(way, suite, shape, gold):
    try:
        suite.check(way, shape, gold)
    finally:
        way.close()


@pytest.mark.parametrize("way", [Vmap, Peft])
def test_a_peers_step_has_the_log_probabilities_and_the_gradient_of_the_naive_one(step, way):
    suite, shape, model, gold = step
    check(way(model, shape), suite, shape, gold)


def test_a_row_without_padding_is_right_and_one_that_attends_across_its_sequences_is_found_wrong(ragged_step):
    suite, shape, model, gold = ragged_step
    check(PeftPaddingFree(model, shape), suite, shape, gold)

    class Across(PeftPaddingFree):
        def nll(self, batch):
            forward = self.model.forward
            everything = torch.ones_like(batch["input_ids"])  # with a mask, transformers does not look for sequences
            self.model.forward = lambda **inputs: forward(attention_mask=everything, **inputs)
            try:
                return super().nll(batch)
            finally:
                self.model.forward = forward

    with pytest.raises(Wrong):
        check(Across(model, shape), suite, shape, gold)


def test_the_bare_products_are_those_of_the_tokens_that_have_to_be_read(ragged_step):
    suite, shape, _, _ = ragged_step
    (families, *_), config, K = suite.batches(shape, "gemms"), CONFIGS[shape["model"]](), shape["K"]
    tokens = sum(map(packed_length, families))
    labels = sum(label != -100 for sequence in sequences_of(families) for label in sequence.labels[1:])
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.hidden_size * config.vocab_size
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    qkv, rest = hidden * (hidden + 2 * keys), hidden * (hidden + 3 * inner)
    trunk, adapted = config.num_hidden_layers - shape["adapted_layers"], shape["adapted_layers"]
    once = tokens * (trunk * (qkv + rest) + qkv)
    of_all = 2 * K * tokens * (adapted * rest + (adapted - 1) * qkv)
    (products,) = (gemms := Gemms(shape)).batches([families])
    with FlopCounterMode(display=False) as counter:
        gemms.step(products)
    assert counter.get_total_flops() == 2 * (once + of_all + 2 * K * labels * head)


def test_the_frozen_base_is_run_as_the_model_runs_it(step):
    suite, shape, model, _ = step
    base = FrozenBase(shape)
    batch = base.read(suite.batches(shape, "frozen_base")[0])
    K, head = shape["K"], model.get_output_embeddings().weight
    rows = model.get_input_embeddings()(batch["input_ids"]).repeat(K, 1, 1).requires_grad_()
    out = model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state
    gradient = (out @ head.mT @ head).detach()
    gradient[:, -1] = 0  # nothing is learnt after the last token
    torch.testing.assert_close(base.work(batch)(), torch.autograd.grad(out, rows, gradient)[0], rtol=0.05, atol=0.05)


def test_the_rows_of_a_captured_step_all_have_the_same_sizes(ragged_step):
    suite, shape, model, _ = ragged_step
    way = Ensemble(model, shape, "torch", captured=True)
    batches = way.batches(suite.batches(shape, "ours_captured"))
    way.close()
    assert len({tuple((name, value.shape) for name, value in batch.items()) for batch in batches}) == 1


def test_a_step_that_could_not_be_captured_is_no_captured_step():
    with pytest.raises(UserWarning, match="not recorded"), as_asked():
        warnings.warn("the work on the GPU is not recorded as CUDA graphs (why): it takes more time", stacklevel=1)


def test_a_shared_beginning_is_read_once_and_a_last_token_never():
    pair, alone = random_families([(3, 2, 4), (0, 5)], 1000, "completion", seed=0)
    assert packed_length(pair) == 3 + (2 - 1) + (4 - 1)
    assert packed_length(alone) == 5 - 1


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
        ids = torch.ones(1, 4, dtype=torch.int64)
        made.logp({"input_ids": ids, "labels": ids})
    finally:
        hook.remove()
        made.close()
    assert allowed == [(False, False, True)]
    assert cuda.cudnn_sdp_enabled()
