"""Every class on which adapters come on: PEFT loads what is saved, and generation is decoding without a cache."""

from __future__ import annotations

import copy
import warnings

import pytest

from ..in_use import assert_peft_loads, assert_says_what_it_says_one_by_one, attach, left_padded
from ..tiny_models import names, tiny_model

DOUBLE = {"axk1", "gemma4_text, keys as values", "zamba"}
"""Here rounding grows in fp32, or sends a token to another expert: held to the same bounds in fp64."""


@pytest.mark.parametrize("name", names())
def test_what_attaches_generates_and_is_loaded_by_peft(name, tmp_path):
    model = tiny_model(name)
    if name in DOUBLE:
        model = model.double()
        model.set_experts_implementation("eager")  # the other one knows no fp64
    base = copy.deepcopy(model)
    try:
        ensemble = attach(model)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_says_what_it_says_one_by_one(ensemble, *left_padded([7, 4]), max_new_tokens=4)
        with ensemble.disable_adapters():
            assert_says_what_it_says_one_by_one(ensemble, *left_padded([7, 4]), max_new_tokens=4)
    assert_peft_loads(ensemble, base, tmp_path)
