"""From text and chat to tokens: special tokens, the seam between prompt and completion, where an answer stops."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from renyi_engine import SftTask
from renyi_engine.data.conversation import Context
from renyi_engine.data.encoding import Encoder, encode_prompts, stop_tokens
from renyi_engine.data.examples import Dropped
from renyi_engine.evaluation.choices import encode_choices

from ..tokenizers_for_tests import byte_pair_tokenizer, learnt

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS, EOS = "<bos>", "<eos>"
# what tokenizers put around a text, and what a text that is learnt begins and ends with then
ADDED = {"$A": ("", EOS), f"{BOS} $A": (BOS, EOS), f"$A {EOS}": ("", EOS), f"{BOS} $A {EOS}": (BOS, EOS)}


def test_prompts_are_the_users_turn_if_there_is_a_template_and_plain_text_if_not(tokenizer):
    encoded = encode_prompts(tokenizer, ["Hi", "Hello"])
    assert [tokenizer.decode(ids) for ids in encoded] == ["<user>Hi</s><assistant>", "<user>Hello</s><assistant>"]
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert [bare.decode(ids) for ids in encode_prompts(bare, ["Hi", "Hello"])] == ["Hi", "Hello"]


def test_the_template_of_a_prompt_is_given_its_variables():
    tokenizer = byte_pair_tokenizer(CHATML + "{% if not enable_thinking %}<think></think>{% endif %}")
    for enable_thinking, ending in ((True, ""), (False, "<think></think>")):
        context = Context(variables={"enable_thinking": enable_thinking})
        (ids,) = encode_prompts(tokenizer, ["Hi"], context)
        expected = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{ending}"
        assert tokenizer.decode(ids) == expected


# ---------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("adds", ADDED)
@pytest.mark.parametrize("opening", ["", BOS])
@pytest.mark.parametrize("ending", ["", EOS])
def test_a_text_that_is_learnt_has_one_bos_and_one_eos_whoever_brings_them(adds, opening, ending):
    tokenizer = byte_pair_tokenizer(adds=adds)
    first, last = ADDED[adds]
    expected = (first or opening) + "What is red?" + last
    ids, labels = Encoder(tokenizer).text(f"{opening}What is red?{ending}")
    assert tokenizer.decode(ids) == expected
    assert labels == ids
    ids, labels = Encoder(tokenizer).completed_text(f"{opening}What is red?", f" Rouge{ending}")
    assert tokenizer.decode(ids) == expected.removesuffix(last) + " Rouge" + last
    assert learnt(tokenizer, ids, labels) == [" Rouge" + last]


@pytest.mark.parametrize("adds", ADDED)
def test_what_is_to_be_continued_has_no_eos(adds):
    tokenizer = byte_pair_tokenizer(adds=adds)
    assert tokenizer.decode(Encoder(tokenizer).prompt("What is red?")) == ADDED[adds][0] + "What is red?"
    assert tokenizer.decode(encode_prompts(tokenizer, ["What is red?"])[0]) == ADDED[adds][0] + "What is red?"
    choices = encode_choices(tokenizer, "Answer:", [" A", " B"])
    assert tokenizer.decode(choices.prompt) == ADDED[adds][0] + "Answer:"
    assert [tokenizer.decode(ids) for ids in choices.completions] == [" A", " B"]


def test_what_a_tokenizer_adds_is_known_though_its_vocabulary_has_no_letter_a():
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, []))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    encoder = Encoder(tokenizer)
    assert encoder.text("GATT")[0] == tokenizer("GATT")["input_ids"] == [0, 4, 2, 5, 5, 1]
    assert encoder.completed_text("GA", "TT") == ([0, 4, 2, 5, 5, 1], [-100, -100, -100, 5, 5, 1])
    assert encoder.prompt("GATT") == [0, 4, 2, 5, 5]


def test_a_tokenizer_without_eos_ends_a_text_with_what_it_puts_there_itself():
    tokenizer = byte_pair_tokenizer(adds="<bos> $A <eos>", eos=None)
    assert tokenizer.decode(Encoder(tokenizer).text("red")[0]) == "<bos>red<eos>"
    assert byte_pair_tokenizer(eos=None).decode(Encoder(byte_pair_tokenizer(eos=None)).text("red")[0]) == "red"


# ---------------------------------------------------------------------- the seam


def test_a_token_across_the_seam_belongs_to_the_completion():
    tokenizer = byte_pair_tokenizer(texts=["abcd"] * 5)
    assert tokenizer.tokenize("abcd") == ["abcd"]
    ids, labels = Encoder(tokenizer).completed_text("xxab", "cdyy")
    assert learnt(tokenizer, ids, labels) == ["abcdyy<eos>"]
    ids, labels = Encoder(tokenizer).completed_text("xxabcd", "yy")
    assert learnt(tokenizer, ids, labels) == ["yy<eos>"]


@given(st.text(alphabet="ab \n.", min_size=1, max_size=12), st.text(alphabet="ab \n.", min_size=1, max_size=12))
def test_all_of_the_completion_is_learnt_and_at_most_one_token_reaches_into_the_prompt(prompt, completion):
    ids, labels = Encoder(MERGING).completed_text(prompt, completion)
    [text] = learnt(MERGING, ids, labels)
    assert MERGING.decode(ids) == prompt + completion + EOS
    assert text.endswith(completion + EOS)
    first = MERGING.decode([label for label in labels if label != -100][:1])
    assert len(text) - len(completion + EOS) < len(first)


MERGING = byte_pair_tokenizer(texts=["ab. \n\nba.\n ab", "a b .\n\n", "aa bb  ab.\n"] * 4)


def test_letters_before_the_seam_are_not_learnt_though_they_become_other_tokens():
    """A unigram tokenizer parts more of the prompt in another way once a letter follows."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("a", -5.0), ("b", -5.0), ("c", -5.0), ("ab", -1.9), ("bac", -0.1), ("</s>", 0.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces)), eos_token="</s>")
    assert tokenizer.tokenize("ababa") == ["ab", "ab", "a"]
    assert tokenizer.tokenize("ababac") == ["ab", "a", "bac"]
    ids, labels = Encoder(tokenizer).completed_text("ababa", "c")
    assert ids[-2:] == tokenizer.convert_tokens_to_ids(["bac", "</s>"])
    assert labels == [-100, -100, *ids[-2:]]


