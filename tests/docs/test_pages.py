"""What the README and docs/ say is true: code runs as printed, links lead somewhere, no flag is missing."""

from __future__ import annotations

import ast
import csv
import dataclasses
import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import trl

from renyi_engine import DpoConfig, DpoTask, SftConfig, SftTask
from renyi_engine.critical_alpha import AlphaStarConfig
from renyi_engine.evaluation import FitWeightsConfig, GenerateConfig, MmluConfig, NllConfig, RefusalConfig

ROOT = Path(__file__).parents[2]
READER = runpy.run_path(str(Path(__file__).with_name("reader.py")), run_name="reader")
blocks_of, RUN, NEEDS = READER["blocks_of"], READER["RUN"], READER["NEEDS"]
PAGES = READER["pages_of"](ROOT)
SHOWN = {"text", "json"}
"""Languages of blocks that are looked at and not run."""
NOT_RUN = {
    ("README.md", "# needs the network\npip install .\n"),
    ("docs/getting_started.md", "# needs the network\npip install .\n"),
    ("docs/serving.md", "# needs vLLM and a GPU\nvllm serve MODEL"),
}
"""(page, how the block begins): all that a clone alone cannot do."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """Where a page's copy of the clone is, as PAGE/clone, once the pages are read."""
    return tmp_path_factory.mktemp("reader") / "scratch"


@pytest.fixture(scope="module")
def read(scratch) -> dict[str, list[list]]:
    """What came of every page for a reader with a clone, an empty home folder and no network: see reader.py."""
    folder = scratch.parent
    clone, home = folder / "clone", folder / "home"
    home.mkdir()
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "PYTHONPATH": f"{clone}:{clone / 'kernels'}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, clone / "tests" / "docs" / "reader.py", clone, scratch]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_runs_as_it_is_printed(page, read):
    for _, code, output, error in read[page]:
        assert error is None, f"{code}\n{output[-3000:]}\n{error}"
    runnable = [(language, code) for language, code in blocks_of(text_of(page)) if language in RUN]
    assert [(language, code) for language, code, *_ in read[page]] == [
        (language, code) for language, code in runnable if not code.startswith(NEEDS)
    ]


def test_the_blocks_that_are_not_run_are_these():
    blocks = [(page, language, code) for page in PAGES for language, code in blocks_of(text_of(page))]
    assert {language for _, language, _ in blocks} <= {*RUN, *SHOWN}
    left_out = [(page, code) for page, language, code in blocks if language in RUN and code.startswith(NEEDS)]
    assert len(left_out) == len(NOT_RUN)
    for page, code in left_out:
        assert any(page == of and code.startswith(start) for of, start in NOT_RUN), code


# ---------------------------------------------------------------------- what the README says


def test_the_readme_can_be_read_in_five_minutes():
    assert len(text_of("README.md").splitlines()) <= 150


def test_particles_take_sides_on_the_readmes_contested_question_and_agree_on_the_other(read):
    output = next(output for _, code, output, _ in read["README.md"] if "renyi-engine generate" in code)
    contested, agreed = (re.findall(r"^p\d+: (.*)$", part, re.M) for part in output.split("# May I"))
    assert len(contested) == len(agreed) == 4
    assert set(contested) == {"yes, always.", "never at all."}
    assert set(agreed) == {"ask first."}


def test_the_readmes_loop_is_twenty_lines_learns_and_saves(read, scratch):
    code, output = next((code, output) for language, code, output, _ in read["README.md"] if language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0]
    assert (scratch / "README.md" / "clone" / "particles" / "p003" / "adapter_model.safetensors").exists()


def test_a_contested_question_is_to_be_clarified_and_another_answered(read):
    output = next(output for _, code, output, _ in read["docs/evaluation.md"] if "decide(" in code)
    assert output.splitlines()[-1] == "['clarify', 'answer']"


def test_exactly_the_contested_rows_of_the_toy_are_flagged(read, scratch):
    table = scratch / "docs" / "evaluation.md" / "clone" / "runs" / "nll" / "examples.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert {row["row"] for row in rows if row["flag"] == "contested or poisoned"} == {
        row["row"] for row in rows if "Should the" in row["text"]
    }


