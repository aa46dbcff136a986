"""lora_linears with the values of A and B held by the caller, all of them views of one matrix per precision.

Layout: K particles, M rows, I/O in/out features, R rank, P parameters of a particle, j a map.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from renyi_kernels import lora_linears
from renyi_kernels.lora_linears import _gradients, _outputs

from ..closeness import assert_close, assert_errs_at_most_half_again_as_much
from ..marks import every_backend, every_x, fast_paths, no_bf16_in_the_interpreter
from .problems import SCALING

precisions = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("torch", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        ("triton", torch.float32),
        ("triton", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=no_bf16_in_the_interpreter),
    ],
    ids=str,
)
every_size = pytest.mark.parametrize(
    "size",
    [
        {},  # three maps of ranks 2, 5 and 1
        {"K": 1},
        {"K": 2, "O": (9, 4), "R": (3, 3), "biased": (False, True)},
        {"O": (7,), "R": (1,), "biased": (True,)},
        {"K": 4, "M": 1, "I": 1, "O": (1,), "R": (1,), "biased": (False,)},
        {"K": 2, "M": 33, "I": 65, "O": (97, 33), "R": (8, 8), "biased": (False, False)},
    ],
    ids=str,
)


BEYOND = 8
"""Values in a row that belong to no map: 64 bytes in fp64. So in the largest problem every view begins at a multiple of
64 bytes, as a copy does. At other addresses MKL gives a large product in fp64 other bits, on some CPUs."""


class Matrix:
    """[K, P] in one dtype: the A of all maps as one block, then the B of each, then values that are not theirs."""

    def __init__(self, A, B, dtype):
        K, I = A[0].shape[0], A[0].shape[2]
        self.ranks = [a.shape[1] for a in A]
        parts = [torch.cat(A, dim=1), *B]
        beyond = torch.full((K, BEYOND), float("nan"), dtype=A[0].dtype, device=A[0].device)
        self.whole = torch.cat([*(part.reshape(K, -1) for part in parts), beyond], dim=1).to(dtype)
        *pieces, _ = self.whole.split([*(part[0].numel() for part in parts), BEYOND], dim=1)
        self.A_block, *self.B = (piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
        self.A = list(self.A_block.split(self.ranks, dim=1))
        assert K == 1 or I == 1 or not any(t.is_contiguous() for t in (*self.A, *self.B))

    @property
    def copies(self):
        return self.A_block, self.B


@pytest.fixture
def given_(problem, device_of):
    """given_(backend, dtype, **size): x, weights, biases, masters in fp32 (fp64 beside fp64), and copies in dtype."""

    def build(backend, dtype, **size):
        p = problem(**size).map(lambda t: t.to(device_of(backend), dtype))
        wide = torch.promote_types(dtype, torch.float32)
        # not representable in low precision, so that a value taken of the wrong ones shows
        masters = Matrix([1.001 * a.to(wide) for a in p.A], [1.001 * b.to(wide) for b in p.B], wide)
        return p.x, p.weights, p.biases, masters, Matrix(masters.A, masters.B, dtype)

    return build


def run(x, weights, biases, masters, copies, backend, strided=True):
    """The outputs and the gradients of x, each A and each B, for an uneven upstream gradient."""
    layout = (lambda t: t.detach()) if strided else (lambda t: t.detach().clone(memory_format=torch.contiguous_format))
    leaves = [layout(t).requires_grad_() for t in (x, *masters.A, *masters.B)]
    n = len(weights)
    A, B = leaves[1 : 1 + n], leaves[1 + n :]
    outs = lora_linears(
        x=leaves[0], weights=weights, biases=biases, A=A, B=B, scaling=SCALING, copies=copies, backend=backend
    )
    upstream = [torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


def pairs(ours, theirs):
    return zip(ours, theirs, strict=True)


@precisions
@every_size
@every_x
def test_copies_and_strides_change_no_bit(given_, backend, dtype, size, shared_x):
    x, weights, biases, masters, copies = given_(backend, dtype, shared_x=shared_x, **size)
    ours = run(x, weights, biases, masters, copies.copies, backend)
    expected = run(x, weights, biases, masters, None, backend, strided=False)
    assert all(torch.equal(a, b) for a, b in pairs(ours, expected))
    assert all(torch.equal(a, b) for a, b in pairs(run(x, weights, biases, masters, None, backend), expected))
    assert [grad.dtype for grad in ours[-2 * len(weights) :]] == [masters.whole.dtype] * 2 * len(weights)


@precisions
@every_x
def test_copies_err_at_most_half_again_as_much_as_naive(given_, backend, dtype, shared_x):
    size = {"K": 3, "M": 40, "I": 65, "O": (97, 33), "R": (7, 2), "biased": (True, False)}
    x, weights, biases, masters, copies = given_(backend, dtype, shared_x=shared_x, **size)
    ours = run(x, weights, biases, masters, copies.copies, backend)
    naive = run(x, weights, biases, masters, None, "reference")
    in_fp64 = Matrix([a.double() for a in masters.A], [b.double() for b in masters.B], torch.float64)
    wide = lambda tensors: [None if t is None else t.double() for t in tensors]
    gold = run(x.double(), wide(weights), wide(biases), in_fp64, None, "reference")
    assert_errs_at_most_half_again_as_much(ours, naive, gold)


@fast_paths
@every_x
def test_the_products_read_the_copies_and_the_gradients_go_to_the_masters(given_, backend, shared_x):
    x, weights, biases, masters, _ = given_(backend, torch.float32, shared_x=shared_x)
    others = Matrix([2 * a for a in masters.A], [3 * b for b in masters.B], torch.float32)
    ours = run(x, weights, biases, masters, others.copies, backend)
    assert_close(ours, run(x, weights, biases, others, None, backend), 1e-6)
    reference = run(x, weights, biases, masters, others.copies, "reference")
    assert_close(reference, run(x, weights, biases, masters, None, "reference"), 1e-12)


@fast_paths
def test_the_copies_of_fp32_may_be_the_masters_themselves(given_, backend):
    x, weights, biases, masters, _ = given_(backend, torch.float32)
    ours = run(x, weights, biases, masters, masters.copies, backend)
    assert all(torch.equal(a, b) for a, b in pairs(ours, run(x, weights, biases, masters, None, backend)))


@fast_paths
@every_x
def test_gradients_of_views_of_one_matrix_add_up_in_views_of_another(given_, backend, shared_x):
    """As the engine holds them. Two backwards, so that the second adds."""
    x, weights, biases, masters, copies = given_(backend, torch.float32, shared_x=shared_x)
    gradients = Matrix(masters.A, masters.B, torch.float32)
    gradients.whole.zero_()
    A, B = ([torch.nn.Parameter(t) for t in tensors] for tensors in (masters.A, masters.B))
    for leaf, view in zip([*A, *B], [*gradients.A, *gradients.B], strict=True):
        leaf.grad = view
    for _ in range(2):
        outs = lora_linears(x, weights, biases, A, B, SCALING, copies=copies.copies, backend=backend)
        sum(out.sin().sum() for out in outs).backward()
    leaves = [t.detach().clone().requires_grad_() for t in (*masters.A, *masters.B)]
    n = len(A)
    outs = lora_linears(x, weights, biases, leaves[:n], leaves[n:], SCALING, backend=backend)
    expected = torch.autograd.grad(2 * sum(out.sin().sum() for out in outs), leaves)
    assert_close([*gradients.A, *gradients.B], expected, 1e-6)
    assert not gradients.whole[:, -BEYOND:].any()


def differentiated(x, weights, biases, masters, copies, backend, gradients, **options):
    """The gradients that autograd gets of x, each A and each B."""
    leaves = [t.detach().requires_grad_() for t in (x, *masters.A, *masters.B)]
    n = len(weights)
    outs = lora_linears(
        leaves[0],
        weights,
        biases,
        leaves[1 : 1 + n],
        leaves[1 + n :],
        SCALING,
        copies=copies.copies,
        gradients=gradients,
        backend=backend,
    )
    upstream = [torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out) for out in outs]
    return torch.autograd.grad(outs, leaves, upstream, allow_unused=True, **options)


@precisions
@every_x
def test_the_op_adds_gradients_to_those_that_it_is_given(given_, backend, dtype, shared_x):
    """To the last bit what autograd would get, where nothing stands yet. What stands there already stays."""
    size = {"K": 2, "M": 70, "I": 34, "O": (33, 3), "R": (5, 2), "biased": (False, True)}
    x, weights, biases, masters, copies = given_(backend, dtype, shared_x=shared_x, **size)
    held = Matrix(masters.A, masters.B, masters.whole.dtype)
    held.whole.zero_()
    dx, *expected = differentiated(x, weights, biases, masters, copies, backend, None)
    found = differentiated(x, weights, biases, masters, copies, backend, lambda: held.copies)
    assert found[1:] == (None,) * 4
    assert torch.equal(found[0], dx)
    assert all(torch.equal(a, b) for a, b in pairs([*held.A, *held.B], expected))
    differentiated(x, weights, biases, masters, copies, backend, lambda: held.copies)
    assert_close([*held.A, *held.B], [2 * e for e in expected], 1e-6)
    assert not held.whole[:, -BEYOND:].any()


@fast_paths
def test_autograd_gets_the_gradients_where_nobody_else_takes_them(given_, backend):
    given = given_(backend, torch.float32)
    expected = differentiated(*given, backend, None)
    asked = []
    refuses = lambda: asked.append(1)
    assert all(map(torch.equal, differentiated(*given, backend, refuses), expected))
    assert asked == [1]
    never = lambda: pytest.fail("asked")
    assert all(map(torch.equal, differentiated(*given, backend, never, create_graph=True), expected))
    assert all(map(torch.equal, differentiated(*given, "reference", never), differentiated(*given, "reference", None)))


@fast_paths
def test_a_frozen_adapter_keeps_the_gradients_with_autograd(given_, backend):
    x, weights, biases, masters, copies = given_(backend, torch.float32)
    A, B = [a.detach().requires_grad_() for a in masters.A], [b.detach() for b in masters.B]
    never = lambda: pytest.fail("asked")
    outs = lora_linears(x, weights, biases, A, B, SCALING, copies=copies.copies, gradients=never, backend=backend)
    assert all(g.any() for g in torch.autograd.grad(sum(out.sum() for out in outs), A))


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        (r"gradients:", ValueError, lambda A, B: (A, B[:1])),
        (r"gradients\[0\]:", ValueError, lambda A, B: (A[:, :3], B)),
        (r"gradients\[1\]\[1\]:", ValueError, lambda A, B: (A, [B[0], B[1].mT, B[2]])),
        (r"gradients\[1\]\[0\]:", TypeError, lambda A, B: (A, [B[0].long(), *B[1:]])),
    ],
)
@fast_paths
def test_gradients_that_do_not_fit_are_named(given_, backend, name, error, change):
    given = given_(backend, torch.float32)
    held = Matrix(given[3].A, given[3].B, torch.float32)
    with pytest.raises(error, match=f"^{name}"):
        differentiated(*given, backend, lambda: change(*held.copies))


@pytest.mark.parametrize("changed", ["A", "B", "copy of A", "copy of B"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "operator"])
@fast_paths
def test_a_change_before_the_backward_raises(given_, backend, changed, compiled):
    x, weights, biases, masters, copies = given_(backend, torch.float32)
    A, B = ([t.detach().requires_grad_() for t in tensors] for tensors in (masters.A, masters.B))
    if compiled:
        present = [weights[0].new_empty(0) if bias is None else bias for bias in biases]
        values = [copies.A_block, *copies.B]
        *outs, _, _ = torch.ops.renyi_kernels.lora_linears(x, weights, present, A, B, values, SCALING, backend)
    else:
        outs = lora_linears(x, weights, biases, A, B, SCALING, copies=copies.copies, backend=backend)
    tensor = {"A": A[1], "B": B[0], "copy of A": copies.A_block, "copy of B": copies.B[2]}[changed]
    with torch.no_grad():
        tensor.mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(out.sum() for out in outs).backward()


@fast_paths
def test_without_copies_a_change_of_a_view_raises_too(given_, backend):
    x, weights, biases, masters, _ = given_(backend, torch.float32)
    A, B = ([torch.nn.Parameter(t) for t in tensors] for tensors in (masters.A, masters.B))
    outs = lora_linears(x, weights, biases, A, B, SCALING, backend=backend)
    masters.whole.mul_(1.0)  # as an optimizer that steps the whole matrix
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(out.sum() for out in outs).backward()


@pytest.mark.parametrize("with_copies", [True, False])
@fast_paths
def test_nothing_is_saved_twice_and_no_adapter_is_copied_for_the_backward(given_, backend, with_copies):
    x, weights, biases, masters, copies = given_(backend, torch.float16, M=9)
    A, B = ([t.detach().requires_grad_() for t in tensors] for tensors in (masters.A, masters.B))
    saved = []
    keep = lambda t: saved.append(t) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lora_linears(x, weights, biases, A, B, SCALING, copies=copies.copies if with_copies else None, backend=backend)
    places = [(t.data_ptr(), tuple(t.shape), t.dtype) for t in saved]
    assert len(set(places)) == len(places)
    held = {t.untyped_storage().data_ptr() for t in (x, *weights, masters.whole, copies.whole)}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in held]
    # x A^T of all maps, and a few counters
    assert [tuple(t.shape) for t in new if t.is_floating_point()] == [(3, 9, 8)]
    assert sum(t.numel() for t in new if not t.is_floating_point()) < 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_copies", [True, False])
@pytest.mark.parametrize("need_dx", [True, False])
@every_x
def test_what_the_operators_do_asks_the_device_for_nothing(dtype, with_copies, need_dx, shared_x):
    """Fake tensors have no values: any question for one raises. They pass by what an operator does, so it is called."""
    K, M, I = 2, 9, 5
    with FakeTensorMode():
        x = torch.zeros(M, I, dtype=dtype) if shared_x else torch.zeros(K, M, I, dtype=dtype)
        weights, biases = (
            [torch.zeros(o, I, dtype=dtype) for o in (7, 3)],
            [torch.zeros(7, dtype=dtype), x.new_empty(0)],
        )
        masters = Matrix(
            [torch.zeros(K, r, I) for r in (2, 1)], [torch.zeros(K, 7, 2), torch.zeros(K, 3, 1)], torch.float32
        )
        copies = Matrix(masters.A, masters.B, dtype)
        values = [copies.A_block, *copies.B] if with_copies else []
        *outs, S, counters = _outputs(x, weights, biases, masters.A, masters.B, values, SCALING, "torch")
        assert [out.shape for out in outs] == [(K, M, 7), (K, M, 3)]
        grads = _gradients(outs, x, S, counters, weights, masters.A, masters.B, values, SCALING, need_dx, "torch")
        dx, dA, *dB = grads
        assert dx.shape == (x.shape if need_dx else (0,))
        assert dA.shape == (K, 3, I)
        assert dA.is_contiguous()
        assert [db.shape for db in dB] == [b.shape for b in masters.B]
        assert {g.dtype for g in (dA, *dB)} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("copies", ValueError, lambda A, B: (A,)),
        ("copies", ValueError, lambda A, B: (A, B[:1])),
        ("copies", ValueError, lambda A, B: (A, B, B)),
        ("copies[0]", ValueError, lambda A, B: (A[:, :3], B)),
        ("copies[0]", ValueError, lambda A, B: (A[:1], B)),
        ("copies[0]", ValueError, lambda A, B: (A[..., :3], B)),
        ("copies[1][1]", ValueError, lambda A, B: (A, [B[0], B[1].mT])),
        ("copies[1][0]", ValueError, lambda A, B: (A, [B[1], B[0]])),
        ("copies[0]", TypeError, lambda A, B: (A.float(), B)),
        ("copies[1][1]", TypeError, lambda A, B: (A, [B[0], B[1].half()])),
    ],
)
@every_backend
def test_copies_that_do_not_fit_are_named(backend, name, error, change):
    A, B = [torch.zeros(2, 1, 4), torch.zeros(2, 3, 4)], [torch.zeros(2, 6, 1), torch.zeros(2, 5, 3)]
    copies = change(torch.cat(A, dim=1).bfloat16(), [b.bfloat16() for b in B])
    weights = [torch.zeros(6, 4).bfloat16(), torch.zeros(5, 4).bfloat16()]
    with pytest.raises(error) as raised:
        lora_linears(torch.zeros(2, 3, 4).bfloat16(), weights, [None, None], A, B, 1.0, copies=copies, backend=backend)
    assert str(raised.value).startswith(f"{name}:")
