"""The judge that is a model on a server."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from renyi_engine.data import ANALYSIS, FINAL
from renyi_engine.evaluation.refusal import verdicts
from renyi_engine.evaluation.refusal.endpoint import Endpoint
from renyi_engine.evaluation.refusal.verdicts import Exchange, Judge, Verdict, judge_prompt, parse_answer, verdict_of

FIRST_WAIT_S = 1.0


class EndpointJudge(Judge):
    """A model on a server that speaks OpenAI's chat protocol. The exchanges of a call are sent at the same time.

    After a time-out, a broken connection, a reply that makes no sense, or one of the statuses 408, 429 and 5xx it tries
    again, `max_retries` times, after 1, 2, 4, ... seconds. If the last try fails too, the verdict is FAILED. Any other
    status, a redirect too, gives FAILED at once. A model that was cut off before it named a label is asked once more,
    with enough tokens to finish its thought.
    """

    depends_on_batch = False

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self.name = f"endpoint:{base_url} {model}"
        self._model = model
        self._num_tries = 1 + max_retries
        self._first_wait_s = first_wait_s
        self._endpoint = Endpoint(base_url, api_key=api_key, timeout_s=timeout_s)

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        with ThreadPoolExecutor(max(len(exchanges), 1)) as pool:
            return list(pool.map(self._verdict, exchanges))

    def _verdict(self, exchange: Exchange) -> Verdict:
        for trial in range(self._num_tries):
            if trial:
                time.sleep(self._first_wait_s * 2 ** (trial - 1))
            try:
                return verdict_of(self._ask(exchange))
            except Exception as error:  # nothing that a server does may stop the evaluation
                status = getattr(getattr(error, "response", None), "status_code", None)
                # only the kind of error is kept: a message may repeat what was sent, and so the key
                failure = Verdict(verdicts.FAILED, " ".join([type(error).__name__, *([str(status)] if status else [])]))
            if status is not None and status not in (408, 429) and status < 500:
                break
        return failure

    def _ask(self, exchange: Exchange) -> str | None:
        """The server's reply; None if it was cut off before the first character: some servers hide thoughts."""
        reply, was_cut = self._reply(exchange, verdicts.MAX_ANSWER_TOKENS)
        if was_cut and parse_answer(reply or "") == verdicts.UNPARSED:
            reply, was_cut = self._reply(exchange, verdicts.MAX_THOUGHT_TOKENS)
        if was_cut and not reply:
            return None
        if not isinstance(reply, str):
            raise TypeError(f"expected text; got {type(reply).__name__}")
        return reply

    def _reply(self, exchange: Exchange, max_tokens: int) -> tuple[str | None, bool]:
        """What the server says, and whether it was cut off."""
        # one turn of the user: some chat templates have no system turn
        messages = [{"role": "user", "content": judge_prompt(exchange)}]
        completion = self._endpoint.post(
            {"model": self._model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
        )
        choice = completion["choices"][0]
        reply = choice["message"].get("content")
        if isinstance(reply, str):
            # some servers drop gpt-oss's special tokens and send "analysisWe need ...assistantfinalYes."
            reply = re.sub(r"\Aanalysis(?=\w)", ANALYSIS, reply).replace("assistantfinal", FINAL)
        return reply, choice.get("finish_reason") == "length"
