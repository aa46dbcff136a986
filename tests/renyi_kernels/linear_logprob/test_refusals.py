"""What linear_logprob refuses, in its derivatives and among its arguments.

Layout: B sequences, N or T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from renyi_kernels import linear_logprob

from ..marks import every_backend, fast_paths
from .heads import HEADS, IGNORE, every_head

# what the derivative refuses


@pytest.mark.parametrize(
    "loss_of", [lambda logprob: -logprob.sum(), lambda logprob: logprob.square().sum()], ids=["linear", "nonlinear"]
)
@pytest.mark.parametrize("through", ["backward", "grad"])
@pytest.mark.parametrize("alone", [True, False], ids=["penalty", "loss_and_penalty"])
@fast_paths
def test_second_derivative_raises(case, score, loss_of, through, alone, backend):
    hidden, weight, labels, _ = case((6,), 5, 7)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    loss = loss_of(score(hidden, weight, labels, backend=backend))
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    penalised = grad.square().sum() if alone else loss + grad.square().sum()
    with pytest.raises(RuntimeError):
        penalised.backward() if through == "backward" else torch.autograd.grad(penalised, hidden)


@every_head
def test_second_derivative_of_the_reference_path_agrees_with_finite_differences(case, head):
    hidden, weight, labels, head = case((3,), 4, 5, head)
    f = lambda hidden: linear_logprob(hidden, weight, labels, backend="reference", **head)
    assert gradcheck(f, hidden.requires_grad_())
    assert gradgradcheck(f, hidden)


@pytest.mark.parametrize("hidden_requires_grad", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
@fast_paths
def test_a_trainable_head_is_refused_in_the_backward_by_name(case, score, hidden_requires_grad, name, backend):
    hidden, weight, labels, head = case((6,), 5, 7, HEADS["bias"])
    hidden, weight, bias = hidden.float(), weight.float(), head["bias"].float()
    expected = score(hidden, weight, labels, bias=bias, backend=backend)
    hidden.requires_grad_(hidden_requires_grad)
    {"weight": weight, "bias": bias}[name].requires_grad_()
    logprob = score(hidden, weight, labels, bias=bias, backend=backend)
    assert torch.equal(logprob, expected)
    with pytest.raises(RuntimeError, match=f"linear_logprob: the head's {name}"):
        logprob.sum().backward()


@fast_paths
def test_backward_can_run_twice_with_other_upstreams(case, score, backend):
    hidden, weight, labels, _ = case((6,), 5, 7)
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    logprob = score(hidden, weight, labels, backend=backend)
    once = torch.autograd.grad(logprob.sum(), hidden, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * logprob.sum(), hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)


# errors

FITTING = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2, 3, dtype=torch.int64)}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("stray", [5, -1, -101, 2**40])
def test_a_label_outside_the_vocabulary_is_a_value_error_that_shows_it(backend, stray):
    labels = torch.tensor([[0, 4, IGNORE], [1, 2, stray]])
    with pytest.raises(ValueError, match=f"labels.*got {stray}"):
        linear_logprob(**FITTING | {"labels": labels}, backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("weight", ValueError, {"weight": torch.zeros(5, 3)}),
        ("weight", ValueError, {"weight": torch.zeros(4)}),
        ("weight", TypeError, {"weight": torch.zeros(5, 4).double()}),
        ("weight", TypeError, {"hidden": torch.zeros(2, 3, 4).bfloat16()}),
        ("labels", ValueError, {"labels": torch.zeros(3).long()}),
        ("labels", ValueError, {"labels": torch.zeros(6).long()}),
        ("labels", TypeError, {"labels": torch.zeros(2, 3).int()}),
        ("labels", TypeError, {"labels": torch.zeros(2, 3)}),
        ("bias", ValueError, {"bias": torch.zeros(4)}),
        ("bias", ValueError, {"bias": torch.zeros(5, 1)}),
        ("logit_softcap", ValueError, {"logit_softcap": 0.0}),
        ("logit_softcap", ValueError, {"logit_softcap": -3.0}),
        ("logit_softcap", ValueError, {"logit_softcap": math.nan}),
        ("logit_softcap", ValueError, {"logit_softcap": 1e31}),
        ("logit_softcap", ValueError, {"logit_softcap": 1e-31}),
        ("logit_scale", ValueError, {"logit_scale": math.nan}),
        ("logit_scale", ValueError, {"logit_scale": -math.inf}),
        ("logit_scale", ValueError, {"logit_scale": 1e39}),
        ("hidden", TypeError, {"hidden": torch.zeros(2, 3, 4).long()}),
        ("weight", ValueError, {"weight": torch.zeros(0, 4)}),
        ("weight", ValueError, {"hidden": torch.zeros(2, 3, 0), "weight": torch.zeros(5, 0)}),
        ("bias", TypeError, {"bias": torch.zeros(5).long()}),
        ("chunk_mib", ValueError, {"chunk_mib": 0.0}),
        ("chunk_mib", ValueError, {"chunk_mib": math.nan}),
    ],
)
def test_what_does_not_fit_is_named(backend, name, error, change):
    with pytest.raises(error, match=f"^{name}:"):
        linear_logprob(**FITTING | change, backend=backend)
