"""Renders chat templates in a process of its own, whose time and memory are limited.

A chat template is a program that comes with a model. transformers runs it in a sandbox, which keeps it from files and
modules, but lets it loop for ever, or double a text until the machine has no memory left. So this file is also a
program: a worker that renders one conversation after the other. If one of them takes too long, the operating system
ends the worker. It is started at the first conversation, and needs transformers and jinja, but not torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import IO, Any

TIME_LIMIT_S = 5
"""Processor time of one conversation, which takes some milliseconds."""
MAX_MEMORY_MIB = 1024
"""What the worker may ask for beyond what it needs to start."""
_TOO_MUCH_MEMORY = {"limit": f"takes more than {MAX_MEMORY_MIB} MiB"}

# not by its path alone: a program's folder is where it looks for modules first, and this one holds a package's files;
# the current folder, which is where -c looks first, may hold somebody else's
_START = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
)
_NO_MEMORY = 3
"""What the worker ends with where memory ended outside of a template."""


class TemplateRefuses(Exception):
    """The template, or the sandbox around it, raised an error about the messages; the text is its first line."""


class LimitReached(Exception):
    """The template needs more than its time or memory; the text says which, as "takes more than 5 s"."""


def render(**arguments: Any) -> tuple[str, list[tuple[int, int]]]:
    """(text, where the template's generation marks are): `render_jinja_template` of transformers on one conversation.

    Args:
        arguments: of that function; what JSON does not know is given to the template as text.

    Raises:
        TemplateRefuses, LimitReached.
    """
    reply = _worker(os.getpid()).ask({"time_limit_s": TIME_LIMIT_S, "arguments": arguments})
    if "limit" in reply:
        raise LimitReached(reply["limit"])
    if "error" in reply:
        raise TemplateRefuses(reply["error"])
    return reply["text"], [(start, end) for start, end in reply["spans"]]


@cache
def _worker(process_id: int) -> _Worker:
    """The worker of this process. A forked process gets one of its own: two processes with the same worker would read
    each other's replies."""
    return _Worker()


class _Worker:
    """The worker's process, started at the first request, and again if it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        atexit.register(self._stop)

    def ask(self, request: Any) -> dict[str, Any]:
        with self._lock:
            try:
                return self._ask(request)
            except BaseException:
                self._stop()  # a late reply would be taken for that to the next request
                raise

    def _ask(self, request: Any) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = json.dumps(request, default=str) + "\n"
        except RecursionError:
            return {"error": "values are nested too deep"}
        with contextlib.suppress(BrokenPipeError):  # it ended while it read: the exit code says why
            process.stdin.write(line)
            process.stdin.flush()
        if reply := process.stdout.readline():
            return json.loads(reply)
        code = process.wait()
        if code == -signal.SIGPROF:
            return {"limit": f"takes more than {TIME_LIMIT_S} s"}
        if code == _NO_MEMORY:
            return _TOO_MUCH_MEMORY
        if code < 0:
            return {"limit": f"ends its process ({signal.strsignal(-code)})"}
        raise RuntimeError(f"the process that renders chat templates ended with code {code}")

    def _start(self) -> subprocess.Popen[str]:
        # in a session of its own: Ctrl-C is for the process that can save something
        return subprocess.Popen(
            [sys.executable, "-c", _START, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
            start_new_session=True,
        )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._owner:  # a fork that ends would wait for it
            process.kill()
            process.communicate()


# ---------------------------------------------------------------------- the worker


def _work(requests: IO[str], replies: IO[str]) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + MAX_MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        for line in requests:
            replies.write(json.dumps(_reply(render_jinja_template, line)) + "\n")
            replies.flush()
    except MemoryError:  # of a line that is read, the rest of which would be taken for the next one, or of a reply
        os._exit(_NO_MEMORY)


def _reply(render_jinja_template: Callable[..., Any], line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["time_limit_s"])
        [text], spans = render_jinja_template(**request["arguments"])
        return {"text": text, "spans": spans[0] if spans else []}
    except MemoryError:
        return _TOO_MUCH_MEMORY
    except Exception as error:  # whatever it raises is about these messages
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return {"error": first_line[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _work(sys.stdin, sys.stdout)
