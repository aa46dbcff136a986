"""alpha*: does the estimate on one adapter, trained alone, predict above which alpha particles part?

Predicted: what `renyi-engine alpha-star` says of the first single adapter of each seed, on the rows that it was trained
on. Observed: particles are trained at several alpha on the same rows. The trainings are those of `contested` and
`people`, and are shared with these if all have the same --output_dir and --dtype.

A control: the same estimate where alpha* is known to be 1, because the adapter drew the answers itself.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from filelock import FileLock
from matplotlib.figure import Figure

from examples.evidence.cells import Work, refuse_other
from examples.evidence.contested.experiment import BASE, EXPERIMENT as CONTESTED
from examples.evidence.experiment import Answers, Data, Experiment, Metric, Setting, Variant
from examples.evidence.measures import variance
from examples.evidence.methods import METHODS, answer_start
from examples.evidence.people.experiment import EXPERIMENT as PEOPLE, particles_yes
from renyi_engine import LoraEnsemble
from renyi_engine.base_model import load_model, load_tokenizer
from renyi_engine.critical_alpha import AlphaStarConfig, find_alpha_star
from renyi_engine.data import decode_answer, left_padded, stop_tokens, tokenize
from renyi_engine.objectives import SftTask

GRID = ("alpha_0.3", "alpha_0.5", "alpha_0.8", "alpha_1")
PARTED = 0.1
"""Particles have parted if their spread is larger by so much than that of particles at alpha = 0."""
MAX_EXAMPLES, NUM_DIMS = 64, 8
MADE_WITH = "made_with.json"


class AlphaStar(Experiment):
    name = "alpha_star"
    title = "alpha*: the alpha above which particles part"
    claim = (
        "The critical alpha that is estimated on one adapter, trained alone, predicts above which alpha coupled "
        "particles part."
    )
    caption = (
        "predicted and observed alpha of each part and seed; a line reaches down to the next smaller alpha that was "
        "tried, at which they had not parted."
    )
    data_file = PEOPLE.data_file
    settings: Mapping[str, Setting] = {name: replace(of, seeds=3) for name, of in CONTESTED.settings.items()}

    def variants(self, setting: str) -> Sequence[Variant]:
        # Smaller alphas are left out where particles hardly part at 0.8. Tweets have the alpha that `people` trains.
        made: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
            "camps of one size": (GRID, {}),
            "answers of one word": (GRID[2:], {"answers": "one word"}),
            "camps of 9 to 1": (GRID[1:], {"minority": 0.1}),
        }
        people = next(one for one in PEOPLE.variants(setting) if one.data["form"] == "four tweets")
        return [
            *(Variant(name, 4, ("lora", "alpha_0", *alphas), BASE | data) for name, (alphas, data) in made.items()),
            replace(people, methods=("lora", "deep_ensemble", "alpha_0.8")),
        ]

    def data(self, options: Mapping[str, Any], seed: int, source: Path | None) -> Data:
        return _owner(options).data(options, seed, source)

    def setting_of(self, setting: str, options: Mapping[str, Any]) -> Setting:
        return _owner(options).setting_of(setting, options)

    def home(self, options: Mapping[str, Any]) -> str:
        return _owner(options).name

    metrics: Mapping[str, Metric] = {"spread": Metric("spread", "", lambda answers: spread(answers))}
    note = (
        "Spread is the standard deviation, over the particles, of the probability of the first camp's answer on "
        "contested questions, or of the probability that a tweet is hate speech. At alpha = 0, four particles were "
        "trained in one run; for tweets, it is the deep ensemble."
    )

    def further(self, work: Work) -> dict[str, Any]:
        """What is predicted and what is observed, of every variant and seed."""
        seeds = range(work.setting.seeds)
        return {
            variant.name: {
                "predicted": [estimate(work, variant, seed) for seed in seeds],
                "own_answers": [estimate(work, variant, seed, own_answers=True) for seed in seeds],
                "observed": [observed(work, variant, seed) for seed in seeds],
                "alphas": [METHODS[name].settings["alpha"] for name in variant.methods if name in GRID],
            }
            for variant in self.variants(work.setting_name)
            if work.is_done(variant)
        }

    def further_lines(self, results: Mapping[str, Any]) -> list[str]:
        lines = [
            f"Predicted is alpha* (Gauss-Newton, {NUM_DIMS} dimensions, at most {MAX_EXAMPLES} training rows), with "
            "its 95 % interval over rows. Observed is the smallest alpha that was tried from which on the spread is "
            f"larger by {PARTED} than at alpha = 0. The last column is the same estimate on the same prompts with "
            "answers that the adapter drew itself. It knows the odds of these answers exactly, so alpha* is 1 over "
            "many draws. There is a number for each seed.",
            "",
            "| part | predicted | observed | predicted where alpha* is 1 |",
            "| --- | --- | --- | --- |",
        ]
        for name, found in results["further"].items():
            seen = [f"not at {found['alphas'][-1]:g}" if one is None else f"{one:g}" for one in found["observed"]]
            cells = [_with_intervals(found["predicted"]), ", ".join(seen), _with_intervals(found["own_answers"])]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return [*lines, ""]

    def picture(self, results: Mapping[str, Any]) -> Figure:
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        not_parted = 1.15
        axes.axhline(not_parted, color="0.8", linewidth=1)
        axes.plot([0, 1], [0, 1], "--", color="0.5", label="predicted = observed")
        for number, (name, found) in enumerate(results["further"].items()):
            predicted = np.clip([one["alpha_star"] for one in found["predicted"]], 0, not_parted)
            seen = np.array([not_parted if one is None else one for one in found["observed"]])
            alphas = [0.0, *found["alphas"]]
            before = [alphas[-1] if one is None else alphas[alphas.index(one) - 1] for one in found["observed"]]
            axes.plot(predicted, seen, "o", color=f"C{number}", label=name)
            axes.vlines(predicted, before, seen, color=f"C{number}")
        axes.set(xlabel="alpha*, predicted", ylabel="alpha at which particles part", xlim=(0, 1.2), ylim=(0, 1.2))
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1, not_parted], ["0", "0.2", "0.4", "0.6", "0.8", "1", "not parted"])
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def spread(answers: Answers) -> float:
    """The mean standard deviation over the particles, drawn by weight, of the probability of one of the answers."""
    if "yes" in answers.facts:
        p = particles_yes(answers)
    else:
        p = answers.particles[..., 0].numpy()[:, answers.facts["contested"]]
    return float(np.sqrt(variance(p, answers.weights.numpy())).mean())


def parted(spreads: Mapping[float, float], uncoupled: float) -> float | None:
    """The smallest alpha from which on the spread exceeds that without coupling by PARTED; None if there is none."""
    found = None
    for alpha in sorted(spreads, reverse=True):
        if spreads[alpha] < uncoupled + PARTED:
            break
        found = alpha
    return found


def observed(work: Work, variant: Variant, seed: int) -> float | None:
    spreads = {method: spread(work.answers(variant, method, seed)[0]) for method in variant.methods}
    uncoupled = spreads["alpha_0"] if "alpha_0" in spreads else spreads["deep_ensemble"]
    return parted({METHODS[name].settings["alpha"]: spreads[name] for name in spreads if name in GRID}, uncoupled)


def estimate(work: Work, variant: Variant, seed: int, own_answers: bool = False) -> dict[str, Any]:
    """alpha_star, its interval, and alpha_star by the number of dimensions, on the rows of the training, or on the same
    prompts with answers that the adapter draws itself. It takes minutes, and is kept."""
    name = f"{seed}-own-answers" if own_answers else f"{seed}"
    folder = work.folder / "alpha_star" / work.setting_name / variant.name.replace(" ", "_") / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    expected = [*work.made_with(variant, "lora", seed), NUM_DIMS, MAX_EXAMPLES]
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / MADE_WITH).exists():  # it is written last
            shutil.rmtree(folder, ignore_errors=True)  # of an estimate that was cut off
            rows = list(work.data(variant, seed).rows)
            if len(rows) > MAX_EXAMPLES:
                rows = random.Random(seed).sample(rows, MAX_EXAMPLES)
            adapter = work.run_folder(variant, "lora", seed) / "particles"
            config = AlphaStarConfig(
                model_name_or_path=work.model_path,
                ensemble=str(adapter),
                dataset_name=str(folder.with_suffix(".jsonl")),
                output_dir=str(folder),
                max_examples=MAX_EXAMPLES,
                max_length=work.setting_of(variant).max_length,
                subspace_dims=NUM_DIMS,
                seed=seed,
            )
            if own_answers:
                rows = answered_by(adapter, rows, config)
            folder.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            find_alpha_star(config)
            (folder / MADE_WITH).write_text(json.dumps(expected))
        refuse_other(folder, json.loads((folder / MADE_WITH).read_text()), expected)
        found = json.loads((folder / "results.json").read_text())
    return {
        "alpha_star": found["alpha_star"],
        "interval": found["alpha_star_interval"],
        "by_dims": found["alpha_star_by_dims"],
    }


def answered_by(adapter: Path, rows: Sequence[Mapping[str, Any]], config: AlphaStarConfig) -> list[dict[str, Any]]:
    """The rows, without those that are too long, each with an answer that the adapter draws. It knows the odds of these
    answers, so over many draws H is G and alpha* is 1."""
    tokenizer = load_tokenizer(config)
    ensemble = LoraEnsemble.from_pretrained(load_model(config), adapter)
    task = SftTask(tokenizer, config.max_length)
    fitting, _ = tokenize(rows, lambda number, row: (row, task.example(number, row)), "rows")
    examples = [example for _, example in fitting]
    starts = [answer_start(one) for one in examples]
    prompts = [one.input_ids[:start] for one, start in zip(examples, starts, strict=True)]
    drawn = ensemble.generate(
        *left_padded(prompts, task.pad_token_id),
        max_new_tokens=max(len(one.input_ids) - start for one, start in zip(examples, starts, strict=True)),
        seed=config.seed,
        eos_token_id=stop_tokens(ensemble.model, tokenizer),
        pad_token_id=task.pad_token_id,
    )[0, :, 0].tolist()
    answered = []
    for (row, _), prompt, tokens in zip(fitting, prompts, drawn, strict=True):
        text = decode_answer(tokenizer, prompt, tokens)
        is_text = isinstance(row["completion"], str)
        answered.append({**row, "completion": text if is_text else [{"role": "assistant", "content": text}]})
    return answered


def _with_intervals(estimates: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join("{:.2g} ({:.2g} to {:.2g})".format(one["alpha_star"], *one["interval"]) for one in estimates)


def _owner(options: Mapping[str, Any]) -> Experiment:
    """The experiment that has data of these options."""
    return PEOPLE if "form" in options else CONTESTED


EXPERIMENT = AlphaStar()
