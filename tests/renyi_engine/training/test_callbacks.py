"""transformers' callbacks: they are called at its points, are told the truth, and are obeyed."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_callback import CallbackHandler, ExportableState

from renyi_engine import SftConfig, Trainer, base_model, train
from renyi_engine.core.files import read_json, sha256_of
from renyi_engine.objectives import EVAL
from renyi_engine.training import checkpoint, write_report
from renyi_engine.training.records import read_run

from .runs import Killed, act_in, alphas, kill, metrics, poison, steps_of

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
NOT_OURS = {"on_predict", "on_prediction_step", "on_push_begin"}


class Recorder(TrainerCallback):
    """Notes every call; `act`, if given, is called with (event, state, control)."""

    def __init__(self, act=lambda event, state, control: None):
        self.calls, self.act = [], act

    def noted(self, *events):
        return [(event, step) for event, step in self.calls if not events or event in events]


def _noting(event):
    def call(self, args, state, control, **kwargs):
        self.calls.append((event, state.global_step))
        self.args, self.state, self.kwargs = args, state, kwargs
        self.act(event, state, control)

    return call


for name in EVENTS:
    setattr(Recorder, name, _noting(name))


@pytest.fixture
def evaluated(sft_config, data_file):
    """A factory of settings with held-out data."""

    def make(**settings):
        return sft_config(eval_dataset_name=str(data_file), dataset_test_split="train", **settings)

    return make


def at(event, step, **wishes):
    """An act that sets these switches of control in one event."""

    def act(now, state, control):
        if (now, state.global_step) == (event, step):
            for name, value in wishes.items():
                setattr(control, name, value)

    return act


# ---------------------------------------------------------------------- the points


def test_the_events_come_in_the_order_of_transformers_own_trainer(evaluated, model_folder, tmp_path):
    """Both trainers run 4 steps of 2 micro-batches, 3 steps an epoch, and log, evaluate and save at the same steps."""
    import datasets

    every = {"logging_steps": 1, "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True}
    theirs = Recorder()
    tokens = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(22)]
    rows = datasets.Dataset.from_list(tokens)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), eval_strategy="steps", report_to=[], disable_tqdm=True, **every, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[theirs]).train()
    ours = Recorder()
    Trainer(evaluated(**every, **sizes), callbacks=[ours]).train()

    def comparable(recorder):
        return [call for call in recorder.calls if call[0] != "on_prediction_step"]

    expected = comparable(theirs)
    # after its last step theirs also logs how long it took; ours evaluates when everything is saved
    last = [(event, 4) for event in ("on_log", "on_evaluate", "on_save", "on_epoch_end", "on_log", "on_train_end")]
    assert expected[-6:] == last
    last = [(event, 4) for event in ("on_save", "on_epoch_end", "on_log", "on_evaluate", "on_train_end")]
    assert comparable(ours) == expected[:-6] + last


def test_every_event_of_a_run_is_told(evaluated):
    seen = Recorder()
    Trainer(evaluated(max_steps=2, gradient_accumulation_steps=2), callbacks=[seen]).train()
    assert {event for event, _ in seen.calls} == {*EVENTS} - NOT_OURS


def test_classes_and_instances_are_callbacks_and_nothing_else_is(sft_config):
    Trainer(sft_config(max_steps=1), callbacks=[TrainerCallback, TrainerCallback()])
    with pytest.raises(TypeError, match=r"^callbacks: expected subclasses or instances of .*TrainerCallback; got 7"):
        Trainer(sft_config(max_steps=1), callbacks=[7])
    for single in (None, TrainerCallback()):
        with pytest.raises(TypeError, match=r"^callbacks: expected a list of transformers' TrainerCallback; got"):
            Trainer(sft_config(max_steps=1), callbacks=single)


# ---------------------------------------------------------------------- what they are told


def test_the_arguments_say_what_the_settings_say(evaluated):
    config = evaluated(
        max_steps=3, eval_steps=2, save_steps=3, learning_rate=3e-3, weight_decay=0.25, seed=7, run_name="mine",
        lr_scheduler_type="cosine", warmup_steps=2, adam_beta2=0.9, max_grad_norm=0.5, save_total_limit=3,
        gradient_accumulation_steps=2, per_device_eval_batch_size=5, train_sampling_strategy="group_by_length",
        gradient_checkpointing=True,
    )  # fmt: skip
    seen = Recorder()
    Trainer(config, callbacks=[seen]).train()
    told = seen.args
    assert isinstance(told, TrainingArguments)
    for name in (
        "output_dir", "max_steps", "eval_steps", "save_steps", "logging_steps", "learning_rate", "weight_decay", "seed",
        "run_name", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps", "max_grad_norm", "save_total_limit",
        "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs",
        "train_sampling_strategy", "gradient_checkpointing", "use_cpu",
    ):  # fmt: skip
        assert getattr(told, name) == getattr(config, name), name
    assert (told.lr_scheduler_type, told.eval_strategy, told.save_strategy) == ("cosine", "steps", "steps")
    assert told.report_to == []
    assert told.train_batch_size == config.per_device_train_batch_size


def test_without_held_out_data_nothing_says_that_there_are_evaluations(sft_config):
    seen = Recorder()
    Trainer(sft_config(max_steps=2, eval_steps=1), callbacks=[seen]).train()
    assert seen.args.eval_strategy == "no"
    assert not seen.noted("on_evaluate")
    with pytest.raises(AssertionError, match="EarlyStoppingCallback requires IntervalStrategy"):
        Trainer(sft_config(max_steps=2, eval_steps=1, output_dir=seen.args.output_dir + "-2"),
                callbacks=[EarlyStoppingCallback]).train()  # fmt: skip


def test_the_state_says_where_the_run_stands(evaluated):
    told = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            told.append((state.global_step, state.epoch, state.max_steps, state.num_train_epochs))
            assert state.is_world_process_zero

    config = evaluated(max_steps=7)  # 22 examples in batches of 4: 6 steps an epoch
    last = Recorder()
    result = Trainer(config, callbacks=[Look, last]).train()
    assert told == [(step, pytest.approx(step / 6), 7, 2) for step in range(1, 8)]
    assert last.state.num_input_tokens_seen == metrics(result.output_dir)[-2]["tokens"]
    assert last.kwargs["model"] is result.ensemble.model
    assert isinstance(last.kwargs["optimizer"].param_groups[0]["lr"], float)
    assert last.kwargs["processing_class"].eos_token == "</s>"


def flat(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl as plain numbers: those of particles by name, the alpha of every step left out."""
    found = {}
    for name, value in line.items():
        if isinstance(value, list) and name != "alpha_of_steps":
            found |= {f"{name}/p{k:03d}": number for k, number in enumerate(value)}
        elif not isinstance(value, list):
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def written(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_logs_are_the_lines_of_metrics_as_plain_numbers(evaluated):
    logs, evaluations = [], []

    class Look(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            Look.logs = [*getattr(Look, "logs", []), {"step": state.global_step} | logs]

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            evaluations.append({"step": state.global_step} | metrics)

    last = Recorder()
    result = Trainer(evaluated(max_steps=4, eval_steps=2), callbacks=[Look, last]).train()
    lines = [flat(line) for line in written(result.output_dir)]
    logs = Look.logs
    assert logs == lines
    assert evaluations == [line for line in lines if "eval_loss_nats" in line]
    assert last.state.log_history == lines
    assert {"particle_nll_nats_per_token/p002", "grad_norm/p000", "skipped_updates/p001"} <= lines[0].keys()


def test_numbers_that_are_not_finite_are_left_out(sft_config, monkeypatch):
    poison(monkeypatch, 1, {2})
    last = Recorder()
    Trainer(sft_config(max_steps=3), callbacks=[last]).train()
    assert ["grad_norm/p001" in line for line in last.state.log_history] == [True, False, True]
    assert all(math.isfinite(value) for line in last.state.log_history for value in line.values())


@pytest.mark.parametrize(
    ("metric", "better"),
    [(None, min), ("loss_nats", min), ("eval_mean_particle_nll_nats_per_token", min)],
)
def test_the_best_evaluation_is_known(evaluated, metric, better):
    last = Recorder()
    config = evaluated(max_steps=8, eval_steps=2, save_steps=2, learning_rate=0.2, metric_for_best_model=metric)
    result = Trainer(config, callbacks=[last]).train()
    name = EVAL + (metric or "mixture_nll_nats_per_token").removeprefix(EVAL)
    found = {line["step"]: line[name] for line in written(result.output_dir) if name in line}
    assert last.state.best_metric == better(found.values())
    assert found[last.state.best_global_step] == last.state.best_metric
    assert last.args.metric_for_best_model == name.removeprefix(EVAL)
    assert last.args.greater_is_better is False


def test_a_metric_that_is_not_measured_is_refused_before_the_model_is_loaded(sft_config):
    with pytest.raises(ValueError, match=r"^metric_for_best_model: expected one of loss_nats, mixture_nll.*got 'loss'"):
        Trainer(sft_config(metric_for_best_model="loss"))
    with pytest.raises(ValueError, match=r"did you mean 'loss_nats'\?$"):
        Trainer(sft_config(metric_for_best_model="loss_nat"))


# ---------------------------------------------------------------------- what they ask for


def whole(run: Path) -> list[int]:
    """The steps of its checkpoints, all of which are whole."""
    steps = []
    for step, path in checkpoint.all_of(run):
        checkpoint.verify(path)
        steps.append(step)
    return steps


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_end"])
def test_a_run_that_is_told_to_stop_is_whole(evaluated, event):
    """Logged, evaluated, saved, with particles and a report, once each; it has finished."""
    step = {"on_step_begin": 5, "on_epoch_end": 6}.get(event, 4)
    seen = Recorder(at(event, step, should_training_stop=True))
    config = evaluated(max_steps=60, logging_steps=4, eval_steps=4, save_steps=4, save_total_limit=9)
    result = Trainer(config, callbacks=[seen]).train()
    run, last = result.output_dir, 6 if event in ("on_step_begin", "on_epoch_end") else 4
    assert result.global_step == last
    assert whole(run) == sorted({4, last})
    lines = [(line["step"], "eval_loss_nats" in line) for line in metrics(run)]
    assert sorted(lines) == sorted({(at_step, held) for at_step in (4, last) for held in (False, True)})
    assert read_json(run / "run.json")["status"] == "finished"
    assert read_run(run).evaluation["step"] == last
    assert (run / "particles" / "p002").is_dir()
    assert (run / "report.html").is_file()
    assert [call for call in seen.calls if call[0] == "on_train_end"] == [("on_train_end", last)]


def test_an_error_at_the_very_end_loses_nothing(sft_config):
    def broken(event, state, control):
        if event == "on_train_end":
            raise ConnectionError("the tracker is away")

    config = sft_config(max_steps=2)
    with pytest.raises(ConnectionError):
        Trainer(config, callbacks=[Recorder(broken)]).train()
    run = Path(config.output_dir)
    assert read_json(run / "run.json")["status"] == "finished"
    assert (run / "particles" / "p002").is_dir()
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_learning_rate_that_a_callback_sets_before_a_step_is_used_in_it(sft_config, event):
    def freeze(self, args, state, control, optimizer, **kwargs):
        for group in optimizer.param_groups:
            assert float(group["lr"]) > 0.0
            group["lr"] = 0.0

    Frozen = type("Frozen", (TrainerCallback,), {event: freeze})
    result = Trainer(sft_config(max_steps=2), callbacks=[Frozen]).train()
    assert [line["learning_rate"] for line in metrics(result.output_dir)] == [0.0, 0.0]
    assert all((B == 0).all() for _, B in result.ensemble.stacked().values())


def test_a_stopped_run_is_resumed_exactly(sft_config, tmp_path):
    settings = {"max_steps": 10, "logging_steps": 5, "save_steps": 100, "lr_scheduler_type": "cosine"}
    straight = sft_config(output_dir=str(tmp_path / "straight"), **settings)
    train(straight)
    stopped = sft_config(output_dir=str(tmp_path / "stopped"), **settings)
    Trainer(stopped, callbacks=[Recorder(at("on_step_end", 7, should_training_stop=True))]).train()
    assert whole(tmp_path / "stopped") == [7]
    train(replace(stopped, resume_from_checkpoint="true"))
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        ours, theirs = (sha256_of(tmp_path / run / "checkpoint-10" / name) for run in ("stopped", "straight"))
        assert ours == theirs, name


def test_a_callback_can_ask_for_a_line_an_evaluation_and_a_checkpoint(evaluated):
    wishes = {"should_log": True, "should_evaluate": True, "should_save": True}
    seen = Recorder(at("on_step_end", 3, **wishes))
    config = evaluated(max_steps=5, logging_steps=100, save_steps=100)
    run = Trainer(config, callbacks=[seen]).train().output_dir
    assert [(line["step"], "eval_loss_nats" in line) for line in metrics(run)] == [
        (3, False), (3, True), (5, False), (5, True),
    ]  # fmt: skip
    assert whole(run) == [3, 5]
    done = ["on_log", "on_log", "on_evaluate", "on_save"]
    assert seen.noted(*done)[:4] == [(event, 3) for event in done]


def test_a_callback_can_ask_for_less(evaluated):
    less = {"should_log": False, "should_evaluate": False, "should_save": False}
    config = evaluated(max_steps=5, logging_steps=2, eval_steps=2, save_steps=2)
    run = Trainer(config, callbacks=[Recorder(at("on_step_end", 2, **less))]).train().output_dir
    assert [line["step"] for line in metrics(run)] == [4, 4, 5, 5]
    assert whole(run) == [4, 5]


@pytest.mark.parametrize("save_steps", [2, 3], ids="saved every {} steps".format)
def test_an_epoch_can_be_ended_early_and_a_resumed_run_remembers_it(sft_config, tmp_path, monkeypatch, save_steps):
    """6 steps an epoch. After step 2 of the first epoch the second begins; the run still makes two passes at most."""
    settings = {"num_train_epochs": 2.0, "max_steps": -1, "save_steps": save_steps}
    run = lambda name: sft_config(output_dir=str(tmp_path / name), **settings)
    seen = Recorder(at("on_step_end", 2, should_epoch_stop=True))
    result = Trainer(run("whole"), callbacks=[seen]).train()
    assert result.global_step == 8
    assert seen.noted("on_epoch_begin", "on_epoch_end") == [
        ("on_epoch_begin", 0), ("on_epoch_end", 2), ("on_epoch_begin", 2), ("on_epoch_end", 8),
    ]  # fmt: skip
    assert [line["epoch"] for line in metrics(result.output_dir)] == pytest.approx(
        [1 / 6, 2 / 6, *(1 + i / 6 for i in range(1, 7))]
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_in(patch, save_steps + 1, kill)
        Trainer(run("broken"), callbacks=[Recorder(at("on_step_end", 2, should_epoch_stop=True))]).train()
    train(replace(run("broken"), resume_from_checkpoint="true"))
    for name in ("adapters.safetensors", "state.json"):
        ours, theirs = (sha256_of(tmp_path / run / "checkpoint-8" / name) for run in ("broken", "whole"))
        assert ours == theirs, name


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_save"])
def test_no_step_is_counted_twice_when_a_stopped_run_goes_on(evaluated, tmp_path, event):
    """It stops at a step at which it saves and does not log; so the checkpoint comes from between two lines."""
    settings = {"max_steps": 10, "logging_steps": 5, "eval_steps": 2, "save_steps": 2, "alpha_schedule": "linear"}
    straight, stopped = (evaluated(output_dir=str(tmp_path / name), **settings) for name in ("straight", "stopped"))
    train(straight)
    Trainer(stopped, callbacks=[Recorder(at(event, 4, should_training_stop=True))]).train()
    train(replace(stopped, resume_from_checkpoint="true"))
    assert alphas(tmp_path / "stopped") == alphas(tmp_path / "straight")
    assert steps_of(tmp_path / "stopped") == [4, 5, 10]


def test_a_line_at_the_end_of_an_epoch_does_not_come_again_after_a_kill(sft_config, tmp_path, monkeypatch):
    """6 steps an epoch; the checkpoint is made before the line that is asked for at the end of the epoch."""
    settings = {"max_steps": 12, "logging_steps": 4, "save_steps": 6}
    whole, broken = (sft_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "broken"))
    asks = lambda: Recorder(at("on_epoch_end", 6, should_log=True))
    Trainer(whole, callbacks=[asks()]).train()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_in(patch, 7, kill)
        Trainer(broken, callbacks=[asks()]).train()
    Trainer(replace(broken, resume_from_checkpoint="true"), callbacks=[asks()]).train()
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("event", ["on_epoch_end", "on_log", "on_save"])
def test_a_step_is_logged_once_however_often_a_callback_asks(sft_config, event):
    def asks(now, state, control):
        control.should_log |= now == event

    run = Trainer(sft_config(max_steps=8), callbacks=[Recorder(asks)]).train().output_dir
    assert steps_of(run) == [*range(1, 9)]


@pytest.mark.parametrize("held_out", [True, False])
def test_a_run_that_ends_before_its_first_step_has_no_report(evaluated, sft_config, held_out):
    config = (evaluated if held_out else sft_config)()
    result = Trainer(config, callbacks=[Recorder(at("on_train_begin", 0, should_training_stop=True))]).train()
    assert result.global_step == 0
    assert not (result.output_dir / "report.html").exists()
    with pytest.warns(UserWarning, match="no checkpoint yet|goes on from step 0"):
        assert train(replace(config, resume_from_checkpoint="true")).global_step == 6


def test_the_state_names_the_checkpoint_of_the_best_step_if_it_is_kept(evaluated):
    last = Recorder()
    config = evaluated(max_steps=6, eval_steps=2, save_steps=2)
    run = Trainer(config, callbacks=[last]).train().output_dir
    assert last.state.best_global_step == 6
    assert last.state.best_model_checkpoint == str(run / "checkpoint-6")
    seen = []
    look = Recorder(lambda event, state, control: seen.append((event, state.best_model_checkpoint)))
    Trainer(replace(config, resume_from_checkpoint="true", max_steps=12, learning_rate=1e-2), callbacks=[look]).train()
    assert dict(reversed(seen))["on_train_begin"] == str(run / "checkpoint-6")
    kept = [None, *(str(run / f"checkpoint-{step}") for step in whole(run))]
    assert look.state.best_model_checkpoint in kept


# ---------------------------------------------------------------------- EarlyStoppingCallback, resumed runs


def test_early_stopping_of_transformers_stops_a_run_that_gets_worse(evaluated):
    """A large step size makes the held-out NLL rise. The run ends whole, and can go on."""
    config = evaluated(max_steps=60, eval_steps=2, learning_rate=0.3, save_steps=50)
    result = Trainer(config, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)]).train()
    nlls = [line["eval_mixture_nll_nats_per_token"] for line in metrics(result.output_dir) if "eval_loss_nats" in line]
    not_better = [nll >= min(nlls[:i], default=math.inf) for i, nll in enumerate(nlls)]
    assert not_better[-2:] == [True, True]
    assert not any(a and b for a, b in itertools.pairwise(not_better[:-1]))
    assert result.global_step == 2 * len(nlls) < 60
    assert whole(result.output_dir) == [result.global_step]
    write_report([result.output_dir], result.output_dir / "report.html")
    step = result.global_step + 1
    longer = replace(config, resume_from_checkpoint="true", max_steps=step)
    assert train(longer).global_step == step


