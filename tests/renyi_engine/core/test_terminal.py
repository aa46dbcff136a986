"""Text of others on a terminal: control characters are written out, all other characters stay."""

from __future__ import annotations

import io
import json
import shutil
import sys
import unicodedata
import warnings

import pytest
from hypothesis import given, strategies as st
from rich.console import Console

from renyi_engine import cli
from renyi_engine.cli import main
from renyi_engine.core.progress import TrainingProgress, track
from renyi_engine.core.terminal import one_line, only_text, visible

from ..tokenizers_for_tests import byte_pair_tokenizer

# clears the screen; renames the window; C1; writes from right to left; goes back to the start of the line
HOSTILE = "\x1b[2J \x1b]0;title\x07 \x9b31m \u202e \u2066 \u2028 over\rwritten \x7f"
WRITTEN_OUT = r"\x1b[2J \x1b]0;title\x07 \x9b31m \u202e \u2066 \u2028 over\x0dwritten \x7f"


def steers(character: str) -> bool:
    """By Unicode's own tables."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in directions


def test_exactly_what_steers_is_written_out_of_all_there_is():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        kept = visible(character) == character
        assert kept == (character in "\n\t" or not steers(character)), hex(code)


@given(st.text(st.characters()))
def test_no_text_steers_and_what_is_written_out_stays_so(text):
    assert not any(map(steers, one_line(text)))
    assert not any(steers(c) for c in visible(text) if c not in "\n\t")
    assert visible(visible(text)) == visible(text)


@pytest.mark.parametrize(
    "text",
    [
        "Grüße, 中文　日本語, Ελληνικά",
        "שלום \u200f!",
        "مرحبا \u200e1",
        "नमस्ते",
        "می\u200cخواهم",
        "👩\u200d👩\u200d👧 ❤️ 🇩🇪",
        "a\tb\nc",
    ],
)
def test_every_language_and_emoji_can_be_read(text):
    assert visible(text) == text


def test_in_a_cell_a_line_end_is_written_out_too():
    assert one_line("a\n\tb") == r"a\n\tb"


# ---------------------------------------------------------------------- the command line


def nothing_steers(printed):
    assert not any(steers(c) for c in printed if c not in "\n\t"), printed
    return printed


def test_whatever_a_command_prints_warns_or_dies_of_is_shown(monkeypatch, capsys):
    def command(_):
        print(HOSTILE)
        sys.stdout.writelines([HOSTILE, "\n"])
        print(HOSTILE, file=sys.stderr)
        warnings.warn(HOSTILE, stacklevel=1)
        raise {"bad input": ValueError, "failed": OSError, "a bug": ZeroDivisionError}[kind](HOSTILE)

    monkeypatch.setitem(cli._COMMANDS, "env", command)
    for kind, code in {"bad input": 2, "failed": 2, "a bug": 1}.items():
        if kind == "a bug":
            with pytest.raises(SystemExit) as stop:
                main(["env"])
            assert stop.value.code == code
        else:
            assert main(["env"]) == code
        printed = capsys.readouterr()
        assert nothing_steers(printed.out).count(WRITTEN_OUT) == 2
        assert nothing_steers(printed.err).count(WRITTEN_OUT) >= 2
    assert "ZeroDivisionError" in printed.err
    assert "Traceback" in printed.err


def test_a_dry_run_shows_what_a_row_holds(model_folder, jsonl, tmp_path, capsys):
    model = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = byte_pair_tokenizer("")  # knows every character
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    data = jsonl(tmp_path / "data.jsonl", [{"prompt": f"Is {HOSTILE}?\n", "completion": "no"}])
    flags = [f"--model_name_or_path={model}", f"--dataset_name={data}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["sft", "--dry_run", "--use_cpu=true", *flags]) == 0
    assert f"Is {WRITTEN_OUT}?\n[[no" in nothing_steers(capsys.readouterr().out)


def test_an_error_shows_the_name_of_a_file(model_folder, tmp_path, capsys):
    flags = [f"--model_name_or_path={model_folder}", "--dataset_name=\x1b[2J.jsonl", f"--output_dir={tmp_path / 'run'}"]
    assert main(["sft", "--use_cpu=true", *flags]) == 2
    assert r"\x1b[2J.jsonl: no such file" in nothing_steers(capsys.readouterr().err)


def test_where_the_terminal_knows_few_characters_the_others_are_written_out():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        with only_text():
            print("ü 中")
    file.seek(0)
    assert file.read() == "\\xfc \\u4e2d\n"


# ---------------------------------------------------------------------- the progress display


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_display_steers_the_terminal_and_what_it_is_told_does_not(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with only_text(), TrainingProgress(10, 0, num_particles=2) as progress:
        assert progress.console.is_terminal
        progress.say(HOSTILE)
        progress.advance(3)
    printed = terminal.getvalue()
    assert WRITTEN_OUT in printed
    assert "\x1b[?25l" in printed  # hides the cursor
    assert "\x1b[2J" not in printed
    assert "\x07" not in printed


def test_a_bar_takes_what_it_is_told_for_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    what = "endpoint:http://[/bold] \x1b[2J"  # to rich, square brackets are markup
    with only_text():
        assert list(track([1, 2], what)) == [1, 2]
    assert r"endpoint:http://[/bold] \x1b[2J" in terminal.getvalue()


def test_where_there_is_no_terminal_the_lines_of_progress_are_plain():
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        list(track([1, 2], HOSTILE))
    assert nothing_steers(file.getvalue()) == f"{WRITTEN_OUT}: 2 batches\n"


def test_a_display_in_a_file_is_what_rich_would_write_without_us():
    file = io.StringIO()
    with TrainingProgress(10, 0, num_particles=2, console=Console(file=file, force_terminal=False)) as progress:
        progress.say(HOSTILE)
    assert file.getvalue() == f"{WRITTEN_OUT}\n"
