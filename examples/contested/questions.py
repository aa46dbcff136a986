"""Yes/no questions of three kinds, made by a small seeded generator.

    uncontested     "Is a sparrow a kind of bird?"            everybody gives the right answer
    even            "Should the library allow dogs?"          two camps of the same size: one says Yes, one says No
    uneven          "Is rice nicer with ginger?"              two camps, four people to one: Yes, and No

Each training question was answered by one person. A camp answers every question of a kind alike, so questions never seen
in training tell whether a particle has taken a side.
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
_PLACES = ["library", "school", "museum", "hospital", "office", "station", "theatre", "market", "bank", "zoo"]
_ACTIONS = ["open on Sundays", "allow dogs", "ban phones", "charge visitors", "play music", "serve beer", "hire a cook"]
_DISHES = ["rice", "soup", "bread", "salad", "pasta", "tea", "cake", "stew", "fish", "cheese"]
_EXTRAS = ["ginger", "lemon", "garlic", "honey", "pepper", "mint", "onion"]


@dataclass(frozen=True)
class Question:
    """A question, the share of people who say Yes, and what the one person who was asked in training said."""

    kind: str
    text: str
    share_of_yes: float
    answer: str


def make_questions(seed: int, num_train: int = 40, num_held_out: int = 20) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions, so many of each kind, none in both."""
    rng = random.Random(seed)
    opinions = [f"Should the {place} {action}?" for place, action in product(_PLACES, _ACTIONS)]
    tastes = [f"Is {dish} nicer with {extra}?" for dish, extra in product(_DISHES, _EXTRAS)]
    total = num_train + num_held_out
    pools = {
        "uncontested": _uncontested(rng, total),
        "even": _contested(rng, "even", rng.sample(opinions, total), 0.5, num_train),
        "uneven": _contested(rng, "uneven", rng.sample(tastes, total), 0.8, num_train),
    }
    train = [question for kind in KINDS for question in pools[kind][:num_train]]
    held_out = [question for kind in KINDS for question in pools[kind][num_train:]]
    return train, held_out


def messages(question: str) -> list[dict[str, str]]:
    """The prompt of a question, as a chat."""
    return [{"role": "system", "content": "Answer Yes or No."}, {"role": "user", "content": question}]


def write_rows(questions: list[Question], path: Path) -> None:
    """One conversational prompt + completion row for each question."""
    rows = [
        {
            "prompt": messages(question.text),
            "completion": [{"role": "assistant", "content": question.answer}],
            "kind": question.kind,
        }
        for question in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _uncontested(rng: random.Random, count: int) -> list[Question]:
    """Half of them true, half of them false."""
    true = [(thing, category) for category, things in _THINGS.items() for thing in things]
    false = [(thing, other) for thing, category in true for other in _THINGS if other != category]
    chosen = [(pair, "Yes") for pair in rng.sample(true, count // 2)]
    chosen += [(pair, "No") for pair in rng.sample(false, count - count // 2)]
    rng.shuffle(chosen)
    return [
        Question("uncontested", f"Is {_with_article(thing)} a kind of {category}?", float(answer == "Yes"), answer)
        for (thing, category), answer in chosen
    ]


def _contested(rng: random.Random, kind: str, texts: list[str], share_of_yes: float, num_train: int) -> list[Question]:
    """The camps answer in their exact proportion, in training and held out."""
    answers: list[str] = []
    for count in (num_train, len(texts) - num_train):
        num_yes = round(share_of_yes * count)
        answers += rng.sample(["Yes"] * num_yes + ["No"] * (count - num_yes), count)
    return [Question(kind, text, share_of_yes, answer) for text, answer in zip(texts, answers, strict=True)]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
