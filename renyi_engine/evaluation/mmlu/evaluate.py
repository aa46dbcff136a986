"""`renyi-engine eval mmlu`: the answers of the particles, their mixture and the base, with lm-eval's prompts.

Layout: K particles, N questions, C choices.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from renyi_engine.core import files, output_folder, track, versions
from renyi_engine.evaluation.choices import context_length, encode_choices, score_choices
from renyi_engine.evaluation.config import MmluConfig
from renyi_engine.evaluation.evaluated_model import Subject, load_subject
from renyi_engine.evaluation.mmlu import lm_eval, questions as mmlu_questions, report
from renyi_engine.evaluation.mmlu.questions import COMPLETIONS, SUBJECTS, Question
from renyi_engine.evaluation.uncertainty import predictive
from renyi_engine.reports import as_text, glossary, page_title, write_page

RESULTS, SAMPLES, MODELS, REPORT = "results.json", "samples", "models", "report.html"


def evaluate_mmlu(config: MmluConfig) -> str:
    """Ask every question, and write these files into `output_dir`. Returns the main table as plain text.

    results.json: the accuracies of the mixture (of the base if there is no ensemble), in lm-eval's format.
    models/base.json, p000.json, ...: the same for the base and for each particle.
    samples/mmlu_SUBJECT.jsonl: every question in lm-eval's format, and what each particle says. The log-likelihoods of
        the mixture are log-probabilities among the four choices.
    report.html: calibration, uncertainty and responsibilities.

    Raises:
        ValueError: the data, the model or the ensemble cannot be used, or output_dir is not empty.
    """
    started = time.time()
    mmlu_questions.check_subjects(config.subjects or [])
    questions, sizes = _choose(config)
    prompts = _prompts(config, questions)
    with output_folder.claimed(Path(config.output_dir)) as output:
        subject = load_subject(config)
        alpha = subject.require_alpha() if subject.num_particles else 0.0
        weights = subject.ensemble.particle_weights.cpu()
        base, particles, num_cut = _score(subject, prompts, config.per_device_eval_batch_size)
        # results.json and the samples are about the first of them
        answers = {"base": base}
        if particles is not None:
            members = {f"p{k:03d}": logp for k, logp in enumerate(particles)}
            answers = {"mixture": predictive(particles, weights).mixture, "base": base, **members}
        main, *others = answers

        samples = _samples(questions, prompts, answers[main], base, particles, alpha, weights)
        _write_samples(output / SAMPLES, samples)
        run = _run_facts(config, subject) | {
            "task_hashes": lm_eval.task_hashes(samples),
            "num_prompts_cut": num_cut,
            "date": started,
            "total_evaluation_time_seconds": str(time.time() - started),
        }

        def results(member: str) -> dict[str, Any]:
            chosen = answers[member].argmax(dim=-1).tolist()
            right = [choice == question.answer for choice, question in zip(chosen, questions, strict=True)]
            return lm_eval.results(questions, right, sizes, config) | run | _model_facts(config, subject, member)

        for member in others:
            (output / MODELS).mkdir(exist_ok=True)
            files.write_json(output / MODELS / f"{member}.json", results(member))
        sections = report.sections(questions, base, particles, alpha, weights)
        page = write_page(
            output / REPORT,
            title=page_title(output, "eval mmlu", config.model_name_or_path),
            lead=_lead(config, subject, questions, num_cut),
            found=report.found(questions, base, particles, weights),
            sections=sections,
            words=report.words_for(subject.num_particles),
            details={"settings": dataclasses.asdict(config), "versions": versions()},
        )
        # written last: where this file is, the others are too
        files.write_json(output / RESULTS, results(main))
        return f"{as_text(sections[0].tables[0])}report: {page}"


def _choose(config: MmluConfig) -> tuple[list[Question], dict[str, int]]:
    """(questions, by group and subject; how many questions the split has for each of these subjects)."""
    found = mmlu_questions.load_questions(config.dataset_name, config.split)
    for name in config.subjects or ():
        if name not in found:
            raise ValueError(f"subjects: {config.dataset_name} has no {config.split} question of {name}; leave it out")
    chosen = [name for name in SUBJECTS if name in (config.subjects or found)]
    questions = [question for name in chosen for question in found[name][: config.limit]]
    return questions, {name: len(found[name]) for name in chosen}


def _prompts(config: MmluConfig, questions: Sequence[Question]) -> list[str]:
    if not config.num_fewshot:
        return [mmlu_questions.prompt(question, ()) for question in questions]
    dev = mmlu_questions.load_questions(config.dataset_name, "dev")
    for name in dict.fromkeys(question.subject for question in questions):
        if len(dev.get(name, ())) < config.num_fewshot:
            raise ValueError(
                f"num_fewshot: expected at most {len(dev.get(name, ()))}, which is how many {name} questions the dev "
                f"split of {config.dataset_name} has; got {config.num_fewshot}; lower it"
            )
    return [mmlu_questions.prompt(question, dev[question.subject][: config.num_fewshot]) for question in questions]


def _score(subject: Subject, prompts: Sequence[str], batch_size: int) -> tuple[Tensor, Tensor | None, int]:
    """(logp of the base [N, C], of the particles [K, N, C] or None, number of prompts cut to the model's context)."""
    ensemble = subject.ensemble
    choices = [encode_choices(subject.tokenizer, prompt, COMPLETIONS) for prompt in prompts]
    context = context_length(ensemble.model)
    num_cut = sum(context is not None and one.num_tokens > context for one in choices)
    if num_cut:
        longer = f"{num_cut} prompts are longer than the model's context of {context} tokens"
        warnings.warn(f"{longer}; their beginning is cut off", stacklevel=2)
    with ensemble.disable_adapters():
        [base] = score_choices(ensemble, choices, batch_size=batch_size, track=partial(track, what="MMLU, base"))
    if not subject.num_particles:
        return base, None, num_cut
    particles = score_choices(ensemble, choices, batch_size=batch_size, track=partial(track, what="MMLU, particles"))
    return base, particles, num_cut


def _lead(config: MmluConfig, subject: Subject, questions: Sequence[Question], num_cut: int) -> str:
    num_subjects = len({question.subject for question in questions})
    who = f"An ensemble of {subject.num_particles} particles on" if subject.num_particles else "The base model"
    lead = (
        f"{who} {config.model_name_or_path} answered {len(questions):,} {config.split} questions of {num_subjects} "
        f"subjects of MMLU, an examination with four choices a question. {config.num_fewshot or 'No'} solved examples "
        "stood in front of each question."
    )
    if num_cut:
        lead += f" {num_cut:,} prompts lost their beginning to fit the model's context."
    return f"{lead} {glossary.unequal(subject.particle_weights)}".strip()


def _write_samples(folder: Path, samples: Sequence[dict[str, Any]]) -> None:
    """One file for each subject, as lm-eval writes one for each task."""
    folder.mkdir(exist_ok=True)
    for subject, of_subject in groupby(samples, lambda sample: sample["doc"]["subject"]):  # samples come by subject
        lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in of_subject)
        files.write_text(folder / f"{lm_eval.task_name(subject)}.jsonl", "".join(lines))


