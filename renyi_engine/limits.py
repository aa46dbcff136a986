"""What a model can read: the tokens that it has embeddings for, and as many of them as it has positions for.

Every command checks this before it runs anything: later it would be no more than an index error on the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine import targets


def check_fits(
    model: PreTrainedModel, sequences: Iterable[tuple[str, Sequence[int]]], argument: str, new_tokens: int = 0
) -> None:
    """Check that `model` can read every sequence, and `new_tokens` more after it.

    Args:
        model: its weights may be on the meta device.
        sequences: each with what it is called in errors, such as "row 3".
        argument: the setting that bounds their length: max_length, or max_new_tokens if there are new ones.

    Raises:
        ValueError: a token has no embedding, or there are more tokens than positions.
    """
    num_embeddings, positions = model.get_input_embeddings().weight.shape[0], num_positions(model)
    for place, ids in sequences:
        check_tokens(num_embeddings, place, ids)
        # the last of the new tokens is drawn, and never read
        if positions is not None and len(ids) + max(new_tokens - 1, 0) > positions:
            more = f" and {new_tokens} new ones" if new_tokens else ""
            most = positions - len(ids) + 1 if new_tokens else positions
            remedy = f"lower --{argument} to at most {most}" if most > 0 else "shorten it"
            raise ValueError(
                f"{argument}: {place} has {len(ids)} tokens{more}, but the model has {positions} positions; {remedy}"
            )


def check_tokens(num_embeddings: int, place: str, ids: Sequence[int]) -> None:
    """ValueError unless there is an embedding for each of these tokens."""
    if max(ids, default=0) >= num_embeddings:
        raise ValueError(
            f"model_name_or_path: {place}: the tokenizer gives token {max(ids)}, the model has {num_embeddings} "
            "embeddings; they do not belong together: give the model with its own tokenizer"
        )


def num_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model with a table of positions can read at once; None where positions are computed.

    Such tables are the learned positions of GPT-2 and OPT, the rotations of GPT-J, and the biases of MPT.
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


def use_a_pad_token_within(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Replace a pad token without an embedding; padding is masked, so any other token will do."""
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= num_embeddings:
        others = (tokenizer.eos_token_id, *tokenizer.all_special_ids, 0)
        tokenizer.pad_token_id = next(id for id in others if id is not None and id < num_embeddings)


def _is_of_positions(path: str) -> bool:
    return re.search(r"pos|^wpe$", path.rsplit(".", 1)[-1]) is not None
