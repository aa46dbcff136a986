"""A model on a server as judge: tries, waits, time to think, and the key."""

from __future__ import annotations

import time

import pytest

from renyi_engine.evaluation.refusal.endpoint_judge import EndpointJudge
from renyi_engine.evaluation.refusal.judges import make_judge
from renyi_engine.evaluation.refusal.verdicts import (
    DIRECT_ANSWER,
    DIRECT_REFUSAL,
    FAILED,
    INDIRECT_REFUSAL,
    LABELS,
    LONGEST_BASIS,
    MAX_ANSWER_TOKENS,
    MAX_THOUGHT_TOKENS,
    UNFINISHED,
    UNPARSED,
    Exchange,
    Verdict,
    judge_prompt,
)

from .conftest import CPU, OK, THOUGHT, completion


def test_a_server_that_times_out_talks_garbage_and_breaks_is_asked_again_until_it_answers(serve):
    replies = (0.4, (200, b"<html>"), (200, b'{"choices": []}'), (503, b""), (429, b"{}"), (200, completion(None)), OK)
    url, requests = serve(*replies)
    judge = EndpointJudge(url, "judge-7b", timeout_s=0.15, max_retries=6, first_wait_s=0.01)
    (verdict,) = judge([Exchange("Hi", "Hello")])
    assert (verdict.label, verdict.basis) == (INDIRECT_REFUSAL, "Indirect refusal.")
    assert len(requests) == len(replies)
    path, _, body = requests[-1]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("judge-7b", 0.0)
    assert body["messages"] == [{"role": "user", "content": judge_prompt(Exchange("Hi", "Hello"))}]


def cut(content):
    return 200, completion(content, "length")


@pytest.mark.parametrize(
    ("replies", "verdict"),
    [
        # a thought that the server keeps back
        ([cut(None), OK], Verdict(INDIRECT_REFUSAL, "Indirect refusal.")),
        ([cut(None), cut(None)], Verdict(UNPARSED, UNFINISHED)),
        ([cut(""), cut("")], Verdict(UNPARSED, UNFINISHED)),
        # one that it sends
        ([cut(f"<think>{THOUGHT}"), (200, completion(f"<think>{THOUGHT}</think>direct_refusal"))],
         Verdict(DIRECT_REFUSAL, "direct_refusal")),
        ([cut(f"<think>{THOUGHT}")] * 2, Verdict(UNPARSED, UNFINISHED)),
        # one of which it sends no start, as the generation prompt has it
        ([cut("Let me see."), (200, completion(f"Let me see. {THOUGHT}</think>direct_refusal"))],
         Verdict(DIRECT_REFUSAL, "direct_refusal")),
        # gpt-oss without its special tokens
        ([cut(f"analysis{THOUGHT}"), (200, completion(f"analysis{THOUGHT}assistantfinaldirect_refusal"))],
         Verdict(DIRECT_REFUSAL, "direct_refusal")),
        ([cut(f"analysis{THOUGHT}")] * 2, Verdict(UNPARSED, UNFINISHED)),
    ],
)  # fmt: skip
def test_a_server_whose_model_thinks_is_asked_again_with_room_to_finish(serve, replies, verdict):
    url, requests = serve(*replies)
    assert EndpointJudge(url, "m", max_retries=0)([Exchange("Hi", "Hello")]) == [verdict]
    assert [body["max_tokens"] for _, _, body in requests] == [MAX_ANSWER_TOKENS, MAX_THOUGHT_TOKENS]


def test_a_server_that_names_a_label_in_time_is_asked_once(serve):
    url, requests = serve(cut("The reply does what was requested.\ndirect_answer"))
    (verdict,) = EndpointJudge(url, "m")([Exchange("Hi", "Hello")])
    assert verdict.label == DIRECT_ANSWER
    assert len(requests) == 1


def test_the_waits_between_tries_double(serve, monkeypatch):
    url, requests = serve((500, b""))
    waits = []
    monkeypatch.setattr("renyi_engine.evaluation.refusal.endpoint_judge.time.sleep", waits.append)
    EndpointJudge(url, "m", max_retries=3, first_wait_s=0.5)([Exchange("", "")])
    assert waits == [0.5, 1.0, 2.0]
    assert len(requests) == 4


@pytest.mark.parametrize(
    ("reply", "num_tries"), [((500, b"sk-123"), 3), ((401, b"bad key sk-123"), 1), ((400, b""), 1)]
)
def test_a_server_that_never_answers_gives_failed_after_the_stated_tries(serve, reply, num_tries):
    url, requests = serve(reply)
    judge = EndpointJudge(url, "m", api_key="sk-123", max_retries=2, first_wait_s=0.001)
    (verdict,) = judge([Exchange("Hi", "Hello")])
    assert verdict.label == FAILED
    assert str(reply[0]) in verdict.basis
    assert "sk-123" not in verdict.basis
    assert len(requests) == num_tries


def test_nobody_listening_gives_failed(serve):
    judge = EndpointJudge("http://127.0.0.1:9/v1", "m", max_retries=1, first_wait_s=0.001)
    assert [verdict.label for verdict in judge([Exchange("", "")] * 2)] == [FAILED, FAILED]


def test_verdicts_keep_the_order_of_their_exchanges(serve, monkeypatch):
    judge = EndpointJudge("http://unused", "m")

    def ask(exchange):
        time.sleep(0.05 * (exchange.response == "slow"))
        return LABELS[exchange.response == "slow"]

    monkeypatch.setattr(judge, "_ask", ask)
    exchanges = [Exchange("", response) for response in ("slow", "fast", "slow", "fast")]
    assert [verdict.label for verdict in judge(exchanges)] == [LABELS[1], LABELS[0]] * 2


def test_the_key_comes_from_the_environment_and_the_hubs_own_token_goes_nowhere(serve, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.setenv("JUDGE_KEY", "sk-123")
    url, requests = serve(OK)
    for variable in ("JUDGE_KEY", None):
        make_judge(f"endpoint:{url}", compute=CPU, model="m", api_key_env=variable)([Exchange("", "")])
    sent = [{k.lower(): v for k, v in headers.items()}.get("authorization") for _, headers, _ in requests]
    assert "hf_private" not in str(requests)
    assert sent == ["Bearer sk-123", None]


def test_of_a_long_reply_only_the_beginning_is_kept_as_the_basis_of_a_verdict(serve):
    long = "It evades. " * 10_000
    url, _ = serve((200, completion(f"{long}\nindirect_refusal")))
    assert EndpointJudge(url, "m")([Exchange("", "")]) == [Verdict(INDIRECT_REFUSAL, long[:LONGEST_BASIS])]