def _samples(
    questions: Sequence[Question],
    prompts: Sequence[str],
    main: Tensor,
    base: Tensor,
    particles: Tensor | None,
    alpha: float,
    weights: Tensor,
) -> list[dict[str, Any]]:
    samples = [
        lm_eval.sample(question, prompt, logp) | {"base_logp_nats": of_base}
        for question, prompt, logp, of_base in zip(questions, prompts, main.tolist(), base.tolist(), strict=True)
    ]
    if particles is None:
        return samples
    labels = torch.tensor([question.answer for question in questions])
    found = predictive(particles, weights)
    columns = {
        "particle_logp_nats": particles.transpose(0, 1),
        "responsibilities": report.answer_responsibilities(particles, labels, alpha, weights).T,
        "total_nats": found.total,
        "aleatoric_nats": found.aleatoric,
        "epistemic_nats": found.epistemic,
        "variation_ratio": found.variation_ratio,
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [one | dict(zip(columns, row, strict=True)) for one, row in zip(samples, rows, strict=True)]


def _run_facts(config: MmluConfig, subject: Subject) -> dict[str, Any]:
    """What a results file says of the run: the same for every member of the ensemble."""
    tokenizer = subject.tokenizer
    special = {
        f"tokenizer_{name}_token": [getattr(tokenizer, f"{name}_token"), str(getattr(tokenizer, f"{name}_token_id"))]
        for name in ("pad", "eos", "bos")
    }
    return {
        "model_source": "renyi-engine",
        "transformers_version": versions()["transformers"],
        **special,
        "eot_token_id": tokenizer.eos_token_id,
        "max_length": context_length(subject.ensemble.model),
        "system_instruction": None,
        "chat_template": None,
        "alpha": subject.alpha,
        "num_particles": subject.num_particles,
        "particle_weights": subject.particle_weights,
        "package_versions": versions(),
    }


def _model_facts(config: MmluConfig, subject: Subject, member: str) -> dict[str, Any]:
    """What a results file says of one member: "base", "mixture" or a particle."""
    model = subject.ensemble.model
    arguments = {"pretrained": config.model_name_or_path, "revision": config.model_revision or "main"}
    name = config.model_name_or_path
    if member != "base":
        arguments |= {"ensemble": config.ensemble, "member": member}
        name = f"{config.ensemble} {member}"
    return {
        "model_name": name,
        "config": {
            "model": "renyi-engine",
            "model_args": arguments,
            "model_num_parameters": model.num_parameters(),
            "model_dtype": str(model.dtype),
            "batch_size": config.per_device_eval_batch_size,
            "device": str(model.device),
            "limit": config.limit,
        },
    }
