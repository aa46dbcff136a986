"""A step asks the device for nothing: from the batch to the measurements, Python only orders work.

A GPU that is asked for a value has to finish first what was ordered before, and then has nothing to do until Python has
ordered more. No GPU is needed to see whether a step asks. Tensors without values raise where one is asked for, and on a
CPU the operators that give an answer to Python can be counted. Custom operators hide what they do inside; their own
tests look there.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from transformers import AutoModelForCausalLM

from renyi_engine import DpoTask, LoraEnsemble, SftTask, train
from renyi_engine.training.figures import Figures
from renyi_engine.training.loss_spikes import RecentNlls
from renyi_engine.training.steps import Steps
from renyi_engine.training.train_step import train_step

from ..questions import Reads

pytestmark = pytest.mark.usefixtures("without_report")

K = 3


def sft(tokenizer):
    task = SftTask(tokenizer, 64)
    rows = [{"prompt": f"{i}? ", "completion": "yes" * (1 + i % 3)} for i in range(5)]
    return task, [task.example(i, row) for i, row in enumerate(rows)]


def dpo(tokenizer):
    task = DpoTask(tokenizer, 64, 0.1)
    rows = [{"prompt": f"{i}? ", "chosen": "yes" * (1 + i % 3), "rejected": "no" * (1 + i % 2)} for i in range(5)]
    pairs = [replace(task.example(i, row), reference=(-3.0 - i, -2.0)) for i, row in enumerate(rows)]
    return task, pairs


TASKS = {"sft": sft, "dpo": dpo}
each_kind_of_step = pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("sft", {"prior": "smoothed_kl", "max_grad_norm": 0.5}),
        ("sft", {"prior": "smoothed_kl", "kernel_bandwidth": 0.7, "max_grad_norm": 0.0}),
        ("sft", {"gradient_checkpointing": True}),
        ("sft", {"dtype": "bfloat16"}),
        ("sft", {"particle_weights": "learned"}),
        ("dpo", {}),
        ("dpo", {"prior": "smoothed_kl", "dtype": "bfloat16"}),
        ("dpo", {"prior": "none"}),
    ],
    ids=str,
)


class Step:
    """A step of two micro-batches, in which one particle is sick, and what the loop does on the device around it."""

    def __init__(self, config, kind, tokenizer) -> None:
        self.config = config
        self.task, self.items = TASKS[kind](tokenizer)
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=getattr(torch, config.dtype))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.ensemble = LoraEnsemble.attach(model, config.ensemble_config()).train()
        assert self.ensemble.packs
        self.batches = [self.task.pack(part) for part in (self.items[:2], self.items[2:])]

    def forget_values(self) -> None:
        """Put tensors without values in the places of all tensors, within the block of a FakeTensorMode."""
        particles, device = self.ensemble.particles, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for part in [*self.ensemble.model.modules(), *self.ensemble.modules()]:
            for name, old in part._parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    part._parameters[name] = torch.nn.Parameter(new, old.requires_grad)
            for name, old in part._buffers.items():
                if old is not None:
                    part._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=device)
        particles.values = torch.nn.Parameter(torch.empty(particles.values.shape, device=device))
        particles.adopt()
        self.begin()

    def begin(self) -> None:
        """Make what a run makes once."""
        values = self.ensemble.particles.values
        device = values.device
        self.optimizer = torch.optim.AdamW([values], lr=0.0, fused=True)
        kind = torch.float32 if device.type == "cuda" else torch.float64  # which the kernels read
        self.optimizer.param_groups[0]["lr"] = torch.full((), 1e-2, dtype=kind, device=device)
        self.recent = RecentNlls([1e3] * 20, device)
        sick = torch.ones(K, 1, 1, device=device)
        sick[1] = math.nan
        first = next(iter(self.ensemble.parameters()))
        first.register_hook(lambda gradient: gradient * sick)
        self.alpha, self.num_examples = (torch.full((), v, dtype=torch.float64, device=device) for v in (0.7, 5.0))

    def make(self):
        result = train_step(
            self.ensemble,
            self.task,
            self.optimizer,
            self.batches,
            self.alpha,
            self.config,
            20,
            self.num_examples.float(),
            self.recent.limit(5.0) * 7 / 5,
        )
        self.recent.remember(result.mixture_nll.sum().double() / 7, result.updated.any())
        return result


@pytest.fixture
def step(sft_config, tokenizer, kind, settings):
    return Step(sft_config(num_particles=K, init="spread", **{"dtype": "float32"} | settings), kind, tokenizer)


@pytest.fixture
def no_values():
    """Within the block, tensors have no values, on a GPU where there is one. Whoever asks for a value raises.

    torch does not know what the fused AdamW does to such tensors if the learning rate is a tensor too. It is told here:
    nothing comes back. The kernel reads the rate where it is, on a GPU from its memory.
    """
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_adamw_.tensor_lr", lambda *args, **kwargs: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield FakeTensorMode(allow_non_fake_inputs=True)
    library._destroy()


@each_kind_of_step
def test_a_step_without_values_runs_to_its_end(step, no_values):
    with no_values:
        step.forget_values()
        with Reads() as reads:
            results = [step.make(), step.make()]
    assert reads.found == []
    for result in results:
        assert isinstance(result.logp, FakeTensor)
        assert result.logp.shape == (K, 5)
        assert result.updated.shape == (K,)


@each_kind_of_step
def test_a_step_asks_a_cpu_for_nothing_either(step):
    """Here with values: what happens is what should, and one particle is sick."""
    step.begin()
    before = step.ensemble.particles.values.detach().clone()
    with Reads() as reads:
        result = step.make()
        figures = Figures(result)
    assert reads.found == []
    read = figures.read()
    assert read.updated.tolist() == [True, False, True]
    moved = (step.ensemble.particles.values != before).any(dim=1)
    assert moved.tolist() == read.updated.tolist()


def test_a_run_makes_its_steps_without_a_question(sft_config, monkeypatch):
    """Beside `train_step`: alpha, the learning rate, the limit of a spike, the copies of the measurements."""
    make, found = Steps.make, []

    def counted(self, *args):
        with Reads() as reads:
            made = make(self, *args)
        found.append(reads.found)
        return made

    monkeypatch.setattr(Steps, "make", counted)
    train(sft_config(max_steps=6, spike_threshold=5.0, alpha_schedule="linear", gradient_accumulation_steps=2))
    assert found == [[]] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_kind_of_step
def test_a_gpu_is_not_waited_for(step):
    """CUDA itself says so. The first step may wait: it compiles kernels."""
    step.ensemble.model.to("cuda")
    step.ensemble.to("cuda")
    step.batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in step.batches]
    step.begin()
    step.make()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = Figures(step.make())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures.read().updated.tolist() == [True, False, True]


QUESTIONS = {
    "item": lambda s: s.sum().item(),
    "bool": lambda s: bool((s > 0).any()),
    "nonzero": lambda s: s.nonzero(),
    "mask": lambda s: s[s > 0],
    "unique": lambda s: s.unique(),
    "equal": lambda s: torch.equal(s, s + 1),
    "masked_select": lambda s: s.masked_select(s > 0),
}


def plant(step, monkeypatch, question) -> None:
    original = type(step.task).score

    def score(self, ensemble, batch):
        scores = original(self, ensemble, batch)
        question(scores.logp.detach())
        return scores

    monkeypatch.setattr(type(step.task), "score", score)


@pytest.mark.parametrize(("kind", "settings"), [("sft", {})])
@pytest.mark.parametrize("name", [*QUESTIONS, "tolist"])
def test_a_question_raises_where_there_are_no_values(step, no_values, monkeypatch, name):
    plant(step, monkeypatch, QUESTIONS.get(name, torch.Tensor.tolist))  # on a CPU, tolist is no operator to count
    with no_values, pytest.raises((DataDependentOutputException, DynamicOutputShapeException, RuntimeError)):
        step.forget_values()
        step.make()


@pytest.mark.parametrize(("kind", "settings"), [("sft", {})])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_to_a_cpu_is_counted(step, monkeypatch, name):
    step.begin()
    plant(step, monkeypatch, QUESTIONS[name])
    with Reads() as reads:
        step.make()
    assert len(reads.found) == 2  # one in each micro-batch


def test_a_copy_that_waits_is_noticed():
    host = torch.ones(3)
    with Reads() as reads:
        host.to("meta", non_blocking=True)
        assert reads.found == []
        host.to("meta")
        assert reads.found == ["_to_copy"]
        torch.empty(3, device="meta").copy_(host)
    assert reads.found == ["_to_copy", "copy_"]
