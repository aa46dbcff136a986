"""Direct preference optimisation (DPO): s[k, i] says how surely particle k prefers the chosen completion of pair i.

    s[k, i] = log sigmoid( beta ((lp_k(y+) - lp_ref(y+)) - (lp_k(y-) - lp_ref(y-))) )         (24), App. B

lp is summed over completion tokens. The reference is the bare base: it scores a data set once, before training.

Layout: K particles, B pairs, N pairs of a data set, T tokens; in [B, 2], 0 is the chosen, 1 the rejected completion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from renyi_engine.core import files, track
from renyi_engine.data import (
    CONTEXT_COLUMNS,
    Dropped,
    Encoder,
    Example,
    collate,
    common_prefix,
    is_conversation,
    longest_first,
    missing_column,
    pack,
    pad_token_id,
    require_field,
    unexpected,
    warn_unread,
)
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives.metrics import Metric, nll_per
from renyi_engine.objectives.task import Scores, batch_of, length
from renyi_kernels import IGNORE_INDEX

# as TRL names them; a reward is beta times the log-ratio to the base
CHOSEN, REJECTED = Metric("rewards/chosen", "nats"), Metric("rewards/rejected", "nats")
MARGIN = Metric("rewards/margins", "nats", better="higher")
CHOSEN_LOGP, REJECTED_LOGP = Metric("logps/chosen", "nats"), Metric("logps/rejected", "nats")
ACCURACY = Metric("rewards/accuracies", "fraction of the pairs", better="higher")
MIXTURE_ACCURACY = Metric("rewards/mixture_accuracies", "fraction of the pairs", better="higher")
"""The accuracy of the mixture, which takes the mean of the particles' probabilities of the preference, by their
weights."""

FORMS = ("prompt + chosen + rejected", "chosen + rejected")


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt. `reference`: the bare base's log-probabilities of (chosen, rejected), in nats."""

    row: int
    chosen: Example
    rejected: Example
    reference: tuple[float, float] | None = None

    @property
    def sequences(self) -> tuple[Example, Example]:
        return self.chosen, self.rejected

    @property
    def num_labels(self) -> int:
        return 1


