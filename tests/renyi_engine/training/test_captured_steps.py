"""A run whose micro-batches are recorded as CUDA graphs is the run without them, up to the rounding of filled rows.

Without a GPU, a graph is a plain call on the memory of the graph: see `core.cuda_graphs`.
"""

from __future__ import annotations

import pytest
import torch

from renyi_engine import Trainer, train
from renyi_engine.core import Recordings, cuda_graphs
from renyi_engine.ensemble import captured
from renyi_engine.objectives import scoring
from renyi_engine.training import steps, trainer

from .runs import metrics
from .test_never_waits import Reads

pytestmark = pytest.mark.usefixtures("without_report")

SETTINGS = {
    "init": "spread",
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 4,
}


@pytest.fixture
def graphs(monkeypatch):
    """Work on a CPU is recorded too. Gives the recordings that a run has made."""
    made, init = [], Recordings.__init__

    def noted(self, *args, **options):
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(Recordings, "__init__", noted)
    for module in (captured, scoring, steps, trainer):
        monkeypatch.setattr(module, "records", lambda device: True)
    return made


def assert_same(ours, theirs):
    for our, their in zip(metrics(ours.output_dir), metrics(theirs.output_dir), strict=True):
        assert our.keys() == their.keys()
        for name, value in their.items():
            assert our[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (their["step"], name)
    for ours_of_map, theirs_of_map in zip(
        ours.ensemble.stacked().values(), theirs.ensemble.stacked().values(), strict=True
    ):
        for one, other in zip(ours_of_map, theirs_of_map, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def both_ways(config, **settings):
    results = []
    for number, cuda_graphs_setting in enumerate(("auto", "false")):
        changed = {"cuda_graphs": cuda_graphs_setting, "output_dir": f"{config().output_dir}-{number}"}
        results.append(train(config(**SETTINGS | settings | changed)))
    return results


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha_controller": "ess:0.6", "prior": "smoothed_kl"},
        {"gradient_checkpointing": True, "max_grad_norm": 0.5, "alpha_schedule": "linear", "prior": "none"},
        {"packed_row_tokens": 40, "particle_weights": "learned"},
    ],
    ids=str,
)
def test_sft(graphs, sft_config, settings):
    assert_same(*both_ways(sft_config, **settings))
    of_steps, of_evaluations = graphs
    assert 1 <= of_steps.num_made <= 6
    assert of_evaluations.num_made >= 1


def test_dpo(graphs, dpo_config):
    assert_same(*both_ways(dpo_config))
    assert [recordings.num_made >= 1 for recordings in graphs] == [True, True]


def test_a_run_of_two_parts_is_the_run(graphs, sft_config):
    whole = train(sft_config(**SETTINGS))
    folder = f"{whole.output_dir}-parts"
    train(sft_config(**SETTINGS | {"max_steps": 4, "output_dir": folder, "lr_scheduler_type": "constant"}))
    other = train(sft_config(**SETTINGS | {"output_dir": f"{folder}-2", "lr_scheduler_type": "constant"}))
    resumed = train(
        sft_config(
            **SETTINGS | {"output_dir": folder, "lr_scheduler_type": "constant", "resume_from_checkpoint": "true"}
        )
    )
    for one, two in zip(resumed.ensemble.parameters(), other.ensemble.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_out_of_memory_while_recording_halves_micro_batches(graphs, sft_config, monkeypatch, capfd):
    init, refused = cuda_graphs._Recording.__init__, []

    def limited(self, function, inputs, *others):
        if len(inputs["label_places"]) > 1 and not refused:
            refused.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory")
        init(self, function, inputs, *others)

    monkeypatch.setattr(cuda_graphs._Recording, "__init__", limited)
    settings = SETTINGS | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    ours = train(sft_config(**settings))
    assert "going on with micro-batches of 2 in place of 4" in capfd.readouterr().err
    theirs = train(sft_config(**settings | {"cuda_graphs": "false", "output_dir": f"{ours.output_dir}-2"}))
    assert refused
    assert_same(ours, theirs)


def test_a_graph_that_repeats_another_batch_is_not_used(graphs, sft_config, monkeypatch):
    """As one would that was recorded with a value in Python."""
    init = cuda_graphs._Recording.__init__

    def repeat_the_first(self, *args):
        init(self, *args)
        outputs = self._replay()
        self._replay = lambda: outputs

    monkeypatch.setattr(cuda_graphs._Recording, "__init__", repeat_the_first)
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs"):
        ours, theirs = both_ways(sft_config)
    assert_same(ours, theirs)


def test_steps_ask_for_nothing_once_their_graphs_are_made(graphs, sft_config, monkeypatch):
    make, found = steps.Steps.make, []

    def counted(self, *args):
        before = graphs[0].num_made
        with Reads() as reads:
            made = make(self, *args)
        found.append((graphs[0].num_made == before, reads.found))
        return made

    monkeypatch.setattr(steps.Steps, "make", counted)
    train(sft_config(max_steps=12, spike_threshold=5.0, alpha_schedule="linear", gradient_accumulation_steps=2))
    replayed = [asked for only_replays, asked in found if only_replays]
    assert len(replayed) >= 3
    assert replayed == [[]] * len(replayed)


def test_true_asks_for_a_gpu(sft_config):
    with pytest.raises(ValueError, match="cuda_graphs: true needs a model on a GPU, but this one is on the cpu"):
        Trainer(sft_config(cuda_graphs=True)).train()


def test_true_and_false_may_be_given_as_such(sft_config):
    assert [sft_config(cuda_graphs=value).cuda_graphs for value in (True, False, "auto")] == ["true", "false", "auto"]
    with pytest.raises(ValueError, match="cuda_graphs: expected one of auto, true, false; got 'yes'"):
        sft_config(cuda_graphs="yes")
