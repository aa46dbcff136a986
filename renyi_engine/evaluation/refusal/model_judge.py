"""The judge that is a local model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from transformers import PreTrainedModel

from renyi_engine import base_model
from renyi_engine.data import (
    Context,
    decode_answer,
    encode_prompts,
    left_padded,
    pad_token_id,
    stop_tokens,
    without_thought,
)
from renyi_engine.ensemble import ModelConfig
from renyi_engine.evaluation.refusal import verdicts
from renyi_engine.evaluation.refusal.verdicts import Exchange, Judge, Verdict, judge_prompt, verdict_of


class ModelJudge(Judge):
    """A local instruct model. It judges in batches, decodes greedily, and is loaded at the first question.

    Its chat template is told that it should not think. If it thinks all the same, it is asked again with more tokens.
    """

    depends_on_batch = True

    def __init__(self, settings: ModelConfig) -> None:
        """Raises ValueError if the model cannot be loaded or has no chat template."""
        self.name = f"model:{settings.model_name_or_path}"
        self._settings = settings
        base_model.load_config(settings, "judge")
        self._tokenizer = base_model.load_tokenizer(settings, "judge")
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"judge: expected an instruct model; {settings.model_name_or_path} has no chat template; choose another"
            )
        self._pad = pad_token_id(self._tokenizer)

    @cached_property
    def _model(self) -> PreTrainedModel:
        return base_model.load_model(self._settings, "judge")

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        replies = self._ask(exchanges, verdicts.MAX_ANSWER_TOKENS)
        thinking = [i for i, reply in enumerate(replies) if not without_thought(reply)]
        if thinking:
            again = self._ask([exchanges[i] for i in thinking], verdicts.MAX_THOUGHT_TOKENS)
            for i, reply in zip(thinking, again, strict=True):
                replies[i] = reply
        return list(map(verdict_of, replies))

    @torch.no_grad()
    def _ask(self, exchanges: Sequence[Exchange], max_new_tokens: int) -> list[str]:
        # templates that do not know `enable_thinking` ignore it
        context = Context(variables={"enable_thinking": False})
        encoded = encode_prompts(self._tokenizer, list(map(judge_prompt, exchanges)), context)
        input_ids, attention_mask = left_padded(encoded, self._pad)
        device = self._model.device
        tokens = self._model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # else a model's own sampling settings would cause warnings
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=stop_tokens(self._model, self._tokenizer),
            pad_token_id=self._pad,
        )
        said = tokens[:, input_ids.shape[1] :].tolist()
        return [decode_answer(self._tokenizer, *pair) for pair in zip(encoded, said, strict=True)]
