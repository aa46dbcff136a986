"""Layers below the first adapted one run once for all particles; layers may be compiled.

Layout: K particles, B sequences.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.multiprocessing.reductions import StorageWeakRef

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble import adapted_maps
from renyi_engine.ensemble.adapted_maps import MapGroup
from renyi_engine.objectives.loss import data_term

from .attaching import attach

# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(("layers", "num_graphs"), [(None, 2), ([1, 2], 3)])
def test_compiled_decoder_layers_of_a_kind_share_one_graph_and_change_nothing(llama, batch, layers, num_graphs):
    """The kinds: the trunk, the first adapted layer, whose maps read a shared input, and those above it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    ensemble = attach(llama, layers_to_transform=layers)
    parameters = list(ensemble.parameters())

    def run():
        logp = ensemble.sequence_logprob(batch)
        return logp.detach(), *torch.autograd.grad(logp.square().sum(), parameters)

    expected = run()
    torch._dynamo.reset()
    for layer in llama.model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=False)
    for got, want in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert len(graphs) == num_graphs


# ---------------------------------------------------------------------- shared trunk


@pytest.fixture
def record_rows(monkeypatch, batch):
    """record_rows(model, paths) is {path: sequences that the module works on}, filled by the next forward."""
    rows = {}
    run, op = MapGroup._run, adapted_maps.lora_linears

    def spy_run(group, place, x, shared):
        def spy_op(x, *maps, **options):
            sequences = x.shape[:-1].numel() // batch["input_ids"].shape[1]
            rows.update(dict.fromkeys(group._paths, sequences))
            return op(x, *maps, **options)

        monkeypatch.setattr(adapted_maps, "lora_linears", spy_op)
        return run(group, place, x, shared)

    monkeypatch.setattr(MapGroup, "_run", spy_run)

    def watch(model, paths):
        for path in paths:

            def hook(module, args, kwargs, output, path=path):
                rows.setdefault(path, (args[0] if args else kwargs["hidden_states"]).shape[0])

            model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
        rows.clear()  # of what attaching ran
        return rows

    return watch


@pytest.mark.parametrize("first", [0, 1, 2])
def test_rows_multiply_at_the_first_adapted_layer(llama, batch, record_rows, first):
    K, B = 4, 3
    ensemble = attach(llama, K, layers_to_transform=list(range(first, 3)))
    maps = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"]
    paths = [f"model.layers.{layer}.{name}" for layer in range(3) for name in [*maps, "post_attention_layernorm"]]
    rows = record_rows(llama, paths)
    ensemble(batch["input_ids"], batch["attention_mask"])
    for path in paths:
        layer, name = int(path.split(".")[2]), path.split(".", 3)[3]
        shared_input = layer == first and name in maps[:3]
        expected = B if layer < first or shared_input else K * B
        assert rows[path] == expected, path


def test_maps_that_read_the_same_input_after_the_particles_part_are_not_shared(llama, batch, record_rows):
    """With o_proj adapted, gate and up of the first layer read one tensor, but one that the particles have touched."""
    ensemble = attach(llama, 4, target_modules=["o_proj", "gate_proj", "up_proj"])
    paths = [f"model.layers.0.{name}" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")]
    rows = record_rows(llama, paths)
    ensemble(batch["input_ids"], batch["attention_mask"])
    assert {path: rows[path] for path in paths} == dict(zip(paths, (3, 12, 12), strict=True))


def test_a_parallel_block_shares_attention_and_mlp_input(tiny_model, batch, record_rows):
    model = tiny_model("cohere")
    ensemble = attach(model, 4)
    paths = [
        f"model.layers.0.{name}"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    rows = record_rows(model, paths)
    ensemble(batch["input_ids"], batch["attention_mask"])
    assert {path: rows[path] for path in paths} == dict(zip(paths, (3, 12, 3, 3, 12), strict=True))


def test_the_trunk_builds_no_graph(llama, batch):
    ensemble = attach(llama, layers_to_transform=[2])
    flags = {}
    for layer in range(3):
        hook = lambda module, args, output, layer=layer: flags.update({layer: output.requires_grad})
        llama.model.layers[layer].register_forward_hook(hook)
    ensemble(batch["input_ids"], batch["attention_mask"])
    assert flags == {0: False, 1: False, 2: True}


@pytest.mark.parametrize("layers", [[1], [2], [1, 2], [0, 2]])
def test_the_shared_trunk_changes_nothing_but_the_work(llama, tiny_model, batch, layers):
    """Against an ensemble on all layers whose other layers have B = 0."""
    ensemble = attach(llama, layers_to_transform=layers)
    everywhere = attach(tiny_model("llama"), apart=False, init="standard")
    part, whole = ensemble.stacked(), everywhere.stacked()
    with torch.no_grad():
        for path, (A, B) in part.items():
            whole[path][0].copy_(A)
            whole[path][1].copy_(B)
    torch.testing.assert_close(everywhere.sequence_logprob(batch), ensemble.sequence_logprob(batch), rtol=0, atol=1e-5)
    for each in (ensemble, everywhere):
        data_term(each.sequence_logprob(batch), 0.7, 3)[0].backward()
    for path in part:
        for ours, theirs in zip(part[path], whole[path], strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("cut_short", [False, True])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(tiny_model, make_batch, layers, cut_short):
    """It would hold a graph, and all that it keeps, for as many steps as Python pleases."""
    model = tiny_model("llama")
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=3, layers_to_transform=layers))
    batch = make_batch([7, 5])
    made = []

    def remember(module, args, output):
        if isinstance(output, torch.Tensor):
            made.append(StorageWeakRef(output.untyped_storage()))

    for module in model.modules():
        module.register_forward_hook(remember)

    def step():
        if cut_short:
            hook = ensemble.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ensemble.sequence_logprob(batch)
            hook.remove()
        else:
            ensemble.sequence_logprob(batch).sum().backward()

    gc.collect()
    gc.disable()
    try:
        step()
        kept = [not each.expired() for each in made]
    finally:
        gc.enable()
    assert made
    assert not any(kept), f"{sum(kept)} of {len(kept)} outputs are still in memory"
