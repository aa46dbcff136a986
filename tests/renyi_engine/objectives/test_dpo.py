"""Preference optimisation: TRL is the oracle of one particle, the formula in fp64 that of several.

Layout: K particles, B pairs; in [B, 2], 0 is the chosen, 1 the rejected completion.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from renyi_engine import EnsembleConfig, LoraEnsemble, train
from renyi_engine.cli import main
from renyi_engine.core import files
from renyi_engine.data.examples import Dropped
from renyi_engine.objectives import evaluate
from renyi_engine.objectives.dpo import DpoTask
from renyi_engine.objectives.loss import data_term
from renyi_engine.training.dataset import make_task

from ..apart import attach_apart
from ..conversations import chat

BETA = 0.3


STRINGS = [
    {"prompt": "Say yes. ", "chosen": "yes, gladly", "rejected": "no"},
    {"prompt": "And 2+2? ", "chosen": "4", "rejected": "22, of course"},
    {"prompt": "Bye", "chosen": ".", "rejected": "? No, stay"},
]
IMPLICIT_STRINGS = [
    {"chosen": "Human: hi Bot: hello there", "rejected": "Human: hi Bot: go away"},
    {"chosen": "Q: 1 A: one", "rejected": "Q: 1 A: on the whole, two"},
]
CHATS = [
    {
        "prompt": chat(("system", "be kind"), ("user", "hi")),
        "chosen": chat(("assistant", "hello")),
        "rejected": chat(("assistant", "what now")),
    },
    {"prompt": chat(("user", "2+2")), "chosen": chat(("assistant", "4")), "rejected": chat(("assistant", "5 or so"))},
]
IMPLICIT_CHATS = [
    {"chosen": [*row["prompt"], *row["chosen"]], "rejected": [*row["prompt"], *row["rejected"]]} for row in CHATS
]
FORMS = {
    "strings": STRINGS,
    "implicit strings": IMPLICIT_STRINGS,
    "chats": CHATS,
    "implicit chats": IMPLICIT_CHATS,
}


@pytest.fixture
def task(tokenizer):
    return DpoTask(tokenizer, max_length=64, beta=BETA)


@pytest.fixture
def attached(model_folder):
    """A new ensemble on the tiny model, its particles apart from each other and from the base."""

    def attach(num_particles, dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        return attach_apart(model, num_particles=num_particles, rank=3, lora_alpha=6, seed=5)

    return attach


def prepared(task, ensemble, rows, folder):
    items = [task.example(number, row) for number, row in enumerate(rows)]
    return task.prepare(ensemble, items, folder, batch_size=2, fingerprint="base")


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("form", FORMS)
def test_one_particle_has_trls_loss_metrics_and_gradients(
    form, alpha, task, attached, model_folder, tokenizer, tmp_path
):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    ensemble = attached(1)
    rows = FORMS[form]
    names = sorted({path.rsplit(".", 1)[-1] for path in ensemble.paths})
    theirs = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=BETA, max_length=64, report_to=[], use_cpu=True, bf16=False,
            per_device_train_batch_size=len(rows), gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=3, lora_alpha=6, target_modules=names, lora_dropout=0.0),
    )  # fmt: skip
    weights = {}
    for path, (A, B) in ensemble.stacked().items():
        lora = theirs.model.base_model.model.get_submodule(path)
        lora.lora_A["default"].weight.data.copy_(A[0])
        lora.lora_B["default"].weight.data.copy_(B[0])
        weights[path] = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(len(rows))])
    expected = theirs.compute_loss(theirs.model.train(), batch)
    expected.backward()
    metrics = {name: values[0] for name, values in theirs._metrics["train"].items()}

    ours = task.collate(prepared(task, ensemble, rows, tmp_path))
    assert torch.equal(ours["input_ids"].transpose(0, 1).flatten(0, 1), batch["input_ids"])
    scores = task.score(ensemble, ours)
    loss, _ = data_term(scores.logp, alpha, len(rows))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert len(set(scores.details) & set(metrics)) == 6
    for name in set(scores.details) & set(metrics):
        assert scores.details[name].mean().item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-5), name
    for path, (A, B) in weights.items():
        for ours_grad, theirs_grad in zip((A.grad, B.grad), ensemble.stacked()[path], strict=True):
            torch.testing.assert_close(theirs_grad.grad[0], ours_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.8, 2.5])
def test_several_particles_follow_the_formula_in_fp64(alpha, task, attached, load_peft, naive_logprob, tmp_path):
    ensemble = attached(3, torch.float64)
    base = AutoModelForCausalLM.from_pretrained(ensemble.model.name_or_path, dtype=torch.float64)
    ensemble.save_pretrained(tmp_path / "particles")
    particles = [load_peft(base, tmp_path / "particles" / f"p{k:03d}", is_trainable=True) for k in range(3)]
    batch = task.collate(prepared(task, ensemble, [*STRINGS, *CHATS], tmp_path))
    rows = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}

    reference = naive_logprob(base, rows).detach().view(-1, 2)
    torch.testing.assert_close(batch["reference_logp"].double(), reference, rtol=1e-6, atol=1e-5)
    s = []
    for particle in particles:
        ratio = naive_logprob(particle, rows).view(-1, 2) - batch["reference_logp"]
        s.append(torch.log(1 / (1 + torch.exp(-BETA * (ratio[:, 0] - ratio[:, 1])))))
    s = torch.stack(s)
    expected = -s.mean(0) if alpha == 0 else -torch.log(torch.exp(alpha * s).mean(0)) / alpha
    expected.mean().backward()

    scores = task.score(ensemble, batch)
    loss, out = data_term(scores.logp, alpha, s.shape[1])
    loss.backward()
    torch.testing.assert_close(scores.logp, s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.responsibilities, torch.softmax(alpha * s, 0), rtol=1e-5, atol=1e-6)
    majority = (torch.exp(s).mean(0) > 0.5).double()
    torch.testing.assert_close(scores.details["rewards/mixture_accuracies"].double(), majority)
    for path, (A, B) in ensemble.stacked().items():
        for k, particle in enumerate(particles):
            lora = particle.base_model.model.get_submodule(path)
            for ours, theirs in ((A, lora.lora_A), (B, lora.lora_B)):
                torch.testing.assert_close(
                    ours.grad[k].double(), theirs["default"].weight.grad.double(), rtol=1e-4, atol=1e-6
                )


@pytest.mark.parametrize("num_particles", [4, 9, 11, 18])
def test_a_mixture_that_has_learned_nothing_prefers_no_answer(task, model_folder, tmp_path, num_particles):
    """It gives every pair the probability 1/2, also where the sum of so many weights 1/K is rounded."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles, rank=1))
    items = [task.example(0, {"prompt": "Dogs? ", "chosen": "yes", "rejected": "no"})]
    found = evaluate(ensemble, task, task.prepare(ensemble, items, tmp_path, 1, "fingerprint"), 1)
    assert found.details["rewards/accuracies"].sum() == 0.0
    assert found.details["rewards/mixture_accuracies"].tolist() == [0.0]


