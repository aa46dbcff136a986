"""The server that an endpoint judge asks. It is not trusted: it cannot hold up the evaluation, fill the memory, or send
the prompt on to somebody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx2

MAX_REPLY_MIB = 4
"""Largest reply, unpacked. One of 4096 tokens, all of them escaped, has less than 1 MiB."""


class ReplyTooLarge(Exception):
    """The reply has more than MAX_REPLY_MIB, or may have: it is packed more than once."""


class Endpoint:
    """The chat completions of a server that speaks OpenAI's protocol. Safe to use from several threads."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_s: float) -> None:
        """Raises ValueError where `base_url` is no address, or holds a user's name or password."""
        self._url = _completions_url(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._certificates = httpx2.create_ssl_context()

    def post(self, payload: Mapping[str, Any]) -> Any:
        """What the server replies to `payload`, parsed from JSON.

        A redirect is not followed, whether it leads to the same host or to another.

        Raises:
            TimeoutError: the last byte of the reply was not there `timeout_s` after the call. httpx2.HTTPStatusError:
                any status but 2xx, a redirect among them. httpx2.TransportError: no connection, or a broken one.
                ReplyTooLarge. ValueError: the reply is not JSON.
        """
        # a loop of its own for every request: only there can all of it be stopped, whatever it waits for
        return json.loads(asyncio.run(asyncio.wait_for(self._post(payload), self._timeout_s)))

    async def _post(self, payload: Mapping[str, Any]) -> bytes:
        client = httpx2.AsyncClient(verify=self._certificates, timeout=None, follow_redirects=False)
        async with client, client.stream("POST", self._url, json=payload, headers=self._headers) as response:
            response.raise_for_status()
            if "," in response.headers.get("content-encoding", ""):
                # packed twice, a few bytes take hours to unpack, without a pause in which the time limit is noticed
                raise ReplyTooLarge
            reply = bytearray()
            async for part in response.aiter_bytes():  # unpacked a bounded part at a time
                reply += part
                if len(reply) > MAX_REPLY_MIB * 2**20:
                    raise ReplyTooLarge
            return bytes(reply)


def _completions_url(base_url: str) -> httpx2.URL:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"judge: expected the address of an endpoint; got {base_url!r} ({error})") from None
    if url.userinfo:
        # not repeated: it may be a password, and the address is written into the results
        raise ValueError(
            "judge: the endpoint's address holds a name or a password; leave it out, and pass a key with "
            "--judge_api_key_env"
        )
    path = url.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return url.copy_with(path=path)
