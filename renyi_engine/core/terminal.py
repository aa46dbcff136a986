"""Makes control characters visible before they are printed, so that text of others cannot steer the terminal.

Data, models, files and error messages that quote them may hold control characters: an escape that clears the screen,
renames the window or hides a line, or a mark that makes a terminal write from right to left. They are written out, as
in "\\x1b". Text of any language and emoji stay as they are.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any, cast

# C0 but tab and newline, delete and C1; Unicode's line ends; marks that turn the direction of writing; surrogates
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with every character that steers a terminal written out, as in "\\\\x1b"; tab and newline stay."""
    return _STEERS.sub(_written_out, text)


def one_line(text: str) -> str:
    """`visible`, with tab and newline written out too: for a cell of a table, or a label."""
    return visible(text).replace("\t", "\\t").replace("\n", "\\n")


def _written_out(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@contextmanager
def only_text() -> Iterator[None]:
    """Inside, all that is printed is made `visible`: results, warnings, errors, and what libraries say.

    A progress display has to steer the terminal. It goes past this, to `rich_proxied_file`, a name that rich knows
    too; what it is told has to be made `visible` before.
    """
    out, err = (cast(IO[str], _Visible(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        except Exception:  # Python would print it after this block
            traceback.print_exc()
            raise SystemExit(1) from None


class _Visible:
    """A stream that makes everything `visible` before it writes it. It is no terminal, so libraries send no colours."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.rich_proxied_file = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding: str = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return False
