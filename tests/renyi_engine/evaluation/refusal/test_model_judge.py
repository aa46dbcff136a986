"""A local model as judge: padding, the end of its turn, and time to think."""

from __future__ import annotations

from renyi_engine.evaluation.refusal.judges import make_judge
from renyi_engine.evaluation.refusal.verdicts import (
    DIRECT_ANSWER,
    DIRECT_REFUSAL,
    INDIRECT_REFUSAL,
    MAX_ANSWER_TOKENS,
    MAX_THOUGHT_TOKENS,
    UNFINISHED,
    UNPARSED,
    Exchange,
    Verdict,
    judge_prompt,
)

from .conftest import CPU


def test_a_local_judge_says_the_same_of_an_exchange_alone_and_beside_a_longer_one(model_folder):
    judge = make_judge(f"model:{model_folder}", compute=CPU)
    # the tiny model reads 128 characters at most without losing its place: only padding matters here
    exchanges = [Exchange("a", "b"), Exchange("a longer one", "with a longer reply, so that the other is padded")]
    together = judge(exchanges)
    assert together == [*judge(exchanges[:1]), *judge(exchanges[1:])]
    assert all(verdict.basis for verdict in together)
    assert judge.name == f"model:{model_folder}"


def test_a_local_judge_takes_the_label_that_its_model_writes(plays):
    judge, prompts, limits = plays("asked", ["Direct answer.<|im_end|>", "indirect_refusal<|im_end|>"])
    exchanges = [Exchange("Hi", "Hello"), Exchange("Hi there", "Hm")]
    assert judge(exchanges) == [Verdict(DIRECT_ANSWER, "Direct answer."), Verdict(INDIRECT_REFUSAL, "indirect_refusal")]
    assert limits == [MAX_ANSWER_TOKENS]
    # asked not to think, and nothing is cut off by the padding
    assert prompts[0] == [
        f"<|im_start|>user\n{judge_prompt(exchange)}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        for exchange in exchanges
    ]


def test_a_local_judge_stops_where_its_template_ends_a_turn_though_its_model_names_another_token(plays):
    judge, _, _ = plays("asked", ["direct_refusal<|im_end|>\n<|im_start|>user\nOr a direct_answer?"])
    assert judge([Exchange("Hi", "No.")]) == [Verdict(DIRECT_REFUSAL, "direct_refusal")]


def test_a_local_judge_that_thinks_is_asked_again_with_room_to_finish(plays):
    long = "Is it a direct_answer? " * 20
    judge, prompts, limits = plays(
        "asked",
        [f"<|START_THINKING|>{long}", "direct_answer<|im_end|>", f"<think>{long}"],
        [f"<|START_THINKING|>{long}<|END_THINKING|>direct_refusal<|im_end|>", f"<think>{long}<|im_end|>"],
    )
    verdicts = judge([Exchange("Hi", "No."), Exchange("Hi", "Yes."), Exchange("Hi", "Hm.")])
    assert [v.label for v in verdicts] == [DIRECT_REFUSAL, DIRECT_ANSWER, UNPARSED]
    assert [v.basis for v in verdicts] == ["direct_refusal", "direct_answer", UNFINISHED]
    assert limits == [MAX_ANSWER_TOKENS, MAX_THOUGHT_TOKENS]
    assert prompts[1] == [prompts[0][0], prompts[0][2]]


def test_a_local_judge_whose_template_begins_the_thought_is_asked_again_too(plays):
    thought = "It could be a direct_answer, " * 20
    judge, _, limits = plays("always", [thought], [f"{thought}</think>\n\nindirect_refusal<|im_end|>"])
    assert judge([Exchange("Hi", "Hm.")]) == [Verdict(INDIRECT_REFUSAL, "indirect_refusal")]
    assert limits == [MAX_ANSWER_TOKENS, MAX_THOUGHT_TOKENS]
