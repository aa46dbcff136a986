"""The responses and their verdicts, in a .jsonl file that grows line by line, so that stopped work can continue.

A line holds one response and a checksum of it. The line is written when the response is generated, and again when it is
judged. If several lines hold the same response, the last one counts. `finish` leaves one line for each response, in
order: the same bytes, whether or not the work was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renyi_engine.core import files

BASE = "base"
"""Stands for the frozen base where a particle would have its number."""

CHECKSUM = "sha256"
"""The field of a line that holds the first 16 digits of the checksum of its other fields."""

Speaker = int | str
"""A particle's number, or BASE."""
Key = tuple[int, Speaker, int]
"""(prompt id, particle, sample)."""


@dataclass(frozen=True)
class Response:
    """One sample of one speaker on one prompt. `judge`, `verdict` and `basis` are None until it is judged."""

    split: str
    prompt_id: int
    particle: Speaker
    sample: int
    response: str
    judge: str | None = None
    verdict: str | None = None
    basis: str | None = None

    @property
    def key(self) -> Key:
        return self.prompt_id, self.particle, self.sample


class ResponseFile:
    """The responses in the file `path`, by key. A file that does not exist yet counts as empty."""

    def __init__(self, path: Path) -> None:
        """Read the file. If the last line was cut short by a kill, it is removed from the file, with a warning.

        Raises:
            ValueError: some other line is not a response, or does not fit its checksum.
        """
        self._path = path
        self.responses: dict[Key, Response] = {}
        whole = path.read_bytes() if path.exists() else b""
        *lines, rest = whole.split(b"\n")
        if rest:
            warnings.warn(f"{path}: the last line was cut short; it is removed", stacklevel=2)
            os.truncate(path, len(whole) - len(rest))
        for number, line in enumerate(lines, start=1):
            try:
                response = _response(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {number} is not a response as it was written ({error}); remove the line, and the "
                    "response is generated again"
                ) from None
            self.responses[response.key] = response

    def write(self, responses: Iterable[Response]) -> None:
        """Append responses, with or without verdicts. The operating system has them when this returns."""
        responses = list(responses)
        files.append_text(self._path, "".join(map(_line, responses)))
        self.responses |= {response.key: response for response in responses}

    def in_order(self) -> list[Response]:
        """All responses, by prompt, then by particle (the base last), then by sample."""
        return sorted(self.responses.values(), key=lambda r: (r.prompt_id, r.particle == BASE, r.particle, r.sample))

    def finish(self) -> None:
        """Replace all lines by one line for each response, in order."""
        files.write_text(self._path, "".join(map(_line, self.in_order())))


def _line(response: Response) -> str:
    fields = dataclasses.asdict(response)
    return json.dumps(fields | {CHECKSUM: _checksum(fields)}) + "\n"


def _response(value: Any) -> Response:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object; got {type(value).__name__}")
    checksum = value.pop(CHECKSUM, None)
    if checksum != _checksum(value):
        raise ValueError(f"its {CHECKSUM} does not fit its content")
    response = Response(**value)
    numbers = [response.prompt_id, response.sample, 0 if response.particle == BASE else response.particle]
    if not isinstance(response.response, str) or not all(isinstance(number, int) for number in numbers):
        raise ValueError("response must be a text; prompt_id, sample and particle must be whole numbers")
    return response


def _checksum(fields: dict[str, Any]) -> str:
    return files.sha256_of_json(fields)[:16]
