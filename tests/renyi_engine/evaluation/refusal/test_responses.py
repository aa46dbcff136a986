"""The file of responses: what a kill leaves of it, and what it is in the end."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import warnings

import pytest
from hypothesis import given, settings, strategies as st

from renyi_engine.core import files
from renyi_engine.evaluation.refusal.responses import BASE, CHECKSUM, Response, ResponseFile

TEXTS = ["", "plain", "two\nlines\r\n", "Grüße \u2028 \U0001f600", '{"a": 1}', "\ud800", "\x1b[31m"]
RESPONSES = [Response("s", i, k, s, TEXTS[(i + s) % 7]) for i in range(3) for k in (0, 1, 10, BASE) for s in range(2)]


@settings(deadline=None, max_examples=40)
@given(at=st.floats(0, 1), seed=st.integers(0, 99))
def test_cut_anywhere_it_keeps_every_whole_line_and_ends_in_the_same_bytes(tmp_path_factory, at, seed):
    path = tmp_path_factory.mktemp("cut") / "responses.jsonl"
    shuffled = random.Random(seed).sample(RESPONSES, len(RESPONSES))
    judged = [dataclasses.replace(r, judge="j", verdict="direct_answer", basis="") for r in shuffled]
    whole = ResponseFile(path)
    whole.write(shuffled)
    whole.write(judged)
    raw = path.read_bytes()
    whole.finish()
    expected = path.read_bytes()
    cut = int(at * len(raw))
    path.write_bytes(raw[:cut])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        resumed = ResponseFile(path)
    assert len(seen) == (cut > 0 and raw[cut - 1 : cut] != b"\n")
    num_whole = raw[:cut].count(b"\n")
    assert list(resumed.responses.values()) == list({r.key: r for r in (shuffled + judged)[:num_whole]}.values())
    resumed.write(r for r in shuffled if r.key not in resumed.responses)
    resumed.write(r for r in judged if resumed.responses[r.key].verdict is None)
    assert ResponseFile(path).responses == resumed.responses
    resumed.finish()
    assert path.read_bytes() == expected


def test_what_was_written_is_on_its_way_to_the_disk_before_write_returns(tmp_path):
    path = tmp_path / "responses.jsonl"
    file = ResponseFile(path)
    for number, response in enumerate(RESPONSES[:3], start=1):
        file.write([response])
        assert path.read_bytes().count(b"\n") == number


def test_in_order_is_by_prompt_particle_and_sample_with_the_base_last(tmp_path):
    file = ResponseFile(tmp_path / "responses.jsonl")
    file.write(reversed(RESPONSES))
    assert file.in_order() == RESPONSES


def summed(line):
    """The line with the checksum that belongs to it."""
    fields = json.loads(line)
    return json.dumps(fields | {CHECKSUM: files.sha256_of_json(fields)[:16]})


@pytest.mark.parametrize(
    "line",
    [
        "", "[]", "nonsense", '{"split": "s"}', "[" * 100_000, summed('{"split": "s"}'),
        summed('{"split":"s","prompt_id":0,"particle":"p","sample":0,"response":""}'),
        summed('{"split":"s","prompt_id":0,"particle":[1],"sample":0,"response":""}'),
        summed('{"split":"s","prompt_id":"0","particle":1,"sample":0,"response":""}'),
        summed('{"split":"s","prompt_id":0,"particle":1,"sample":0,"response":null}'),
        # a response in all but the checksum
        '{"split":"s","prompt_id":0,"particle":1,"sample":0,"response":"","judge":null,"verdict":null,"basis":null}',
    ],
)  # fmt: skip
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "responses.jsonl"
    ResponseFile(path).write(RESPONSES[:2])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"responses\.jsonl: line 3 is not a response .*; remove the line"):
        ResponseFile(path)


def test_every_single_bit_that_flips_is_noticed(tmp_path):
    path = tmp_path / "responses.jsonl"
    judged = Response("s", 1, 0, 2, "I cannot.", judge="keyword", verdict="direct_refusal", basis="i cannot")
    ResponseFile(path).write([RESPONSES[0], judged, RESPONSES[1]])
    whole = path.read_bytes()
    expected = ResponseFile(path).responses
    first, second, _ = whole.splitlines(keepends=True)
    refusals = []
    for bit in range(8 * len(first), 8 * (len(first) + len(second))):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = ResponseFile(path).responses
        except ValueError as error:
            refusals.append(str(error))
        else:  # white space of another kind between two fields
            assert found == expected
    assert all(re.search("line [23] is not a response as it was written", refusal) for refusal in refusals)
    assert len(refusals) > 0.95 * 8 * len(second)
