"""The connection to the server that an endpoint judge asks. The server is not trusted: it cannot delay the evaluation
without limit, fill the memory, or make us send the prompt to another server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx2

MAX_REPLY_MIB = 4
"""The largest reply, unpacked. A reply of 4096 tokens, all of them escaped, has less than 1 MiB."""


class ReplyTooLarge(Exception):
    """The reply is larger than MAX_REPLY_MIB, or is packed more than once and may be larger."""


class Endpoint:
    """The chat completions of a server that speaks OpenAI's protocol. Several threads may use it at once."""

    def __init__(self, base_url: str, *, api_key: str | None, timeout_s: float) -> None:
        """Raises ValueError if `base_url` is not an address, or holds a user's name or password."""
        self._url = _completions_url(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._certificates = httpx2.create_ssl_context()

    def post(self, payload: Mapping[str, Any]) -> Any:
        """The reply of the server to `payload`, parsed from JSON. No redirect is followed, not even to the same host.

        Raises:
            TimeoutError: the whole reply was not there after `timeout_s`.
            httpx2.HTTPStatusError: the status is not 2xx; a redirect counts among these.
            httpx2.TransportError: there is no connection, or it broke.
            ReplyTooLarge: the reply is too large.
            ValueError: the reply is not JSON.
        """
        # every request has an event loop of its own, where the time limit stops it whatever it waits for
        return json.loads(asyncio.run(asyncio.wait_for(self._post(payload), self._timeout_s)))

    async def _post(self, payload: Mapping[str, Any]) -> bytes:
        client = httpx2.AsyncClient(verify=self._certificates, timeout=None, follow_redirects=False)
        async with client, client.stream("POST", self._url, json=payload, headers=self._headers) as response:
            response.raise_for_status()
            if "," in response.headers.get("content-encoding", ""):
                # packed twice, a few bytes can take hours to unpack, and the time limit would not be noticed meanwhile
                raise ReplyTooLarge
            reply = bytearray()
            async for part in response.aiter_bytes():  # each part is bounded after unpacking
                reply += part
                if len(reply) > MAX_REPLY_MIB * 2**20:
                    raise ReplyTooLarge
            return bytes(reply)


def _completions_url(base_url: str) -> httpx2.URL:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"judge: expected endpoint:http://HOST:PORT/v1 or alike; got {base_url!r} ({error})") from None
    if url.userinfo:
        # the message does not repeat the address, which may hold a password
        raise ValueError(
            "judge: the endpoint's address holds a name or a password; remove it, and pass a key with "
            "--judge_api_key_env"
        )
    path = url.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return url.copy_with(path=path)
