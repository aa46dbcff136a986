"""Reads pages as a person would who has nothing but a clone: every block of code is run, in the order of the page.

    python reader.py CLONE EMPTY_FOLDER      prints {page: [[language, code, output, error or null], ...]} as JSON

README.md and docs/getting_started.md start in a fresh copy of the clone. The other pages go on from a copy of what
getting_started.md left. The Python blocks of a page share their names, as in one session.

One process imports torch and transformers, and forks for each page and for each `renyi-engine` command: imported anew,
they would take most of the time.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import transformers  # noqa: F401  (before the forks)
from markdown_it import MarkdownIt

from renyi_engine import cli, train  # noqa: F401

README, START = "README.md", "docs/getting_started.md"
RUN = ("python", "bash")
NEEDS = "# needs "
"""How a block begins that needs what a clone does not have. A reader sees it, and the block is not run."""


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(language, code) of each fenced block; directives of Sphinx, as {toctree}, are none."""
    fences = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    return [(fence.info, fence.content) for fence in fences if not fence.info.startswith("{")]


def pages_of(clone: Path) -> list[str]:
    others = sorted(str(path.relative_to(clone)) for path in (clone / "docs").glob("*.md"))
    return [README, START, *(page for page in others if page != START)]


def read(page: str, folder: Path) -> None:
    """Run the blocks of a page in `folder`, up to the first that fails; read.json beside it says what came of them."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = f"{folder}:{folder / 'kernels'}"
    names: dict[str, object] = {"__name__": "__main__"}
    results = []
    for number, (language, code) in enumerate(blocks_of((folder / page).read_text(encoding="utf-8"))):
        if language not in RUN or code.startswith(NEEDS):
            continue
        output, error = folder.parent / f"{number}.txt", None
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            if language == "python":
                exec(compile(code, f"{page}, block {number}", "exec"), names)
            else:
                run_shell(code)
        except BaseException:
            error = traceback.format_exc()
        sys.stdout.flush()
        results.append((language, code, output.read_text(encoding="utf-8", errors="replace"), error))
        if error is not None:
            break
    (folder.parent / "read.json").write_text(json.dumps(results))


def run_shell(code: str) -> None:
    """The commands of a block in turn: those of renyi-engine in a fork, what stands between them in bash."""
    lines = code.replace("\\\n", " ").splitlines()
    while lines:
        ours = lines[0].startswith("renyi-engine ")
        script = []
        while lines and lines[0].startswith("renyi-engine ") == ours and not (ours and script):
            script.append(lines.pop(0))
        if ours:
            status = in_a_fork(command_line, script[0])
        else:
            status = subprocess.run(["bash", "-euo", "pipefail", "-c", "\n".join(script)]).returncode
        if status:
            raise RuntimeError(f"exit status {status} of {script[0]}")


def command_line(line: str) -> int:
    sys.argv = shlex.split(line, comments=True)
    return cli.main()


def in_a_fork(function: Callable[..., int | None], *arguments: object) -> int:
    """The exit status of a process that goes on from here with `function`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function(*arguments) or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    clone, scratch = (Path(argument).resolve() for argument in sys.argv[1:])
    results = {}
    for page in pages_of(clone):
        folder = scratch / page / "clone"
        shutil.copytree(clone if page in (README, START) else scratch / START / "clone", folder)
        if in_a_fork(read, page, folder):
            raise SystemExit(f"{page}: could not be read")
        results[page] = json.loads((scratch / page / "read.json").read_text())
    print(json.dumps(results))


if __name__ == "__main__":
    main()
