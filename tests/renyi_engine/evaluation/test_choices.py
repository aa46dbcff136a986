"""Given completions are scored as the ensemble itself scores them, one by one, unpadded and uncut."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.evaluation.choices import Choices, context_length, encode_choices, score_choices

K = 3


@pytest.fixture(scope="module")
def ensemble(tiny_model) -> LoraEnsemble:
    model = tiny_model("llama", dtype=torch.float64)
    return LoraEnsemble.attach(model, EnsembleConfig(num_particles=K, rank=2, lora_alpha=64, init="spread"))


@pytest.fixture(scope="module")
def gpt2(tiny_model) -> LoraEnsemble:
    """Learned positions: one token more than the context is an index error."""
    model = tiny_model("gpt2", dtype=torch.float64, n_positions=12)
    return LoraEnsemble.attach(model, EnsembleConfig(num_particles=K, rank=2, lora_alpha=64, init="spread"))


def random_choices(lengths: list[int], completions: list[int], seed: int = 0) -> list[Choices]:
    """A prompt of each length, with a completion of each number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randint(3, 97, (count,), generator=generator).tolist()
    return [Choices(draw(length), [draw(count) for count in completions]) for length in lengths]


def one_by_one(ensemble: LoraEnsemble, choices: list[Choices]) -> Tensor:
    """[K, N, C]: every pair as a batch of its own, through sequence_logprob."""
    rows = []
    for one in choices:
        for ids in one.completions:
            labels = [-100] * len(one.prompt) + ids
            batch = {"input_ids": torch.tensor([one.prompt + ids]), "labels": torch.tensor([labels])}
            with torch.no_grad():
                rows.append(ensemble.sequence_logprob(batch)[:, 0])
    return torch.stack(rows, dim=1).unflatten(1, (len(choices), -1))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    completions=st.one_of(
        st.lists(st.just(1), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=4)
    ),
    batch_size=st.integers(1, 5),
)
def test_scores_are_those_of_every_pair_alone_whatever_the_batches(ensemble, lengths, completions, batch_size):
    choices = random_choices(lengths, completions)
    scores = score_choices(ensemble, choices, batch_size=batch_size)
    assert scores.shape == (K, len(lengths), len(completions))
    torch.testing.assert_close(scores, one_by_one(ensemble, choices), rtol=0, atol=1e-10)


def test_particles_differ_and_without_adapters_it_is_the_base(ensemble, tiny_model):
    choices = random_choices([5, 2], [1, 1, 1])
    with ensemble.disable_adapters():
        base = score_choices(ensemble, choices, batch_size=2)
    assert base.shape == (1, 2, 3)
    model = tiny_model("llama", dtype=torch.float64)
    for n, one in enumerate(choices):
        logp = torch.log_softmax(model(torch.tensor([one.prompt])).logits[0, -1], -1)
        torch.testing.assert_close(base[0, n], logp[[ids[0] for ids in one.completions]], rtol=0, atol=1e-10)
    particles = score_choices(ensemble, choices, batch_size=2)
    assert (particles - particles.roll(1, 0)).abs().min() > 1e-6


@pytest.mark.parametrize("architecture", ["gemma2", "gptj", "granite", "cohere"])
def test_soft_caps_scales_and_biases_of_the_head_are_honoured(tiny_model, architecture):
    model = tiny_model(architecture, dtype=torch.float64)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=2, rank=1, init="spread"))
    choices = random_choices([4, 6], [1, 1])
    expected = one_by_one(ensemble, choices)
    torch.testing.assert_close(score_choices(ensemble, choices, batch_size=2), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("completions", [[1, 1], [2, 3]], ids=["one token", "several tokens"])
def test_of_a_long_prompt_the_model_reads_the_end_that_fits(gpt2, completions):
    context = context_length(gpt2.model)
    assert context == 12
    long = random_choices([20, 12, 3], completions)
    scores = score_choices(gpt2, long, batch_size=2)
    for n, one in enumerate(long):
        for c, ids in enumerate(one.completions):
            # the last token of a completion is never read, so it takes no place
            read = (one.prompt + ids)[:-1][-context:]
            with torch.no_grad():
                logp = gpt2.model.lm_head(gpt2(torch.tensor([read]))[:, 0, -len(ids) :]).log_softmax(-1)
            expected = logp[:, range(len(ids)), ids].sum(-1)
            torch.testing.assert_close(scores[:, n, c], expected, rtol=0, atol=1e-10)
    assert [one.num_tokens > context for one in long] == [True, max(completions) > 1, False]


def test_a_completion_that_no_context_holds_is_refused(gpt2):
    with pytest.raises(ValueError, match=r"completions: one has 13 tokens, but the model reads 12 at once"):
        score_choices(gpt2, random_choices([1], [13]), batch_size=1)


@pytest.mark.parametrize("choices", [[], [Choices([5], [[1]]), Choices([5], [[1], [2]])]], ids=["none", "uneven"])
def test_choices_have_to_be_there_and_of_one_number(ensemble, choices):
    with pytest.raises(ValueError, match="choices: expected at least one prompt, and the same number"):
        score_choices(ensemble, choices, batch_size=1)


def test_the_seam_is_where_the_prompts_own_tokens_end_and_its_spaces_move(tokenizer):
    encode = lambda text: tokenizer(text)["input_ids"]
    choices = encode_choices(tokenizer, "Is it?  ", ["Yes", "no"])
    assert choices.prompt == encode("Is it?")
    assert choices.completions == [encode("  Yes"), encode("  no")]


def test_a_prompt_that_brings_its_bos_gets_no_second_one(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    with_bos = AutoTokenizer.from_pretrained(tmp_path)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert with_bos("Hi")["input_ids"].count(bos) == 1
    ids = with_bos("Hi")["input_ids"]
    for prompt in ("Hi", "<s>Hi"):
        choices = encode_choices(with_bos, prompt, ["!"])
        assert choices.prompt == ids
        assert len(choices.completions[0]) == 1


def test_a_tokenizer_that_appends_eos_scores_the_letter_and_not_the_end(ensemble, tokenizer):
    """With the end in the completions all four letters would get the same score, and be scored after an end."""
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    eos = ending.eos_token_id
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    assert ending("Hi")["input_ids"][-1] == eos
    letters = [" A", " B", " C", " D"]
    plain, with_eos = (encode_choices(one, "Which?\nAnswer:", letters) for one in (tokenizer, ending))
    assert with_eos == plain
    scores = score_choices(ensemble, [with_eos], batch_size=1)
    assert len({round(score, 4) for score in scores[0, 0].tolist()}) == 4


def test_nothing_to_score_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt: it is empty"):
        encode_choices(tokenizer, " \n", ["a"])
    with pytest.raises(ValueError, match="completions: '' adds no token to the prompt 'Hi'"):
        encode_choices(tokenizer, "Hi", ["a", ""])


def test_text_is_scored_under_every_particle(ensemble, tokenizer):
    choices = [encode_choices(tokenizer, prompt, [text]) for prompt, text in (("Ask: ", "yes"), ("To", "!"))]
    particles = score_choices(ensemble, choices, batch_size=1)
    torch.testing.assert_close(particles, torch.cat([one_by_one(ensemble, [c]) for c in choices], 1))


def test_progress_sees_every_batch(ensemble):
    seen = []

    def track(batches):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    score_choices(ensemble, random_choices([3, 9, 4, 4, 1], [1, 1]), batch_size=2, track=track)
    assert seen == [2, 2, 1]
