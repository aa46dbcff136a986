"""The questions of MMLU, and the prompts that ask them.

Hendrycks et al. 2021, *Measuring Massive Multitask Language Understanding*. The groups, their order and the prompts are
those of lm-eval. The data may be the hub's data set (cais/mmlu, or a copy of it); a folder that holds dev, validation
(or val) and test, each as .jsonl, .json or .parquet; or the folders of CSV files that the authors published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from renyi_engine.core import typos
from renyi_engine.data import Row, columns_of, csv_cells, load_splits, missing_column

LETTERS = ("A", "B", "C", "D")
COMPLETIONS = tuple(f" {letter}" for letter in LETTERS)
COLUMNS = ("subject", "question", "choices", "answer")
# the names of each split in files; the first name is the hub's
SPLITS = {"test": ("test",), "validation": ("validation", "val"), "dev": ("dev",)}
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
HUB_CONFIG = "all"
GROUPS: Mapping[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "other": (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
    "social_sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
}  # fmt: skip
SUBJECTS = tuple(subject for subjects in GROUPS.values() for subject in subjects)


@dataclass(frozen=True)
class Question:
    """One question with its four choices.

    Attributes:
        number: the place of the question among those of its subject and split, from 0.
        answer: the right choice, 0 to 3.
    """

    number: int
    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int

    def record(self) -> dict[str, Any]:
        """The question as a row of the hub's data set."""
        return {"question": self.text, "subject": self.subject, "choices": list(self.choices), "answer": self.answer}


def description(subject: str) -> str:
    """The first line of a prompt."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def ask(text: str, choices: Sequence[str]) -> str:
    """A question with its choices, up to the place of the answer."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([text, *lines, "Answer:"])


def prompt(question: Question, examples: Sequence[Question]) -> str:
    """What the model reads: `examples` of the same subject with their answers, then the question."""
    solved = [ask(e.text.strip(), e.choices) + COMPLETIONS[e.answer] for e in examples]
    return description(question.subject) + "\n\n".join([*solved, ask(question.text.strip(), question.choices)])


def check_subjects(subjects: Sequence[str]) -> None:
    """Raises ValueError, with the nearest name, if one of `subjects` is not a subject of MMLU."""
    for subject in subjects:
        if subject not in SUBJECTS:
            raise ValueError(f"subjects: {_no_subject(subject)}")


def load_questions(name: str, split: str) -> dict[str, list[Question]]:
    """The questions of a split, by subject. Subjects and questions keep the order of the data.

    Args:
        name: a hub id or a local folder.
        split: "test", "validation" or "dev".

    Raises:
        ValueError, in one line: there is no such data set or split, a column is missing, or a row is not a question of
            one of the 57 subjects with four choices and an answer.
    """
    questions: dict[str, list[Question]] = {}
    for place, row in _rows(name, split):
        try:
            subject = row.get("subject")
            if subject not in SUBJECTS:
                raise ValueError(f"subject: {_no_subject(subject)}")
            of_subject = questions.setdefault(subject, [])
            of_subject.append(_question(len(of_subject), subject, *map(row.get, COLUMNS[1:])))
        except ValueError as error:
            raise ValueError(f"dataset_name: {place}: {error}") from None
    return questions


def _question(number: int, subject: str, question: Any, choices: Any, answer: Any) -> Question:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question: expected a text; got {question!r}")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices: expected a list of 4 texts; got {str(choices)[:60]}")
    index = LETTERS.index(answer) if answer in LETTERS else answer
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 4:
        raise ValueError(f"answer: expected 0 to 3, or A to D; got {answer!r}")
    return Question(number, subject, question, tuple(choices), index)


def _rows(name: str, split: str) -> Iterator[tuple[str, Row]]:
    """(where the row stands, row), for each row of a split."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"dataset_name: {name} is one file; expected a hub id, or a folder with a file of each split")
    for stem in SPLITS[split]:
        if tables := sorted((folder / stem).glob(f"*_{stem}.csv")):
            for table in tables:
                yield from _csv_rows(table, table.name.removesuffix(f"_{stem}.csv"))
            return
    files = [path for stem in SPLITS[split] for s in SUFFIXES if (path := folder / f"{stem}{s}").is_file()]
    saved = (folder / "dataset_dict.json").is_file()
    if folder.is_dir() and not (files or saved or (folder / "README.md").is_file()):
        stem = SPLITS[split][-1]
        raise ValueError(
            f"dataset_name: {name} has no {split} split; expected {stem}.jsonl, {stem}/SUBJECT_{stem}.csv, or a copy "
            "of the hub's data set with its README.md; add one of them"
        )
    splits = load_splits(str(files[0]) if files else name, None if files or saved else HUB_CONFIG, "dataset_name")
    rows = splits.rows(split, "split", default=split)
    if not set(COLUMNS) <= set(columns_of(rows)):
        raise missing_column("dataset_name", columns_of(rows), [" + ".join(COLUMNS)])
    for number, row in enumerate(rows):
        yield f"{split} row {number}", row


def _csv_rows(path: Path, subject: str) -> Iterator[tuple[str, Row]]:
    """The rows of a file without a header: question, A, B, C, D, letter of the answer."""
    try:
        for line, cells in csv_cells(path):
            if len(cells) != 6:
                raise ValueError(f"line {line}: expected 6 cells: question, A, B, C, D, answer; got {len(cells)}")
            row = {"subject": subject, "question": cells[0], "choices": cells[1:5], "answer": cells[5]}
            yield f"{path}: line {line}", row
    except ValueError as error:
        raise ValueError(f"dataset_name: {path}: {error}") from None


def _no_subject(name: Any) -> str:
    return f"{name!r} is none of MMLU's 57 subjects" + typos.hint(str(name).replace(" ", "_"), SUBJECTS)
