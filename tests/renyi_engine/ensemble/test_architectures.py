"""On every architecture an ensemble is K PEFT adapters: same log-probabilities, same gradients.

Layout: K particles, B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_kernels import renyi_reduce

K = 3
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {}),
    "nemotron": ("nemotron", {}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 3}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gpt2": ("gpt2", {}),
    "gpt2-eager": ("gpt2", {"attn_implementation": "eager"}),
    "gptj": ("gptj", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "olmo": ("olmo", {}),
}
CASES = [(name, layers) for name in MODELS for layers in (None, [2])] + [("gemma2", [1]), ("gpt2", [1])]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1] or 'all'}")
def trained(request, tiny_model, make_batch, load_peft, tmp_path_factory):
    """An ensemble after two optimizer steps, its base, and what PEFT loads of the folders that it saved."""
    name, layers = request.param
    architecture, overrides = MODELS[name]
    base = tiny_model(architecture, dtype=dtype_of(name), **overrides)
    ensemble = LoraEnsemble.attach(
        tiny_model(architecture, dtype=dtype_of(name), **overrides),
        EnsembleConfig(num_particles=K, rank=3, lora_alpha=6, layers_to_transform=layers, init="spread"),
    )
    train(ensemble, make_batch([9, 6, 7], seed=1))
    folder = tmp_path_factory.mktemp(name)
    ensemble.save_pretrained(folder)
    particles = [load_peft(base, folder / f"p{k:03d}", is_trainable=True) for k in range(K)]
    return SimpleNamespace(ensemble=ensemble, base=base, folder=folder, particles=particles, name=name)


def dtype_of(name):
    """fp64, where nothing but a wrong formula comes near the tolerance; Gemma-2's own eager attention takes fp32 only:
    in fp64 it gives NaN where a window holds nothing but padding."""
    return torch.float32 if name == "gemma2" else torch.float64


def train(ensemble, batch):
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.05)
    for _ in range(2):
        renyi_reduce(ensemble.sequence_logprob(batch), 0.7).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def close(ours, theirs, rtol=1e-6):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-5, rtol=rtol)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_saved_particles_have_the_same_logprob_in_peft(trained, make_batch, naive_logprob, padding):
    batch = make_batch([8, 8, 8, 8] if padding == "none" else [5, 9, 3, 7], padding=padding, seed=2)
    truth = torch.stack([naive_logprob(particle, batch) for particle in trained.particles])
    assert (truth.max(0).values - truth.min(0).values).min() > 0.01, "the particles are too alike to test anything"
    if padding == "none":
        close(trained.ensemble.sequence_logprob({k: v for k, v in batch.items() if k != "attention_mask"}), truth)
    close(trained.ensemble.sequence_logprob(batch), truth)


@pytest.mark.parametrize(("B", "T"), [(6, 6), (3, 3), (2, 2), (9, 3), (2, 6), (1, 1), (1, 6), (4, 1)])
def test_shapes_that_a_guess_by_size_would_confuse(trained, make_batch, B, T):
    batch = make_batch([T] * B, seed=3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    truth = [particle.get_base_model().base_model(input_ids=ids).last_hidden_state for particle in trained.particles]
    close(trained.ensemble(ids), torch.stack(truth))
    close(trained.ensemble(ids, mask), torch.stack(truth))
    if T > 2:
        mask[0, 0] = 0  # a mask that cannot be dropped: the model makes it a four-dimensional one
        truth = [alone(particle, ids, mask) for particle in trained.particles]
        close(trained.ensemble(ids, mask)[:, mask.bool()], torch.stack(truth))


def alone(particle, ids, mask):
    """Final hidden states of the real tokens, each sequence run alone."""
    backbone = particle.get_base_model().base_model
    return torch.cat(
        [backbone(input_ids=row[keep][None]).last_hidden_state[0] for row, keep in zip(ids, mask.bool(), strict=True)]
    )


@pytest.mark.parametrize("padding", ["right", "left"])
def test_gradient_of_each_particle_is_its_responsibility_times_its_own(trained, make_batch, naive_logprob, padding):
    alpha = 0.3
    batch = make_batch([5, 8, 4], padding=padding, seed=4)
    trained.ensemble.zero_grad()
    out = renyi_reduce(trained.ensemble.sequence_logprob(batch), alpha)
    out.loss.mean().backward()

    s = torch.stack([naive_logprob(particle, batch) for particle in trained.particles])
    r = torch.softmax(alpha * s.detach(), dim=0)
    assert r.min() > 0.02, "one particle has all responsibility: nothing is tested"
    close(out.responsibilities, r)
    for k, particle in enumerate(trained.particles):
        particle.zero_grad()
        (-(r[k] * s[k]).mean()).backward(retain_graph=True)
        assert_same_gradients(trained.ensemble, k, particle)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_one_particle_has_the_gradients_of_plain_lora(trained, tiny_model, make_batch, naive_logprob, alpha):
    batch = make_batch([5, 8, 4], seed=5)
    particle = trained.particles[1]
    architecture, overrides = MODELS[trained.name]
    model = tiny_model(architecture, dtype=dtype_of(trained.name), **overrides)
    single = LoraEnsemble.from_pretrained(model, trained.folder / "p001")
    renyi_reduce(single.sequence_logprob(batch), alpha).loss.mean().backward()
    particle.zero_grad()
    (-naive_logprob(particle, batch).mean()).backward()
    assert single.config.num_particles == 1
    assert_same_gradients(single, 0, particle)


def assert_same_gradients(ensemble, k, particle):
    """To fp32: the ensemble keeps fp32 masters, while PEFT trains in the dtype of the base."""
    for path, (A, B) in ensemble.stacked().items():
        lora = particle.get_base_model().get_submodule(path)
        for ours, theirs in (
            (A.grad[k], lora.lora_A["default"].weight.grad),
            (B.grad[k], lora.lora_B["default"].weight.grad),
        ):
            assert theirs.abs().max() > 0
            close(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_agrees_with_peft_too(name, tiny_model, make_batch, load_peft, naive_logprob, tmp_path):
    architecture, overrides = MODELS[name]
    base = tiny_model(architecture, **overrides)
    ensemble = LoraEnsemble.attach(
        tiny_model(architecture, **overrides), EnsembleConfig(num_particles=K, rank=3, init="spread")
    )
    train(ensemble, make_batch([5, 4], seed=1))
    ensemble.save_pretrained(tmp_path)
    batch = make_batch([4, 5, 3], seed=6)
    truth = torch.stack([naive_logprob(load_peft(base, tmp_path / f"p{k:03d}"), batch) for k in range(K)])
    close(ensemble.sequence_logprob(batch), truth)
