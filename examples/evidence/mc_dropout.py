"""One LoRA adapter with dropout that stays on when it answers (Gal and Ghahramani 2016), by PEFT.

Dropout acts on the input of every adapter. Each of `PASSES` answers with other dropped entries is a member.

Layout: K members, N questions, C answers, B sequences, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from examples.evidence.experiment import Data, Setting
from examples.evidence.methods import choices_of
from renyi_engine.data import Example, collate, tokenize
from renyi_engine.objectives import SftTask
from renyi_kernels import linear_logprob

PASSES = 4
DROPOUT = 0.1


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, data: Data, seed: int
) -> dict[str, np.ndarray]:
    """Train one adapter and let it answer `PASSES` times. Returns what `methods.train` does."""
    torch.manual_seed(seed)
    num_layers = model.config.num_hidden_layers
    layers = range(num_layers - (setting.last_layers or num_layers), num_layers)
    modules = model.named_modules()
    linear = {path.rpartition(".")[2] for path, module in modules if isinstance(module, torch.nn.Linear)}
    config = LoraConfig(
        r=setting.lora_r,
        lora_alpha=16,
        target_modules=sorted(linear - {"lm_head"}),  # PEFT takes no "all-linear" beside layers_to_transform
        layers_to_transform=list(layers),
        lora_dropout=DROPOUT,
        task_type="CAUSAL_LM",
    )
    adapted, task = get_peft_model(model, config), SftTask(tokenizer, setting.max_length)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, setting.max_steps)
    examples, _ = tokenize(data.rows, task.example, "rows")  # without those that are too long, as other methods
    tokens, order, started = 0, [], time.monotonic()
    adapted.train()
    for _ in range(setting.max_steps):
        while len(order) < setting.batch_size:
            order += torch.randperm(len(examples)).tolist()
        batch, order = [examples[i] for i in order[: setting.batch_size]], order[setting.batch_size :]
        tokens += sum(len(example.input_ids) for example in batch)
        loss = -_logprob(adapted, task, batch).sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.monotonic() - started
    logp = torch.stack([_answers(adapted, task, data) for _ in range(PASSES)])
    found = {
        "logp": logp.numpy(),
        "weights": np.full(PASSES, 1 / PASSES),
        "seconds": np.array(seconds),
        "tokens": np.array(float(tokens)),
        "parameters": np.array(sum(parameter.numel() for parameter in trained)),
    }
    adapted.unload()
    return found


@torch.no_grad()
def _answers(model: torch.nn.Module, task: SftTask, data: Data) -> Tensor:
    """[N, C] nats, with dropout."""
    asked = []
    for number, question in enumerate(data.questions):
        choices = choices_of(task, question)
        for ids in choices.completions:
            labels = [-100] * len(choices.prompt) + ids
            asked.append(Example(number, choices.prompt + ids, labels))
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].input_ids))
    logp = torch.empty(len(asked))
    for start in range(0, len(asked), 64):
        chosen = order[start : start + 64]
        logp[chosen] = _logprob(model, task, [asked[i] for i in chosen]).float().cpu()
    return logp.view(len(data.questions), -1)


def _logprob(model: torch.nn.Module, task: SftTask, examples: Sequence[Example]) -> Tensor:
    """[B] nats: the log-likelihood of each example's labels."""
    base = model.get_base_model()
    batch = {name: values.to(base.device) for name, values in collate(examples, task.pad_token_id).items()}
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return linear_logprob(hidden, base.lm_head.weight, labels).sum(dim=-1)
