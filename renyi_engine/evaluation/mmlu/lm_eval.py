"""Results and samples in the format of lm-eval 0.4, for its own table and for other programs that read its files.

Layout: N questions, G subjects of a group.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from renyi_engine.evaluation.config import MmluConfig
from renyi_engine.evaluation.mmlu.questions import COMPLETIONS, GROUPS, LETTERS, Question, ask, description

TASK_VERSION, GROUP_VERSION = 1.0, "2"
"""Versions of lm-eval's tasks: those with the same questions, prompts and weights."""
ALL = "mmlu"


def task_name(subject: str) -> str:
    return f"{ALL}_{subject}"


def results(
    questions: Sequence[Question], right: Sequence[bool], sizes: Mapping[str, int], config: MmluConfig
) -> dict[str, Any]:
    """The main part of a results file: accuracy and standard error of each subject, of each group, and of all.

    Args:
        right: [N] whether the answer to each question is right.
        sizes: how many questions of each subject the split has; `questions` may be some of them.
    """
    of_task: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        of_task.setdefault(task_name(question.subject), []).append(is_right)
    subject_of = {task_name(question.subject): question.subject for question in questions}
    tasks = {name: _task_score(name, subject_of[name], right) for name, right in of_task.items()}
    members = {
        task_name(group): [task_name(s) for s in subjects if task_name(s) in tasks]
        for group, subjects in GROUPS.items()
    }
    members = {group: names for group, names in members.items() if names}
    groups = {
        group: _group_score(group, group.removeprefix(f"{ALL}_").replace("_", " "), [tasks[n] for n in names])
        for group, names in members.items()
    }
    groups[ALL] = _group_score(ALL, ALL, list(tasks.values()))
    return {
        "results": {**tasks, **groups},
        "groups": groups,
        "group_subtasks": {ALL: list(members), **members},
        "configs": {name: _task_config(name, subject, config) for name, subject in subject_of.items()},
        "versions": {**dict.fromkeys(tasks, TASK_VERSION), **dict.fromkeys(groups, GROUP_VERSION)},
        "n-shot": dict.fromkeys(tasks, config.num_fewshot),
        "higher_is_better": {name: {"acc": True} for name in tasks},
        "n-samples": {
            name: {"original": sizes[subject_of[name]], "effective": len(right)} for name, right in of_task.items()
        },
    }


def sample(question: Question, prompt: str, logp: Sequence[float]) -> dict[str, Any]:
    """A line of a samples file. `logp` is the log-likelihood of each choice in nats.

    lm-eval also says whether greedy decoding would give the choice. That is not computed here and is null.
    """
    doc = question.record()
    responses = [[str(value), None] for value in logp]
    answer = max(range(len(logp)), key=logp.__getitem__)
    return {
        "doc_id": question.number,
        "doc": doc,
        "target": str(question.answer),
        "arguments": {f"gen_args_{i}": {"arg_0": prompt, "arg_1": text} for i, text in enumerate(COMPLETIONS)},
        "resps": [[response] for response in responses],
        "filtered_resps": responses,
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(str(question.answer)),
        "acc": float(answer == question.answer),
    }


def task_hashes(samples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each task a hash of its questions, prompts and answers. It equals lm-eval's if lm-eval asked the same."""
    hashes: dict[str, str] = {}
    for one in samples:
        name = task_name(one["doc"]["subject"])
        hashes[name] = hashes.get(name, "") + one["doc_hash"] + one["prompt_hash"] + one["target_hash"]
    return {name: _hash(text) for name, text in hashes.items()}


def _task_score(name: str, alias: str, right: Sequence[bool]) -> dict[str, Any]:
    accuracy, num_questions = sum(right) / len(right), len(right)
    # the standard error of a mean of zeros and ones, with the unbiased variance
    error = math.sqrt(accuracy * (1 - accuracy) / (num_questions - 1)) if num_questions > 1 else "N/A"
    return {"name": name, "alias": alias, "sample_len": num_questions, "acc,none": accuracy, "acc_stderr,none": error}


def _group_score(name: str, alias: str, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every question counts the same. The standard error comes from the pooled variance within subjects."""
    sizes = [task["sample_len"] for task in tasks]
    errors = [task["acc_stderr,none"] for task in tasks]
    total = sum(sizes)
    error: float | str = "N/A"
    if "N/A" not in errors:
        variance = sum((n - 1) * n * e**2 for n, e in zip(sizes, errors, strict=True)) / (total - len(tasks))
        error = math.sqrt(variance / total)
    return {
        "name": name,
        "alias": alias,
        "sample_len": total,
        "acc,none": sum(task["acc,none"] * task["sample_len"] for task in tasks) / total,
        "acc_stderr,none": error,
        "sample_count": {"acc,none": total},
    }


def _task_config(name: str, subject: str, config: MmluConfig) -> dict[str, Any]:
    # `ask` itself makes the template of a question
    template = ask("{{question.strip()}}", [f"{{{{choices[{i}]}}}}" for i in range(len(LETTERS))])
    return {
        "task": name,
        "task_alias": subject,
        "dataset_path": config.dataset_name,
        "dataset_name": subject,
        "test_split": config.split,
        "fewshot_split": "dev",
        "doc_to_text": template,
        "doc_to_target": "answer",
        "doc_to_choice": list(LETTERS),
        "description": description(subject),
        "target_delimiter": " ",
        "fewshot_delimiter": "\n\n",
        "fewshot_config": {"sampler": "first_n", "split": "dev"},
        "num_fewshot": config.num_fewshot,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "output_type": "multiple_choice",
        "repeats": 1,
        "metadata": {"version": TASK_VERSION},
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
