"""Adapter folders: those that PEFT writes, and ours, to be edited and refused."""

from __future__ import annotations

import hashlib
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from renyi_engine import LoraEnsemble
from renyi_engine.core.files import sha256_of
from renyi_engine.ensemble.adapter_folder import ENSEMBLE_FILE, TENSORS_FILE

K = 3
Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def write_peft(model, folder, names=("a", "b", "c"), *, seed=0, **config):
    """PEFT's own adapters, random and different, in folder/a, folder/b, ..."""
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
    } | config
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPT-2's fan_in_fan_out
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, peft.LoraConfig(**config))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0.0, 0.1)
        adapted.save_pretrained(folder)
    return folder


def edit_json(path, **changes):
    """Set entries; ensemble.json gets a new digest, so that it is not refused for its digest."""
    content = json.loads(path.read_text())
    content.update(changes)
    if path.name == ENSEMBLE_FILE:
        content.pop("digest", None)
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def edit_tensors(folder, **changes):
    """Set tensors (None: take away), and let ensemble.json agree, so that the checksum is not what refuses."""
    tensors = load_file(folder / TENSORS_FILE)
    tensors.update(changes)
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / TENSORS_FILE, metadata={"format": "pt"})
    renew_checksums(folder.parent)


def renew_checksums(directory):
    ensemble = directory / ENSEMBLE_FILE
    if ensemble.is_file():
        names = json.loads(ensemble.read_text())["sha256"]
        edit_json(ensemble, sha256={name: sha256_of(directory / name) for name in names})


def refused(model, folder, *named):
    """Loading raises a one-line ValueError that names all of `named`, and leaves the model without a trace."""
    with pytest.raises(ValueError) as refusal:
        LoraEnsemble.from_pretrained(model, folder)
    message = str(refusal.value)
    assert "\n" not in message
    for name in named:
        assert str(name) in message
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def tree(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}
