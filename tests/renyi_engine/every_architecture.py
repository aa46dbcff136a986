"""What is true of an ensemble on every causal LM class that can be built tiny, and the list of it in the docs.

The truth of a particle is the model alone, W + scaling * B_k A_k in place of each adapted weight, one unpadded sequence
at a time. `python -m tests.renyi_engine.every_architecture`, from the project's folder, writes docs/architectures.md.

Layout: K particles, B sequences, T tokens, D hidden size, I/O in/out features, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from renyi_engine import EnsembleConfig, LoraEnsemble
from renyi_engine.ensemble.targets import decoder

from . import tiny_models

LIST = Path(__file__).parents[2] / "docs" / "architectures.md"
K = 2
LENGTHS = (6, 9, 4, 7)
"""Of B = 4 sequences: as many as a tiny model has attention heads."""


@dataclass
class Truth:
    """logp [K, B], hidden states [K, T, D] of each sequence, and the gradients of the summed logp by path."""

    logp: Tensor
    hidden: list[Tensor]
    gradients: dict[str, tuple[Tensor, Tensor]]


class Subject:
    """A tiny model of one class with an ensemble on it, or the sentence that refused it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ensemble: LoraEnsemble | None = None
        self.refusal: str | None = None
        config = EnsembleConfig(num_particles=K, rank=2, lora_alpha=4, init="spread")
        model = tiny_models.tiny_model(name)
        self.model_class = type(model).__name__
        try:
            self.ensemble = LoraEnsemble.attach(model, config)
        except ValueError as error:
            self.refusal = str(error)
            return
        with torch.no_grad():  # particles far apart
            for _, B in self.ensemble.stacked().values():
                B.mul_(10.0)

    @property
    def sequences(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        low, high = tiny_models.TEXT_IDS.start, tiny_models.TEXT_IDS.stop
        return [torch.randint(low, high, (length,), generator=generator) for length in LENGTHS]

    def batch(self, num_sequences: int, padding: str) -> dict[str, Tensor]:
        sequences = self.sequences[:num_sequences]
        width = max(map(len, sequences))
        ids = torch.zeros(num_sequences, width, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids.clone(), "labels": ids - 100}
        for row, tokens in enumerate(sequences):
            start = width - len(tokens) if padding == "left" else 0
            batch["input_ids"][row, start : start + len(tokens)] = tokens
            batch["attention_mask"][row, start : start + len(tokens)] = 1
            batch["labels"][row, start + 1 : start + len(tokens)] = tokens[1:]
        return batch

    @cached_property
    def truth(self) -> Truth:
        assert self.ensemble is not None
        adapters = {path: (A.detach(), B.detach()) for path, (A, B) in self.ensemble.stacked().items()}
        scaling = self.ensemble.config.scaling
        model = tiny_models.tiny_model(self.name)
        weights = {path: model.get_submodule(path).weight.detach() for path in adapters}
        logp, hidden = [], []
        of_A: dict[str, list[Tensor]] = {path: [] for path in adapters}
        of_B: dict[str, list[Tensor]] = {path: [] for path in adapters}
        for k in range(K):
            merged = {}
            for path, (A, B) in adapters.items():
                linear = model.get_submodule(path)
                update = _as_weight(linear, scaling * B[k] @ A[k])
                # a weight of its own: some models tie those of several maps
                merged[path] = linear.weight = nn.Parameter(weights[path] + update)
            runs = [_alone(model, tokens) for tokens in self.sequences]
            logp.append(torch.stack([run[0] for run in runs]))
            hidden.append([run[1] for run in runs])
            gradients = torch.autograd.grad(logp[k].sum(), list(merged.values()), allow_unused=True)
            for (path, (A, B)), gradient in zip(adapters.items(), gradients, strict=True):
                linear = model.get_submodule(path)
                of_weight = _as_weight(linear, torch.zeros_like(linear.weight) if gradient is None else gradient)
                of_A[path].append(scaling * B[k].T @ of_weight)
                of_B[path].append(scaling * of_weight @ A[k].T)
        return Truth(
            torch.stack(logp).detach(),
            [torch.stack(list(of_particles)) for of_particles in zip(*hidden, strict=True)],
            {path: (torch.stack(of_A[path]), torch.stack(of_B[path])) for path in adapters},
        )


def _as_weight(linear: nn.Module, matrix: Tensor) -> Tensor:
    """[O, I] -> the layout of the map's weight, and back."""
    return matrix.T if isinstance(linear, Conv1D) else matrix


def _alone(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of the tokens after the first, final hidden states [T, D])."""
    hidden: list[Tensor] = []
    handle = decoder(model).register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state[0].detach()))
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    handle.remove()
    return torch.log_softmax(logits, -1)[:-1].gather(1, tokens[1:, None]).sum(), hidden[0]


def trains(subject: Subject) -> str:
    return "yes" if subject.refusal is None else f"no: {subject.refusal}"


def generates(subject: Subject) -> str:
    """How it reads what it continues: see `renyi_engine.ensemble.cache`."""
    if subject.ensemble is None:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject.ensemble.generate(subject.sequences[0][None], max_new_tokens=1, eos_token_id=[])
    return "from its cache" if subject.ensemble.reads_from_cache else "reading all again"


def reads_packed_rows(subject: Subject) -> str:
    """`test_every_architecture` checks that it reads them right."""
    if subject.ensemble is None:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "yes" if subject.ensemble.packs else "no, padded"


def peft_loads(subject: Subject) -> str:
    """`test_every_class_in_use` checks this for every class that is not refused."""
    return "" if subject.ensemble is None else "yes"


COLUMNS: dict[str, Callable[[Subject], str]] = {
    "trains": trains,
    "packs": reads_packed_rows,
    "generates": generates,
    "PEFT loads": peft_loads,
}
"""What the list says of a class."""


def row(subject: Subject) -> str:
    return _row(subject.name, subject.model_class, *(say(subject) for say in COLUMNS.values()))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(rows: list[str]) -> str:
    left_out = [_row(name, reason) for name, reason in sorted(tiny_models.NOT_TINY.items())]
    return "\n".join(
        [
            "# Which models it runs on",
            "",
            f"These are all causal language model classes of transformers {transformers.__version__}, and all classes "
            "for text and images, which are run on text alone. Of each, a tiny model with random weights was tried.",
            "",
            "- trains: every particle has the log-probabilities, hidden states and gradients of the model alone with "
            "that particle's adapter. After `no` stands the message with which the model is refused.",
            "- packs: the sequences of a batch stand in one row without padding, and get the log-probabilities and "
            "gradients that they get alone. `no, padded`: they are padded, because the model's layers mix tokens in "
            "other ways than by attention, or its attention cannot be told where sequences end.",
            "- generates: the log-probabilities are those of decoding without a cache. `from its cache`: the model's "
            "own cache gives them. `reading all again`: it does not, so the whole sequence is read again for every new "
            "token, which is slow.",
            "- PEFT loads: PEFT loads the saved adapters and gives the same logits.",
            "",
            "`python -m tests.renyi_engine.every_architecture` writes this page, and a test compares it with what it "
            "finds.",
            "",
            _row("model type", "class", *COLUMNS),
            _row("---", "---", *("---" for _ in COLUMNS)),
            *rows,
            "",
            "Not tried, as no tiny one can be built:",
            "",
            _row("model type", "why"),
            _row("---", "---"),
            *left_out,
            "",
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    LIST.write_text(page([row(Subject(name)) for name in tiny_models.names()]))
