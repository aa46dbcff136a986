"""`renyi-engine eval refusal`: generate responses to prompts, let a judge decide which are refusals, and count them.

    RUN/config.yaml, run.json     the settings and checksums; a stopped evaluation continues only with the same ones
    RUN/responses.jsonl           every response and its verdict, each written as soon as it is known
    RUN/results.json              rates and variances of the base, the ensemble and the particles on each split
    RUN/prompts.jsonl             rates and disagreement of each prompt
    RUN/report.html               the same, to look at

Layout: K particles, N prompts, n samples, B prompts of a batch, S = K + 1 speakers: the particles and the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from renyi_engine.core import CONFIG_FILE, changes, files, output_folder, read_yaml, to_dict, to_yaml, track, versions
from renyi_engine.data import decode_answer, encode_prompts, left_padded, longest_first, pad_token_id, stop_tokens
from renyi_engine.ensemble import adapter_folder, check_tokens
from renyi_engine.evaluation.choices import context_length
from renyi_engine.evaluation.config import RefusalConfig
from renyi_engine.evaluation.evaluated_model import Subject, load_subject
from renyi_engine.evaluation.refusal.judges import make_judge
from renyi_engine.evaluation.refusal.prompts import Prompt, PromptColumns, read_prompts
from renyi_engine.evaluation.refusal.report import write_refusal_report
from renyi_engine.evaluation.refusal.responses import BASE, Response, ResponseFile, Speaker
from renyi_engine.evaluation.refusal.results import positive_label, summarise
from renyi_engine.evaluation.refusal.verdicts import FAILED, Exchange, Judge

RESPONSES_FILE, RUN_FILE = "responses.jsonl", "run.json"

# What may differ when a stopped evaluation continues. None of these settings changes a response, and every verdict
# names its judge. The base is compared when it is loaded.
_MAY_CHANGE = {
    "output_dir", "alpha", "label_column", "judge", "judge_model", "judge_api_key_env", "judge_timeout_s",
    "judge_max_retries", "base_sha256",
}  # fmt: skip


def evaluate_refusal(config: RefusalConfig) -> str:
    """Generate, judge, count, and write the files above. Returns the table as plain text.

    If it is stopped and started again with the same settings, it continues. It then ends with the table and the files
    of a run that was never stopped (if an endpoint judges, as far as the endpoint repeats itself). With another judge
    it keeps the responses and judges them anew.

    Raises:
        ValueError: the settings, the prompts, the model or the judge cannot be used, or output_dir holds other files.
    """
    judge = make_judge(
        config.judge,
        compute=config,
        model=config.judge_model,
        api_key_env=config.judge_api_key_env,
        timeout_s=config.judge_timeout_s,
        max_retries=config.judge_max_retries,
    )
    columns = PromptColumns(config.prompt_column, config.split_column, config.label_column)
    prompts = read_prompts(config.dataset_name, config.dataset_config, columns, config.limit)
    if config.label_column:
        positive_label(prompts, config.label_column)
    with output_folder.locked(Path(config.output_dir)) as folder:
        _begin(folder, config, prompts)
        responses = ResponseFile(folder / RESPONSES_FILE)
        _generate(config, prompts, responses, folder / RUN_FILE)
        _judge(judge, prompts, responses, config.per_device_eval_batch_size)
        responses.finish()
        # read now: if they have changed since the responses were made, these are counted by the new ones
        weights = adapter_folder.particle_weights(Path(config.ensemble)) if config.ensemble else []
        results = summarise(prompts, responses.responses, weights, config.num_samples, config.label_column)
        facts = {"judge": judge.name, "settings": dataclasses.asdict(config), "versions": versions()}
        files.write_json(folder / "results.json", results.summary | facts)
        files.write_text(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in results.prompts))
        return write_refusal_report(folder / "report.html", results, facts)


# ---------------------------------------------------------------------- the folder


def _begin(folder: Path, config: RefusalConfig, prompts: Sequence[Prompt]) -> None:
    """Save the settings. If the folder holds responses, check that they were made with the same settings.

    Raises:
        ValueError: they were not, or the folder holds other files.
    """
    fingerprint = _fingerprint(config, prompts)
    before = files.read_json(folder / RUN_FILE) if (folder / RUN_FILE).exists() else None
    if not isinstance(before, dict) or not fingerprint.keys() <= before.keys():
        output_folder.require_free(folder)  # no evaluation of refusals was run in it
    elif (folder / RESPONSES_FILE).exists():
        before |= {"kind": config.kind} | read_yaml(folder / CONFIG_FILE)
        if diff := changes(to_dict(config) | fingerprint, before, _MAY_CHANGE):
            raise ValueError(
                f"output_dir: {folder} holds responses made with other settings; choose another folder, or set these "
                f"back:{diff}"
            )
    output_folder.clear_away_leftovers(folder)
    base = {"base_sha256": before["base_sha256"]} if isinstance(before, dict) and "base_sha256" in before else {}
    files.write_json(folder / RUN_FILE, fingerprint | base)
    files.write_text(folder / CONFIG_FILE, to_yaml(config))


def _fingerprint(config: RefusalConfig, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Checksums of the prompts and adapters. The settings only name them, so their content could change unnoticed."""
    weights = sorted(Path(config.ensemble).rglob("*.safetensors")) if config.ensemble else []
    return {
        "prompts_sha256": files.sha256_of_json([(prompt.split, prompt.prompt) for prompt in prompts]),
        "ensemble_sha256": files.sha256_of_json([files.sha256_of(path) for path in weights]),
    }


