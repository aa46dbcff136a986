"""What is generated has the values of decoding without a cache, whatever a model does with caches and padding.

Layout: K particles, B prompts, T tokens, n samples, L new tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch

from renyi_engine import LoraEnsemble
from renyi_engine.ensemble import cache

from .. import tiny_models
from ..in_use import assert_says_what_it_says_one_by_one, attach, left_padded

LENGTHS = (7, 4, 1)
HYBRIDS = {
    "bamba": "all-linear",
    "falcon_mamba": ["in_proj", "x_proj"],
    "granitemoehybrid": "all-linear",
    "jamba": ["in_proj", "out_proj", "q_proj", "down_proj"],
    "lfm2": "all-linear",
    "lfm2_moe": "all-linear",
    "mamba": ["in_proj", "x_proj"],
    "mamba2": "all-linear",
    "olmo_hybrid": "all-linear",
    "qwen3_5_text": "all-linear",
    "qwen3_next": "all-linear",
}
UNCACHED = {
    "minimax": "a cache of its own class",
    "rwkv": "takes no notice of the cache",
    "nemotron_h": "its step for one token does not bound what its pass over many bounds",
}


@pytest.mark.parametrize("layers", [None, "last"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_continue_from_their_cache(name, layers):
    model = tiny_models.tiny_model(name)
    layers = None if layers is None else [model.config.num_hidden_layers - 1]
    ensemble = attach(model, HYBRIDS[name], layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_says_what_it_says_one_by_one(ensemble, *left_padded(LENGTHS))
        with ensemble.disable_adapters():
            assert_says_what_it_says_one_by_one(ensemble, *left_padded(LENGTHS))
    assert ensemble.reads_from_cache


@pytest.mark.parametrize("name", UNCACHED)
def test_what_cannot_continue_from_a_cache_reads_all_again_and_says_so_once(name):
    ensemble = attach(tiny_models.tiny_model(name))
    prompts = left_padded(LENGTHS)
    with pytest.warns(UserWarning, match="cannot continue from a cache"):
        assert_says_what_it_says_one_by_one(ensemble, *prompts)
    assert not ensemble.reads_from_cache
    with warnings.catch_warnings(), ensemble.disable_adapters():
        warnings.simplefilter("error")
        assert_says_what_it_says_one_by_one(ensemble, *prompts)


def test_the_trial_of_the_cache_reads_ordinary_tokens_and_not_the_first_ones(tiny_model):
    """The first tokens often occur in no text. In low precision, models are nats away from themselves after these."""
    ensemble, read = attach(tiny_model("llama")), []
    num_tokens = ensemble.model.config.vocab_size

    @contextmanager
    def reader(_, input_ids, attention_mask, num_samples):
        def next_logits(tokens):
            read.append(tokens)
            return torch.zeros(4, num_tokens)

        read.append(input_ids[attention_mask.bool()])
        yield torch.zeros(4, num_tokens), next_logits

    cache._try(ensemble, reader)
    assert num_tokens // 3 <= torch.cat(read).min()
    assert torch.cat(read).max() < num_tokens


def test_phi3_continues_across_its_original_length(tiny_model):
    """Positions are of one kind up to 10 tokens, of another beyond; prompts that stay below, cross and begin beyond."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 10, **factors}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=10)
    ensemble = attach(model)
    assert_says_what_it_says_one_by_one(ensemble, *left_padded((3, 8, 12, 10, 5)))
    assert ensemble.reads_from_cache
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[:2])))
    ensemble.generate(*left_padded((3, 12)), max_new_tokens=4, eos_token_id=[])
    assert seen == [(2, 3), (2, 1), (2, 1), (2, 1), (2, 12), (2, 1), (2, 1), (2, 1)], "no cache was used"


def test_positions_that_depend_on_what_else_was_read_are_refused(tiny_model):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ensemble = attach(tiny_model("llama", rope_parameters=rope, max_position_embeddings=12))
    ids, mask = left_padded((7, 4))
    assert_says_what_it_says_one_by_one(ensemble, ids, mask)
    with pytest.raises(ValueError, match="max_new_tokens: a prompt of 7 tokens may grow to 13, but beyond 12 "):
        ensemble.generate(ids, mask, max_new_tokens=7, eos_token_id=[])


def test_a_cache_that_goes_wrong_at_the_second_token_is_not_trusted(tiny_model, monkeypatch):
    """The last token read is forgotten: nothing shows before the second."""
    ensemble = attach(tiny_model("llama"))
    plain = LoraEnsemble.next_logits

    def forgetful(self, input_ids, attention_mask, cache):
        logits = plain(self, input_ids, attention_mask, cache)
        if input_ids.shape[1] == 1:
            for layer in cache.layers:
                layer.keys[..., -1, :] = 0
        return logits

    monkeypatch.setattr(LoraEnsemble, "next_logits", forgetful)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM cannot continue .*would be wrong by .* nats"):
        assert_says_what_it_says_one_by_one(ensemble, *left_padded(LENGTHS))


def test_running_out_of_memory_is_no_reason_to_go_without_a_cache(tiny_model, monkeypatch):
    ensemble = attach(tiny_model("llama"))

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(cache, "from_cache", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        ensemble.generate(*left_padded(LENGTHS), eos_token_id=[])
    assert ensemble.reads_from_cache is None