def test_the_critical_alpha_of_the_toy_is_below_the_default_and_contested_answers_drive_it(read):
    output = next(output for _, code, output, _ in read["docs/alpha.md"] if "alpha-star --model" in code)
    assert 0.6 < float(re.search(r"alpha\* = ([\d.]+)", output)[1]) < 0.75
    drivers = re.findall(r"slope ([+-])\S+  (.*)$", output, re.M)
    assert {sign for sign, _ in drivers} == {"+", "-"}
    assert all("Should the" in text for _, text in drivers)


def test_the_trackers_hold_the_run_and_a_callback_stops_one(read, scratch):
    clone = scratch / "docs" / "trackers.md" / "clone"
    assert list((clone / "runs" / "tracked" / "runs").rglob("events.out.tfevents.*"))
    output = next(output for _, code, output, _ in read["docs/trackers.md"] if "EarlyStoppingCallback" in code)
    assert "particles share an example" in output
    assert int(output.splitlines()[-1]) < 80


REPORTS = {
    "The report of a run": [
        "getting_started.md/clone/runs/toy",
        "training.md/clone/runs/preferences",
        "alpha.md/clone/runs/weights",
    ],
    "The report of `eval nll`": ["evaluation.md/clone/runs/nll"],
    "The report of `eval mmlu`": ["evaluation.md/clone/runs/mmlu"],
    "The report of `eval refusal`": ["evaluation.md/clone/runs/refusal"],
    "The report of `alpha-star`": ["alpha.md/clone/runs/alpha_star"],
}


@pytest.mark.parametrize("section", REPORTS)
def test_a_part_of_a_report_that_the_docs_explain_is_there_under_that_name(section, read, scratch):
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text_of("docs/reports.md"), re.M | re.S)[1]
    pages = [(scratch / "docs" / run / "report.html").read_text(encoding="utf-8") for run in REPORTS[section]]
    there = {html.unescape(title) for page in pages for title in re.findall(r"<h2[^>]*>([^<]*)", page)}
    explained = {" ".join(title.split()) for title in re.findall(r"\*\*([^*]+)\*\*", text)}
    assert explained
    assert [title for title in explained if not any(name.startswith(title) for name in there)] == []
    if section != "The report of a run":  # which has parts of its own for preferences
        assert len(explained) == len(there - {"Words on this page", "Details"})


def test_the_readmes_times_are_those_of_the_benchmarks():
    steps = re.findall(
        r"^\| ([^,|]*)[^|]*\| training_step smollm2_(\w+),[^|]*\|(.*)\|$", text_of("docs/speed.md"), re.M
    )
    step = "SmolLM2-135M, all layers, K = 8, 2 x 128 tokens"
    rows = {
        ("AMD EPYC", "all"): f"{step}, 2 CPU threads",
        ("AMD EPYC", "last8"): "the same, last 8 layers",
        ("NVIDIA H200", "all"): f"{step}, one H200",
    }
    assert [(device, shape) for device, shape, _ in steps] == list(rows)
    for device, shape, cells in steps:
        numbers = (re.search(r"[\d.]+", cell) for cell in cells.split("|")[:4])
        ours, naive, peer, floor = (f" {found[0]} " if found else " " for found in numbers)
        row = f"| {rows[device, shape]} | **{ours.strip()}** |{peer}|{naive}|{floor}|"
        assert row in text_of("README.md")


# ---------------------------------------------------------------------- commands, data, packages


@pytest.fixture(scope="module")
def reference() -> str:
    return runpy.run_path(str(ROOT / "docs" / "commands.py"), run_name="commands")["reference"]()


SETTINGS = {
    "sft": SftConfig,
    "dpo": DpoConfig,
    "generate": GenerateConfig,
    "fit-weights": FitWeightsConfig,
    "alpha-star": AlphaStarConfig,
    "eval mmlu": MmluConfig,
    "eval nll": NllConfig,
    "eval refusal": RefusalConfig,
}


def flags_of(reference: str, command: str) -> set[str]:
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", reference, re.M | re.S)[1]
    return set(re.findall(r"^```\{option\} --(\w+)", section, re.M))


@pytest.mark.parametrize("command", SETTINGS)
def test_every_setting_of_a_command_is_in_the_reference_and_nothing_else(command, reference):
    options = {"config", "print_config"} | ({"dry_run"} if command in ("sft", "dpo") else set())
    fields = {field.name for field in dataclasses.fields(SETTINGS[command])}
    assert flags_of(reference, command) == fields | options


