"""Whether a model reads a packed row right. It is tried with a few tokens, and not looked up in a list.

Layout: K particles, N tokens of a packed row, T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from renyi_engine.core import is_out_of_memory, reason
from renyi_engine.ensemble import architecture

MIXED = 1e-4
"""How far hidden states in fp32 may move if other sequences of the row change. Rounding may do that where tokens of
several sequences go through one expert; otherwise not a bit moves."""


class Readable(Protocol):
    """What the trial needs of a `LoraEnsemble`, which says what these mean."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...
    def packed_hidden(self, batch: Mapping[str, Tensor]) -> Tensor: ...
    @property
    def model(self) -> PreTrainedModel: ...


@torch.no_grad()
def obstacle(ensemble: Readable) -> str | None:
    """Why the model cannot read packed rows, in words; None if it can.

    A row of five parts is read twice: a text, another text, a beginning, and two ways to go on from it. The second time
    the first text and the first way to go on are other tokens. What the other parts get must not change by that, and
    it must be what they get alone.
    """
    model = ensemble.model
    ids = architecture.ordinary_tokens(model, 40)
    first, other_first = ids[:12], ids[12:24]
    text, beginning = ids[5:15], ids[8:14]
    way, other_way, last_way = ids[20:24], ids[30:34], ids[25:30]
    try:
        once = _read(ensemble, [first, text, beginning, way, last_way])
        again = _read(ensemble, [other_first, text, beginning, other_way, last_way])
        alone = {
            1: ensemble(text[None])[:, 0],
            2: ensemble(beginning[None])[:, 0],
            4: ensemble(torch.cat([beginning, last_way])[None])[:, 0, len(beginning) :],
        }
    except Exception as error:  # a model may raise anything for rows that it did not expect
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {reason(error)}"
    if not all(_unmoved(once[part], again[part]) for part in alone):
        return "a sequence changes with the other sequences of its row"
    if not all(architecture.close(once[part], hidden) for part, hidden in alone.items()):
        return "a sequence in a row gets other values than alone"
    return None


def _read(ensemble: Readable, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """The hidden states of five parts in one row; the last two of them go on from the third."""
    lengths = [len(part) for part in parts]
    starts = [0, 0, 0, lengths[2], lengths[2]]
    positions = [start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)]
    prefixes = [-1, -1, -1, 2, 2]
    row = {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat(positions)[None],
        "segments": torch.tensor([lengths, prefixes]).mT,
    }
    return ensemble.packed_hidden(row).split(lengths, dim=1)


def _unmoved(once: Tensor, again: Tensor) -> bool:
    if once.equal(again):
        return True
    distance = (once - again).float().norm(dim=-1) / (once.float().norm(dim=-1) + 1e-6)
    return once.dtype in (torch.float32, torch.float64) and bool((distance < MIXED).all())
