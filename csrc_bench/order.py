"""Which rows tell most. These are measured first, in this order; all others follow as they stand in their files."""

from __future__ import annotations

import re

_OURS, _FLOORS = "ours|ours_captured", "gemms|frozen_base"
_COMPILED = "ours_compiled|ours_captured_compiled|frozen_base_captured_compiled"  # the first of them may take minutes

FIRST = [
    rf"training_step bar_\w+_all-step-({_OURS}|{_FLOORS}|peft_bf16)",
    rf"ragged_step bar_\w+_(hh_rlhf_pairs|mmlu_completion)_k\d\w*-step-({_OURS}|{_FLOORS}|peft_padding_free)",
    rf"training_step bar_\w+_all-step-({_COMPILED})",
    rf"ragged_step bar_\w+_(hh_rlhf_pairs|mmlu_completion)_k\d\w*-step-({_COMPILED})",
    r"renyi_loss bar_(qwen2|tiny)-both-\w+",
    r"(lora_linears|grouped_lora) bar_\w+-(graph|both)-(ours|ours_torch|baddbmm_|gemms|copy)",
    r"training_step smollm2_k\d+-step-(ours|ours_captured|gemms)",
    r"training_step memory_\w+-step-\w+",
    r"generate bar_(smollm2|tiny)-tokens-\w+",
    r"training_step smollm2_k\d+-step-ours_captured_compiled",  # each compiles for some seconds
]
"""Each is a pattern for "op shape-direction-variant"."""


def place(name: str) -> int:
    """The place in `FIRST` of a row of that name; behind all of them if there is none."""
    return next((number for number, pattern in enumerate(FIRST) if re.fullmatch(pattern, name)), len(FIRST))


def is_first(name: str) -> bool:
    return place(name) < len(FIRST)