def test_a_particle_with_nan_has_no_say_in_the_mixture(task, model_folder, tmp_path):
    ensemble = LoraEnsemble.attach(
        AutoModelForCausalLM.from_pretrained(model_folder), EnsembleConfig(3, rank=2, lora_alpha=960, init="spread")
    )
    answers = [("yes" * (i + 1), "no" * (i + 1)) for i in range(3)]
    rows = [{"prompt": "? ", "chosen": one, "rejected": other} for a, b in answers for one, other in ((a, b), (b, a))]
    items = [task.example(number, row) for number, row in enumerate(rows)]
    items = task.prepare(ensemble, items, tmp_path, 3, "fingerprint")
    ensemble.particle_weights = [0.75, 0.25, 0.0]
    expected = evaluate(ensemble, task, items, 3).details["rewards/mixture_accuracies"]
    assert expected.sum() == 3
    with torch.no_grad():
        next(iter(ensemble.parameters()))[2].fill_(torch.nan)
    found = evaluate(ensemble, task, items, 3)
    assert found.logp[2].isnan().all()
    assert torch.equal(found.details["rewards/mixture_accuracies"], expected)


def test_the_mixture_decides_by_the_weights_of_its_particles(task, model_folder, tmp_path):
    ensemble = LoraEnsemble.attach(
        AutoModelForCausalLM.from_pretrained(model_folder), EnsembleConfig(2, rank=2, lora_alpha=960, init="spread")
    )
    rows = [{"prompt": f"{i}? ", "chosen": "yes" * (i + 1), "rejected": "no" * (i + 1)} for i in range(6)]
    items = [task.example(number, row) for number, row in enumerate(rows)]
    items = task.prepare(ensemble, items, tmp_path, 3, "fingerprint")
    for k, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        ensemble.particle_weights = weights
        found = evaluate(ensemble, task, items, 3)
        of_one = found.details["rewards/accuracies"][k]
        torch.testing.assert_close(found.details["rewards/mixture_accuracies"], of_one)
        summary = found.summary(0.7)
        nlls = [summary[f"{whose}_nll_nats_per_pair"] for whose in ("mixture", "mean_particle")]
        assert nlls == pytest.approx([-found.logp[k].mean().item()] * 2, rel=1e-5)
        assert summary["rewards/accuracies"] == of_one.double().mean().item()
        assert summary["ess_particles"] == 1.0


