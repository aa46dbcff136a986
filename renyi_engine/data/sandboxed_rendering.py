"""Renders chat templates in a process of its own, whose time and memory are limited.

A chat template is a program that comes with a model. transformers runs it in a sandbox. The sandbox keeps it from files
and modules, but lets it loop for ever, or double a text until the machine has no memory left. So this file is also a
program: a worker that renders one conversation after the other. If a conversation takes too long, the operating system
ends the worker. The worker is started for the first conversation. It needs transformers and jinja, but not torch.
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
"""How much processor time one conversation may take. Usually it takes some milliseconds."""
MAX_MEMORY_MIB = 1024
"""How much memory the worker may take beyond what it needs to start."""
_TOO_MUCH_MEMORY = {"limit": f"takes more than {MAX_MEMORY_MIB} MiB"}

# Python looks for modules first in the folder of the program that it runs, or, with -c, in the current folder. Neither
# is wanted: this folder holds modules of a package, and the current folder may hold files of somebody else.
_START = (
    "import sys; sys.path[:] = filter(None, sys.path); import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
)
_NO_MEMORY = 3
"""The exit code of a worker whose memory ran out while it read a request or wrote a reply."""


class TemplateRefuses(Exception):
    """The template, or the sandbox around it, raised an error about the messages. The text is its first line."""


class LimitReached(Exception):
    """The template needs more time or memory than it may take. The text says which, as in "takes more than 5 s"."""


def render(**arguments: Any) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans that the template marks with {% generation %}) of one conversation.

    Args:
        arguments: those of transformers' `render_jinja_template`. A value that JSON has no form for becomes text.

    Raises:
        TemplateRefuses: the template raised an error.
        LimitReached: the template needs too much time or memory.
    """
    reply = _worker(os.getpid()).ask({"time_limit_s": TIME_LIMIT_S, "arguments": arguments})
    if "limit" in reply:
        raise LimitReached(reply["limit"])
    if "error" in reply:
        raise TemplateRefuses(reply["error"])
    return reply["text"], [(start, end) for start, end in reply["spans"]]


@cache
def _worker(process_id: int) -> _Worker:
    """The worker of this process. A forked process gets its own, because two processes with one worker would read each
    other's replies."""
    return _Worker()


class _Worker:
    """The process of the worker. It is started for the first request, and again if it has ended."""

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
                self._stop()  # else a late reply would be taken for the reply to the next request
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
        with contextlib.suppress(BrokenPipeError):  # the worker ended while it read: its exit code says why
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
        # in a session of its own, so that Ctrl-C reaches only the process that can save something
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
        if process is not None and os.getpid() == self._owner:  # a forked process does not own the worker
            process.kill()
            process.communicate()


# ---------------------------------------------------------------------- the worker


def _work(requests: IO[str], replies: IO[str]) -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # so that transformers takes it for not installed
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + MAX_MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        for line in requests:
            replies.write(json.dumps(_reply(render_jinja_template, line)) + "\n")
            replies.flush()
    except MemoryError:  # while reading or writing: the rest of the line would be taken for the next request
        os._exit(_NO_MEMORY)


def _reply(render_jinja_template: Callable[..., Any], line: str) -> dict[str, Any]:
    try:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["time_limit_s"])
        [text], spans = render_jinja_template(**request["arguments"])
        return {"text": text, "spans": spans[0] if spans else []}
    except MemoryError:
        return _TOO_MUCH_MEMORY
    except Exception as error:  # a template may raise anything
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return {"error": first_line[:500]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _work(sys.stdin, sys.stdout)
