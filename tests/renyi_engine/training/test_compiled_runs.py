"""A run whose decoder layers are compiled is the run without; and which runs compile them."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch

from renyi_engine import LoraEnsemble, train
from renyi_engine.training.config import WORTH_COMPILING

from .runs import metrics


def test_a_compiled_run_gives_the_same_figures_and_says_that_it_compiles(sft_config, monkeypatch, capsys, tmp_path):
    # to make code would take longer, and is tested elsewhere
    monkeypatch.setattr(LoraEnsemble, "compile_layers", partialmethod(LoraEnsemble.compile_layers, backend="eager"))
    settings = {"max_steps": 4, "init": "spread", "layers_to_transform": [2], "gradient_checkpointing": True}
    results = [
        train(sft_config(**settings, torch_compile=compiles, output_dir=str(tmp_path / str(compiles))))
        for compiles in (False, True)
    ]
    assert capsys.readouterr().err.count("compiling the decoder layers for training on packed rows") == 1
    for ours, theirs in zip(*(metrics(result.output_dir) for result in results), strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    uncompiled, compiled = (result.ensemble.particles.values for result in results)
    torch.testing.assert_close(compiled, uncompiled, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("torch_compile", "device_type", "num_steps", "compiles"),
    [
        ("auto", "cuda", WORTH_COMPILING // 2, True),
        ("auto", "cuda", WORTH_COMPILING // 2 - 1, False),
        ("auto", "cpu", 10**6, False),
        (True, "cpu", 1, True),
        ("true", "cuda", 1, True),
        (False, "cuda", 10**6, False),
    ],
)
def test_which_runs_compile_their_layers(sft_config, torch_compile, device_type, num_steps, compiles):
    config = sft_config(torch_compile=torch_compile, gradient_accumulation_steps=2)
    assert config.compiles(device_type, num_steps) is compiles


def test_another_word_is_refused(sft_config):
    with pytest.raises(ValueError, match=r"^torch_compile: expected one of auto, true, false; got 'perhaps'"):
        sft_config(torch_compile="perhaps")