def test_what_callbacks_keep_and_what_was_best_outlive_a_kill(evaluated, tmp_path, monkeypatch):
    class Counter(TrainerCallback, ExportableState):
        def __init__(self):
            self.steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

        def state(self):
            return {"args": {}, "attributes": {"steps": self.steps}}

    config = evaluated(max_steps=8, eval_steps=2, save_steps=4, learning_rate=0.2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_in(patch, 7, kill)
        Trainer(config, callbacks=[Counter]).train()
    counter, last = Counter(), Recorder()
    resumed = Trainer(replace(config, resume_from_checkpoint="true"), callbacks=[last, counter]).train()
    assert counter.steps == 8
    lines = [flat(line) for line in written(resumed.output_dir)]
    assert last.state.log_history == lines
    assert last.state.best_metric == min(line.get("eval_mixture_nll_nats_per_token", math.inf) for line in lines)
    assert last.noted("on_epoch_begin")[0] == ("on_epoch_begin", 4)


def test_callbacks_that_only_look_change_nothing(evaluated, tmp_path):
    plain = evaluated(max_steps=6, eval_steps=2, save_steps=3, output_dir=str(tmp_path / "plain"))
    train(plain)
    Trainer(replace(plain, output_dir=str(tmp_path / "watched")), callbacks=[Recorder()]).train()
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "watched")
    for name in ("adapters.safetensors", "optimizer.safetensors", "state.json"):
        ours, theirs = (sha256_of(tmp_path / run / "checkpoint-6" / name) for run in ("plain", "watched"))
        assert ours == theirs, name