class DpoTask:
    """A `Task` whose examples are pairs. Chosen and rejected are in one batch."""

    unit = "pair"
    nll = nll_per(unit)
    details: tuple[Metric, ...] = (CHOSEN, REJECTED, ACCURACY, MARGIN, CHOSEN_LOGP, REJECTED_LOGP, MIXTURE_ACCURACY)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        beta: float,
        min_score_gap: float | None = None,
        score_columns: Sequence[str] = ("score_chosen", "score_rejected"),
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length, self.beta = max_length, beta
        self.min_score_gap, self.score_columns = min_score_gap, list(score_columns)
        self.pad_token_id = pad_token_id(tokenizer)
        self._encoder = Encoder(tokenizer)

    def check_columns(self, columns: Sequence[str], argument: str) -> None:
        if not {"chosen", "rejected"} <= set(columns):
            raise missing_column(argument, columns, FORMS)
        if "instruction" in columns and "prompt" not in columns:
            raise ValueError(
                f"{argument}: expected a column prompt beside chosen and rejected; got instruction, which would not be "
                "read; rename it to prompt, and append to it an empty line and input where that is not empty"
            )
        scores = [] if self.min_score_gap is None else self.score_columns
        if not set(scores) <= set(columns):
            raise missing_column(argument, columns, [" + ".join(scores)])
        warn_unread(argument, columns, ["prompt", "chosen", "rejected", *scores, *CONTEXT_COLUMNS])

    def example(self, number: int, row: Mapping[str, Any]) -> Pair:
        """The pair of row `number`.

        Raises:
            Dropped: the pair teaches nothing, or the beginning of a completion cannot be found. It teaches nothing if
                both are the same, a score is missing or too near the other, or a completion is empty or cut off.
            ValueError: a field is missing, or is not what its column should hold.
        """
        prompt, chosen, rejected = _with_prompt(number, row)
        if chosen == rejected:
            raise Dropped("chosen and rejected are the same")
        if self.min_score_gap is not None:
            self._require_gap(number, row, self.min_score_gap)
        if not prompt:
            given = row.get("prompt") in ("", [])
            raise Dropped("the prompt is empty" + ("" if given else ": chosen and rejected do not begin alike"))
        if not chosen or not rejected:
            raise Dropped("a completion is empty")
        sides = [
            self._encoder.completed(number, prompt, completion, column, row)
            for column, completion in (("chosen", chosen), ("rejected", rejected))
        ]
        # a token that holds the end of the prompt may make one completion begin earlier: then both do, as in TRL
        start = min(_first_label(labels) for _, labels in sides)
        if start >= self.max_length:
            raise Dropped(f"the prompt alone fills max_length ({self.max_length} tokens)")
        first, second = (self._sequence(number, input_ids, labels, start) for input_ids, labels in sides)
        if first.input_ids == second.input_ids:
            cut = f" as far as max_length ({self.max_length} tokens)" if first.num_cut or second.num_cut else ""
            raise Dropped(f"chosen and rejected are the same tokens{cut}")
        return Pair(number, first, second)

    def prepare(
        self, ensemble: LoraEnsemble, items: Sequence[Pair], folder: Path, batch_size: int, fingerprint: str
    ) -> list[Pair]:
        """The pairs with their reference log-probabilities. A file in `folder` keeps these; its name depends on base,
        data and template. If the file is damaged, a warning says so, and it is made again."""
        key = _key(items, fingerprint, str(ensemble.model.dtype))
        path = folder / f"reference-{key}.safetensors"
        logp = _read_reference(path, len(items))
        if logp is None:
            logp = self._reference(ensemble, items, batch_size)
            tensors = {"logp_nats": logp}
            files.write_tensors(path, tensors, files.checksum(tensors))
        return [
            dataclasses.replace(pair, reference=(chosen, rejected))
            for pair, (chosen, rejected) in zip(items, logp.tolist(), strict=True)
        ]

    def collate(self, items: Sequence[Pair]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [B, 2, T], and for pairs that are prepared reference_logp [B, 2]."""
        rows = collate([sequence for pair in items for sequence in pair.sequences], self.pad_token_id)
        return {name: value.view(len(items), 2, -1) for name, value in rows.items()} | _reference_logp(items)

    def pack(self, items: Sequence[Pair]) -> dict[str, Tensor]:
        """All completions in one row, where the prompt of a pair stands once; and reference_logp as in `collate`."""
        return pack(pair.sequences for pair in items) | _reference_logp(items)

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores:
        """s of (24), and the details that `details` declares."""
        logp = _completion_logp(ensemble, batch)
        reference = batch["reference_logp"].to(logp.device, non_blocking=True)
        rewards = self.beta * (logp - reference.view(-1, *logp.shape[1:]))
        margins = rewards[..., 0] - rewards[..., 1]
        s = nn.functional.logsigmoid(margins)
        details = {
            CHOSEN: rewards[..., 0],
            REJECTED: rewards[..., 1],
            ACCURACY: (margins > 0).float(),
            MARGIN: margins,
            CHOSEN_LOGP: logp[..., 0],
            REJECTED_LOGP: logp[..., 1],
            # the excess over 1/2 is exactly 0 in a tie, whatever the weights are; a particle with NaN is left out
            MIXTURE_ACCURACY: (ensemble.particle_weights @ (s.exp().double() - 0.5).nan_to_num(nan=0.0) > 0.0).float(),
        }
        return Scores(s, {metric.name: details[metric].detach() for metric in self.details})

    def headline(self, metrics: Mapping[str, Any]) -> str:
        return f"reward accuracy {metrics[ACCURACY.name]:.3f}  margin {metrics[MARGIN.name]:.3f} nats"

    def _require_gap(self, number: int, row: Mapping[str, Any], gap: float) -> None:
        chosen, rejected = (_score(number, column, row.get(column)) for column in self.score_columns)
        if not chosen - rejected > gap:
            raise Dropped(f"the scores do not differ by more than {gap:g} (min_score_gap)")

    def _sequence(self, number: int, input_ids: list[int], labels: list[int], start: int) -> Example:
        first = _first_label(labels)
        labels = [*labels[:start], *input_ids[start:first], *labels[first:]]
        return Example.cut(number, input_ids, labels, self.max_length)

    @torch.no_grad()
    def _reference(self, ensemble: LoraEnsemble, items: Sequence[Pair], batch_size: int) -> Tensor:
        """The log-probabilities [N, 2] that the bare base gives the completions, in nats."""
        logp = torch.empty(len(items), 2)
        order = longest_first(map(length, items))
        parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        with ensemble.disable_adapters():
            for part in track(parts, "reference log-probabilities of the base"):
                batch = batch_of(self, ensemble, [items[i] for i in part])
                logp[part] = _completion_logp(ensemble, batch)[0].float().cpu()
        return logp


def _read_reference(path: Path, num_pairs: int) -> Tensor | None:
    """The log-probabilities [N, 2] that an earlier run kept. None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        tensors = files.read_tensors(path)
        if tensors.keys() != {"logp_nats"} or tensors["logp_nats"].shape != (num_pairs, 2):
            raise ValueError(f"{path}: not the reference log-probabilities of {num_pairs} pairs")
    except ValueError as error:
        warnings.warn(f"{error}; the reference log-probabilities are computed again", stacklevel=3)
        return None
    return tensors["logp_nats"]


def _first_label(labels: Sequence[int]) -> int:
    """The place of the first token of the completion. If there is none: the place after the last token."""
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def _score(number: int, column: str, value: Any) -> float:
    """A score of row `number`. It may be text, because a .csv file holds numbers as text."""
    if value is None or value == "":
        raise Dropped("a score is missing")
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    raise unexpected(f"row {number}: {column}", "a number", value)


def _completion_logp(ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probabilities [K, B, 2] of the completions, in nats."""
    if "segments" not in batch:  # it is padded
        batch = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
    return ensemble.sequence_logprob(batch).unflatten(1, (-1, 2))


def _reference_logp(items: Sequence[Pair]) -> dict[str, Tensor]:
    """The reference log-probabilities [B, 2] of pairs that are prepared; nothing for others."""
    if items[0].reference is None:
        return {}
    return {"reference_logp": torch.tensor([pair.reference for pair in items])}


def _with_prompt(number: int, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), all strings or all lists of messages.

    If the row has no prompt, or a string beside whole conversations, the prompt is what chosen and rejected begin with.
    Each keeps at least one message or character. In strings, a space at the end of the prompt goes to the completions.
    """
    sides: dict[str, Any] = {column: row.get(column) for column in ("prompt", "chosen", "rejected")}
    prompt, chosen, rejected = sides.values()
    for column, value in (("chosen", chosen), ("rejected", rejected)):
        known = isinstance(value, str) or is_conversation(value)
        require_field(known, number, column, "a string or a list of messages", value)
    same_kind = isinstance(chosen, str) == isinstance(rejected, str)
    require_field(same_kind, number, "rejected", f"a {type(chosen).__name__}, as chosen is", rejected)
    if isinstance(chosen, str):
        require_field(prompt is None or isinstance(prompt, str), number, "prompt", "a string, as chosen is", prompt)
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return prompt, chosen, rejected
    length = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if length > 0 and chosen[length - 1] == " ":
        length -= 1
    return chosen[: max(length, 0)], chosen[max(length, 0) :], rejected[max(length, 0) :]


def _key(items: Sequence[Pair], fingerprint: str, dtype: str) -> str:
    """A key for base, data and template. Data and template show in the tokens and labels."""
    sequences = [[s.input_ids, s.labels] for pair in items for s in pair.sequences]
    return files.sha256_of_json([fingerprint, dtype, sequences])[:16]
