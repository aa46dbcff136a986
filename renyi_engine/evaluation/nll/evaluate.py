"""`renyi-engine eval nll`: score the rows of a data set, diagnose each example, and write what was found.

Layout: K particles, N examples, B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from renyi_engine.core import CONFIG_FILE, files, output_folder, to_yaml
from renyi_engine.data import Example, Row, excerpt, load_splits
from renyi_engine.ensemble import LoraEnsemble, sum_tokens
from renyi_engine.evaluation.config import NllConfig
from renyi_engine.evaluation.evaluated_model import Subject, load_subject
from renyi_engine.evaluation.nll import diagnosis
from renyi_engine.evaluation.nll.diagnosis import CONTESTED, FLAGGED_BY, NLLS, OUT_OF_SUPPORT, Diagnosis
from renyi_engine.evaluation.nll.report import write_nll_report
from renyi_engine.objectives import Evaluation, Scores, SftTask, check_fits, describe_rows, evaluate, read_items


def evaluate_nll(config: NllConfig) -> str:
    """Diagnose every example. examples.csv, results.json and report.html are written into `config.output_dir`.

    Returns:
        What was found, in a few lines of text.

    Raises:
        ValueError: the data, the model or the ensemble cannot be used, or output_dir is not empty.
    """
    rows, calibration_rows = _read_rows(config)
    with output_folder.claimed(Path(config.output_dir)) as folder:
        subject = load_subject(config)
        ensemble, alpha = subject.ensemble, subject.require_alpha()
        if alpha == 0:
            raise ValueError(
                f"alpha: {config.ensemble} was trained at 0, where all examples have the same responsibilities; "
                "pass --alpha 1"
            )
        counted = [k for k, weight in enumerate(subject.particle_weights) if weight > 0]
        if len(counted) < 2:
            raise ValueError(
                f"ensemble: expected at least 2 particles with a weight above 0; {config.ensemble} holds "
                f"{len(counted)}; choose an ensemble with more"
            )
        task = _WithDisagreement(subject.tokenizer, config.max_length, counted)
        examples, lines = _examples(ensemble, task, rows, "dataset_name")
        min_gain = 0.0
        if calibration_rows:
            calibration, of_calibration = _examples(ensemble, task, calibration_rows, "calibration_dataset_name")
            diagnosis.check_calibration(len(calibration), config.calibration_share)
            lines += [f"calibration: {line}" for line in of_calibration]
            scored, base_logp = _score(ensemble, task, calibration, config.per_device_eval_batch_size)
            gains = diagnosis.gain_over_base(scored.logp, base_logp, scored.num_labels, scored.particle_weights)
            min_gain = diagnosis.support_limit(gains, config.calibration_share)
        scored, base_logp = _score(ensemble, task, examples, config.per_device_eval_batch_size)
        found = diagnosis.diagnose(
            scored.logp,
            base_logp,
            scored.details["disagreement"],
            scored.num_labels,
            alpha,
            config.min_disagreement,
            min_gain,
            scored.particle_weights,
        )
        texts = [excerpt(subject.tokenizer, example) for example in examples]
        table = [Diagnosis(e.row, *values, text=text) for e, values, text in zip(examples, found, texts, strict=True)]
        return _write(config, folder, subject, table, min_gain, lines)


def _read_rows(config: NllConfig) -> tuple[Sequence[Row], Sequence[Row]]:
    """The rows to diagnose, and those of the calibration set, if there is one."""
    splits = load_splits(config.dataset_name, config.dataset_config, "dataset_name")
    rows = splits.rows(config.dataset_split, "dataset_split", NllConfig.dataset_split)
    if not config.calibration_dataset_name:
        return rows, []
    splits = load_splits(config.calibration_dataset_name, None, "calibration_dataset_name")
    default = NllConfig.calibration_dataset_split
    return rows, splits.rows(config.calibration_dataset_split, "calibration_dataset_split", default)


def _examples(
    ensemble: LoraEnsemble, task: SftTask, rows: Sequence[Row], setting: str
) -> tuple[list[Example], list[str]]:
    """The examples that the task makes of the rows, and which rows it dropped, in words."""
    examples, dropped = read_items(task, rows, setting)
    check_fits(ensemble.model, examples)
    return examples, describe_rows(examples, dropped)


def _score(
    ensemble: LoraEnsemble, task: SftTask, examples: Sequence[Example], batch_size: int
) -> tuple[Evaluation, Tensor]:
    """The scores of the examples under the particles, and their logp under the base, [N] nats.

    The base is scored as K particles whose B is zero. So it takes the path of the particles and rounds as they do, and
    particles that learnt nothing gain exactly nothing. In bfloat16, the logp of a base that runs by itself differs from
    this by up to 0.1 nats a token.
    """
    scored = evaluate(ensemble, task, examples, batch_size)
    stacked = [B for _, B in ensemble.stacked().values()]
    kept = [B.detach().clone() for B in stacked]
    with torch.no_grad():
        try:
            for B in stacked:
                B.zero_()
            base = evaluate(ensemble, task, examples, batch_size)
        finally:
            for B, values in zip(stacked, kept, strict=True):
                B.copy_(values)
    return scored, base.logp.amax(dim=0)


class _WithDisagreement(SftTask):
    """Supervised fine-tuning, whose scores also say how far the `counted` particles disagree on each sequence, [B]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, counted: Sequence[int]) -> None:
        super().__init__(tokenizer, max_length)
        self.counted = counted

    def score(self, ensemble: LoraEnsemble, batch: Mapping[str, Tensor]) -> Scores:
        logp = ensemble.token_logprob(batch)
        counted = torch.stack([logp[k] for k in self.counted])  # with a list as index, torch would wait for a GPU
        return Scores(sum_tokens(logp), {"disagreement": diagnosis.token_disagreement(counted)})


def _write(
    config: NllConfig, folder: Path, subject: Subject, table: Sequence[Diagnosis], min_gain: float, dropped: list[str]
) -> str:
    files.write_text(folder / CONFIG_FILE, to_yaml(config))
    files.write_csv(folder / "examples.csv", table)
    kinds = {kind: [d for d in table if d.flag == kind] for kind in (CONTESTED, OUT_OF_SUPPORT)}
    mean = lambda name: sum(getattr(d, name) for d in table) / len(table)
    results: dict[str, Any] = {
        "num_examples": len(table),
        "alpha": subject.alpha,
        "particle_weights": subject.particle_weights,
        "min_disagreement": config.min_disagreement,
        "min_gain_nats_per_token": min_gain,
        **{kind.replace(" ", "_"): len(found) for kind, found in kinds.items()},
        **{f"mean_{name}": mean(name) for name in (*FLAGGED_BY, "ess_particles", *NLLS)},
        "dropped_rows": dropped,
    }
    files.write_json(folder / "results.json", results)
    report = write_nll_report(folder / "report.html", config, table, kinds, results)
    counts = "\n".join(f"{kind}: {len(found)} of {len(table)} examples" for kind, found in kinds.items())
    means = f"mean ESS {results['mean_ess_particles']:.2f} of {subject.num_particles}, alpha {subject.alpha:g}"
    return "\n".join([*dropped, counts, means, f"table: {folder / 'examples.csv'}", f"report: {report}"])