def test_at_the_base_every_particle_is_undecided(task, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ensemble = LoraEnsemble.attach(model, EnsembleConfig(num_particles=2, rank=2))
    scores = task.score(ensemble, task.collate(prepared(task, ensemble, STRINGS, tmp_path)))
    torch.testing.assert_close(scores.logp, torch.full((2, 3), math.log(0.5)), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- rows


def seen(task, row):
    """(prompt, chosen, rejected) as the tokens have them."""
    pair, decode = task.example(4, row), task.tokenizer.decode
    start = [label != -100 for label in pair.chosen.labels].index(True)
    assert pair.chosen.input_ids[:start] == pair.rejected.input_ids[:start]
    assert all(label == -100 for label in pair.rejected.labels[:start])
    return decode(pair.chosen.input_ids[:start]), *(decode(s.input_ids[start:]) for s in pair.sequences)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, ("2+2=", "4</s>", "5</s>")),
        ({"chosen": "2+2= 4", "rejected": "2+2= 5"}, ("2+2=", " 4</s>", " 5</s>")),
        ({"chosen": "Q A: on", "rejected": "Q A: one"}, ("Q A: o", "n</s>", "ne</s>")),
        (CHATS[1], ("<user>2+2</s><assistant>", "4</s>", "5 or so</s>")),
        (IMPLICIT_CHATS[1], ("<user>2+2</s><assistant>", "4</s>", "5 or so</s>")),
        # as UltraFeedback has it: a prompt of strings beside whole chats
        (IMPLICIT_CHATS[1] | {"prompt": "2+2"}, ("<user>2+2</s><assistant>", "4</s>", "5 or so</s>")),
    ],
)
def test_every_form_of_a_row_gives_prompt_chosen_and_rejected(task, row, expected):
    assert seen(task, row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        ({"chosen": chat(("user", "a")), "rejected": chat(("user", "a"))}, "chosen and rejected are the same"),
        ({"prompt": "x" * 64, "chosen": "y", "rejected": "z"}, "the prompt alone fills max_length"),
        ({"prompt": "x", "chosen": "", "rejected": "z"}, "a completion is empty"),
        ({"prompt": "x", "chosen": "y", "rejected": "y</s>"}, "chosen and rejected are the same tokens$"),
        (
            {"prompt": "x", "chosen": "y" * 70 + "1", "rejected": "y" * 70 + "2"},
            r"chosen and rejected are the same tokens as far as max_length \(64 tokens\)",
        ),
        ({"prompt": "", "chosen": "y", "rejected": "z"}, "the prompt is empty$"),
        *(
            (row, "the prompt is empty: chosen and rejected do not begin alike")
            for row in (
                {"chosen": chat(("user", "a")), "rejected": chat(("user", "b"))},
                {"prompt": "x", "chosen": chat(("assistant", "a")), "rejected": chat(("assistant", "b"))},
            )
        ),
        (
            {"chosen": chat(("system", "s"), ("user", "a")), "rejected": chat(("system", "s"), ("user", "b"))},
            "the completion does not begin with a message of the assistant",
        ),
    ],
)
def test_pairs_that_teach_nothing_are_dropped_with_the_reason(task, row, reason):
    with pytest.raises(Dropped, match=reason):
        task.example(0, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": None, "rejected": "z"}, "row 7: chosen: expected a string or a list of messages"),
        ({"prompt": "x", "chosen": "y", "rejected": chat(("user", "a"))}, "row 7: rejected: expected a str"),
        (
            {"prompt": chat(("user", "a")), "chosen": "Yes, 1", "rejected": "Yes, 2"},
            "row 7: prompt: expected a string, as chosen is; got list",
        ),
        ({"prompt": "x", "chosen": "y", "rejected": [1]}, "row 7: rejected: expected a string or a list of messages"),
    ],
)
def test_a_field_that_is_not_what_its_column_says_names_its_row(task, row, message):
    with pytest.raises(ValueError, match=message):
        task.example(7, row)


