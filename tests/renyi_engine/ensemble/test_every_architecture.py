"""On every causal LM class an ensemble is right, or attach refuses in one sentence: see `every_architecture`."""

from __future__ import annotations

import pytest
import torch
import transformers

from renyi_engine.data import Example, collate, pack

from .. import every_architecture, tiny_models
from ..every_architecture import LIST, Subject


@pytest.fixture(scope="module", params=tiny_models.names())
def subject(request):
    return Subject(request.param)


@pytest.fixture
def attached(subject):
    if subject.ensemble is None:
        pytest.skip(subject.refusal)
    return subject


def test_attach_succeeds_or_refuses_in_one_sentence(subject):
    if subject.refusal is not None:
        assert subject.refusal.startswith(("model: ", "target_modules: "))
        assert "\n" not in subject.refusal


BATCHES = [(1, "none"), (2, "right"), (2, "left"), (4, "right"), (4, "left")]
"""B sequences and the side of their padding; four are as many as there are attention heads."""


def test_every_particle_is_the_model_alone_with_its_adapter_merged(attached):
    ensemble, truth = attached.ensemble, attached.truth
    assert (truth.logp[0] - truth.logp[1]).abs().max() > 0.05, "the particles are too alike to test anything"
    for num_sequences, padding in BATCHES:
        batch = attached.batch(num_sequences, padding)
        if padding == "left" and not ensemble.pads_left:
            with pytest.raises(ValueError, match="pad on the right"):
                ensemble.sequence_logprob(batch)
            continue
        with torch.no_grad():
            hidden = ensemble(batch["input_ids"], batch["attention_mask"])
            logp = ensemble.sequence_logprob(batch)
        torch.testing.assert_close(logp, truth.logp[:, :num_sequences], rtol=1e-4, atol=1e-3)
        for row, keep in enumerate(batch["attention_mask"].bool()):
            torch.testing.assert_close(hidden[:, row, keep], truth.hidden[row], rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_model_alone(attached):
    ensemble, truth = attached.ensemble, attached.truth
    for padding in ("right", "left") if ensemble.pads_left else ("right",):
        ensemble.zero_grad()
        ensemble.sequence_logprob(attached.batch(4, padding)).sum().backward()
        for path, stack in ensemble.stacked().items():
            for ours, theirs in zip(stack, truth.gradients[path], strict=True):
                found = torch.zeros_like(theirs) if ours.grad is None else ours.grad
                assert (found - theirs).norm() <= 1e-3 * theirs.norm() + 1e-4, path


@pytest.mark.filterwarnings("ignore:.* cannot read packed rows")
def test_a_packed_row_equals_its_sequences_one_by_one(attached):
    """Four sequences, and two that begin alike; the log-likelihoods of all and their gradients."""
    ensemble, tokens = attached.ensemble, [sequence.tolist() for sequence in attached.sequences]
    if not ensemble.packs:
        pytest.skip("its batches are padded")
    families = [[Example(0, ids, ids)] for ids in tokens]
    beginning, unlearnt = tokens[0], [-100] * len(tokens[0])
    families.append([Example(0, beginning + ids, unlearnt + ids) for ids in tokens[1:3]])
    examples = [example for family in families for example in family]
    packed, of_packed = _run(ensemble, [pack(families)])
    alone, of_alone = _run(ensemble, [collate([example], 0) for example in examples])
    _, of_padded = _run(ensemble, [collate(examples, 0)])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    # in some models rounding alone moves the gradient by more: as a padded batch shows, which is tested above
    rounding = (of_padded - of_alone).norm() / of_alone.norm()
    assert (of_packed - of_alone).norm() / of_alone.norm() <= max(1e-5, 2 * rounding)


def _run(ensemble, batches):
    """(logp of all sequences, their gradient) in these batches."""
    ensemble.zero_grad()
    logp = torch.cat([ensemble.sequence_logprob(batch) for batch in batches], dim=1)
    logp.sum().backward()
    return logp.detach(), torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.grad is not None])


def test_the_list_in_the_docs_says_what_is_found(subject):
    text = LIST.read_text()
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip("the list is of another version of transformers")
    assert every_architecture.row(subject) in text.splitlines()


def test_the_list_in_the_docs_has_no_other_rows():
    lines = [line for line in LIST.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 4 + len(tiny_models.names()) + len(tiny_models.NOT_TINY)