# ---------------------------------------------------------------------- report_to


def test_tensorboard_and_trackio_hold_the_numbers_of_metrics(evaluated, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the environment when it is imported
    poison(monkeypatch, 1, {2})  # a gradient that is NaN
    config = evaluated(
        max_steps=6, logging_steps=1, eval_steps=2, report_to=["tensorboard", "trackio"], run_name="mine"
    )
    run = train(config).output_dir
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in written(run):
        numbers = flat(line)
        step = numbers.pop("step")
        for name, value in numbers.items():
            group, of_eval = ("eval/", name.removeprefix("eval_")) if name.startswith("eval_") else ("train/", name)
            expected.setdefault(group + of_eval, []).append((step, value))
    assert len(expected["train/grad_norm/p001"]) == 5
    assert {"train/particle_nll_nats_per_token/p000", "eval/particle_nll_nats_per_token/p002"} <= expected.keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (run / "runs").iterdir()
    read = EventAccumulator(str(events))
    read.Reload()
    assert {*read.Tags()["scalars"]} == expected.keys()
    for name, values in expected.items():
        found = [(event.step, event.value) for event in read.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name

    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    assert tmp_path in trackio.utils.TRACKIO_DIR.parents
    logs = SQLiteStorage.get_logs("huggingface", "mine")
    for name, values in expected.items():
        found = [(log["train/global_step"], log[name]) for log in logs if name in log]
        assert found == values, name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"report_to: tensorbord is not supported.*; did you mean 'tensorboard'\?"),
        (["tensorboard", "nowhere"], "report_to: nowhere is not supported, only .*trackio.* are supported"),
        (["none", "tensorboard"], "report_to: expected 'none' alone, or names of programs; got none, tensorboard"),
        (["wandb"], r"report_to: wandb is not installed .*; pip install wandb$"),
        (["tensorboard", "comet_ml"], r"report_to: comet_ml is not installed .*; pip install comet-ml$"),
    ],
)
def test_what_cannot_be_reported_to_is_refused_before_anything_is_loaded(sft_config, monkeypatch, names, message):
    monkeypatch.setattr(base_model, "load_config", lambda *_: pytest.fail("the base was looked at"))
    with pytest.raises(ValueError, match=message) as error:
        train(sft_config(report_to=names))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [RuntimeError, ImportError, ValueError])
