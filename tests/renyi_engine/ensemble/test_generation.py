"""Continuations: Hugging Face's own greedy search on PEFT adapters as the oracle, and draws that belong to their names.

Layout: K particles, B prompts, T tokens, n samples, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.generation import draw

PAD, STOP = 0, 2
LENGTHS = (5, 2, 1)


@pytest.fixture
def prompts():
    """Three prompts of different length, padded on the left."""
    generator = torch.Generator().manual_seed(4)
    width = max(LENGTHS)
    input_ids = torch.full((len(LENGTHS), width), PAD)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(LENGTHS):
        input_ids[row, width - length :] = torch.randint(3, 97, (length,), generator=generator)
        mask[row, width - length :] = 1
    return input_ids, mask


@pytest.fixture
def attached(tiny_model):
    def attach(architecture="llama", layers=None, **overrides):
        model = tiny_model(architecture, dtype=dtype_of(architecture), **overrides)
        config = EnsembleConfig(num_particles=3, rank=2, layers_to_transform=layers, init="spread", seed=3)
        ensemble = LoraEnsemble.attach(model, config)
        with torch.no_grad():  # particles far enough apart to say different things
            for parameter in ensemble.parameters():
                parameter.mul_(4)
        return ensemble

    return attach


def dtype_of(architecture):
    """fp64, where ties cannot come of rounding; Gemma-2's own eager attention takes fp32 only: in fp64 it gives NaN
    where a window holds nothing but padding."""
    return torch.float32 if architecture == "gemma2" else torch.float64


def theirs(model, input_ids, mask, length):
    new = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )[:, input_ids.shape[1] :]
    return torch.nn.functional.pad(new, (0, length - new.shape[1]), value=PAD)


@pytest.mark.parametrize("layers", [None, [2]], ids=["all layers", "last layer"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "mistral", "gemma2", "gpt2", "gptj", "cohere"])
def test_greedy_particles_say_what_peft_and_hugging_face_say(
    architecture, layers, attached, prompts, tiny_model, load_peft, tmp_path
):
    windowed = {"sliding_window": 4} if architecture == "mistral" else {}
    base = tiny_model(architecture, dtype=dtype_of(architecture), **windowed)
    ensemble = attached(architecture, layers, **windowed)
    ensemble.save_pretrained(tmp_path)
    ours = ensemble.generate(*prompts, temperature=0, max_new_tokens=9, eos_token_id=STOP, pad_token_id=PAD)
    ours = torch.nn.functional.pad(ours[:, :, 0], (0, 9 - ours.shape[-1]), value=PAD)
    for k in range(3):
        peft = load_peft(base, tmp_path / f"p{k:03d}")
        assert torch.equal(ours[k], theirs(peft, *prompts, 9)), k
    with ensemble.disable_adapters():
        bare = ensemble.generate(*prompts, temperature=0, max_new_tokens=9, eos_token_id=STOP, pad_token_id=PAD)
    assert bare.shape[:3] == (1, 3, 1)
    bare = torch.nn.functional.pad(bare[0, :, 0], (0, 9 - bare.shape[-1]), value=PAD)
    assert torch.equal(bare, theirs(base, *prompts, 9))


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all layers", "shared trunk"])
def test_a_draw_depends_on_its_seed_particle_prompt_and_sample_alone(attached, prompts, layers):
    ensemble = attached(layers=layers)
    options = {"max_new_tokens": 7, "eos_token_id": STOP, "pad_token_id": PAD, "seed": 11}
    together = ensemble.generate(*prompts, num_samples=4, prompt_ids=[30, 10, 20], **options)
    assert together.shape[:3] == (3, 3, 4)
    assert len({tuple(row.tolist()) for row in together.view(36, -1)}) > 25
    for row, name in ((2, 20), (0, 30)):
        alone = ensemble.generate(*(x[row : row + 1] for x in prompts), num_samples=2, prompt_ids=[name], **options)
        width = min(alone.shape[-1], together.shape[-1])
        assert torch.equal(alone[:, 0, :, :width], together[:, row, :2, :width])
        assert (together[:, row, :2, width:] == PAD).all()
    other = ensemble.generate(*prompts, num_samples=4, prompt_ids=[30, 10, 20], **(options | {"seed": 12}))
    assert not torch.equal(other[..., :3], together[..., :3])


def test_the_prompt_is_read_once_by_the_trunk_and_once_by_each_particle(attached, prompts):
    ensemble = attached(layers=[2])
    ensemble.generate(*prompts, max_new_tokens=1)  # the cache was tried
    seen = {layer: [] for layer in (0, 2)}
    for layer, shapes in seen.items():
        ensemble.model.model.layers[layer].mlp.register_forward_hook(
            lambda _, args, __, shapes=shapes: shapes.append(tuple(args[0].shape[:2]))
        )
    ensemble.generate(*prompts, num_samples=2, max_new_tokens=3, eos_token_id=[], pad_token_id=PAD)
    assert seen == {0: [(3, 5), (18, 1), (18, 1)], 2: [(9, 5), (18, 1), (18, 1)]}


def test_nothing_but_padding_follows_a_stop_token_and_all_stop_early(attached, prompts):
    ensemble = attached()
    free = ensemble.generate(*prompts, max_new_tokens=12, eos_token_id=[], num_samples=2)
    stops = [int(free[0, 0, 0, 2]), int(free[1, 1, 1, 4])]
    held = ensemble.generate(*prompts, max_new_tokens=12, eos_token_id=stops, pad_token_id=PAD, num_samples=2)
    assert held.shape[-1] <= 12
    for before, after in zip(free.view(18, -1), held.view(18, -1), strict=True):
        first = next((i for i, token in enumerate(before.tolist()) if token in stops), len(before) - 1)
        assert torch.equal(after[: first + 1], before[: first + 1][: len(after)])
        assert (after[first + 1 :] == PAD).all()
    at_once = ensemble.generate(*prompts, max_new_tokens=12, eos_token_id=list(range(97)))
    assert at_once.shape[-1] == 1


def test_the_model_trains_as_before_after_generating(attached, prompts, make_batch):
    ensemble = attached().train()
    batch = make_batch((6, 4))
    before = ensemble.sequence_logprob(batch)
    ensemble.generate(*prompts, num_samples=3, max_new_tokens=4)
    after = ensemble.sequence_logprob(batch)
    assert torch.equal(before, after)
    assert after.requires_grad


def test_checkpointing_while_it_trains_does_not_keep_the_cache_from_it(attached, prompts):
    """Hugging Face drops the cache of a checkpointed layer without a word."""
    ensemble = attached()
    before = ensemble.generate(*prompts, num_samples=3, max_new_tokens=4)
    ensemble.model.gradient_checkpointing_enable()
    ensemble.train()
    assert torch.equal(ensemble.generate(*prompts, num_samples=3, max_new_tokens=4), before)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_draws_invert_the_distribution_function(data):
    """Over N evenly spaced uniform numbers, each token comes up N p times, up to one at each of its ends."""
    size = data.draw(st.integers(1, 12))
    logits = torch.tensor(data.draw(st.lists(st.floats(-30, 5), min_size=size, max_size=size)), dtype=torch.float32)
    temperature, top_p = data.draw(st.floats(0.2, 3)), data.draw(st.sampled_from([1.0, 0.9, 0.5, 1e-6]))
    N = 500
    uniform = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    tokens = draw(logits.expand(N, size), uniform, temperature, top_p)
    probability = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ranked = sorted(range(size), key=lambda v: (-probability[v].item(), v))
        kept, mass = [], 0.0
        for v in ranked:
            if mass >= top_p:
                break
            kept.append(v)
            mass += probability[v].item()
        probability = torch.tensor([probability[v].item() if v in kept else 0.0 for v in range(size)])
        probability = probability.double() / probability.sum()
    counts = torch.bincount(tokens, minlength=size)
    assert ((counts - N * probability).abs() <= 1 + 1e-6 * N).all()


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(3, 5)
    uniform = torch.tensor([0.0, 0.999999, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 0.7, 1.0).tolist() == [1, 3, 3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"num_samples": 0}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt_ids": [1, 2]}, "prompt_ids"),
        ({"prompt_ids": [1, 2, -3]}, "prompt_ids"),
    ],
)
def test_what_does_not_do_is_named(attached, prompts, change, named):
    with pytest.raises(ValueError, match=named):
        attached().generate(*prompts, **change)


def test_a_prompt_padded_on_the_right_is_refused(attached, prompts):
    input_ids, _ = prompts
    with pytest.raises(ValueError, match="prompt 1 is empty or padded on the right"):
        attached().generate(input_ids, torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5]))


def test_a_model_that_says_nothing_of_its_end_needs_to_be_told(attached, prompts):
    ensemble = attached()
    ensemble.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id"):
        ensemble.generate(*prompts)
