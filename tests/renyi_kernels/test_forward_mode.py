"""Forward-mode derivatives: right, or refused by name. PyTorch's own operators drop them without a word.

K particles, M rows, I/O in/out features, R rank, B sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from renyi_kernels import grouped_lora, linear_logprob, lora_linears, renyi_loss, renyi_reduce

from .marks import every_backend

SHAPES = {
    "grouped_lora": [(2, 3, 5), (2, 2, 5), (2, 4, 2), (2, 3, 4)],
    "lora_linears": [(2, 3, 5), (4, 5), (4,), (2, 2, 5), (2, 4, 2)],
    "linear_logprob": [(6, 5), (7, 5), (7,)],
    "renyi_reduce": [(3, 4)],
    "renyi_loss": [(2, 3, 2, 5), (7, 5)],
}
OPS = {
    "grouped_lora": lambda x, A, B, base, **k: grouped_lora(x, A, B, 1.75, base, **k),
    "lora_linears": lambda x, w, b, A, B, **k: lora_linears(x, [w], [b], [A], [B], 1.75, **k)[0],
    "linear_logprob": lambda hidden, weight, bias, **k: linear_logprob(
        hidden, weight, torch.arange(6, device=hidden.device), bias=bias, **k
    ),
    "renyi_reduce": lambda logp, **k: renyi_reduce(logp, 0.8, **k).loss,
    "renyi_loss": lambda hidden, weight, **k: (
        renyi_loss(hidden, weight, torch.arange(6, device=hidden.device).view(3, 2), 0.8, **k).loss
    ),
}
every_input = pytest.mark.parametrize(
    ("op", "index"), [(op, index) for op, shapes in SHAPES.items() for index in range(len(shapes))]
)


@pytest.fixture
def inputs(normals, device_of):
    def build(op, backend):
        draw = normals(0)
        return [draw(*shape).to(device_of(backend), torch.float32) for shape in SHAPES[op]]

    return build


def assert_right_or_refused(run, expected):
    try:
        ours = run()
    except RuntimeError as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(ours.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)
        return
    # ours; or PyTorch's own, of a function that is not written for torch.func
    assert "no forward-mode derivative" in refusal or "autograd.Function with functorch transforms" in refusal


def by_func(f, x, tangent):
    return torch.func.jvp(f, (x,), (tangent,))[1]


def by_dual_tensors(f, x, tangent):
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(x, tangent))
        found = forward_ad.unpack_dual(value).tangent
        return torch.zeros_like(value) if found is None else found


@pytest.mark.parametrize("way", [by_func, by_dual_tensors])
@every_backend
@every_input
def test_the_derivative_of_every_input(inputs, op, index, backend, way):
    given_ = inputs(op, backend)
    tangent = torch.linspace(-1, 2, given_[index].numel()).view_as(given_[index]).to(given_[index])

    def along(backend):
        call = lambda x: OPS[op](*given_[:index], x, *given_[index + 1 :], backend=backend)
        return lambda: way(call, given_[index], tangent)

    expected = along("reference")()
    assert expected.any()
    assert_right_or_refused(along(backend), expected)


@every_backend
@pytest.mark.parametrize("op", SHAPES)
def test_the_derivative_of_what_comes_from_above(inputs, op, backend):
    """A gradient is linear in it, so its derivative is the gradient of its tangent."""
    given_ = inputs(op, backend)

    def gradient_at(upstream, backend):
        leaf = given_[0].clone().requires_grad_()
        return torch.autograd.grad(OPS[op](leaf, *given_[1:], backend=backend), leaf, upstream)[0]

    value = OPS[op](*given_, backend="reference").detach()
    upstream, tangent = torch.ones_like(value), torch.linspace(-1, 2, value.numel()).view_as(value).to(value)
    run = lambda: by_dual_tensors(lambda u: gradient_at(u, backend), upstream, tangent)
    assert_right_or_refused(run, gradient_at(tangent, "reference"))


def test_a_compiled_op_refuses_it_too(inputs):
    given_ = inputs("linear_logprob", "torch")
    call = lambda hidden: OPS["linear_logprob"](hidden, *given_[1:], backend="torch")
    torch._dynamo.reset()
    compiled = torch.compile(lambda h: by_func(call, h, torch.ones_like(h)), backend="aot_eager")
    with pytest.raises(RuntimeError, match="forward-mode"):
        compiled(given_[0])
    torch._dynamo.reset()
