"""`renyi-engine fit-weights`: fit the weights of an ensemble's particles to held-out rows, and keep them in its folder.

Layout: K particles, N examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from renyi_engine import base_model
from renyi_engine.data import Row, columns_of, load_splits
from renyi_engine.ensemble import LoraEnsemble, adapter_folder
from renyi_engine.evaluation.config import FitWeightsConfig
from renyi_engine.objectives import (
    DpoTask,
    Evaluation,
    SftTask,
    Task,
    check_fits,
    describe_rows,
    evaluate,
    fit_particle_weights,
    read_items,
)


def fit_weights(config: FitWeightsConfig) -> str:
    """Score held-out rows, fit the weights by EM (see `fit_particle_weights`), and write them into the ensemble.json of
    `config.ensemble`. The particles stay as they are. If the rows have the columns chosen and rejected, they are scored
    as preference pairs, else as texts.

    Returns:
        The weights before and after, and the NLL of the mixture, in a few lines of text.

    Raises:
        ValueError: the data, the model or the ensemble cannot be used; the folder has no ensemble.json; it holds one
            particle alone; or no particle gives a row any mass. Nothing was written.
    """
    folder = Path(config.ensemble)
    num_particles = len(adapter_folder.particle_weights(folder))
    adapter_folder.require_ensemble_file(folder, "ensemble")
    if num_particles < 2:
        raise ValueError(f"ensemble: {folder} holds one particle, whose weight is 1; choose an ensemble with more")
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_split, "dataset_split", FitWeightsConfig.dataset_split)
    task = _task(config, base_model.load_tokenizer(config), rows)
    examples, dropped = read_items(task, rows, "dataset_name")
    ensemble = LoraEnsemble.from_pretrained(base_model.load_model(config), folder)
    check_fits(ensemble.model, examples)
    with tempfile.TemporaryDirectory() as kept:
        size = config.per_device_eval_batch_size
        examples = task.prepare(ensemble, examples, Path(kept), size, ensemble.base_fingerprint["digest"])
    before = evaluate(ensemble, task, examples, size)
    try:
        weights = fit_particle_weights(before.logp, config.alpha, rows=before.rows)
    except ValueError as error:
        raise ValueError(f"dataset_name: {str(error).removeprefix('logp: ')}") from None
    path = adapter_folder.write_weights(folder, weights.tolist())
    after = replace(before, particle_weights=weights)
    return "\n".join([*describe_rows(examples, dropped), *_compared(task, before, after), f"written into {path}"])


def _task(config: FitWeightsConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Task:
    if {"chosen", "rejected"} <= set(columns_of(rows)):
        return DpoTask(tokenizer, config.max_length, config.beta)
    return SftTask(tokenizer, config.max_length)


def _compared(task: Task, before: Evaluation, after: Evaluation) -> list[str]:
    pairs = zip(before.particle_weights.tolist(), after.particle_weights.tolist(), strict=True)
    weights = [f"p{k:03d}: weight {old:.4f} before, {new:.4f} now" for k, (old, new) in enumerate(pairs)]
    old, new = (found.summary(1.0)[task.nll.mixture.name] for found in (before, after))
    return [
        *weights,
        f"mixture NLL on these {len(before.rows)} examples: {old:.4f} nats/{task.unit} before, {new:.4f} now",
    ]
