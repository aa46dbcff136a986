"""What a run would do: its settings, one example with the tokens that are learnt, and the memory that it will take."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from renyi_engine import base_model
from renyi_engine.core import to_yaml
from renyi_engine.data import Example, marked
from renyi_engine.ensemble import targets
from renyi_engine.objectives import check_fits, length
from renyi_engine.training.config import TrainConfig
from renyi_engine.training.dataset import load_dataset, make_task
from renyi_kernels.linear_logprob import CHUNK_MIB


def describe_run(config: TrainConfig) -> str:
    """Resolved settings, a decoded example and a memory estimate, as text; no weights are loaded."""
    task = make_task(config)
    dataset = load_dataset(config, task)
    model = base_model.skeleton(config)
    check_fits(model, [*dataset.train, *dataset.held_out])
    left_out = "".join(f"{line}\n" for line in dataset.description)
    longest = max(map(length, dataset.train))
    first = dataset.train[0]
    shown = "\n\n".join(show(sequence, task.tokenizer) for sequence in first.sequences)
    return (
        f"# settings\n{to_yaml(config)}\n# data\n{len(dataset.train)} training and {len(dataset.held_out)} held-out "
        f"examples, the longest of {longest} tokens\n{left_out}\n"
        f"# row {first.row}; the loss is on what stands in [[ ]]\n{shown}\n\n"
        f"# memory\n{memory_estimate(config, model, longest, len(first.sequences))}"
    )


def show(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example's text, with the stretches that are learnt in double brackets."""
    return "".join(f"[[{text}]]" if learnt else text for text, learnt in marked(tokenizer, example))


def memory_estimate(config: TrainConfig, model: PreTrainedModel, longest: int, num_sequences: int) -> str:
    """MiB of weights, adapters and activations for the largest micro-batch, whose examples hold `num_sequences` each.
    The activations are a rough estimate."""
    base_config = model.config
    maps = targets.match_targets(model, config.ensemble_config().target_modules, config.layers_to_transform)
    itemsize = (
        (base_config.dtype or torch.float32).itemsize
        if config.dtype == "auto"
        else getattr(torch, config.dtype).itemsize
    )
    adapters = config.num_particles * config.lora_r * sum(sum(targets.features(m)) for m in maps.values())
    layers_path, layers = targets.decoder_layers(model)
    first = min(targets.layer_index(path, layers_path) for path in maps)
    # the backward keeps, of a row, the input and the output of every linear map from the first adapted layer on
    above = [m for path, m in targets.linear_maps(model).items() if targets.layer_index(path, layers_path) >= first]
    kept = sum(sum(targets.features(m)) for m in above)
    if config.gradient_checkpointing:
        width = base_config.get_text_config().hidden_size
        kept = width * (len(layers) - first) + kept // (len(layers) - first)
    rows = config.num_particles * config.per_device_train_batch_size * num_sequences * longest
    parts = {
        "base weights": itemsize * sum(p.numel() for p in model.parameters()),
        "adapters, gradients, AdamW moments": 16 * adapters,
        f"activations of {rows} rows (rough)": itemsize * rows * kept,
        "logits of a chunk": CHUNK_MIB * 2**20,
    }
    lines = [f"{name:40} {size / 2**20:10.0f} MiB" for name, size in parts.items()]
    return "\n".join([*lines, f"{'in all':40} {sum(parts.values()) / 2**20:10.0f} MiB"]) + "\n"