def test_only_pairs_whose_scores_differ_by_more_than_the_gap_are_kept(tokenizer):
    task = DpoTask(tokenizer, 64, BETA, min_score_gap=1.0, score_columns=["good", "bad"])
    row = {"prompt": "x", "chosen": "y", "rejected": "z"}
    task.example(0, row | {"good": 4, "bad": 2.5})
    task.example(0, row | {"good": "4", "bad": "2.5"})
    for scores in ({"good": 4, "bad": 3}, {"good": 1, "bad": 4}):
        with pytest.raises(Dropped, match="do not differ by more than 1"):
            task.example(0, row | scores)
    for missing in (None, ""):
        with pytest.raises(Dropped, match="a score is missing"):
            task.example(0, row | {"good": missing, "bad": 3})
    with pytest.raises(ValueError, match="row 3: bad: expected a number; got str 'low'"):
        task.example(3, row | {"good": 5, "bad": "low"})
    with pytest.raises(ValueError, match="row 3: good: expected a number; got int '1000"):
        task.example(3, row | {"good": 10**400, "bad": 1})
    with pytest.raises(ValueError, match="row 3: good: expected a number; got str 'nan'"):
        task.example(3, row | {"good": "nan", "bad": 1})
    with pytest.raises(ValueError, match=r"expected the columns good \+ bad; got .*"):
        task.check_columns(["prompt", "chosen", "rejected", "good"], "dataset_name")


def test_columns_of_no_known_form_get_a_hint(task):
    task.check_columns(["chosen", "rejected", "id"], "dataset_name")
    with pytest.raises(ValueError, match="is 'choosen' meant to be 'chosen'"):
        task.check_columns(["prompt", "choosen", "rejected"], "dataset_name")
    with pytest.raises(ValueError, match="got instruction, which would not be read; rename it to prompt"):
        task.check_columns(["instruction", "input", "chosen", "rejected"], "dataset_name")


# ---------------------------------------------------------------------- the reference


def test_the_reference_is_kept_and_belongs_to_base_data_and_template(task, attached, tmp_path, monkeypatch):
    ensemble = attached(2)
    first = prepared(task, ensemble, STRINGS, tmp_path)
    monkeypatch.setattr(LoraEnsemble, "sequence_logprob", None)
    assert prepared(task, ensemble, STRINGS, tmp_path) == first
    items = [task.example(number, row) for number, row in enumerate(STRINGS)]
    with pytest.raises(TypeError):  # other base
        task.prepare(ensemble, items, tmp_path, 2, "another base")
    with pytest.raises(TypeError):  # other data
        task.prepare(ensemble, items[::-1], tmp_path, 2, "base")
    other = "{% for m in messages %}({{ m['content'] }}){% endfor %}"
    task.tokenizer.chat_template, before = other, task.tokenizer.chat_template
    try:
        with pytest.raises(TypeError):  # other template
            prepared(task, ensemble, CHATS, tmp_path)
    finally:
        task.tokenizer.chat_template = before


