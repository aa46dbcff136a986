"""Makes questions and what people answer to them, from a seed. There are three kinds of questions:

    uncontested     "Do ducks need water?"               everybody gives the right answer
    even            "Should the library allow dogs?"     half of the people are for it, half are against
    uneven          "Is rice nicer with ginger?"         four people in five say yes, one says no

One person answered each training question. The data do not say to which camp this person belongs: that is what a
particle can specialise in. No held-out question occurs in training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

KINDS = ("uncontested", "even", "uneven")

_ANIMALS = [
    "ducks", "horses", "rabbits", "bees", "tigers", "frogs",
    "goats", "whales", "mice", "eagles", "cows", "dogs",
]  # fmt: skip
_MACHINES = [
    "hammers", "engines", "clocks", "radios", "lamps",
    "ladders", "trains", "pumps", "drills", "phones",
]  # fmt: skip
_PLACES = [
    "library", "school", "museum", "hospital", "office",
    "station", "theatre", "market", "bank", "zoo",
]  # fmt: skip
_ACTIONS = ["allow dogs", "open on Sundays", "ban phones", "charge visitors", "play music", "serve beer", "hire a cook"]
_DISHES = ["rice", "soup", "bread", "salad", "pasta", "tea", "cake", "stew", "fish", "cheese"]
_EXTRAS = ["ginger", "lemon", "garlic", "honey", "pepper", "mint", "onion"]

# what the first and the second camp say; nobody gives the second answer to an uncontested question
_ANSWERS = {
    "uncontested": ("Always.", "Never."),
    "even": ("Yes, gladly.", "No, never."),
    "uneven": ("Yes, much nicer.", "No, far worse."),
}
SHARES_OF_FIRST = {"uncontested": 1.0, "even": 0.5, "uneven": 0.8}
"""The part of all people who are in the first camp."""


@dataclass(frozen=True)
class Question:
    """A question, the answers of the first and the second camp, which of them was given in training, and the part of
    all people who are in the first camp."""

    kind: str
    text: str
    answers: tuple[str, str]
    answered_by_first: bool
    share_of_first: float

    def row(self, by_first: bool) -> dict:
        """The question as a chat, with the answer of the first camp or of the second."""
        return {
            "prompt": [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": self.text}],
            "completion": [{"role": "assistant", "content": self.answers[0 if by_first else 1]}],
        }


def make_questions(
    seed: int,
    num_train: int | Mapping[str, int] = 40,
    num_held_out: int | Mapping[str, int] = 20,
    shares_of_first: Mapping[str, float] = SHARES_OF_FIRST,
) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions: so many of each kind, answered by the camps in their exact proportion. A number
    for all kinds, or one for each kind that is wanted."""
    rng = random.Random(seed)
    always, never = _ANSWERS["uncontested"]
    texts = {
        "uncontested": [
            (f"Do {who} need {what}?", (always, never)) for who, what in product(_ANIMALS, ("water", "air", "food"))
        ]
        + [
            (f"Do {who} need {what}?", (never, always))
            for who, what in product(_MACHINES, ("friends", "love", "sleep"))
        ],
        "even": [(f"Should the {place} {action}?", _ANSWERS["even"]) for place, action in product(_PLACES, _ACTIONS)],
        "uneven": [(f"Is {dish} nicer with {extra}?", _ANSWERS["uneven"]) for dish, extra in product(_DISHES, _EXTRAS)],
    }
    train, held_out = [], []
    for kind in KINDS:
        end, rest = (
            number.get(kind, 0) if isinstance(number, Mapping) else number for number in (num_train, num_held_out)
        )
        chosen = rng.sample(texts[kind], end + rest)
        for part, questions in ((train, chosen[:end]), (held_out, chosen[end:])):
            share = shares_of_first[kind]
            num_first = round(share * len(questions))
            people = rng.sample([True] * num_first + [False] * (len(questions) - num_first), len(questions))
            part += [
                Question(kind, *question, person, share) for question, person in zip(questions, people, strict=True)
            ]
    return train, held_out


def write_rows(questions: list[Question], path: Path) -> None:
    """Write a row of prompt and completion, as messages, for each question."""
    rows = [question.row(question.answered_by_first) | {"kind": question.kind} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
