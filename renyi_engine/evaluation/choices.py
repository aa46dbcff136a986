"""The log-likelihood of given completions of a prompt, under every particle.

Layout: K particles, N prompts, C completions, B sequences of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine.data import Encoder, Example, longest_first, pack
from renyi_engine.ensemble import LoraEnsemble, changing_positions, check_tokens, num_positions
from renyi_kernels import IGNORE_INDEX


@dataclass(frozen=True)
class Choices:
    """A prompt and C completions of it, as token ids."""

    prompt: list[int]
    completions: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads for the longest completion. Its last token is predicted, never read."""
        return len(self.prompt) + max(map(len, self.completions)) - 1


def encode_choices(tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str]) -> Choices:
    """Tokens of a prompt and of each completion, split where lm-eval splits them, so that scores can be compared.

    Prompt and completion are encoded as one text, which is cut where the tokens of the prompt alone end. White space at
    the end of the prompt becomes part of the completions. Tokens that the tokenizer puts before every text come once,
    before the prompt. Nothing is put after the completion.

    Raises:
        ValueError: the prompt is empty, or a completion adds no token to it.
    """
    stripped = prompt.rstrip()
    if not stripped:
        raise ValueError("prompt: it is empty, and no model predicts a first token; begin it with the BOS token")
    encoder = Encoder(tokenizer)
    alone = encoder.prompt(stripped)
    encoded = [encoder.prompt(prompt + completion) for completion in completions]
    for completion, ids in zip(completions, encoded, strict=True):
        if len(ids) <= len(alone):
            raise ValueError(
                f"completions: {completion!r} adds no token to the prompt {prompt[-40:]!r}; give it some text"
            )
    return Choices(alone, [ids[len(alone) :] for ids in encoded])


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read at once; None if neither a table of positions nor its config limits them."""
    return num_positions(model) or getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def score_choices(
    ensemble: LoraEnsemble,
    choices: Sequence[Choices],
    *,
    batch_size: int,
    track: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> Tensor:
    """The log-likelihood of every completion, nats summed over its tokens: ``[K, N, C]`` on CPU, fp32 or better.

    The model reads each prompt once for all completions, if every completion is one token, or if it can read packed
    rows (`LoraEnsemble.packs`) and no sequence is so long that its positions change. A sequence that is longer than the
    model's context loses its beginning. Inside `ensemble.disable_adapters()` the result is the base's, K = 1.

    Args:
        choices: N prompts, each with the same number C of completions.
        batch_size: prompts of a batch. A batch holds prompts of similar length. It is packed, or padded on the right.
        track: iterates over the batches in place of `iter`, to show progress.

    Raises:
        ValueError: there is no prompt, prompts have different numbers of completions, a completion is longer than the
            model's context, or the model has no embedding for a token.
    """
    if len({len(one.completions) for one in choices}) != 1:
        raise ValueError("choices: expected at least one prompt, and the same number of completions for every prompt")
    num_embeddings = ensemble.model.get_input_embeddings().weight.shape[0]
    for number, one in enumerate(choices):
        check_tokens(num_embeddings, f"prompt {number}", one.prompt)
        for ids in one.completions:
            check_tokens(num_embeddings, f"a completion of prompt {number}", ids)
    context = context_length(ensemble.model) or sys.maxsize
    longest = max(len(ids) for one in choices for ids in one.completions)
    if longest > context:
        raise ValueError(f"completions: one has {longest} tokens, but the model reads {context} at once; shorten it")
    _, limit = changing_positions(ensemble.model) or ("", sys.maxsize)
    if ensemble.packs and all(one.num_tokens <= limit for one in choices):
        families = [[_example(one.prompt, ids, context) for ids in one.completions] for one in choices]
        score = partial(_packed_logprob, ensemble, families)
        return _score_sequences(ensemble.model, [one.num_tokens for one in choices], batch_size, track, score)
    if longest == 1:
        labels = torch.tensor([[ids[0] for ids in one.completions] for one in choices])
        prompts = [one.prompt[-context:] for one in choices]
        score = partial(_last_logprob, ensemble, prompts, labels)
        return _score_sequences(ensemble.model, list(map(len, prompts)), batch_size, track, score)
    sequences = [(one.prompt + ids)[-context - 1 :] for one in choices for ids in one.completions]
    num_labels = [len(ids) for one in choices for ids in one.completions]
    # the last token of a sequence is predicted, never read
    lengths = [len(ids) - 1 for ids in sequences]
    score = partial(_suffix_logprob, ensemble, sequences, num_labels)
    logp = _score_sequences(ensemble.model, lengths, batch_size, track, score)
    return logp.view(logp.shape[0], len(choices), -1)


def _score_sequences(
    model: PreTrainedModel,
    lengths: Sequence[int],
    batch_size: int,
    track: Callable[[Sequence[list[int]]], Iterable[list[int]]],
    score: Callable[[list[int]], Tensor],
) -> Tensor:
    """The results of `score`, [K, B, ...] for the indices of a batch, in the order of the sequences.

    lengths: how many tokens of each sequence the model reads. Some models change their positions for sequences beyond a
    length; those sequences have batches of their own.
    """
    _, limit = changing_positions(model) or ("", sys.maxsize)
    order = longest_first(lengths)
    kinds = ([i for i in order if lengths[i] > limit], [i for i in order if lengths[i] <= limit])
    batches = [kind[start : start + batch_size] for kind in kinds for start in range(0, len(kind), batch_size)]
    scores = torch.cat([score(batch).cpu() for batch in track(batches)], dim=1)
    return scores[:, torch.tensor(order).argsort()]


def _example(prompt: list[int], completion: list[int], context: int) -> Example:
    """A completion after as much of its prompt as the model can read. Its last token is predicted, never read."""
    input_ids = (prompt + completion)[-context - 1 :]
    return Example(0, input_ids, [IGNORE_INDEX] * (len(input_ids) - len(completion)) + completion)


def _packed_logprob(ensemble: LoraEnsemble, families: Sequence[Sequence[Example]], batch: list[int]) -> Tensor:
    """[K, B, C]: the logp of the completions of each prompt of the batch."""
    logp = ensemble.sequence_logprob(pack(families[i] for i in batch))
    return logp.unflatten(1, (len(batch), -1))


def _last_logprob(ensemble: LoraEnsemble, prompts: Sequence[list[int]], labels: Tensor, batch: list[int]) -> Tensor:
    """[K, B, C]: the logp of C single tokens, labels [N, C], after the last token of each prompt of the batch."""
    hidden = _read(ensemble, [prompts[i] for i in batch])
    ends = torch.tensor([len(prompts[i]) - 1 for i in batch], device=hidden.device)
    last = hidden[:, torch.arange(len(batch), device=hidden.device), ends]
    return ensemble.label_logprob(last.unsqueeze(2).expand(-1, -1, labels.shape[1], -1), labels[batch])


def _suffix_logprob(
    ensemble: LoraEnsemble, sequences: Sequence[list[int]], num_labels: Sequence[int], batch: list[int]
) -> Tensor:
    """[K, B]: the logp of the last num_labels[i] tokens of each sequence of the batch, summed."""
    hidden = _read(ensemble, [sequences[i][:-1] for i in batch])
    labels = torch.full(hidden.shape[1:3], IGNORE_INDEX)
    for row, i in enumerate(batch):
        # the last label is predicted at the last position that is read
        end = len(sequences[i]) - 1
        labels[row, end - num_labels[i] : end] = torch.tensor(sequences[i][-num_labels[i] :])
    return ensemble.label_logprob(hidden, labels).sum(dim=-1)


def _read(ensemble: LoraEnsemble, sequences: Sequence[list[int]]) -> Tensor:
    """The final hidden states, [K, B, T, D], of sequences that are padded on the right."""
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.int64) for ids in sequences], batch_first=True)
    return ensemble(pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True), mask)
