"""What lora_linears refuses, and what becomes of its outputs and of tensors without memory.

Layout: K particles, M rows, I/O in/out features, R rank, j a map.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor, FakeTensorMode

from renyi_kernels import lora_linears, use_backend

from ..marks import every_backend, fast_paths

# what the derivative refuses


@fast_paths
@pytest.mark.parametrize("name", ["weights", "biases"])
@pytest.mark.parametrize("trains", [True, False], ids=["beside_adapters", "alone"])
def test_a_trainable_weight_or_bias_is_refused_in_the_backward_by_name(problem, place, backend, name, trains):
    given_ = place(problem(), backend, torch.float32)
    expected = given_.maps(backend)
    for x in given_.trained:
        x.requires_grad_(trains)
    getattr(given_, name)[2].requires_grad_()
    outs = given_.maps(backend)
    assert all(torch.equal(x, y) for x, y in zip(outs, expected, strict=True))
    with pytest.raises(RuntimeError, match=f"lora_linears: the {name}.*frozen"):
        sum(out.sum() for out in outs).backward()


def test_the_reference_differentiates_weights_and_biases_too(problem):
    given_ = problem()
    wanted = [x.requires_grad_() for x in [*given_.weights, given_.biases[0], given_.biases[2]]]
    grads = torch.autograd.grad(sum(out.sum() for out in given_.maps("reference")), wanted)
    assert all(grad.any() for grad in grads)


@fast_paths
@pytest.mark.parametrize("second", [0, 1, 4], ids=["x", "A", "B"])
def test_a_second_derivative_raises(problem, place, backend, second):
    given_ = place(problem(), backend, torch.float32)
    trained = [x.requires_grad_() for x in given_.trained]
    value = given_.all_maps(backend)(*trained).square().sum()
    (grad,) = torch.autograd.grad(value, trained[second], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lora_linears.*second derivative.*backend='reference'"):
        grad.square().sum().backward()


# what becomes of the outputs, and of inputs without memory


@fast_paths
def test_outputs_may_be_changed_in_place(problem, place, backend):
    """As some attention layers clamp their projections."""
    given_ = place(problem(), backend, torch.float32)
    trained = [x.requires_grad_() for x in given_.trained]

    def gradients(path):
        outs = given_.maps(path)
        for out in outs:
            out.clamp_(-0.5, 0.5)
        return torch.autograd.grad(sum(out.square().sum() for out in outs), trained)

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("without_memory", [lambda t: t.to("meta"), FakeTensorMode().from_tensor], ids=["meta", "fake"])
def test_tensors_without_memory_get_their_shapes(problem, without_memory):
    outs = problem().map(without_memory).maps("torch")
    assert [out.shape for out in outs] == [out.shape for out in problem().maps("torch")]
    assert all(isinstance(out, FakeTensor) or out.is_meta for out in outs)


# errors


def fitting():
    return {
        "x": torch.zeros(2, 3, 4),
        "weights": [torch.zeros(6, 4), torch.zeros(5, 4)],
        "biases": [torch.zeros(6), None],
        "A": [torch.zeros(2, 1, 4), torch.zeros(2, 3, 4)],
        "B": [torch.zeros(2, 6, 1), torch.zeros(2, 5, 3)],
        "scaling": 1.0,
    }


@every_backend
@pytest.mark.parametrize(
    ("name", "error", "argument", "index", "value"),
    [
        ("x", ValueError, "x", None, torch.zeros(4)),
        ("x", ValueError, "x", None, torch.zeros(1, 2, 3, 4)),
        ("weights[0]", ValueError, "x", None, torch.zeros(2, 3, 5)),
        ("A[0]", ValueError, "x", None, torch.zeros(3, 3, 4)),
        ("A[0]", ValueError, "x", None, torch.zeros(1, 3, 4)),
        ("weights, biases, A, B", ValueError, "weights", None, [torch.zeros(6, 4)]),
        ("weights, biases, A, B", ValueError, "biases", None, [None] * 3),
        ("weights, biases, A, B", ValueError, "A", None, []),
        ("weights[1]", ValueError, "weights", 1, torch.zeros(4)),
        ("weights[1]", ValueError, "weights", 1, torch.zeros(4, 5)),
        ("biases[0]", ValueError, "biases", 0, torch.zeros(5)),
        ("biases[1]", ValueError, "biases", 1, torch.zeros(1)),
        ("A[1]", ValueError, "A", 1, torch.zeros(3, 4)),
        ("A[1]", ValueError, "A", 1, torch.zeros(1, 3, 4)),
        ("A[1]", ValueError, "A", 1, torch.zeros(2, 3, 5)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 5, 4)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 4, 3)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 3, 5)),
        ("x", TypeError, "x", None, torch.zeros(2, 3, 4).long()),
        ("x", ValueError, "x", None, torch.zeros(2, 3, 0)),
        ("weights[1]", ValueError, "weights", 1, torch.zeros(0, 4)),
        ("A[1]", ValueError, "A", 1, torch.zeros(2, 0, 4)),
        ("B[1]", ValueError, "B", 1, torch.zeros(2, 5, 0)),
        ("weights[1]", TypeError, "weights", 1, torch.zeros(5, 4).double()),
        ("biases[0]", TypeError, "biases", 0, torch.zeros(6).half()),
        ("A[1]", TypeError, "A", 1, torch.zeros(2, 3, 4).long()),
        ("B[0]", TypeError, "B", 0, torch.zeros(2, 6, 1).bool()),
    ],
)
def test_what_does_not_fit_is_named(monkeypatch, backend, name, error, argument, index, value):
    arguments = fitting()
    if index is None:
        arguments[argument] = value
    else:
        arguments[argument][index] = value
    worked = []
    for module, name_ in ((F, "linear"), (torch, "mm"), (torch, "addmm")):
        monkeypatch.setattr(module, name_, lambda *a, **k: worked.append(a))
    with use_backend(backend), pytest.raises(error) as raised:
        lora_linears(**arguments)
    assert str(raised.value).startswith(f"{name}:")
    assert worked == []


@every_backend
def test_no_map_at_all_is_a_value_error(backend):
    with pytest.raises(ValueError, match="at least one map"):
        lora_linears(torch.zeros(2, 3, 4), [], [], [], [], 1.0, backend=backend)
