"""A scorer gives the log-likelihoods of its examples, and what it made goes with it."""

from __future__ import annotations

import gc
import weakref

import torch

from renyi_engine.data import Example, pack
from renyi_engine.ensemble import captured
from renyi_engine.objectives import Scorer, scoring
from renyi_engine.objectives.task import Scores

from ..apart import attach_apart
from ..ensemble.test_packed_attention import build


class Task:
    unit = "token"

    def pack(self, items):
        return pack([item] for item in items)

    def score(self, ensemble, batch):
        return Scores(ensemble.sequence_logprob(batch), {})


def test_the_memory_of_its_graphs_is_free_as_soon_as_nobody_has_the_scorer(monkeypatch):
    """Python's collection of garbage comes late, and it knows nothing of the memory of a GPU."""
    for module in (captured, scoring):
        monkeypatch.setattr(module, "records", lambda device: True)
    ensemble = attach_apart(build(), num_particles=2, r=2)
    examples = [Example(row, list(range(3, 9 + row)), list(range(3, 9 + row))) for row in range(4)]
    scorer = Scorer(ensemble, Task(), examples, 2)
    plain = Scorer(ensemble, Task(), examples, 2, cuda_graphs=False)
    torch.testing.assert_close(scorer().logp, plain().logp, rtol=1e-5, atol=1e-5)
    (recordings,) = [cell.cell_contents for cell in scorer._run.__closure__ if hasattr(cell.cell_contents, "num_made")]
    assert recordings.num_made
    gone = weakref.ref(recordings)
    gc.disable()
    try:
        del recordings, scorer
        assert gone() is None
    finally:
        gc.enable()
