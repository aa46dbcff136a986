"""`renyi-engine alpha-star`: from which alpha on particles at one adapter move apart, and for which examples.

Layout: N examples, P parameters of the adapter, m dimensions of the subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine import base_model
from renyi_engine.core import CONFIG_FILE, files, output_folder, seeding, to_yaml
from renyi_engine.critical_alpha.config import AlphaStarConfig
from renyi_engine.critical_alpha.curvature import particle, project_adapter
from renyi_engine.critical_alpha.derivatives import parts_of
from renyi_engine.critical_alpha.findings import OF_ONE, Driver, growth, make_drivers, make_results, num_drivers, say
from renyi_engine.critical_alpha.projection import CriticalAlpha, Projection
from renyi_engine.critical_alpha.report import write_alpha_star_report
from renyi_engine.data import excerpt, load_splits
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives import SftTask, check_fits, describe_rows, potential_curvature, read_items
from renyi_engine.reports import as_text

DIRECTION_FILE = "direction.safetensors"


def find_alpha_star(config: AlphaStarConfig) -> str:
    """Estimate the critical alpha of one adapter on a data set. results.json, examples.csv, direction.safetensors and
    report.html are written into `config.output_dir`.

    Returns:
        What was found, in a few lines of text.

    Raises:
        ValueError: the data, the model or the adapter cannot be used, the model cannot be differentiated twice, or
            output_dir is not empty.
    """
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_split, "dataset_split", AlphaStarConfig.dataset_split)
    with output_folder.claimed(Path(config.output_dir)) as folder:
        task = SftTask(base_model.load_tokenizer(config), config.max_length)
        examples, dropped = read_items(task, rows, "dataset_name")
        num_rows, of_rows = len(examples), describe_rows(examples, dropped)
        if num_rows > config.max_examples:
            drawn = torch.randperm(num_rows, generator=seeding.generator(config.seed))[: config.max_examples]
            examples = [examples[i] for i in sorted(drawn.tolist())]
        slots, adapter, trained_at = _load(config)
        check_fits(slots.model, examples)
        projection, point = project_adapter(
            slots,
            adapter,
            task,
            examples,
            config.subspace_dims,
            curvature=config.curvature,
            prior_curvature=potential_curvature(config.prior_lambda, num_rows, config.prior_std),
            seed=config.seed,
        )
        found = projection.critical_alpha()
        resampled = projection.bootstrap(config.num_resamples, seeding.generator(config.seed, 1))
        alpha = (trained_at or 1.0) if config.alpha is None else config.alpha
        texts = [excerpt(task.tokenizer, example) for example in examples]
        drivers = make_drivers(projection, found, examples, texts)
        results = make_results(projection, found, resampled, alpha) | {
            "curvature": config.curvature,
            "prior_curvature": projection.prior_curvature,
            "num_examples": len(examples),
            "num_parameters": len(projection.basis),
            "only_B": len(point) < len(adapter),
            "dropped_rows": of_rows,
        }
        _write(config, folder, slots, projection, found, point, drivers, results)
        return _summary(config, folder, results, drivers)


def _load(config: AlphaStarConfig) -> tuple[LoraEnsemble, list[Tensor], float | None]:
    """(an ensemble that lends places for the copies of a batch, the adapter, the alpha of its training if known)."""
    model = base_model.load_model(config)
    shape, adapter, alpha = config.adapters(num_particles=1, seed=config.seed), None, None
    if config.ensemble:
        ensemble = LoraEnsemble.from_pretrained(model, config.ensemble)
        if config.particle >= ensemble.config.num_particles:
            raise ValueError(
                f"particle: expected 0 to {ensemble.config.num_particles - 1}, the particles that {config.ensemble} "
                f"holds; got {config.particle}"
            )
        shape, adapter, alpha = ensemble.config, particle(ensemble, config.particle), ensemble.alpha
        ensemble.detach()
    shape = replace(shape, num_particles=config.per_device_eval_batch_size, init="standard", seed=config.seed)
    slots = LoraEnsemble.attach(model, shape)
    return slots, adapter or particle(slots, 0), alpha


def _write(
    config: AlphaStarConfig,
    folder: Path,
    slots: LoraEnsemble,
    projection: Projection,
    found: CriticalAlpha,
    point: Sequence[Tensor],
    drivers: Sequence[Driver],
    results: dict[str, Any],
) -> None:
    files.write_text(folder / CONFIG_FILE, to_yaml(config))
    files.write_json(folder / "results.json", files.finite(results))
    files.write_csv(folder / "examples.csv", drivers)
    parts = parts_of(projection.basis @ found.direction.to(projection.basis), point)
    kinds = ("lora_B",) if results["only_B"] else ("lora_A", "lora_B")
    names = [f"{path}.{kind}" for path in slots.paths for kind in kinds]
    files.write_tensors(folder / DIRECTION_FILE, dict(zip(names, parts, strict=True)))
    write_alpha_star_report(folder / "report.html", config, drivers, results)


def _summary(config: AlphaStarConfig, folder: Path, results: dict[str, Any], drivers: Sequence[Driver]) -> str:
    first = [f"  {driver.share:.0%}  slope {driver.slope:+.3g}  {driver.text}" for driver in drivers[:4]]
    return "\n".join(
        [
            *results["dropped_rows"],
            *say(results),
            as_text(growth(results)).rstrip(),
            "driven by:",
            *first,
            *([f"  {OF_ONE}"] if num_drivers(drivers) == 1 else []),
            f"table: {folder / 'examples.csv'}",
            f"report: {folder / 'report.html'}",
        ]
    )
