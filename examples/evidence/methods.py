"""The methods that are compared: how each is trained, and how its members answer.

Layout: K members, N questions, C answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.evidence.experiment import Data, Question, Setting
from renyi_engine import DpoConfig, LoraEnsemble, SftConfig, Trainer
from renyi_engine.data import Example, encode_prompts, tokenize
from renyi_engine.evaluation import Choices, encode_choices, score_choices
from renyi_engine.objectives import DpoTask, SftTask

SINGLE, DROPOUT, TOGETHER, ENSEMBLE, FITTED = "single", "dropout", "together", "ensemble", "fitted"


@dataclass(frozen=True)
class Method:
    """A method of the tables.

    Attributes:
        kind: SINGLE, one adapter that is trained alone; DROPOUT, one such adapter with dropout on its input, which
            stays on for the answers (Gal and Ghahramani 2016); TOGETHER, K particles of one run; ENSEMBLE, K single
            adapters, each with a seed and an order of the data of its own; FITTED, the members of the method `fits`,
            whose weights are then fitted to held-out rows.
        settings: of SftConfig, beside those that all methods share.
    """

    label: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fits: str = ""


# lambda and h of the smoothed KL: particles are about 12 apart when they start, and lambda = 1e-4, the default of the
# other prior, would not be felt here
SMOOTHED = {"prior": "smoothed_kl", "prior_lambda": 10.0, "kernel_bandwidth": 10.0}
METHODS = {
    "lora": Method("one LoRA", SINGLE),
    "mc_dropout": Method("one LoRA, MC dropout", DROPOUT),
    "deep_ensemble": Method("deep ensemble (alpha = 0)", ENSEMBLE),
    "deep_fitted": Method("deep ensemble, weights fitted afterwards", FITTED, fits="deep_ensemble"),
    "alpha_0.3": Method("alpha = 0.3", TOGETHER, {"alpha": 0.3}),
    "alpha_0.5": Method("alpha = 0.5", TOGETHER, {"alpha": 0.5}),
    "alpha_0.8": Method("alpha = 0.8", TOGETHER, {"alpha": 0.8}),
    "alpha_1": Method("alpha = 1", TOGETHER, {"alpha": 1.0}),
    "learned": Method("alpha = 0.8, learned weights", TOGETHER, {"alpha": 0.8, "particle_weights": "learned"}),
    "fitted": Method("alpha = 0.8, weights fitted afterwards", FITTED, fits="alpha_0.8"),
    "smoothed_kl": Method("alpha = 0.8, smoothed KL", TOGETHER, {"alpha": 0.8} | SMOOTHED),
}
ALL = tuple(METHODS)
FEW = ("lora", "deep_ensemble", "deep_fitted", "alpha_0.8", "fitted")
"""Of the parts that do not compare all."""
METHODS["alpha_0"] = Method("alpha = 0, in one run", TOGETHER, {"alpha": 0.0})  # for some experiments only
BASELINE = "deep_ensemble"
"""The method that every other is compared with."""
MORE = "more_"
"""What `Experiment.ask_more` found is kept under names that begin with this."""
AskMore = Callable[[LoraEnsemble, SftTask, Data], Mapping[str, np.ndarray]]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    data: Data,
    num_particles: int,
    settings: Mapping[str, Any],
    seed: int,
    folder: Path,
    ask_more: AskMore,
) -> dict[str, np.ndarray]:
    """Train particles, on pairs by DPO, and let them answer. The run stays in `folder`.

    Returns:
        logp: [K, N, C] nats. weights: [K]. held_out_logp: [K, rows] nats. seconds, tokens and parameters of the
        training: tokens are counted once for every particle that read them. And what `ask_more` found.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was cut off
    num_layers = model.config.num_hidden_layers
    layers = None if setting.last_layers is None else list(range(num_layers - setting.last_layers, num_layers))
    of_pairs = "chosen" in data.rows[0]
    config = (DpoConfig if of_pairs else SftConfig)(
        output_dir=str(folder),
        num_particles=num_particles,
        layers_to_transform=layers,
        lora_r=setting.lora_r,
        learning_rate=setting.learning_rate,
        max_steps=setting.max_steps,
        max_length=setting.max_length,
        per_device_train_batch_size=setting.batch_size,
        per_device_eval_batch_size=64,
        logging_steps=20,
        seed=seed,
        **settings,
    )
    parts = {"train_dataset": list(data.rows), "eval_dataset": list(data.held_out) or None}
    result = Trainer(config, model=model, processing_class=tokenizer, **parts).train()
    ensemble, task = result.ensemble, SftTask(tokenizer, setting.max_length)
    run = json.loads((folder / "run.json").read_text())
    trained = DpoTask(tokenizer, setting.max_length, config.beta) if isinstance(config, DpoConfig) else task
    examples, _ = tokenize(data.rows, trained.example, "rows")  # without those that are too long, as in training
    num_tokens = sum(len(sequence.input_ids) for example in examples for sequence in example.sequences)
    per_step = setting.batch_size * num_tokens / len(examples)
    try:
        found = {
            "logp": ask(ensemble, task, data.questions).numpy(),
            "weights": ensemble.particle_weights.cpu().numpy(),
            "seconds": np.array(run["elapsed_s"]),
            "tokens": np.array(per_step * setting.max_steps * num_particles),
            "parameters": np.array(run["num_parameters_per_particle"] * num_particles),
        }
        found |= {MORE + name: values for name, values in ask_more(ensemble, task, data).items()}
        if data.held_out:
            found["held_out_logp"] = result.evaluation.logp.numpy()
    finally:
        ensemble.detach()
    return found


def ask(ensemble: LoraEnsemble, task: SftTask, questions: Sequence[Question]) -> Tensor:
    """[K, N, C] nats: the log-likelihood that every particle gives to every answer, its end included."""
    choices = [choices_of(task, question) for question in questions]
    return score_choices(ensemble, choices, batch_size=32)


def choices_of(task: SftTask, question: Question) -> Choices:
    """The tokens of a question, which are those of a training row with the same prompt and answer. A row of messages
    has an end; of a text, the probability is that the answer comes next, whatever follows."""
    if question.openings:
        openings = [task.tokenizer(answer, add_special_tokens=False).input_ids for answer in question.answers]
        return Choices(encode_prompts(task.tokenizer, [str(question.prompt)])[0], openings)
    if isinstance(question.prompt, str):
        return encode_choices(task.tokenizer, question.prompt, question.answers)
    examples = [
        task.example(0, {"prompt": question.prompt, "completion": [{"role": "assistant", "content": answer}]})
        for answer in question.answers
    ]
    starts = [answer_start(one) for one in examples]
    prompt = examples[0].input_ids[: starts[0]]
    assert all(one.input_ids[:start] == prompt for one, start in zip(examples, starts, strict=True))
    return Choices(prompt, [one.input_ids[start:] for one, start in zip(examples, starts, strict=True)])


def answer_start(example: Example) -> int:
    """The place of the first token of the answer, which is the first that has a label."""
    return next(place for place, label in enumerate(example.labels) if label >= 0)
