"""The head's product that writes the exponentials instead of logits, called as its launcher is.

Gold is the reference in fp64. Layout: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch

import renyi_kernels.triton_ops.linear_logprob_gemm as ops
from renyi_kernels import head_chunks, reference
from renyi_kernels.triton_ops import tuning

from ..closeness import largest
from .heads import HEADS, IGNORE, cast, every_head, mib_of_rows

SMALL = {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 16}, {"num_warps": 4, "num_stages": 1}
ODD = (19, 17, 37)
ALIGNED = (20, 32, 40)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(ops, "head_blocks", lambda *_: SMALL)


@pytest.fixture
def with_tma(monkeypatch):
    """Off a GPU the interpreter has tensor descriptors too; a GPU without them is left as it is."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(ops, "architecture", lambda device: "sm_90")


@pytest.fixture
def product(device):
    """product(hidden, weight, labels, head) of the launcher, on the CPU: (logprob, d logprob / d hidden, E)."""

    def run(hidden, weight, labels, head, *, need_grad=True):
        N, V = len(hidden), len(weight)
        E = torch.full((N, -(-V // 8) * 8), torch.nan, dtype=hidden.dtype, device=device)[:, :V] if need_grad else None
        head = (head.get("bias"), head.get("logit_softcap"), head.get("logit_scale", 1.0))
        given = [x.to(device) if isinstance(x, torch.Tensor) else x for x in (hidden, weight, labels, *head)]
        logprob, a, b = ops.logprob_product(*given, E)
        if E is None:
            assert a is None
            assert b is None
            return logprob.cpu(), None, None
        w_y = weight[labels.clamp(0, V - 1)].double()
        gradient = a.cpu()[:, None] * w_y - b.cpu()[:, None] * (E.cpu().double() @ weight.double())
        return logprob.cpu(), gradient, E.cpu()

    return run


def gold(hidden, weight, labels, head):
    hidden, head = hidden.double().requires_grad_(), cast(head, torch.float64)
    options = (head.get("bias"), head.get("logit_softcap"), head.get("logit_scale", 1.0))
    logprob = reference.linear_logprob(hidden, weight.double(), labels, *options)
    return logprob.detach(), torch.autograd.grad(logprob.sum(), hidden)[0]


def assert_right(ours, truth, dtype):
    """Log-probabilities to 1e-5 nats. Gradients in fp32 to 1e-5 of the largest; E in fp16 has 11 bits."""
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=1e-5)
    relative = 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(ours[1], truth[1], rtol=0, atol=relative * max(1.0, largest(truth[1])))


def drawn(case, dtype, sizes, head=(), **options):
    N, D, V = sizes
    hidden, weight, labels, head = case((N,), D, V, head, labelled=1.0, **options)
    return hidden.to(dtype), weight.to(dtype), labels, cast(head, dtype)


@every_head
@pytest.mark.usefixtures("small_tiles")
def test_log_probabilities_and_gradients_are_those_of_the_reference(case, product, head):
    inputs = drawn(case, torch.float32, ODD, head)
    assert_right(product(*inputs), gold(*inputs), torch.float32)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (1, 1, 1), (16, 16, 32), ALIGNED], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_so_they_are_for_sizes_of_none_and_one_and_for_whole_tiles(case, product, sizes):
    inputs = drawn(case, torch.float32, sizes, HEADS["all"])
    assert_right(product(*inputs), gold(*inputs), torch.float32)


@pytest.mark.usefixtures("with_tma")
def test_so_they_are_with_the_largest_tile_and_tensor_descriptors(case, product):
    inputs = drawn(case, torch.float16, (20, 72, 301), HEADS["bias"])
    assert_right(product(*inputs), gold(*inputs), torch.float16)


@pytest.mark.usefixtures("small_tiles", "with_tma")
def test_so_they_are_with_tensor_descriptors_in_fp32(case, product):
    inputs = drawn(case, torch.float32, ALIGNED, HEADS["all"])
    assert_right(product(*inputs), gold(*inputs), torch.float32)


@pytest.mark.parametrize(("head", "labelled"), [(HEADS["plain"], 1.0), (HEADS["all"], 0.7)], ids=["plain", "all"])
@pytest.mark.usefixtures("small_tiles")
def test_the_op_takes_it_chunk_by_chunk_if_it_is_switched_on(
    case, score, value_and_grads, uneven, monkeypatch, head, labelled
):
    hidden, weight, labels, head = case((2, 6), 16, 40, head, labelled=labelled)
    hidden, weight, head = hidden.float(), weight.float(), cast(head, torch.float32)
    launcher, calls = ops.logprob_product, []
    monkeypatch.setattr(ops, "logprob_product", lambda *given: calls.append(len(given[0])) or launcher(*given))
    head["chunk_mib"] = mib_of_rows(5, 40, 4)
    run = lambda backend: value_and_grads(
        lambda hidden: score(hidden, weight, labels, backend=backend, **head), [hidden], uneven((2, 6))
    )
    run("triton")
    assert calls == []
    monkeypatch.setattr(head_chunks, "PRODUCT_WITH_EPILOGUE", True)
    (value, (gradient,)), (expected, (expected_gradient,)) = run("triton"), run("torch")
    count = int((labels != IGNORE).sum())
    assert calls == [5] * (count // 5) + [count % 5]
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)
    # the same chunks: off a GPU, the bits of NumPy's product can depend on the place of a row in its tile
    assert torch.equal(score(hidden, weight, labels, backend="triton", **head), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_a_row_beyond_the_range_is_done_again_with_its_block_and_with_no_other(case, product, dtype):
    hidden, weight, labels, head = drawn(case, dtype, ODD, size=0.3)
    before = product(hidden, weight, labels, head)
    hidden[17] *= 400.0
    labels[17] = (hidden[17].float() @ weight.float().T).argmin()
    logprob, gradient, E = product(hidden, weight, labels, head)
    truth = gold(hidden, weight, labels, head)
    assert truth[0][17] < -150
    assert E.isfinite().all()
    assert E[17].max() <= 64.0
    torch.testing.assert_close(logprob.double(), truth[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, truth[1], rtol=0, atol=1e-3 if dtype == torch.float16 else 1e-5)
    others = [n for n in range(19) if n != 17]
    assert all(torch.equal(x[others], y[others]) for x, y in zip((logprob, gradient, E), before, strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_done_again_if_all_rows_are_within_the_range(case, product, monkeypatch):
    """The second launch finds no block: E keeps what was put there in between."""
    inputs = drawn(case, torch.float32, ODD)
    kernel, written = ops.linear_logprob_gemm_kernel, []

    class Spoiling:
        def __getitem__(self, grid):
            def launch(*args, AGAIN, **kwargs):
                kernel[grid](*args, AGAIN=AGAIN, **kwargs)
                written.append(args[2].clone())
                args[2].fill_(7.0)

            return launch

    monkeypatch.setattr(ops, "linear_logprob_gemm_kernel", Spoiling())
    product(*inputs)
    assert len(written) == 2
    assert (written[1] == 7.0).all()
    assert not (written[0] == 7.0).any()


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_and_a_run_without_gradient_give_the_same_bits(case, product):
    inputs = drawn(case, torch.float32, ODD, HEADS["all"])
    first, second = product(*inputs), product(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(product(*inputs, need_grad=False)[0], first[0])


@pytest.mark.usefixtures("small_tiles")
def test_a_target_that_is_no_token_is_nan_and_has_no_gradient(case, product):
    hidden, weight, labels, head = drawn(case, torch.float32, ODD)
    before = product(hidden, weight, labels, head)
    labels[5:8] = torch.tensor([-100, 37, 2**40])
    logprob, gradient, _ = product(hidden, weight, labels, head)
    assert logprob.isnan().tolist() == [5 <= n < 8 for n in range(19)]
    assert (gradient[5:8] == 0).all()
    others = [n for n in range(19) if not 5 <= n < 8]
    assert torch.equal(logprob[others], before[0][others])
    assert torch.equal(gradient[others], before[1][others])


@pytest.mark.usefixtures("small_tiles")
def test_a_probability_next_to_one_keeps_its_digits(case, product):
    hidden, weight, labels, head = drawn(case, torch.float32, ALIGNED, size=1.0)
    weight[labels[0]] = 25.0 * hidden[0] / hidden[0].square().sum()
    truth = gold(hidden, weight, labels, head)
    assert -1e-7 < truth[0][0] < -1e-14
    ours = product(hidden, weight, labels, head)
    torch.testing.assert_close(ours[0][0].double(), truth[0][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours[1][0], truth[1][0], rtol=0, atol=1e-3 * truth[1][0].abs().max().item())


def test_no_row_of_the_table_needs_more_shared_memory_than_its_device_has():
    """The tiles of all steps, and beside them the tile of E."""
    limits = {"any": 64, "gfx942": 64, "sm_80": 163, "sm_90": 227, "sm_100": 227}
    for (itemsize, arch, _), (sizes, _, num_stages) in tuning._HEAD_ROWS.items():
        n, v, d = sizes["BLOCK_N"], sizes["BLOCK_V"], sizes["BLOCK_D"]
        assert itemsize * (num_stages * (n + v) * d + n * v) <= limits[arch] * 1024, arch
