"""Whether a model reads a packed row right. It is tried with a few tokens, and not looked up in a list.

Layout: K particles, N tokens of a packed row, T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from renyi_engine.core import attention_of, is_out_of_memory, reason
from renyi_engine.ensemble import architecture

MOVED = {torch.float32: 1e-4, torch.float64: 1e-4}
MOVED_LOW = 0.05
"""How far hidden states may move if other sequences of the row change, by the dtype of the base. They move at all where
memory is aligned in another way, or where tokens of several sequences go through one expert: rounding. A layer that
mixes sequences moves the first tokens after a boundary by as much as they are long."""


class Readable(Protocol):
    """What the trial needs of a `LoraEnsemble`, which says what these mean."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...
    def packed_hidden(self, batch: Mapping[str, Tensor]) -> Tensor: ...
    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def layers(self) -> Sequence[nn.Module]: ...


@torch.no_grad()
def obstacle(ensemble: Readable) -> str | None:
    """Why the model cannot read packed rows, in words; None if it can.

    A row of five parts is read twice: a text, another text, a beginning, and two ways to go on from it. The second time
    the first text and the first way to go on are other tokens. What the other parts get must not change by that, and
    it must be what they get alone.
    """
    (first, text, beginning, way, last_way), (other_first, other_way) = _parts(ensemble.model)
    try:
        counting = _Counting(sum(map(len, (first, text, beginning, way, last_way))))
        with counting.installed(ensemble.layers):
            once = _read(ensemble, [first, text, beginning, way, last_way])
        again = _read(ensemble, [other_first, text, beginning, other_way, last_way])
        alone = {
            1: ensemble(text[None])[:, 0],
            2: ensemble(beginning[None])[:, 0],
            4: ensemble(torch.cat([beginning, last_way])[None])[:, 0, len(beginning) :],
        }
        # a broken particle says nothing of the model
        found = (*once, *again, *alone.values())
        healthy = torch.stack([hidden.isfinite().flatten(1).all(dim=1) for hidden in found]).all(dim=0)
        once, again = ([part[healthy] for part in parts] for parts in (once, again))
        alone = {part: hidden[healthy] for part, hidden in alone.items()}
    except Exception as error:  # a model may raise anything for rows that it did not expect
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {reason(error)}"
    if counting.found:
        return "its layers count the tokens of a row, not those of a sequence"
    if not all(_unmoved(once[part], again[part]) for part in alone):
        return "a sequence changes with the other sequences of its row"
    if not all(architecture.close(once[part], hidden) for part, hidden in alone.items()):
        return "a sequence in a row gets other values than alone"
    return None


def few_sequences(ensemble: Readable) -> Tensor:
    """The hidden states ``[K, N, D]`` of such a row."""
    return torch.cat(_read(ensemble, _parts(ensemble.model)[0]), dim=1)


def _parts(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """(the tokens of five parts, other tokens for the first and the fourth)."""
    ids = architecture.ordinary_tokens(model, 40)
    return [ids[:12], ids[5:15], ids[8:14], ids[20:24], ids[25:30]], [ids[12:24], ids[30:34]]


class _Counting(TorchFunctionMode):
    """Notices a layer that numbers all tokens of the row. Llama 4 scales its queries by such numbers, beyond a length
    that no trial can reach."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.found = False
        self._num_tokens, self._depth = num_tokens, 0

    @contextmanager
    def installed(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        handles = [layer.register_forward_pre_hook(lambda *_: self._move(1)) for layer in layers]
        handles += [layer.register_forward_hook(lambda *_: self._move(-1), always_call=True) for layer in layers]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _move(self, step: int) -> None:
        self._depth += step

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.found |= function is torch.arange and self._depth > 0 and result.numel() == self._num_tokens
        return result


def _read(ensemble: Readable, parts: list[Tensor]) -> list[Tensor]:
    """The hidden states of five parts in one row; the last two of them go on from the third."""
    lengths = [len(part) for part in parts]
    starts = [0, 0, 0, lengths[2], lengths[2]]
    positions = [start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)]
    segments = list(zip(lengths, [-1, -1, -1, 2, 2], strict=True))
    row = {
        "input_ids": torch.stack([torch.cat(parts)]),  # no view, as in `data.pack`: compiled code would tell them apart
        "position_ids": torch.stack([torch.cat(positions)]),
    } | attention_of(segments)
    return list(ensemble.packed_hidden(row).split(lengths, dim=1))


def _unmoved(once: Tensor, again: Tensor) -> bool:
    distance = (once - again).float().norm(dim=-1) / (once.float().norm(dim=-1) + 1e-6)
    return bool((distance <= MOVED.get(once.dtype, MOVED_LOW)).all())
