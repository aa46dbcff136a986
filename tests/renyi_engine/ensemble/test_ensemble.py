"""LoraEnsemble: its parameters, and the values that it gives.

Layout: K particles, B sequences, T tokens, D hidden size, I/O in/out features, R rank.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.lora_ensemble import sum_tokens
from renyi_engine.ensemble.targets import linear_maps
from renyi_engine.objectives.loss import data_term
from renyi_kernels import renyi_reduce

from .attaching import attach, gradients

# ---------------------------------------------------------------------- parameters


def test_parameters_are_exactly_the_stacked_adapters(llama):
    K, R = 4, 3
    ensemble = attach(llama, K, rank=R)
    expected = {}
    for path, linear in linear_maps(llama).items():
        key = path.replace(".", "/")
        expected[f"adapters.{key}.A"] = (K, R, linear.in_features)
        expected[f"adapters.{key}.B"] = (K, linear.out_features, R)
    assert {name: tuple(p.shape) for name, p in ensemble.named_parameters()} == expected
    assert all(p.requires_grad and p.dtype == torch.float32 and p.is_leaf for p in ensemble.parameters())
    assert set(ensemble.state_dict()) == set(expected), "the base must not be in the state"
    assert not {id(p) for p in ensemble.parameters()} & {id(p) for p in llama.parameters()}
    assert not any(p.requires_grad for p in llama.parameters()), "the base is frozen"


@settings(deadline=None, max_examples=15)
@given(K=st.integers(1, 5), R=st.integers(1, 7), layers=st.sets(st.integers(0, 2), min_size=1))
def test_number_of_parameters_is_k_r_times_in_plus_out(tiny_model, K, R, layers):
    ensemble = LoraEnsemble.attach(
        tiny_model("llama"), EnsembleConfig(num_particles=K, rank=R, layers_to_transform=sorted(layers))
    )
    # q and o 32 + 32, k and v 32 + 16, gate, up and down 32 + 48
    per_layer = 2 * 64 + 2 * 48 + 3 * 80
    assert sum(p.numel() for p in ensemble.parameters()) == K * R * per_layer * len(layers)


def test_only_the_adapters_get_gradients(llama, batch):
    ensemble = attach(llama)
    data_term(ensemble.sequence_logprob(batch), 0.5, 3)[0].backward()
    assert all(p.grad.abs().max() > 0 for p in ensemble.parameters())
    assert all(p.grad is None for p in llama.parameters())


# ---------------------------------------------------------------------- running


@pytest.mark.parametrize("layers", [None, [1], [2]])
@pytest.mark.parametrize(("K", "B", "T"), [(1, 1, 1), (1, 3, 4), (3, 1, 4), (4, 4, 4), (2, 5, 7)])
def test_forward_gives_k_b_t_d(llama, make_batch, layers, K, B, T):
    ensemble = attach(llama, K, layers_to_transform=layers)
    batch = make_batch([T] * B)
    assert ensemble(batch["input_ids"], batch["attention_mask"]).shape == (K, B, T, 32)
    assert ensemble(batch["input_ids"]).shape == (K, B, T, 32)
    assert ensemble.token_logprob(batch).shape == (K, B, T)
    assert ensemble.sequence_logprob(batch).shape == (K, B)
    assert ensemble.sequence_logprob(batch).dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_no_sequences_or_no_tokens_are_refused_by_name(llama, shape):
    """Hugging Face models do not run on them either."""
    ids = torch.ones(shape, dtype=torch.int64)
    ensemble = attach(llama)
    for mask in (None, ids):
        with pytest.raises(ValueError, match=r"input_ids.*at least 1"):
            ensemble(ids, mask)


def test_sequence_logprob_is_the_sum_of_token_logprob_where_the_next_token_has_a_label(llama, batch):
    ensemble = attach(llama)
    tokens = ensemble.token_logprob(batch)
    counted = F.pad(batch["labels"][:, 1:] != -100, (0, 1)).expand_as(tokens)
    assert (tokens[counted] < 0).all()
    assert (tokens[~counted] == 0).all()
    torch.testing.assert_close(ensemble.sequence_logprob(batch), tokens.sum(-1), rtol=0, atol=1e-6)
    assert torch.equal(sum_tokens(tokens), tokens.sum(-1))


def test_labels_on_the_first_token_are_predicted_by_nothing(llama, batch):
    ensemble = attach(llama)
    labels = batch["labels"].clone()
    labels[:, 0] = 5
    assert torch.equal(ensemble.sequence_logprob(batch | {"labels": labels}), ensemble.sequence_logprob(batch))


def test_labels_all_masked_give_zero_and_zero_gradients(llama, batch):
    ensemble = attach(llama)
    logp = ensemble.sequence_logprob(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert torch.equal(logp, torch.zeros(3, 3))
    out = renyi_reduce(logp, 0.7)
    assert torch.equal(out.loss, torch.zeros(3))
    out.loss.mean().backward()
    assert all((p.grad == 0).all() for p in ensemble.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_row_of_padding_alone_takes_no_part(tiny_model, make_batch, architecture, padding):
    # other numbers of rows are other sums: in fp32 some gradients then differ by 1e-6. Gemma-2's eager mask is fp32's
    dtype, rtol, atol = (torch.float32, 1e-4, 1e-6) if architecture == "gemma2" else (torch.float64, 1e-10, 1e-12)
    ensemble = attach(tiny_model(architecture, dtype=dtype))
    full = make_batch([3, 7, 5], padding=padding)
    full["attention_mask"][0], full["labels"][0] = 0, -100
    logp = ensemble.sequence_logprob(full)
    assert torch.equal(logp[:, 0], torch.zeros(3))
    data_term(logp, 0.7, 2)[0].backward()
    found = gradients(ensemble)
    ensemble.zero_grad()
    data_term(ensemble.sequence_logprob({name: value[1:] for name, value in full.items()}), 0.7, 2)[0].backward()
    for name, gradient in gradients(ensemble).items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol)


def test_the_result_does_not_depend_on_the_padding_side(llama, make_batch):
    ensemble = attach(llama)
    right, left = make_batch([3, 8, 5], padding="right"), make_batch([3, 8, 5], padding="left")
    torch.testing.assert_close(ensemble.sequence_logprob(right), ensemble.sequence_logprob(left), rtol=0, atol=1e-5)


def test_a_forward_keeps_no_tensor_alive(llama, make_batch):
    ensemble = attach(llama)

    def living(seed):
        with torch.no_grad():
            ensemble.sequence_logprob(make_batch([3, 8, 5], seed=seed))
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    living(0)
    assert living(1) == living(2)


def test_no_mask_means_no_padding(llama, make_batch):
    ensemble = attach(llama)
    batch = make_batch([7, 7])
    unmasked = {name: batch[name] for name in ("input_ids", "labels")}
    torch.testing.assert_close(ensemble.sequence_logprob(batch), ensemble.sequence_logprob(unmasked), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [((8,), None), ((2, 8, 1), None), ((2, 8), (2, 7)), ((2, 8), (1, 8)), ((2, 8), (8,)), ((2, 8), (2, 1, 8, 8))],
)
def test_wrong_input_shapes_are_refused(llama, ids, mask):
    ensemble = attach(llama)
    with pytest.raises(ValueError, match=r"input_ids, attention_mask: expected \[B, T\] each"):
        ensemble(torch.ones(ids, dtype=torch.int64), None if mask is None else torch.ones(mask, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(3, 7), (2, 8), (1, 8), (8,), (3, 1, 8)], ids=str)
def test_labels_of_another_shape_are_refused(llama, batch, shape):
    """[1, T] too: the labels of one sequence must not be taken for those of all."""
    ensemble = attach(llama)
    with pytest.raises(ValueError, match="labels"):
        ensemble.sequence_logprob(batch | {"labels": torch.full(shape, 5)})


def test_labels_outside_the_vocabulary_are_refused(llama, batch):
    with pytest.raises(ValueError, match="labels: expected -100 or a token id"):
        attach(llama).sequence_logprob(batch | {"labels": torch.full_like(batch["labels"], 97)})


@pytest.mark.parametrize("architecture", ["llama", "granite", "cohere", "gemma2", "gpt2", "gptj"])
def test_disabled_adapters_are_the_bare_base(tiny_model, naive_logprob, batch, architecture):
    ensemble = attach(tiny_model(architecture), layers_to_transform=[1, 2])
    truth = naive_logprob(tiny_model(architecture), batch)
    enabled = ensemble.sequence_logprob(batch)
    with ensemble.disable_adapters():
        logp = ensemble.sequence_logprob(batch)
        torch.testing.assert_close(naive_logprob(ensemble.model, batch), truth, rtol=0, atol=1e-5)
        assert ensemble(batch["input_ids"], batch["attention_mask"]).shape == (1, 3, 8, 32)
    torch.testing.assert_close(logp, truth[None], rtol=0, atol=2e-5)
    assert (enabled - truth).abs().min() > 1e-3
    assert torch.equal(ensemble.sequence_logprob(batch), enabled), "they are back on outside"


def test_adapters_come_back_on_after_an_error_and_only_after_the_outermost_block(llama, batch):
    ensemble = attach(llama)
    enabled = ensemble.sequence_logprob(batch)
    with pytest.raises(KeyError), ensemble.disable_adapters():
        raise KeyError
    assert torch.equal(ensemble.sequence_logprob(batch), enabled)
    with ensemble.disable_adapters():
        with ensemble.disable_adapters():
            pass
        assert ensemble.sequence_logprob(batch).shape == (1, 3)


def test_the_model_itself_runs_the_ensemble_particle_major(llama, make_batch):
    ensemble = attach(llama)
    batch = make_batch([6, 6])
    logp = torch.log_softmax(llama(input_ids=batch["input_ids"]).logits, -1).view(3, 2, 6, -1)
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).expand(3, 2, 6)
    picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(labels != -100, 0.0)
    torch.testing.assert_close(ensemble.token_logprob(batch), picked, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- dtypes


def test_a_bf16_model_has_fp32_adapters(tiny_model, batch):
    ensemble = attach(tiny_model("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in ensemble.parameters()} == {torch.float32}
    assert ensemble(batch["input_ids"], batch["attention_mask"]).dtype == torch.bfloat16
    logp = ensemble.sequence_logprob(batch)
    assert logp.dtype == torch.float32
    data_term(logp, 0.7, 3)[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ensemble.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_bf16_model_is_as_exact_as_peft_in_bf16(
    tiny_model, make_batch, naive_logprob, load_peft, tmp_path, architecture
):
    batch = make_batch([8, 9, 10, 11, 12, 13, 14, 15])
    half = tiny_model(architecture, dtype=torch.bfloat16)
    ensemble = attach(copy.deepcopy(half))
    ensemble.save_pretrained(tmp_path)
    gold = attach(copy.deepcopy(half).double()).sequence_logprob(batch)
    naive = torch.stack([naive_logprob(load_peft(half, tmp_path / f"p{k:03d}"), batch) for k in range(3)])
    rms = lambda logp: (logp.double() - gold).square().mean().sqrt().item()
    assert rms(ensemble.sequence_logprob(batch)) <= 1.5 * rms(naive) + 1e-3


def test_an_fp64_model_gives_fp64_logprobs(tiny_model, batch):
    wide, narrow = attach(tiny_model("llama", dtype=torch.float64)), attach(tiny_model("llama"))
    assert wide.sequence_logprob(batch).dtype == torch.float64
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    torch.testing.assert_close(wide.sequence_logprob(batch).float(), narrow.sequence_logprob(batch), rtol=0, atol=1e-5)


def test_state_dict_round_trips(tiny_model, batch):
    ensemble = attach(tiny_model("llama"))
    other = attach(tiny_model("llama"), apart=False, seed=9)
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other.sequence_logprob(batch), ensemble.sequence_logprob(batch))
