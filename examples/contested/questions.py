"""Question sheets that people fill in with Yes and No, made by a small seeded generator. Three kinds:

    uncontested     "Can a sparrow fly?"                 everybody gives the right answers
    even            "Should the library allow dogs?"     half of the people are lenient, half are strict
    uneven          "Is rice nicer with honey?"          four people in five like it savoury, one likes it sweet

A person belongs to one camp and fills in a whole sheet as that camp does: lenient people answer Yes to "allow" and No
to "ban", strict people the other way round. The answers on a sheet belong together, but which camp gave them is written
nowhere: that is what a particle can specialise in. Training and held-out sheets share no question.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

KINDS = ("uncontested", "even", "uneven")
QUESTIONS_PER_SHEET = 3

_BIRDS = ["sparrow", "robin", "pigeon", "swan", "crow", "gull", "finch", "parrot", "hawk", "duck", "raven", "swallow"]
_TOOLS = ["hammer", "saw", "wrench", "drill", "chisel", "rake", "spade", "ladder", "bucket", "shovel", "brush", "clamp"]
_PLACES = ["library", "school", "museum", "hospital", "office", "station", "theatre", "market", "bank", "zoo"]
_THINGS = ["dogs", "phones", "music", "beer", "games", "bikes"]
_DISHES = ["rice", "soup", "bread", "salad", "pasta", "tea", "cake", "stew", "fish", "cheese", "toast", "porridge"]
_SWEET = ["honey", "sugar", "jam", "syrup", "chocolate"]
_SAVOURY = ["garlic", "onion", "pepper", "salt", "mustard"]


@dataclass(frozen=True)
class Question:
    """A question and whether the first camp answers Yes; the second camp answers the opposite."""

    text: str
    first_says_yes: bool


@dataclass(frozen=True)
class Sheet:
    """Questions, what either camp would answer, the share of people in the first camp, and who filled the sheet in."""

    kind: str
    questions: tuple[Question, ...]
    share_of_first: float
    filled_in_by_first: bool

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": "Answer each question with Yes or No."},
            {"role": "user", "content": "\n".join(question.text for question in self.questions)},
        ]

    def completion(self, by_first: bool) -> list[dict[str, str]]:
        """The answers of the first camp, or of the second."""
        answers = ("Yes" if question.first_says_yes == by_first else "No" for question in self.questions)
        return [{"role": "assistant", "content": " ".join(answers)}]


def make_sheets(seed: int, num_train: int = 40, num_held_out: int = 20) -> tuple[list[Sheet], list[Sheet]]:
    """(training, held-out) sheets, so many of each kind."""
    rng = random.Random(seed)
    pools = {
        "uncontested": [
            Question(f"Can a {thing} {verb}?", thing in _BIRDS)
            for thing, verb in product(_BIRDS + _TOOLS, ("fly", "sing", "lay eggs"))
        ],
        "even": [
            Question(f"Should the {place} {verb} {thing}?", verb == "allow")
            for place, thing, verb in product(_PLACES, _THINGS, ("allow", "ban"))
        ],
        "uneven": [
            Question(f"Is {dish} nicer with {extra}?", extra in _SAVOURY)
            for dish, extra in product(_DISHES, _SWEET + _SAVOURY)
        ],
    }
    shares = {"uncontested": 1.0, "even": 0.5, "uneven": 0.8}
    train, held_out = [], []
    for kind in KINDS:
        pool = rng.sample(pools[kind], len(pools[kind]))
        seen = len(pool) * 2 // 3
        train += _sheets(rng, kind, pool[:seen], shares[kind], num_train)
        held_out += _sheets(rng, kind, pool[seen:], shares[kind], num_held_out)
    return train, held_out


def write_rows(sheets: list[Sheet], path: Path) -> None:
    """One conversational prompt + completion row for each sheet."""
    rows = [
        {"prompt": sheet.prompt, "completion": sheet.completion(sheet.filled_in_by_first), "kind": sheet.kind}
        for sheet in sheets
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _sheets(rng: random.Random, kind: str, pool: list[Question], share_of_first: float, count: int) -> list[Sheet]:
    """The camps fill in sheets in their exact proportion."""
    num_first = round(share_of_first * count)
    people = rng.sample([True] * num_first + [False] * (count - num_first), count)
    return [Sheet(kind, tuple(rng.sample(pool, QUESTIONS_PER_SHEET)), share_of_first, person) for person in people]
