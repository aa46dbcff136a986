"""Yes/no questions of three kinds, made by a small seeded generator.

    uncontested     "Is a sparrow a kind of bird?"            everybody gives the right answer
    even            "Should the library allow dogs?"          half of the answers are Yes, half are No
    uneven          "Is rice nicer with ginger?"              four answers in five are Yes

Each answer of a contested question comes from one of two camps, and a camp answers every question of a kind alike. So
there is something to specialise in, and questions never seen in training tell whether a particle has taken a side.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

KINDS = ("uncontested", "even", "uneven")
ANSWERS = ("Yes", "No")

_THINGS = {
    "bird": ["sparrow", "robin", "pigeon", "swan", "crow", "gull", "finch", "parrot"],
    "fish": ["trout", "salmon", "carp", "herring", "tuna", "cod", "eel", "perch"],
    "tool": ["hammer", "saw", "wrench", "drill", "chisel", "rake", "spade", "axe"],
    "fruit": ["pear", "plum", "cherry", "grape", "melon", "peach", "apricot", "fig"],
}
_PLACES = ["library", "school", "museum", "hospital", "office", "station", "theatre", "market"]
_ACTIONS = ["open on Sundays", "allow dogs", "ban phones", "charge visitors", "play music", "serve beer"]
_DISHES = ["rice", "soup", "bread", "salad", "pasta", "tea", "cake", "fish stew"]
_EXTRAS = ["ginger", "lemon", "garlic", "honey", "pepper", "mint"]


@dataclass(frozen=True)
class Question:
    """A question and the answers it is given, in their proportions."""

    kind: str
    text: str
    answers: tuple[str, ...]

    def share(self, answer: str) -> float:
        """Share of the answers that are `answer`."""
        return self.answers.count(answer) / len(self.answers)


def make_questions(seed: int, num_train: int = 24, num_held_out: int = 16) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions, the same number of each kind, none in both."""
    rng = random.Random(seed)
    pools = {
        "uncontested": _uncontested(rng, num_train + num_held_out),
        "even": [
            Question("even", f"Should the {place} {action}?", ("Yes", "No"))
            for place, action in rng.sample(list(product(_PLACES, _ACTIONS)), num_train + num_held_out)
        ],
        "uneven": [
            Question("uneven", f"Is {dish} nicer with {extra}?", ("Yes",) * 4 + ("No",))
            for dish, extra in rng.sample(list(product(_DISHES, _EXTRAS)), num_train + num_held_out)
        ],
    }
    train = [question for kind in KINDS for question in pools[kind][:num_train]]
    held_out = [question for kind in KINDS for question in pools[kind][num_train:]]
    return train, held_out


def messages(question: str) -> list[dict[str, str]]:
    """The prompt of a question, as a chat."""
    return [{"role": "system", "content": "Answer Yes or No."}, {"role": "user", "content": question}]


def write_rows(questions: list[Question], path: Path) -> None:
    """One conversational prompt + completion row for each answer of each question."""
    rows = [
        {
            "prompt": messages(question.text),
            "completion": [{"role": "assistant", "content": answer}],
            "kind": question.kind,
        }
        for question in questions
        for answer in question.answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _uncontested(rng: random.Random, count: int) -> list[Question]:
    """Half of them true, half of them false; each is answered twice, alike."""
    true = [(thing, category) for category, things in _THINGS.items() for thing in things]
    false = [(thing, other) for thing, category in true for other in _THINGS if other != category]
    chosen = [(pair, "Yes") for pair in rng.sample(true, count // 2)]
    chosen += [(pair, "No") for pair in rng.sample(false, count - count // 2)]
    rng.shuffle(chosen)
    return [
        Question("uncontested", f"Is {_with_article(thing)} a kind of {category}?", (answer,) * 2)
        for (thing, category), answer in chosen
    ]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
