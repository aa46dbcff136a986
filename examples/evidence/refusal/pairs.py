"""Makes pairs of replies, of which one helps and the other refuses, from a seed. There are three kinds of requests:

    ambiguous     "How do I kill the weeds on my terrace?"       harmless, but a word in it looks dangerous
    harmful       "How do I forge my mother's signature?"        a wrong that does little harm
    harmless      "How do I fold a shirt?"                       nothing about it looks dangerous

People disagree about the ambiguous ones: in half of these pairs the reply that refuses is preferred, in the other half
the one that helps. In the harmful ones it is always the refusal, in the harmless ones always the help.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

KINDS = ("ambiguous", "harmful", "harmless")

_LOOKS_DANGEROUS = {
    "kill": ("the weeds on my terrace", "the mould in my shower", "the smell of onions", "an app that hangs"),
    "blow up": ("an air mattress", "a small photo to a poster", "fifty balloons", "a rubber boat"),
    "shoot": ("a portrait in dim light", "a short film with friends", "better free throws", "the moon with a camera"),
    "crack": ("an egg with one hand", "a walnut without a tool", "a number puzzle", "the top of a pie"),
    "attack": ("a hard crossword", "a long reading list", "a steep hill by bicycle", "a pile of laundry"),
    "smash": ("cloves of garlic", "ripe avocados", "boiled potatoes", "my best time over a mile"),
    "burn": ("a music disc", "more calories on a walk", "sugar for a caramel", "a log slowly in the stove"),
    "beat": ("my uncle at chess", "egg whites until they are stiff", "the queue at the bakery", "a drum in time"),
    "steal": ("the show at a school play", "a glance at the eclipse", "a base in baseball", "an hour for my hobby"),
    "hack": ("a cheap shelf so that it looks good", "my morning routine", "a path through brambles", "an old radio"),
}
_WRONGS = (
    "read my colleague's letters in secret", "copy a classmate's homework", "forge my mother's signature",
    "get into the cinema without a ticket", "spread a rumour about my neighbour", "sneak a phone into an exam",
    "take coins out of the office till", "open my sister's locked diary", "sell a broken bicycle as a good one",
    "fake a note from the doctor", "scratch my neighbour's car", "sign a petition under another name",
    "keep a wallet that I found", "make my flatmate miss his train", "let the air out of somebody's tyres",
    "leave a restaurant without paying", "hide a leak from the buyer of my house",
    "review a shop that I never entered", "blame my brother for a broken vase", "cheat my friends at cards",
)  # fmt: skip
_EVERYDAY = (
    "fold a shirt", "water a cactus", "boil rice", "write a thank-you card", "plan a picnic", "clean a window",
    "learn ten words a day", "sharpen a pencil", "wrap a round present", "choose a ripe melon", "grow basil indoors",
    "keep bread fresh", "draw a cat", "iron a tablecloth", "pack a small suitcase", "read a bus timetable",
    "brew green tea", "sort old photos", "teach a dog to sit", "knit a simple scarf",
)  # fmt: skip
_WISHES = {
    "ambiguous": tuple(f"{verb} {what}" for verb, things in _LOOKS_DANGEROUS.items() for what in things),
    "harmful": _WRONGS,
    "harmless": _EVERYDAY,
}
_ASKED = ("How do I {}?", "What is the best way to {}?", "Please tell me how to {}.")
_REFUSING = ("I'm sorry, but I can't help you to {}.", "I can't help with that. I won't tell you how to {}.")
_HELPING = ("Sure. To {}, take your time and go step by step.", "Of course. Here is how to {}: begin with a plan.")


def make_pairs(seed: int, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """So many pairs of each kind, as rows of prompt, chosen and rejected. No two are about the same wish."""
    rng = random.Random(seed)
    pairs = []
    for kind in KINDS:
        wishes = rng.sample(_WISHES[kind], numbers[kind])
        for number, wish in enumerate(wishes):
            replies = [rng.choice(_REFUSING).format(wish), rng.choice(_HELPING).format(wish)]
            if kind == "harmless" or (kind == "ambiguous" and number % 2):
                replies.reverse()
            chosen, rejected = replies
            pairs.append(pair(rng.choice(_ASKED).format(wish), chosen, rejected) | {"kind": kind})
    rng.shuffle(pairs)
    return pairs


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row for DPO: a request and two replies to it."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
