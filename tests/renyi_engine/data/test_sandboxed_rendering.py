"""A chat template is a program of somebody else: its time and memory are limited, and it renders as in transformers."""

from __future__ import annotations

import atexit
import datetime
import os
import resource
import signal
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from renyi_engine import SftTask
from renyi_engine.data import sandboxed_rendering
from renyi_engine.data.sandboxed_rendering import LimitReached, TemplateRefuses, render

from ..conversations import CHATML, ONE, TWO
from ..tokenizers_for_tests import byte_pair_tokenizer

# templates that take too long, in Python code and inside of one operation
SLOW = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "sort": "{% set a = range(99999) | list %}{% for i in range(99999) %}{% set b = a | sort %}{% endfor %}",
}
GREEDY = {
    "doubled": "{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
    "times": "{{ 'x' * 10 ** 11 }}",
    "padding": "{{ '%100000000000d' | format(1) }}",
    "list": "{{ [0] * 10 ** 10 }}",
}


def of(template, **arguments):
    return render(chat_template=template, **{"conversations": [ONE], "return_assistant_tokens_mask": False} | arguments)


@pytest.mark.parametrize("name", SLOW)
def test_a_template_that_does_not_end_is_ended(monkeypatch, name):
    monkeypatch.setattr(sandboxed_rendering, "TIME_LIMIT_S", 0.2)
    with pytest.raises(LimitReached, match=r"takes more than 0\.2 s"):
        of(SLOW[name])


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_wants_all_memory_gets_a_little(name):
    of("")  # started, with its limit
    process = sandboxed_rendering._worker(os.getpid())._process
    with pytest.raises(LimitReached, match="takes more than 1024 MiB"):
        of(GREEDY[name])
    assert of("{{ 1 }}") == ("1", [])
    assert sandboxed_rendering._worker(os.getpid())._process is process  # it is refused, and the worker lives


@pytest.mark.parametrize("marks", [False, True])
def test_a_conversation_is_rendered_as_transformers_renders_it(marks):
    template = (
        "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m.role }}: {% generation %}"
        "{{ m.content }}{% endgeneration %}{{ [m] | tojson }}{% endfor %}"
        "{{ tools | tojson }}{{ documents }}{{ mood }}{{ bos_token }}"
    )
    arguments = {
        "conversations": [[*TWO, {"role": "user", "content": "Grüße \u2028 \ud800 \x00 \x1b[0m 😀"}]],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "documents": [{"title": "a", "text": "b"}],
        "chat_template": template,
        "return_assistant_tokens_mask": marks,
        "add_generation_prompt": True,
        "mood": [1.5, None, True, {"x": []}],
        "bos_token": "<s>",
    }
    [text], spans = render_jinja_template(**arguments)
    assert render(**arguments) == (text, spans[0] if marks else [])
    assert not marks or len(spans[0]) == 5
    # what JSON does not know is written as Jinja writes it
    day = datetime.date(2026, 1, 2)
    assert of("{{ day }}", day=day) == ("2026-01-02", [])


def test_what_a_template_refuses_is_said_in_its_own_words_on_one_line():
    with pytest.raises(TemplateRefuses, match=r"^no system$"):
        of("{{ raise_exception('no system\nat all') }}")
    with pytest.raises(TemplateRefuses, match="unsafe"):
        of("{{ ''.__class__.__mro__ }}")
    with pytest.raises(TemplateRefuses, match="Unexpected end of template"):
        of("{% for m in messages %}")


def test_two_threads_get_each_their_own_text():
    texts = {}

    def work(number):
        texts[number] = [of("{{ n }}", n=f"{number}.{i}")[0] for i in range(50)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: [f"{number}.{i}" for i in range(50)] for number in range(4)}


def test_a_call_that_is_broken_off_leaves_no_reply_for_the_next(monkeypatch):
    monkeypatch.setattr(sandboxed_rendering, "TIME_LIMIT_S", 60)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            of(SLOW["loops"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert of("{{ 2 }}") == ("2", [])


def test_a_worker_that_was_killed_is_started_again():
    of("")
    process = sandboxed_rendering._worker(os.getpid())._process
    process.kill()
    process.wait()
    assert of("{{ 3 }}") == ("3", [])


def test_a_process_forked_from_one_that_renders_can_end_and_leaves_it_its_worker():
    of("")
    process = sandboxed_rendering._worker(os.getpid())._process
    child = os.fork()
    if not child:
        atexit._run_exitfuncs()  # as at the end of a program
        os._exit(0)
    ended, end = 0, time.monotonic() + 10
    while not ended and time.monotonic() < end:
        ended, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended
    assert of("{{ 4 }}") == ("4", [])
    assert sandboxed_rendering._worker(os.getpid())._process is process


def test_values_that_are_nested_too_deep_are_refused():
    deep = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(TemplateRefuses, match="nested too deep"):
        of("", deep=deep)
    assert of("{{ 5 }}") == ("5", [])


def test_a_conversation_that_the_worker_has_no_memory_to_read_is_a_limit_that_is_reached():
    of("")
    process = sandboxed_rendering._worker(os.getpid())._process
    resource.prlimit(process.pid, resource.RLIMIT_AS, (2**20, 2**20))
    with pytest.raises(LimitReached, match="takes more than 1024 MiB"):
        of("", text="x" * 2**24)
    assert of("{{ 6 }}") == ("6", [])


def test_modules_in_the_current_folder_are_not_those_of_the_worker(tmp_path, monkeypatch):
    worker = sandboxed_rendering._Worker()
    for module in ("runpy", "json", "resource", "transformers", "jinja2"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    request = {"conversations": [ONE], "chat_template": "{{ 8 }}", "return_assistant_tokens_mask": False}
    try:
        assert worker.ask({"time_limit_s": 5, "arguments": request}) == {"text": "8", "spans": []}
    finally:
        worker._stop()


@pytest.mark.parametrize("template", [SLOW["loops"], GREEDY["doubled"]], ids=["slow", "greedy"])
def test_a_row_whose_template_does_not_end_is_an_error_with_a_remedy_and_not_a_row_left_out(monkeypatch, template):
    tokenizer = byte_pair_tokenizer(CHATML + "{% if messages | length > 2 %}" + template + "{% endif %}")
    monkeypatch.setattr(sandboxed_rendering, "TIME_LIMIT_S", 1)
    task = SftTask(tokenizer, 512)
    task.example(0, {"messages": ONE})
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"the chat template of .*: it takes more than 1\w* \w+; use another") as error:
        task.example(1, {"messages": TWO})
    assert type(error.value) is ValueError  # Dropped would be counted, and the next row tried
    assert time.monotonic() - started < 20
