"""In a packed row a sequence gets what it gets alone: with windows, soft caps, sinks and checkpointing, and in the one
call for a whole row that a GPU makes. `test_every_architecture` tests the same on every model.

Layout: H heads, D size of a head.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from renyi_engine.data import Example, collate, pack
from renyi_engine.ensemble import packing_trial, varlen
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_engine.ensemble.packed_attention import Packing

from .. import tiny_models
from ..apart import attach_apart

LENGTHS = (17, 9, 21, 4)
WINDOW = 5
SHORT_SIGHTED = {
    "mistral": ("mistral", "sdpa", {"sliding_window": WINDOW}),
    "mistral, eager": ("mistral", "eager", {"sliding_window": WINDOW}),
    "qwen2, one layer of two": (
        "qwen2",
        "sdpa",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma2, soft cap": ("gemma2", "eager", {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", "sdpa", {"sliding_window": WINDOW}),
    "phi3": ("phi3", "sdpa", {"sliding_window": WINDOW}),
    "gpt_oss, sinks": ("gpt_oss", "eager", {"sliding_window": WINDOW}),
    "cohere2": ("cohere2", "sdpa", {"sliding_window": WINDOW}),
}
"""Models whose layers see a few tokens back, and how: model type, attention implementation, settings."""


def build(model_type="llama", attention="sdpa", dtype=torch.float32, **settings):
    config = tiny_models.tiny_config(tiny_models.config_classes()[model_type](), {})
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                tiny_models._randomise(parameter)
    return model.to(dtype).eval()


def families():
    """Four sequences, and two that begin alike."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]
    pair = [Example(0, texts[0] + ids, [-100] * len(texts[0]) + ids) for ids in texts[1:3]]
    return [*([Example(0, ids, ids)] for ids in texts), pair]


def one_by_one(ensemble):
    examples = [example for family in families() for example in family]
    return torch.cat([ensemble.sequence_logprob(collate([example], 0)) for example in examples], dim=1)


def assert_as_alone(ensemble):
    """That a packed row gives each sequence the logp and the gradients that it gets alone. Returns the logp."""
    packed, alone = ensemble.sequence_logprob(pack(families())), one_by_one(ensemble)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    gradients = []
    for logp in (packed, alone):
        ensemble.zero_grad()
        logp.sum().backward()
        gradients.append(gradient(ensemble))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    return packed


def gradient(ensemble):
    return torch.cat([parameter.grad.flatten() for parameter in ensemble.parameters()])


@pytest.mark.parametrize("case", SHORT_SIGHTED)
def test_layers_that_see_a_few_tokens_back_do_so_within_each_sequence(case):
    model_type, attention, settings = SHORT_SIGHTED[case]
    ensemble = attach_apart(build(model_type, attention, **settings), num_particles=2, r=2)
    assert ensemble.packs
    packed = assert_as_alone(ensemble)
    # the window matters, or the test would say nothing
    far = attach_apart(build(model_type, attention, **settings | {"sliding_window": 64}), num_particles=2, r=2)
    assert (far.sequence_logprob(pack(families())) - packed).abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"attn_temperature_tuning": True}, {"attn_temperature_tuning": False}])
def test_layers_that_number_the_tokens_of_the_row_do_not_pack(settings):
    """Llama 4 scales its queries so, in layers without rotary positions, from token 8192 on."""
    ensemble = attach_apart(build("llama4_text", **settings), num_particles=2, r=2)
    numbers = settings["attn_temperature_tuning"]
    assert packing_trial.obstacle(ensemble) == (
        "its layers count the tokens of a row, not those of a sequence" if numbers else None
    )


def test_a_broken_particle_does_not_keep_the_model_from_packing():
    ensemble = attach_apart(build(), num_particles=2, r=2)
    with torch.no_grad():
        next(ensemble.parameters())[1] = torch.nan
    assert ensemble.packs