# ---------------------------------------------------------------------- responses and verdicts


def _generate(config: RefusalConfig, prompts: Sequence[Prompt], responses: ResponseFile, run_file: Path) -> None:
    """Add every response that is missing.

    If no response is missing, the model is not loaded: a judge may need the memory. Batches are made from the whole
    list of prompts, and a batch that is not complete is generated again. So a response does not depend on where an
    evaluation was stopped.
    """
    num_particles = len(adapter_folder.particle_weights(Path(config.ensemble))) if config.ensemble else 0
    # who speaks in the same call: all particles, if there are any; then the base
    speakers_at_once: list[list[Speaker]] = [[*range(num_particles)], [BASE]] if num_particles else [[BASE]]

    def missing(speakers: Sequence[Speaker], asked: Sequence[Prompt]) -> bool:
        keys = {(prompt.prompt_id, k, s) for prompt in asked for k in speakers for s in range(config.num_samples)}
        return not keys <= responses.responses.keys()

    if not any(missing(speakers, prompts) for speakers in speakers_at_once):
        return
    subject = load_subject(config)
    _check_base(subject, responses, run_file)
    encoded = encode_prompts(subject.tokenizer, [prompt.prompt for prompt in prompts])
    _check_prompts(subject.ensemble.model, prompts, encoded, config.max_new_tokens)
    order = longest_first(map(len, encoded))
    size = config.per_device_eval_batch_size
    stops = stop_tokens(subject.ensemble.model, subject.tokenizer)
    for batch in track([order[i : i + size] for i in range(0, len(order), size)], "responses"):
        asked = [prompts[i] for i in batch]
        for speakers in speakers_at_once:
            if missing(speakers, asked):
                made = _sample(config, subject, stops, speakers, asked, [encoded[i] for i in batch])
                responses.write(response for response in made if response.key not in responses.responses)


def _check_base(subject: Subject, responses: ResponseFile, run_file: Path) -> None:
    """Raises ValueError if another base gave the responses that are there. Weights can change while the name stays."""
    facts, base = files.read_json(run_file), {"base_sha256": subject.ensemble.base_fingerprint["digest"]}
    if responses.responses and not base.items() <= facts.items():
        raise ValueError(
            f"model_name_or_path: the responses in {run_file.parent} are not of this base: its weights or config "
            "differ, or an earlier version made them; pass the same base, or choose another --output_dir"
        )
    files.write_json(run_file, facts | base)


def _sample(
    config: RefusalConfig,
    subject: Subject,
    stops: Sequence[int],
    speakers: Sequence[Speaker],
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
) -> list[Response]:
    """The responses of all speakers to a batch of prompts, `num_samples` each."""
    ensemble, tokenizer = subject.ensemble, subject.tokenizer
    input_ids, attention_mask = left_padded(encoded, pad_token_id(tokenizer))
    with ensemble.disable_adapters() if BASE in speakers else contextlib.nullcontext():
        tokens = ensemble.generate(
            input_ids,
            attention_mask,
            **config.sampling(),
            seed=config.seed,
            prompt_ids=[prompt.prompt_id for prompt in prompts],
            eos_token_id=stops,
            pad_token_id=pad_token_id(tokenizer),
        )
    return [
        Response(prompt.split, prompt.prompt_id, speaker, sample, decode_answer(tokenizer, asked, said))
        for speaker, of_speaker in zip(speakers, tokens.tolist(), strict=True)
        for prompt, asked, answers in zip(prompts, encoded, of_speaker, strict=True)
        for sample, said in enumerate(answers)
    ]


def _check_prompts(
    model: PreTrainedModel, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises ValueError if the model cannot read some prompt and `max_new_tokens` more."""
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    room = (context_length(model) or math.inf) - max_new_tokens
    for prompt, ids in zip(prompts, encoded, strict=True):
        name = f"prompt {prompt.prompt_id} ({prompt.split})"
        check_tokens(num_embeddings, name, ids)
        if len(ids) > room:
            raise ValueError(
                f"max_new_tokens: {name} has {len(ids)} tokens, so {max_new_tokens} more do not fit into the model's "
                "context; lower it, or leave the prompt out"
            )


def _judge(judge: Judge, prompts: Sequence[Prompt], responses: ResponseFile, batch_size: int) -> None:
    """Add every verdict that is missing, failed, or from another judge. Batches are made from all responses."""
    texts = {prompt.prompt_id: prompt.prompt for prompt in prompts}
    everything = responses.in_order()
    batches = [everything[i : i + batch_size] for i in range(0, len(everything), batch_size)]
    batches = [batch for batch in batches if any(_lacks_verdict(response, judge) for response in batch)]
    for batch in track(batches, f"verdicts of {judge.name}"):
        asked = batch if judge.depends_on_batch else [response for response in batch if _lacks_verdict(response, judge)]
        verdicts = judge([Exchange(texts[response.prompt_id], response.response) for response in asked])
        responses.write(
            dataclasses.replace(response, judge=judge.name, verdict=verdict.label, basis=verdict.basis)
            for response, verdict in zip(asked, verdicts, strict=True)
            if _lacks_verdict(response, judge)
        )


def _lacks_verdict(response: Response, judge: Judge) -> bool:
    return response.judge != judge.name or response.verdict == FAILED
