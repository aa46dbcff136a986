"""`renyi-engine alpha-star`: above which alpha particles that start at one adapter part, and over which examples.

Layout: N examples, P parameters of the adapter, m dimensions of the subspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine import base_model
from renyi_engine.core import CONFIG_FILE, files, output_folder, seeding, to_yaml
from renyi_engine.critical_alpha.config import AlphaStarConfig
from renyi_engine.critical_alpha.curvature import particle, project_adapter
from renyi_engine.critical_alpha.derivatives import parts_of
from renyi_engine.critical_alpha.projection import CriticalAlpha, Projection
from renyi_engine.data import Example, excerpt, load_splits
from renyi_engine.ensemble import LoraEnsemble
from renyi_engine.objectives import SftTask, check_fits, describe_rows, potential_curvature, read_items
from renyi_engine.reports import Section, Table, as_text, lines, write_page

DIRECTION_FILE = "direction.safetensors"
SHOWN = 25
"""Examples in the report; the table on disk has all."""
INTERVAL = (0.025, 0.975)
WHAT_H_IS = {"hessian": "the whole Hessian", "gauss_newton": "the Gauss-Newton part of the Hessian"}


@dataclass(frozen=True)
class Driver:
    """What an example contributes to the direction v of the critical alpha (paper 3.3).

    Attributes:
        row: its number in the data set.
        share: its part of v'Gv, the mean squared slope, from 0 to 1.
        slope: d s / d v, nats for a unit of v. Examples whose slopes have opposite signs pull particles apart.
        curvature: of -s along v, nats for a squared unit of v.
    """

    row: int
    share: float
    slope: float
    curvature: float
    text: str


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
        drivers = _drivers(projection, found, examples, texts)
        results = _results(projection, found, resampled, alpha) | {
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


def _drivers(
    projection: Projection, found: CriticalAlpha, examples: Sequence[Example], texts: Sequence[str]
) -> list[Driver]:
    """One for each example, the largest share first."""
    v = found.direction
    slopes = projection.scores @ v
    curvatures = torch.einsum("a,nab,b->n", v, projection.curvatures, v)
    shares = slopes.square() / slopes.square().sum()
    columns = zip(examples, shares.tolist(), slopes.tolist(), curvatures.tolist(), texts, strict=True)
    drivers = [Driver(e.row, share, slope, curvature, text) for e, share, slope, curvature, text in columns]
    return sorted(drivers, key=lambda driver: -driver.share)


def _results(projection: Projection, found: CriticalAlpha, resampled: Tensor, alpha: float) -> dict[str, Any]:
    H, G = projection.pencil()
    of_H, of_S = torch.linalg.eigvalsh(H), torch.linalg.eigvalsh(H - alpha * G)
    low, high = resampled.quantile(torch.tensor(INTERVAL, dtype=resampled.dtype), interpolation="nearest").tolist()
    m = len(H)
    return {
        "alpha_star": found.alpha,
        "alpha_star_interval": [low, high],
        "alpha_star_by_dims": [projection.critical_alpha(num_dims=dims).alpha for dims in range(1, m + 1)],
        "num_dims": m,
        "num_leading_dims": projection.num_leading,
        "curvature_along_direction": (found.direction @ H @ found.direction).item(),
        "squared_slope_along_direction": (found.direction @ G @ found.direction).item(),
        "alpha": alpha,
        "spectrum_of_H": of_H.tolist(),
        "spectrum_of_S_alpha": of_S.tolist(),
        "num_unstable_dims": int((of_S < -projection.resolution * of_H.abs().max()).sum()),
    }


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
    _report(config, folder, drivers, results)


def _say(results: dict[str, Any]) -> list[str]:
    """The answer in sentences."""
    low, high = results["alpha_star_interval"]
    said = [
        f"alpha* = {results['alpha_star']:.4g} (95 % of resamples: {low:.4g} to {high:.4g}), from "
        f"{results['num_examples']} examples in {results['num_dims']} of {results['num_parameters']:,} dimensions",
        f"H is {WHAT_H_IS[results['curvature']]}",
        f"at alpha = {results['alpha']:g}, a spread pays along {results['num_unstable_dims']} of them",
    ]
    if results["alpha_star"] <= 0:
        said.append(
            "alpha* is not above 0: along its direction the negative log-likelihood itself curves downwards, so this "
            "adapter is at no minimum and a spread pays at every alpha; train on, add a prior, or leave the network's "
            "own curvature out with --curvature gauss_newton"
        )
    return said


def _growth(results: dict[str, Any]) -> Table:
    by_dims = results["alpha_star_by_dims"]
    shown = sorted({d for d in (1, 2, 4, 8, 16, 32, 64, 128, results["num_leading_dims"]) if d < len(by_dims)})
    shown.append(len(by_dims))
    return Table("", ["dimensions", *map(str, shown)], [["alpha*", *(f"{by_dims[dims - 1]:.4g}" for dims in shown)]])


def _summary(config: AlphaStarConfig, folder: Path, results: dict[str, Any], drivers: Sequence[Driver]) -> str:
    first = [f"  {driver.share:.0%}  slope {driver.slope:+.3g}  {driver.text}" for driver in drivers[:4]]
    return "\n".join(
        [
            *results["dropped_rows"],
            *_say(results),
            as_text(_growth(results)).rstrip(),
            "driven by:",
            *first,
            f"table: {folder / 'examples.csv'}",
            f"report: {folder / 'report.html'}",
        ]
    )


def _report(config: AlphaStarConfig, folder: Path, drivers: Sequence[Driver], results: dict[str, Any]) -> Path:
    m, leading, alpha = results["num_dims"], results["num_leading_dims"], results["alpha"]
    who = f"particle {config.particle} of {config.ensemble}" if config.ensemble else "a fresh adapter"
    dims = list(range(1, m + 1))
    growth = lines(
        "growth",
        {"alpha*": (dims, results["alpha_star_by_dims"])},
        xlabel="dimensions of the subspace",
        ylabel="critical alpha",
        vertical={"leading directions of G end": leading + 0.5},
        caption="The critical alpha in the first dimensions of the subspace. It can only sink as they grow; where the "
        "line is flat at the end, more dimensions would not say much else.",
    )
    spectrum = lines(
        "spectrum",
        {
            "H, alpha = 0": (dims, results["spectrum_of_H"]),
            f"S_alpha = H - {alpha:g} G": (dims, results["spectrum_of_S_alpha"]),
        },
        xlabel="eigenvalue, the smallest first",
        ylabel="curvature of the loss (nats)",
        horizontal={"a spread pays below": 0.0},
        caption="Curvature of the loss as particles spread, in the subspace. Where H dips below the dashed line, the "
        "adapter is at no minimum of its own loss; where only S_alpha does, the coupling makes particles part.",
    )
    of_H = WHAT_H_IS[config.curvature]
    moved = "B alone, as B is zero and A moves nothing" if results["only_B"] else "A and B of every adapted map"
    sections = [
        Section(
            "Would particles part?",
            "Particles that all start at this adapter stay together while alpha is below alpha*, and part along one "
            "direction above it: " + ". ".join(said[0].upper() + said[1:] for said in _say(results)) + ".",
            pictures=[growth, spectrum],
        ),
        Section(
            "Which examples drive it",
            "Along that direction some examples gain what others lose: slopes of opposite sign pull apart. The share "
            "is of the mean squared slope. What is scored stands in [[ ]].",
            tables=[
                Table(
                    f"The first {min(SHOWN, len(drivers))} of {len(drivers)} examples",
                    ["row", "share", "slope", "curvature", "example"],
                    [
                        [str(d.row), f"{d.share:.1%}", f"{d.slope:+.4g}", f"{d.curvature:.4g}", d.text]
                        for d in drivers[:SHOWN]
                    ],
                    "Slopes are in nats a unit of the direction, curvatures in nats a squared unit; all of them are "
                    "in examples.csv, the direction is in direction.safetensors.",
                )
            ],
        ),
    ]
    return write_page(
        folder / "report.html",
        title="Critical alpha",
        lead=f"From which alpha on particles that start at {who} would part, on {results['num_examples']:,} "
        f"examples of {config.dataset_name}.",
        sections=sections,
        words=[
            ("alpha*", "The least ratio of v'Hv to v'Gv over directions v of the adapter's parameters."),
            ("H", f"Mean curvature of an example's negative log-likelihood: {of_H}. Here of {moved}."),
            ("G", "Mean outer product of an example's gradient: how much the examples disagree on where to go."),
            ("Resamples", "The examples drawn anew with replacement, in the same subspace."),
        ],
        details={"settings": asdict(config), "results": results},
    )
