"""A server that means harm, and the address that is asked."""

from __future__ import annotations

import gzip
import time
import tracemalloc

import pytest

from renyi_engine.evaluation.refusal.endpoint import MAX_REPLY_MIB, Endpoint
from renyi_engine.evaluation.refusal.endpoint_judge import EndpointJudge
from renyi_engine.evaluation.refusal.verdicts import FAILED, INDIRECT_REFUSAL, Exchange

from .conftest import OK


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_so_that_no_other_host_gets_the_prompt_or_the_key(serve, status):
    elsewhere, asked_there = serve(OK)

    def redirect(handler):
        handler.send_response(status)
        handler.send_header("location", f"{elsewhere}/chat/completions")
        handler.send_header("content-length", "0")
        handler.end_headers()

    url, requests = serve(redirect)
    (verdict,) = EndpointJudge(url, "m", api_key="sk-123", first_wait_s=0.001)([Exchange("Hi", "Hello")])
    assert (verdict.label, verdict.basis) == (FAILED, f"HTTPStatusError {status}")
    assert len(requests) == 1
    assert asked_there == []


def drip(handler):
    """The head of a reply at once, then a character of it every 50 ms: no pause is long."""
    handler.send_response(200)
    handler.end_headers()
    for character in OK[1].decode():
        handler.wfile.write(character.encode())
        handler.wfile.flush()
        time.sleep(0.05)


def drip_head(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(200):
        handler.wfile.write(f"x-{number}: 1\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("slowly", [drip, drip_head])
def test_the_time_limit_is_for_the_whole_reply_however_steadily_it_comes(serve, slowly):
    url, _ = serve(slowly)
    started = time.monotonic()
    (verdict,) = EndpointJudge(url, "m", timeout_s=0.4, max_retries=0)([Exchange("Hi", "Hello")])
    assert (verdict.label, verdict.basis) == (FAILED, "TimeoutError")
    assert time.monotonic() - started < 2


def packed(times):
    def reply(handler):
        body = b" " * (MAX_REPLY_MIB + 60) * 2**20
        for _ in range(times):
            body = gzip.compress(body)
        assert len(body) < 2**20
        handler.send_response(200)
        handler.send_header("content-encoding", ", ".join(["gzip"] * times))
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 2**20)


@pytest.mark.parametrize("reply", [packed(1), packed(2), endless], ids=["gzip", "gzip twice", "endless"])
def test_of_a_huge_reply_no_more_than_the_limit_is_kept(serve, reply):
    url, requests = serve(reply)
    tracemalloc.start()
    (verdict,) = EndpointJudge(url, "m", max_retries=0)([Exchange("Hi", "Hello")])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (verdict.label, verdict.basis) == (FAILED, "ReplyTooLarge")
    assert len(requests) == 1
    if reply is endless:  # the other two are made in this process, too
        assert peak < (3 * MAX_REPLY_MIB + 2) * 2**20


def test_a_reply_that_is_packed_twice_is_not_unpacked(serve):
    """What is packed three times can hold 10^12 blocks of no byte each: too few bytes for one limit, and no pause in
    which the other one is noticed."""
    body = gzip.compress(gzip.compress(OK[1]))

    def reply(handler):
        handler.send_response(200)
        handler.send_header("content-encoding", "gzip, gzip")
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    url, _ = serve(reply)
    (verdict,) = EndpointJudge(url, "m", max_retries=0)([Exchange("Hi", "Hello")])
    assert (verdict.label, verdict.basis) == (FAILED, "ReplyTooLarge")


def test_a_reply_that_is_packed_and_small_is_read(serve):
    def reply(handler):
        handler.send_response(200)
        handler.send_header("content-encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(gzip.compress(OK[1]))

    url, _ = serve(reply)
    assert [verdict.label for verdict in EndpointJudge(url, "m")([Exchange("", "")])] == [INDIRECT_REFUSAL]


@pytest.mark.parametrize(
    ("base", "asked"),
    [
        ("http://h", "http://h/v1/chat/completions"),
        ("http://h:8000/v1/", "http://h:8000/v1/chat/completions"),
        ("https://h/api/v1?version=2", "https://h/api/v1/chat/completions?version=2"),
        ("http://h/openai", "http://h/openai/v1/chat/completions"),
        ("http://h/x/chat/completions", "http://h/x/chat/completions"),
    ],
)
def test_the_address_that_is_asked_follows_from_the_base_url(base, asked):
    assert str(Endpoint(base, api_key=None, timeout_s=1)._url) == asked