def test_the_table_of_commands_names_all_of_them(reference):
    listed = re.findall(r"^\| `renyi-engine ([^`]+)`", text_of("docs/commands.md"), re.M)
    assert sorted(listed) == sorted(re.findall(r"^## (.+)$", reference, re.M))


def test_a_flag_that_the_pages_name_exists(reference):
    known = {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", reference)} | {"help", "version"}
    of_others = {"readme", "minutes", "out", "setting", "data", "enable_lora", "max_loras", "max_lora_rank"}
    of_others |= {"lora_modules", "logdir"}
    for page in PAGES:
        named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(page))}
        of_evidence = {"model"} if page == "docs/evidence.md" else set()
        assert named - known - of_others - of_evidence == set(), page


def test_the_names_of_settings_that_nobody_else_has_are_listed():
    section = re.search(r"^## Names of the flags\n(.*?)A few names", text_of("docs/training.md"), re.M | re.S)[1]
    theirs = (trl.SFTConfig, trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments, peft.LoraConfig)
    known = {field.name for cls in theirs for field in dataclasses.fields(cls)}
    ours = {field.name for cls in (SftConfig, DpoConfig) for field in dataclasses.fields(cls)}
    assert set(re.findall(r"`(\w+)`", section)) == ours - known


def test_every_example_of_a_row_is_one(tokenizer):
    sections = re.split(r"^## ", text_of("docs/data.md"), flags=re.M)
    rows = {section.splitlines()[0]: [json.loads(code) for _, code in blocks_of(section) if code.startswith("{")]
            for section in sections}  # fmt: skip
    sft, dpo = rows["Supervised fine-tuning"], rows["Preferences"]
    assert [sorted(row) for row in sft] == [["text"], *[["completion", "prompt"]] * 2, ["messages"]]
    assert len(dpo) == 4
    for number, row in enumerate(sft):
        assert SftTask(tokenizer, max_length=1024).example(number, row).num_labels > 0
    for number, row in enumerate(dpo):
        gap = 1.0 if "score_chosen" in row else None
        pair = DpoTask(tokenizer, max_length=1024, beta=0.1, min_score_gap=gap).example(number, row)
        assert all(sequence.num_labels > 0 for sequence in pair.sequences)


def test_the_example_of_a_question_is_one(tmp_path):
    from renyi_engine.evaluation import load_questions

    row = next(code for language, code in blocks_of(text_of("docs/data.md")) if '"choices"' in code)
    (tmp_path / "test.jsonl").write_text(row)
    [[question]] = load_questions(str(tmp_path), "test").values()
    assert question.choices[question.answer] == "4"


def test_the_page_of_packages_says_of_each_what_its_docstring_says():
    page = text_of("docs/packages.md")
    for file in sorted((ROOT / "renyi_engine").glob("*/__init__.py")):
        first_line = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).splitlines()[0]
        assert f"| `{file.parent.name}` | {first_line} |" in page
    for file in sorted((ROOT / "renyi_engine").glob("*.py")):
        assert file.name == "__init__.py" or f"| `{file.name}` |" in page


# ---------------------------------------------------------------------- links


def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", "docs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / Path(page).relative_to("docs").with_suffix(".html")).exists()


def test_the_links_of_the_readme_lead_to_files_and_headings_that_exist():
    for target in re.findall(r"\]\(([^)]+)\)", text_of("README.md")):
        name, _, heading = target.partition("#")
        assert (ROOT / name).is_file(), target
        assert not heading, f"{target}: the heading is not checked"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.]+)\)", text_of("README.md")))
    assert linked >= set(PAGES) - {"README.md", "docs/index.md", "docs/security.md"}


def test_links_to_other_places_are_well_formed():
    for page in PAGES:
        for target in re.findall(r"\]\((\w+:[^)]*)\)", text_of(page)):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./#~%?=&+-]*)?", target), target


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_a_page_names_exist(page):
    for name, test in re.findall(r"`((?:tests|examples|csrc_bench|docs)/[\w./]*)(?:::(\w+))?`", text_of(page)):
        assert (ROOT / name).exists(), name
        assert not test or f"def {test}(" in text_of(name), f"{name}::{test}"