def test_a_program_that_does_not_start_is_named(sft_config, monkeypatch, error):
    class Broken(TrainerCallback):
        def __init__(self):
            raise error("its client is missing")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "broken", Broken)
    with pytest.raises(ValueError, match=r"^report_to: broken is not installed \(its client is missing\)"):
        Trainer(sft_config(report_to=["broken"]))


def test_a_run_without_callbacks_does_without_training_arguments(sft_config, monkeypatch):
    """They need the package accelerate."""
    monkeypatch.setattr(TrainingArguments, "__init__", lambda *_, **__: pytest.fail("they were made"))
    assert train(sft_config(max_steps=1, report_to=["none"])).global_step == 1


def test_the_handler_of_transformers_takes_what_it_is_given():
    """`Callbacks` leans on two internal classes; with another version this says so first."""
    handler = CallbackHandler([transformers.DefaultFlowCallback], None, None, None, None)
    assert {event for event in EVENTS if hasattr(handler, event)} == {*EVENTS}


def test_one_program_may_be_named_without_a_list(sft_config):
    assert sft_config(report_to="none").report_to == ["none"]
    assert sft_config(report_to="tensorboard").report_to == ["tensorboard"]


def test_settings_may_leave_out_what_a_trainer_can_be_given():
    assert SftConfig(output_dir="o").dataset_name == ""
    with pytest.raises(ValueError, match="output_dir: needed, but not given"):
        SftConfig()
