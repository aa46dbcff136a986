"""What a model can read: only tokens that it has embeddings for, and not more of them than it has positions for.

Every command checks this before it runs anything. Later there would only be an index error on the device.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine.ensemble import targets


def check_fits(
    model: PreTrainedModel, sequences: Iterable[tuple[str, Sequence[int]]], argument: str, new_tokens: int = 0
) -> None:
    """Check that `model` can read every sequence, and `new_tokens` more tokens after it.

    Args:
        model: its weights may be on the meta device.
        sequences: (what errors call it, such as "row 3"; its tokens) for each sequence.
        argument: the setting that bounds their length: max_length, or max_new_tokens if there are new tokens.

    Raises:
        ValueError: a token has no embedding, or there are more tokens than positions.
    """
    num_embeddings, positions = model.get_input_embeddings().weight.shape[0], num_positions(model)
    for place, ids in sequences:
        check_tokens(num_embeddings, place, ids)
        # the last of the new tokens is drawn, but nobody reads it
        if positions is not None and len(ids) + max(new_tokens - 1, 0) > positions:
            more = f" and {new_tokens} new ones" if new_tokens else ""
            most = positions - len(ids) + 1 if new_tokens else positions
            remedy = f"lower --{argument} to at most {most}" if most > 0 else "shorten it"
            raise ValueError(
                f"{argument}: {place} has {len(ids)} tokens{more}, but the model has {positions} positions; {remedy}"
            )


def check_batches(model: PreTrainedModel, lengths: Collection[tuple[int, int]], argument: str) -> None:
    """Check that log-likelihoods of sequences of these lengths do not depend on which of them share a batch. `lengths`:
    how many tokens of each sequence the model reads in a packed row, and in a padded batch. `argument` is the setting
    that makes the sequences shorter.

    Raises:
        ValueError: they do depend, because the model's rotary positions change with the longest sequence of a batch.
    """
    kind, limit = changing_positions(model) or ("", sys.maxsize)
    beyond = sum(padded > limit for _, padded in lengths)
    # Phi-3 has one kind of positions up to the limit and another beyond it, always for the whole batch
    if beyond and ("dynamic" in kind or any(packed <= limit for packed, _ in lengths)):
        raise ValueError(
            f"{argument}: {beyond} of {len(lengths)} sequences are longer than {limit} tokens, and from there on the "
            f"rotary positions of {type(model).__name__} (rope_type {kind!r}) depend on the longest sequence of a "
            f"batch; make all sequences at most {limit} tokens long: lower --{argument}"
        )


def check_tokens(num_embeddings: int, place: str, ids: Sequence[int]) -> None:
    """ValueError unless there is an embedding for each of these tokens."""
    if max(ids, default=0) >= num_embeddings:
        raise ValueError(
            f"model_name_or_path: {place}: the tokenizer gives token {max(ids)}, but the model has {num_embeddings} "
            "embeddings, so they do not belong together; give the model with its own tokenizer"
        )


def num_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model with a table of positions can read at once. None if the model computes its positions.

    GPT-2 and OPT have tables of learned positions, GPT-J has one of rotations, and MPT one of biases.
    """
    if model.config.model_type == "mpt":  # it makes a new table in every forward
        return model.config.max_seq_len
    decoder = targets.decoder(model)
    sizes = [
        # some tables begin with rows that stand for no position
        module.num_embeddings - getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding) and _is_of_positions(name)
    ]
    sizes += [len(table) for name, table in decoder.named_buffers() if _is_of_positions(name) and len(table) > 1]
    return min(sizes, default=None)


def changing_positions(model: PreTrainedModel) -> tuple[str, int] | None:
    """(rope type, the number of tokens beyond which they change) of rotary positions that change with the longest
    sequence of a batch. None if a model has no such positions."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(by_layer for by_layer in rope.values() if isinstance(by_layer, dict))):
        kind = one.get("rope_type", "default")
        if kind == "longrope":
            return kind, one.get("original_max_position_embeddings", config.max_position_embeddings)
        if "dynamic" in kind:
            return kind, config.max_position_embeddings
    return None


def use_a_pad_token_within(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Replace a pad token that has no embedding. Padding is masked, so any other token will do."""
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= num_embeddings:
        others = (tokenizer.eos_token_id, *tokenizer.all_special_ids, 0)
        tokenizer.pad_token_id = next(id for id in others if id is not None and id < num_embeddings)


def _is_of_positions(path: str) -> bool:
    return re.search(r"pos|^wpe$", path.rsplit(".", 1)[-1]) is not None
