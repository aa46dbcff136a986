"""Real chat templates, as TRL ships them: tokens, labels and log-probabilities are those of TRL's own preprocessing.

Where TRL's trainers mark answers, they replace a template by one of their own with `{% generation %}` marks: what this
project finds in the original by comparing renderings is held to those marks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from renyi_engine import DpoTask, EnsembleConfig, LoraEnsemble, SftTask
from renyi_engine.data.examples import Dropped

from ..conversations import chat
from ..tokenizers_for_tests import byte_pair_tokenizer, learnt

MAX_LENGTH = 4096
FOLDER = Path(trl.__file__).parent / "chat_templates"
# the format of Mistral-7B-Instruct-v0.3: the system text stands before the last turn of the user
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == messages.index(asked[-1]) and "
    "messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# the families that people use: ChatML, Llama 3, Gemma, Mistral, Phi-3, Qwen3 with thinking, Command-R, and more
ORIGINALS = (
    "qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1", "gemma", "gemma3", "mistral", "phi3", "phi3_5", "qwen3",
    "cohere", "cohere2", "gptoss", "glm4moe", "lfm2",
)  # fmt: skip


SYSTEM = chat(("system", "Be brief."))
ONE = chat(("user", "What is red?"), ("assistant", "Rouge."))
TWO = [*ONE, *chat(("user", "And what is blue, in French?"), ("assistant", "C'est bleu."))]
EMPTY = [*chat(("user", "")), *TWO[1:]]
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "tells the time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}],
}
WITH_TOOL = [ONE[0], CALLING, {"role": "tool", "name": "clock", "content": "noon"}, *TWO[1:]]
# templates that refuse a system text
NO_SYSTEM = {"gemma"}
# templates that take tools and tool calls
TOOLS = ("qwen2_5", "qwen3_instruct_2507", "llama3_1", "qwen3", "gptoss", "glm4moe")


def tokenizer_of(name):
    template = MISTRAL if name == "mistral" else (FOLDER / f"{name}.jinja").read_text()
    return byte_pair_tokenizer(template, words=True)


@pytest.fixture(scope="module")
def trainer_arguments(tmp_path_factory):
    return {
        "output_dir": str(tmp_path_factory.mktemp("trl")), "report_to": [], "use_cpu": True, "bf16": False,
        "max_length": MAX_LENGTH, "disable_tqdm": True, "per_device_train_batch_size": 16,
    }  # fmt: skip


def tiny_llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def sft_trainer(tokenizer, row, arguments, model=None, **settings):
    return SFTTrainer(
        model or tiny_llama(tokenizer), args=SFTConfig(**arguments, **settings), processing_class=tokenizer,
        train_dataset=Dataset.from_list([row]),
    )  # fmt: skip


def rows_of(name):
    conversations = [ONE, TWO, EMPTY] + ([] if name in NO_SYSTEM else [SYSTEM + ONE, SYSTEM + TWO])
    rows = [{"messages": messages} for messages in conversations]
    return rows + ([{"messages": WITH_TOOL, "tools": [CLOCK]}] if name in TOOLS else [])


@pytest.mark.parametrize("name", ORIGINALS)
def test_prompt_and_completion_become_trls_tokens_labels_and_log_probabilities(name, trainer_arguments):
    tokenizer = tokenizer_of(name)
    rows = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "tools": row.get("tools")}
        for row in rows_of(name)
    ]
    model = tiny_llama(tokenizer)
    # one row at a time: a data set of TRL's would give every message the fields of all
    theirs = [sft_trainer(tokenizer, row, trainer_arguments, model=model) for row in rows]
    task = SftTask(tokenizer, MAX_LENGTH)
    ours = [task.example(number, row) for number, row in enumerate(rows)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.input_ids == other.train_dataset[0]["input_ids"]
        assert one.labels == other.train_dataset[0]["labels"]

    expected = []
    for trainer in theirs:
        batch = trainer.data_collator([trainer.train_dataset[0]])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=batch["input_ids"]).logits[0, :-1], -1)
        labels = batch["labels"][0, 1:]
        expected.append(logp[labels != -100, labels[labels != -100]].sum())
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=1, rank=1))
    found = ensemble.sequence_logprob(task.collate(ours))[0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-4)


# what TRL's marks hold of the header, which the generation prompt already brings: an answer is learnt after it
HEADERS = {"qwen2_5": "\n", "gptoss": "<|start|>assistant"}
# TRL's template for training is another one: it writes a thinking block into every turn, or a token after every turn
REWRITTEN = {"qwen3", "glm4moe", "llama3_1", "mistral"}


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name not in REWRITTEN])
def test_answers_of_a_conversation_are_what_trl_marks(name, trainer_arguments):
    tokenizer = tokenizer_of(name)
    task = SftTask(tokenizer, MAX_LENGTH)
    for number, row in enumerate(rows_of(name)):
        trainer = sft_trainer(tokenizer, row, trainer_arguments, assistant_only_loss=True)
        [theirs] = trainer.train_dataset
        ours = task.example(number, row)
        assert ours.input_ids == theirs["input_ids"]
        if name not in HEADERS:
            assert ours.labels == theirs["labels"]
        marked = learnt(tokenizer, theirs["input_ids"], theirs["labels"])
        assert all(text.startswith(HEADERS.get(name, "")) for text in marked)
        said = learnt(tokenizer, ours.input_ids, ours.labels)
        assert said == [text.removeprefix(HEADERS.get(name, "")) for text in marked]


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3", "deepseek_r1_distill", "glm4moe", "qwen2_5", "gptoss"])
def test_marks_in_a_template_are_taken_as_they_are(name, trainer_arguments):
    tokenizer = tokenizer_of(f"{name}_training")
    task = SftTask(tokenizer, MAX_LENGTH)
    spoken_first = {"messages": [*chat(("assistant", "Hello.")), *TWO]}
    for number, row in enumerate([*rows_of(name), spoken_first]):
        trainer = sft_trainer(tokenizer, row, trainer_arguments, assistant_only_loss=True)
        ours = task.example(number, row)
        assert ours.input_ids == trainer.train_dataset[0]["input_ids"]
        assert ours.labels == trainer.train_dataset[0]["labels"]


THOUGHT = "<think>\n\n</think>\n\n"
SPOKEN = {
    # thoughts are written into the last turn only
    "qwen3": ["Rouge.<|im_end|>\n", f"{THOUGHT}C'est bleu.<|im_end|>\n"],
    "qwen3_5_think": ["Rouge.<|im_end|>\n", "\n</think>\n\nC'est bleu.<|im_end|>\n"],
    # another token ends the last turn
    "gptoss": ["<|channel|>final<|message|>Rouge.<|end|>", "<|channel|>final<|message|>C'est bleu.<|return|>"],
    "phi3": ["Rouge.<|end|>\n", "C'est bleu.<|end|>\n<eos>"],
    "mistral": [" Rouge.<eos>", " C'est bleu.<eos>"],
    "glm4moe": ["\n<think></think>\nRouge.", "\n<think></think>\nC'est bleu."],
    # these take content as a list of parts only
    "llava_next": [" Rouge.</s> ", " C'est bleu.</s> "],
    "smolvlm": [" Rouge.<end_of_utterance>\n", " C'est bleu.<end_of_utterance>\n"],
}


@pytest.mark.parametrize("name", SPOKEN)
def test_templates_that_write_earlier_turns_in_another_way_still_tell_who_speaks(name):
    tokenizer = tokenizer_of(name)
    example = SftTask(tokenizer, MAX_LENGTH).example(0, {"messages": TWO})
    assert learnt(tokenizer, example.input_ids, example.labels) == SPOKEN[name]
    rendered = tokenizer.decode(example.input_ids)
    assert all(message["content"] in rendered for message in TWO)


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill"])
def test_a_generation_prompt_that_opens_a_thought_is_refused_unless_answers_are_marked(name):
    for row in ({"messages": TWO}, {"prompt": ONE[:1], "completion": ONE[1:]}):
        with pytest.raises(Dropped, match=r"opens a thinking block \('<think>'\) that it does not write before"):
            SftTask(tokenizer_of(name), MAX_LENGTH).example(0, row)
    tokenizer = tokenizer_of(f"{name}_training")
    example = SftTask(tokenizer, MAX_LENGTH).example(0, {"prompt": TWO[:3], "completion": TWO[3:]})
    said = learnt(tokenizer, example.input_ids, example.labels)
    assert said == ["<｜Assistant｜>C'est bleu.<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_pairs_become_trls_tokens(name, trainer_arguments):
    tokenizer = tokenizer_of(name)
    rejected = chat(("assistant", "Rien du tout."))
    task = DpoTask(tokenizer, MAX_LENGTH, beta=0.1)
    for number, row in enumerate(rows_of(name)):
        messages = row["messages"]
        pair = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected, "tools": row.get("tools")}
        trainer = DPOTrainer(
            tiny_llama(tokenizer), args=DPOConfig(**trainer_arguments), train_dataset=Dataset.from_list([pair]),
            processing_class=tokenizer, peft_config=LoraConfig(target_modules=["q_proj"]),
        )  # fmt: skip
        [theirs] = trainer.train_dataset
        prompt = theirs["prompt_ids"]
        for one, said in zip(task.example(number, pair).sequences, ("chosen_ids", "rejected_ids"), strict=True):
            assert one.input_ids == prompt + theirs[said]
            assert one.labels == [-100] * len(prompt) + theirs[said]


def test_a_template_that_shows_tools_but_writes_no_call_is_refused():
    # TRL learns the end of an empty turn where the call would be
    with pytest.raises(Dropped, match="the chat template does not write the assistant's tool calls"):
        SftTask(tokenizer_of("lfm2"), MAX_LENGTH).example(0, {"messages": WITH_TOOL, "tools": [CLOCK]})