@pytest.mark.parametrize("model_type", ["mamba", "bloom", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_cannot_pack_says_so_once_and_is_padded(model_type, dtype):
    ensemble = attach_apart(build(model_type, "eager", dtype), num_particles=2, r=2)
    with pytest.warns(UserWarning, match=r"cannot read packed rows \(.*\): its batches are padded"):
        assert not ensemble.packs
    assert not ensemble.packs  # and no second warning: warnings are errors here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_sequences_of_a_row_change_no_bit(dtype):
    ensemble = attach_apart(build(dtype=dtype), num_particles=2, r=2)
    assert ensemble.packs
    (first,), *rest = families()
    other = Example(0, first.input_ids[::-1], first.labels[::-1])
    with torch.no_grad():
        logp = [ensemble.token_logprob(pack([[example], *rest])) for example in (first, other)]
    assert not logp[0][:, 0].equal(logp[1][:, 0])
    assert logp[0][:, 1:].equal(logp[1][:, 1:])


def test_checkpointed_layers_run_again_on_the_packed_row():
    found = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ensemble = attach_apart(model, num_particles=2, r=2).train()
        ensemble.sequence_logprob(pack(families())).sum().backward()
        found.append(gradient(ensemble))
    assert found[0].equal(found[1])


def test_adapters_off_a_packed_row_gives_the_bases_values():
    ensemble = attach_apart(build(), num_particles=3, r=2)
    with torch.no_grad(), ensemble.disable_adapters():
        packed, alone = ensemble.sequence_logprob(pack(families())), one_by_one(ensemble)
    assert packed.shape == (1, len(LENGTHS) + 2)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_rows_of_each_particles_own_are_refused():
    ensemble = attach_apart(build(), num_particles=2, r=2)
    with ensemble.running(Rows.OWN), pytest.raises(RuntimeError, match="every particle has rows of its own"):
        ensemble.sequence_logprob(pack(families()))


def test_sequences_without_a_label_have_logp_0():
    """Pairs of completions that are a part of the only token have none."""
    ensemble = attach_apart(build(), num_particles=2, r=2)
    row = pack([[Example(0, [7], [7]), Example(0, [8], [8])], [Example(0, [5, 6], [-100, -100])]])
    logp = ensemble.sequence_logprob(row)
    assert logp.equal(torch.zeros(2, 3))
    logp.sum().backward()
    assert not gradient(ensemble).any()


def test_the_model_keeps_its_own_attention():
    model = build()
    ensemble = attach_apart(model, num_particles=2, r=2)
    before = one_by_one(ensemble)
    ensemble.sequence_logprob(pack(families())).sum().backward()
    assert model.config._attn_implementation == "sdpa"
    assert one_by_one(ensemble).equal(before)
    with pytest.raises(IndexError):  # a failed forward leaves nothing behind
        ensemble.sequence_logprob(pack([[Example(0, [5, 10**6, 7], [5, 10**6, 7])]]))
    assert model.config._attn_implementation == "sdpa"


def test_a_deep_copy_reads_packed_rows_of_its_own():
    ensemble = attach_apart(build(), num_particles=2, r=2)
    other = copy.deepcopy(ensemble)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(other.sequence_logprob(pack(families())), one_by_one(other), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            ensemble.sequence_logprob(pack(families())), one_by_one(ensemble), rtol=1e-5, atol=1e-5
        )


# ---------------------------------------------------------------------- one call for the whole row


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """What `varlen_attn` computes, part by part. [tokens, H, D] each."""
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    q_ends, k_ends, outputs = cu_seq_q.tolist(), cu_seq_k.tolist(), []
    assert (q_ends[-1], k_ends[-1]) == (len(query), len(key))
    for part in range(len(q_ends) - 1):
        q = query[q_ends[part] : q_ends[part + 1]]
        k, v = (states[k_ends[part] : k_ends[part + 1]] for states in (key, value))
        assert len(q) <= max_q
        assert len(k) <= max_k
        sees = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        q, k, v = (states.transpose(0, 1) for states in (q, k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def calls(monkeypatch):
    """Attention as on a GPU, with a stand-in for its kernel. Counts the calls."""
    counted = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        counted.append(None)
        return stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "is_for_the_kernel", lambda states: True)
    return counted


def test_a_plain_row_is_one_call_a_layer_for_all_particles(calls):
    ensemble = attach_apart(build(), num_particles=3, r=2)
    assert_as_alone(ensemble)
    assert len(calls) == len(ensemble.layers)


@pytest.mark.parametrize("case", ["mistral", "gemma2, soft cap", "gpt_oss, sinks"])
def test_other_attention_is_one_call_a_sequence(calls, case):
    model_type, attention, settings = SHORT_SIGHTED[case]
    ensemble = attach_apart(build(model_type, attention, **settings), num_particles=2, r=2)
    with torch.no_grad():
        torch.testing.assert_close(
            ensemble.sequence_logprob(pack(families())), one_by_one(ensemble), rtol=1e-5, atol=1e-5
        )
    assert not calls


def test_a_window_that_no_sequence_reaches_is_plain(calls):
    ensemble = attach_apart(build("mistral", sliding_window=64), num_particles=2, r=2)
    ensemble.sequence_logprob(pack(families()))
    assert len(calls) == len(ensemble.layers)


def test_layers_of_the_shared_trunk_run_one_row_and_the_others_a_row_of_each_particle(calls):
    ensemble = attach_apart(build(), num_particles=3, r=2, layers_to_transform=[1])
    assert ensemble.num_shared_layers == 1
    logp = ensemble.sequence_logprob(pack(families()))
    assert len(calls) == len(ensemble.layers) == 2
    torch.testing.assert_close(logp, one_by_one(ensemble), rtol=1e-5, atol=1e-5)


def test_one_call_a_sequence_refuses_to_be_recorded_before_cuda_does(monkeypatch):
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    packing = Packing(build().config, {"segments": OnGpu()})
    with pytest.raises(RuntimeError, match="attention is one call for each sequence"):
        _ = packing.segments


@pytest.mark.parametrize(
    ("size", "size_of_values", "fits"),
    [(64, 64, True), (256, 256, True), (264, 264, False), (60, 60, False), (192, 128, False)],
)
def test_heads_of_other_sizes_than_the_kernel_has_are_not_given_to_it(calls, size, size_of_values, fits):
    query, value = torch.empty(1, 2, 3, size), torch.empty(1, 2, 3, size_of_values)
    assert varlen.fits(query, value, {}) is fits


def test_an_attention_that_is_told_of_windows_by_an_option_is_called_for_each_sequence(calls, monkeypatch):
    """As flash attention is: it has no mask, and cuts what it is given where positions begin again."""

    def attend(module, query, key, value, attention_mask, *, scaling, sliding_window, position_ids=None, **_):
        assert attention_mask is None
        assert position_ids is None or position_ids.shape[-1] == query.shape[2]
        num_queries, num_keys = query.shape[2], key.shape[2]
        sees = torch.ones(num_queries, num_keys, dtype=torch.bool)
        sees = sees.tril(num_keys - num_queries).triu(num_keys - num_queries - sliding_window + 1)
        out = scaled_dot_product_attention(query, key, value, attn_mask=sees, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "by_option", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "by_option", lambda **_: None)
    ensemble = attach_apart(build("mistral", sliding_window=WINDOW), num_particles=2, r=2)
    before = one_by_one(ensemble)
    ensemble.model.config._attn_implementation = "by_option"
    packed = ensemble.sequence_logprob(pack(families()))
    torch.testing.assert_close(packed, before, rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "a shared trunk"])
def test_on_a_gpu_the_kernel_is_as_exact_as_one_sequence_at_a_time(layers, monkeypatch):
    """Against fp32: values, and gradients."""
    kernel, counted = varlen.varlen_attn, []

    def count(*args, **kwargs):
        counted.append(None)
        return kernel(*args, **kwargs)

    def measured(ensemble, logp):
        ensemble.zero_grad()
        logp.sum().backward()
        return logp.detach().cpu(), gradient(ensemble).cpu()

    monkeypatch.setattr(varlen, "varlen_attn", count)
    model = build(dtype=torch.bfloat16)
    settings = {"num_particles": 2, "r": 2, "layers_to_transform": layers}
    gold = attach_apart(copy.deepcopy(model).float(), **settings)
    ensemble = attach_apart(model.to("cuda"), **settings)
    assert ensemble.packs
    counted.clear()
    packed = measured(ensemble, ensemble.sequence_logprob(pack(families())))
    assert len(counted) == len(ensemble.layers)
    alone = measured(ensemble, one_by_one(ensemble))
    for truth, ours, theirs in zip(measured(gold, one_by_one(gold)), packed, alone, strict=True):
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-2 * truth.norm()


# ---------------------------------------------------------------------- other threads


def in_the_middle_of(ensemble, other):
    """What a packed forward gives, and what `other()` gives in a thread that begins while the forward runs."""
    with ThreadPoolExecutor(1) as thread:
        begun = []

        def begin(*_):
            handle.remove()
            begun.append(thread.submit(torch.no_grad()(other)))
            wait(begun, timeout=0.2)  # it may have to wait for this forward

        handle = ensemble.layers[-1].register_forward_pre_hook(begin)
        with torch.no_grad():
            packed = ensemble.sequence_logprob(pack(families()))
        (future,) = begun
        return packed, future.result()


OTHERS = {
    "a packed row": lambda ensemble: ensemble.sequence_logprob(pack(families()[:3])),
    "a padded batch": lambda ensemble: one_by_one(ensemble),
    "the model itself": lambda ensemble: ensemble.model(torch.arange(3, 19).expand(2, -1)).logits,
}


@pytest.mark.parametrize("of_one_model", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_threads_do_not_see_each_others_packed_rows(of_one_model, other):
    """Two models may also share one config, in which transformers reads the name of the attention."""
    model = build()
    ensemble = attach_apart(model, num_particles=2, r=2)
    second = ensemble if of_one_model else attach_apart(type(model)(model.config).eval(), num_particles=2, r=2)
    assert ensemble.packs
    assert second.packs
    with torch.no_grad():
        expected = ensemble.sequence_logprob(pack(families())), OTHERS[other](second)
    found = in_the_middle_of(ensemble, lambda: OTHERS[other](second))
    assert all(map(torch.equal, found, expected))
    assert model.config._attn_implementation == "sdpa"