@pytest.mark.parametrize("damage", ["flipped", "cut", "another length", "another name", "empty"])
def test_a_damaged_reference_is_named_and_computed_again(task, attached, tmp_path, damage):
    ensemble = attached(2)
    expected = prepared(task, ensemble, STRINGS, tmp_path)
    (path,) = tmp_path.glob("reference-*")
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(whole[:-4])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        name, length = ("other", len(STRINGS)) if damage == "another name" else ("logp_nats", len(STRINGS) + 1)
        files.write_tensors(path, {name: torch.zeros(length, 2)})
    with pytest.warns(UserWarning, match=rf"{path.name}.*computed again"):
        assert prepared(task, ensemble, STRINGS, tmp_path) == expected
    assert prepared(task, ensemble, STRINGS, tmp_path) == expected  # without a warning, which would be an error


# ---------------------------------------------------------------------- a run


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_the_preference_and_says_so_in_trls_names(dpo_config):
    result = train(dpo_config(max_steps=25))
    *steps, held_out = lines_of(result.output_dir)
    assert steps[0]["mixture_nll_nats_per_pair"] == pytest.approx(math.log(2), abs=1e-3)
    assert held_out["eval_rewards/accuracies"] == 1.0
    assert held_out["eval_rewards/margins"] > steps[0]["rewards/margins"] + 0.1
    assert held_out["eval_rewards/margins"] == pytest.approx(
        held_out["eval_rewards/chosen"] - held_out["eval_rewards/rejected"], abs=1e-5
    )
    assert len(steps[-1]["particle_rewards/accuracies"]) == 3
    assert held_out["eval_rewards/accuracies"] == pytest.approx(sum(held_out["eval_particle_rewards/accuracies"]) / 3)
    assert 1 <= steps[-1]["ess_particles"] <= 3
    evaluation = json.loads((result.output_dir / "evaluation.json").read_text())
    assert (len(evaluation["logp_nats"]), len(evaluation["logp_nats"][0])) == (3, 6)
    assert (result.output_dir / "report.html").is_file()


def test_a_run_scores_pairs_as_its_settings_say(dpo_config):
    config = dpo_config(beta=0.45, min_score_gap=2.0, score_columns=["good", "bad"], max_length=50)
    task = make_task(config)
    assert (task.beta, task.max_length, task.min_score_gap, task.score_columns) == (0.45, 50, 2.0, ["good", "bad"])


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(dpo_config, tmp_path):
    whole = train(dpo_config()).ensemble
    train(dpo_config(max_steps=3, output_dir=str(tmp_path / "parts"), lr_scheduler_type="constant"))
    straight = train(dpo_config(output_dir=str(tmp_path / "straight"), lr_scheduler_type="constant")).ensemble
    again = dpo_config(output_dir=str(tmp_path / "parts"), lr_scheduler_type="constant", resume_from_checkpoint="true")
    parts = train(again).ensemble
    for p, q, r in zip(parts.parameters(), straight.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


def test_the_command_line_trains_shows_both_sequences_and_exports(dpo_config, tmp_path, capsys):
    config = dpo_config(max_steps=2, min_score_gap=2.0)
    flags = [
        f"--{name}={value}"
        for name, value in vars(config).items()
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
    ]
    assert main(["dpo", *flags, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "0? [[yes</s>]]" in shown
    assert "0? [[no</s>]]" in shown
    assert "rows dropped" in shown
    assert main(["dpo", *flags]) == 0
    assert main(["export", config.output_dir, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "p002" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("setting", [{"beta": 0.0}, {"min_score_gap": -1.0}, {"score_columns": ["a"]}])
def test_settings_that_do_not_do_are_named(dpo_config, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        dpo_config(**setting)