# ---------------------------------------------------------------------- where an answer stops


def tiny_llama(tokenizer, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes | config)).eval()


def test_answers_stop_at_the_models_the_tokenizers_and_the_templates_end():
    tokenizer = byte_pair_tokenizer(CHATML)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny_llama(tokenizer, eos_token_id=7)
    model.generation_config = GenerationConfig(eos_token_id=[8, 9])
    assert stop_tokens(model, tokenizer) == sorted({7, 8, 9, tokenizer.eos_token_id, end_of_turn})


def test_a_tokenizer_with_an_eos_is_enough_and_nothing_at_all_is_refused():
    tokenizer = byte_pair_tokenizer()
    model = tiny_llama(tokenizer, eos_token_id=None)
    model.generation_config = GenerationConfig()
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="no end-of-sequence token, and neither has the model"):
        stop_tokens(model, byte_pair_tokenizer(eos=None))


def test_what_training_teaches_an_answer_to_end_with_ends_it_in_generation():
    """Four.<|im_end|> is learnt; the model's configuration names another token."""
    tokenizer = byte_pair_tokenizer(CHATML)
    row = {"prompt": [{"role": "user", "content": "2+2"}], "completion": [{"role": "assistant", "content": "Four."}]}
    example = SftTask(tokenizer, 64).example(0, row)
    [answer] = learnt(tokenizer, example.input_ids, example.labels)
    assert answer == "Four.<|im_end|>\n"
    stops = stop_tokens(tiny_llama(tokenizer, eos_token_id=tokenizer.eos_token_id), tokenizer)
    assert set(stops) & {label for label in example.labels if label != -100}


def test_half_a_character_is_refused_and_a_whole_one_is_not():
    tokenizer = byte_pair_tokenizer()
    task = SftTask(tokenizer, 64)
    for row in ({"text": "red \ud83d"}, {"prompt": "red", "completion": "\udcff"}):
        with pytest.raises(Dropped, match="a text holds half a character, which has no tokens"):
            task.example(0, row)
    # what a shell hands over where it cannot decode
    with pytest.raises(ValueError, match="half a character"):
        encode_prompts(tokenizer, ["\udcff"])
    assert tokenizer.decode(task.example(0, {"text": "red \U0001f600"}).input_ids) == "red \U0001f600<eos>"
