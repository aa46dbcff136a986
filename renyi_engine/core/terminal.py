"""Makes control characters visible before they are printed, so that text of other people cannot control the terminal.

Data, models and files may hold control characters, and error messages quote them. Such a character may clear the
screen, rename the window, hide a line, or make the terminal write from right to left. It is printed as a code, such as
"\\x1b". Text of any language and emoji stay as they are.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any, cast

# C0 without tab and newline, delete, and C1; Unicode's line ends; marks that change the direction; surrogates
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with a code such as "\\\\x1b" for every character that controls a terminal. Tab and newline stay."""
    return _STEERS.sub(_written_out, text)


def one_line(text: str) -> str:
    """Like `visible`, but tab and newline become codes too. It is meant for a cell of a table, or a label."""
    return visible(text).replace("\t", "\\t").replace("\n", "\\n")


def _written_out(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@contextmanager
def only_text() -> Iterator[None]:
    """Inside the block, everything that is printed is made `visible`: results, warnings, errors, messages of libraries.

    A progress display has to control the terminal. So it writes to `rich_proxied_file`, the stream itself, under a name
    that rich knows too. The display makes each text `visible` first.
    """
    out, err = (cast(IO[str], _Visible(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        except Exception:  # Python would print it after this block, and not make it visible
            traceback.print_exc()
            raise SystemExit(1) from None


class _Visible:
    """A stream that makes text `visible` and writes it. It says that it is no terminal, so nothing sends it colours."""

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


def use_plain_warnings() -> None:
    """Print every warning from now on in one line, without the source line that raised it."""
    warnings.formatwarning = lambda message, *_, **__: visible(f"warning: {message}\n")
