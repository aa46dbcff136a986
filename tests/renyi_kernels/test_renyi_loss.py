"""The fused loss, and the choice of a backend. K particles, B sequences, T tokens, D hidden size, V vocabulary."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import renyi_kernels
from renyi_kernels import BACKENDS, grouped_lora, linear_logprob, lora_linears, renyi_loss, renyi_reduce, use_backend

from .marks import every_alpha, fast_paths, fp64_paths

IGNORE = -100
HEADS = [{}, {"bias": True, "logit_softcap": 4.0, "logit_scale": 0.7, "chunk_mib": 0.001}]
K, B, T, D, V = 3, 4, 6, 5, 11

every_head = pytest.mark.parametrize("head", HEADS, ids=["plain", "full"])


@pytest.fixture
def problem(normals):
    """(hidden, weight, labels, head with its bias drawn), in fp64; the last sequence has no labels."""

    def build(head=(), lead=(K, B, T)):
        draw, head = normals(0), dict(head)
        hidden, weight = 2 * draw(*lead, D), draw(V, D)
        labels = torch.randint(0, V, lead[1:], generator=torch.Generator().manual_seed(0))
        labels[draw(*lead[1:]) < -0.5] = IGNORE
        labels[-1:] = IGNORE
        if head.get("bias"):
            head["bias"] = draw(V)
        return hidden, weight, labels, head

    return build


def by_hand(hidden, weight, labels, alpha, bias=None, logit_softcap=None, logit_scale=1.0, chunk_mib=None):
    """The loss from the full logits and the textbook formula, good at these sizes in fp64 unless alpha is tiny."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    counts = labels != IGNORE
    index = labels.clamp(min=0).expand(hidden.shape[:3])[..., None]
    token_logp = torch.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
    s = (token_logp * counts).sum(dim=-1)
    if alpha == 0.0:
        return -s.mean(dim=0), s
    return -(torch.logsumexp(alpha * s, dim=0) - math.log(s.shape[0])) / alpha, s


@fp64_paths
@every_head
@every_alpha
def test_loss_and_gradient_equal_the_plain_formula_on_full_logits(
    problem, value_and_grads, uneven, backend, head, alpha
):
    hidden, weight, labels, head = problem(head)
    ours = lambda hidden: renyi_loss(hidden, weight, labels, alpha, backend=backend, **head).loss
    plain = lambda hidden: by_hand(hidden, weight, labels, alpha, **head)[0]
    loss, (grad,) = value_and_grads(ours, [hidden], uneven((B,)))
    expected, (expected_grad,) = value_and_grads(plain, [hidden], uneven((B,)))
    # the textbook value loses 1/alpha times the rounding of a logarithm; its gradient does not
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10 if alpha != 1e-8 else 1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)

    out = renyi_loss(hidden, weight, labels, alpha, backend=backend, **head)
    s = by_hand(hidden, weight, labels, alpha, **head)[1]
    r = torch.softmax(alpha * s, dim=0)
    torch.testing.assert_close(out.logp, s, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.responsibilities, r, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out.ess, 1 / r.square().sum(dim=0), rtol=1e-10, atol=1e-10)


@every_alpha
@every_head
@fast_paths
def test_fp32_is_within_1e5_nats_a_token_and_gradients_within_5e4_of_the_largest(
    device_of, problem, value_and_grads, uneven, alpha, head, backend
):
    hidden, weight, labels, head = problem(head)
    labels[-1, 0] = 1  # a sequence without labels has a test of its own

    def run(on, dtype, backend):
        tensors = {name: x.float().to(on, dtype) if name == "bias" else x for name, x in head.items()}
        w, y = weight.float().to(on, dtype), labels.to(on)
        f = lambda hidden: renyi_loss(hidden, w, y, alpha, backend=backend, **tensors).loss
        value, (grad,) = value_and_grads(f, [hidden.float().to(on, dtype)], uneven((B,)).to(on))
        return value.cpu(), grad.cpu()

    on = device_of(backend)
    (loss, grad), (gold, gold_grad) = run(on, torch.float32, backend), run("cpu", torch.float64, "reference")
    assert loss.dtype == grad.dtype == torch.float32
    assert ((loss - gold).abs() <= 1e-5 * (labels != IGNORE).sum(dim=1)).all()
    assert (grad - gold_grad).abs().max() <= 5e-4 * gold_grad.abs().max()


@every_head
def test_it_is_the_reduction_of_the_token_log_probabilities(problem, head):
    hidden, weight, labels, head = problem(head)
    token_logp = linear_logprob(hidden, weight, labels.expand(K, B, T), **head)
    expected = renyi_reduce(token_logp, 0.8, mask=labels != IGNORE)
    for ours, theirs in zip(renyi_loss(hidden, weight, labels, 0.8, **head), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_particle_k_is_scored_on_the_same_labels_as_alone(problem):
    hidden, weight, labels, _ = problem()
    together = renyi_loss(hidden, weight, labels, 0.8)
    for k in range(K):
        alone = renyi_loss(hidden[k : k + 1], weight, labels, 0.8)
        torch.testing.assert_close(alone.logp[0], together.logp[k], rtol=1e-12, atol=1e-12)
        assert torch.equal(alone.loss, -alone.logp[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [3.0, math.nan])
def test_changing_one_particle_changes_no_bit_of_anothers_log_likelihood(problem, dtype, to):
    hidden, weight, labels, _ = problem()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    before = renyi_loss(hidden, weight, labels, 0.8).logp
    hidden[1] = to
    after = renyi_loss(hidden, weight, labels, 0.8).logp
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[[0, 2]], before[[0, 2]])


@fp64_paths
@every_alpha
def test_an_example_that_no_particle_can_explain_loses_inf_with_zero_gradient(
    problem, value_and_grads, uneven, backend, alpha
):
    hidden, weight, labels, _ = problem()
    banned = int(labels[1][labels[1] != IGNORE][0])
    labels = labels.where((labels != banned) | (torch.arange(B)[:, None] == 1), IGNORE)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[banned] = -math.inf
    f = lambda hidden: renyi_loss(hidden, weight, labels, alpha, bias=bias, backend=backend).loss
    loss, (grad,) = value_and_grads(f, [hidden], uneven((B,)))
    assert loss.isposinf().tolist() == [False, True, False, False]
    assert torch.equal(grad[:, 1], torch.zeros(K, T, D, dtype=torch.float64))
    assert grad.isfinite().all()
    assert (grad[:, [0, 2]].abs().amax(dim=(0, 2, 3)) > 0).all()


@every_alpha
def test_unlabelled_positions_take_no_part_whatever_their_hidden_state(problem, value_and_grads, uneven, alpha):
    hidden, weight, labels, _ = problem()
    off = labels == IGNORE
    f = lambda hidden: renyi_loss(hidden, weight, labels, alpha, backend="torch").loss
    clean, (clean_grad,) = value_and_grads(f, [hidden], uneven((B,)))
    hidden[:, off] = math.nan
    loss, (grad,) = value_and_grads(f, [hidden], uneven((B,)))
    assert torch.equal(loss, clean)
    assert torch.equal(grad, clean_grad)
    assert not grad[:, off].any()
    assert loss[-1] == 0  # a sequence without labels


@fp64_paths
@pytest.mark.parametrize("lead", [(1, 2, 3), (3, 0, 4), (3, 2, 1), (3, 2, 0)], ids=str)
def test_one_particle_no_sequences_one_token_and_no_tokens_work(problem, value_and_grads, uneven, backend, lead):
    hidden, weight, labels, _ = problem(lead=lead)
    ours = lambda hidden: renyi_loss(hidden, weight, labels, 0.8, backend=backend).loss
    plain = lambda hidden: by_hand(hidden, weight, labels, 0.8)[0]
    loss, (grad,) = value_and_grads(ours, [hidden], uneven(lead[1:2]))
    expected, (expected_grad,) = value_and_grads(plain, [hidden], uneven(lead[1:2]))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_only_the_loss_carries_a_gradient(problem):
    hidden, weight, labels, _ = problem()
    out = renyi_loss(hidden.requires_grad_(), weight, labels, 0.8)
    assert [field for field in out._fields if getattr(out, field).requires_grad] == ["loss"]


# backends


def ran_on_reference(call):
    """Whether a second derivative exists, which tells the reference path from the torch one."""
    hidden = torch.ones(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(call(hidden).square().sum(), hidden, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError:
        return False
    return True


def score(hidden, backend=None):
    weight = torch.arange(35.0, dtype=torch.float64).reshape(7, 5) / 35
    return linear_logprob(hidden, weight, torch.zeros(hidden.shape[:-1], dtype=torch.int64), backend=backend)


def loss(hidden, backend=None):
    weight = torch.arange(35.0, dtype=torch.float64).reshape(7, 5) / 35
    labels = torch.zeros(hidden.shape[1:3], dtype=torch.int64)
    return renyi_loss(hidden, weight, labels, 0.8, **({} if backend is None else {"backend": backend})).loss


@pytest.mark.parametrize("op", [score, loss])
def test_argument_block_and_default_choose_the_path(op):
    assert not ran_on_reference(op)
    assert not ran_on_reference(lambda hidden: op(hidden, "torch"))
    assert not ran_on_reference(lambda hidden: op(hidden, "auto"))
    assert ran_on_reference(lambda hidden: op(hidden, "reference"))
    with use_backend("reference"):
        assert ran_on_reference(op)
        assert not ran_on_reference(lambda hidden: op(hidden, "torch"))
        assert not ran_on_reference(lambda hidden: op(hidden, "auto"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the block may be obeyed without an error")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_the_argument_wins_over_the_block_in_both_ops_of_the_loss(backend):
    hidden = torch.ones(2, 3, 4, 5, dtype=torch.float64)
    with use_backend("triton"):
        assert loss(hidden, backend).isfinite().all()
        with pytest.raises(ValueError, match="triton"):
            loss(hidden)


def test_blocks_nest_and_restore_also_after_an_error():
    with use_backend("reference"):
        with use_backend("torch"):
            assert not ran_on_reference(score)
            with use_backend("auto"):
                assert not ran_on_reference(score)
        assert ran_on_reference(score)
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert ran_on_reference(score)
        with pytest.raises(ValueError, match="backend"), use_backend("cuda"):
            pass
        assert ran_on_reference(score)
    assert not ran_on_reference(score)


def test_a_block_holds_for_its_own_thread_only():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ran_on_reference(score)))
        thread.start()
        thread.join()
    assert seen == [False]


def test_argument_and_block_give_the_same_bits(problem):
    hidden, weight, labels, _ = problem()
    for backend in ("auto", "torch", "reference"):
        by_argument = renyi_loss(hidden, weight, labels, 0.8, backend=backend)
        with use_backend(backend):
            by_block = renyi_loss(hidden, weight, labels, 0.8)
        assert all(torch.equal(x, y) for x, y in zip(by_argument, by_block, strict=True))


CALLS = {
    "grouped_lora": lambda **k: grouped_lora(
        torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), torch.zeros(1, 4, 1), 1.0, **k
    ),
    "lora_linears": lambda **k: lora_linears(
        torch.zeros(1, 2, 3), [torch.zeros(4, 3)], [None], [torch.zeros(1, 1, 3)], [torch.zeros(1, 4, 1)], 1.0, **k
    ),
    "linear_logprob": lambda **k: linear_logprob(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2).long(), **k),
    "renyi_reduce": lambda **k: renyi_reduce(torch.zeros(2, 3), 0.5, **k),
}
LOSS = lambda **k: renyi_loss(torch.zeros(1, 2, 2, 3), torch.zeros(4, 3), torch.zeros(2, 2).long(), 0.5, **k)


@pytest.mark.parametrize("call", [*CALLS.values(), LOSS], ids=[*CALLS, "renyi_loss"])
@pytest.mark.parametrize("backend", ["cuda", "", "Torch"])
def test_an_unknown_backend_is_a_value_error_that_lists_the_known_ones(call, backend):
    with pytest.raises(ValueError, match="backend.*" + ".*".join(BACKENDS)):
        call(backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU an op may have a triton path")
@pytest.mark.parametrize("op", CALLS)
def test_triton_without_it_is_a_value_error_that_names_the_op(monkeypatch, op):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=op):
        CALLS[op](backend="triton")
    with use_backend("triton"), pytest.raises(ValueError, match=op):
        CALLS[op]()


# the package


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("alpha", ValueError, {"alpha": -0.1}),
        ("alpha", TypeError, {"alpha": True}),
        ("hidden", ValueError, {"hidden": torch.zeros(2, 3, 5)}),
        ("hidden", ValueError, {"hidden": torch.zeros(1, 1, 2, 3, 5)}),
        ("labels", ValueError, {"labels": torch.zeros(3, dtype=torch.int64)}),
        ("labels", ValueError, {"labels": torch.zeros(2, 2, 3, dtype=torch.int64)}),
        ("labels", TypeError, {"labels": torch.zeros(2, 3)}),
        ("labels", ValueError, {"labels": torch.full((2, 3), 7)}),
        ("weight", ValueError, {"weight": torch.zeros(7, 4)}),
        ("logit_softcap", ValueError, {"logit_softcap": -1.0}),
        ("softcap", TypeError, {"softcap": 1.0}),
    ],
)
def test_what_does_not_fit_is_named(name, error, change):
    arguments = {
        "hidden": torch.zeros(2, 2, 3, 5),
        "weight": torch.zeros(7, 5),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "alpha": 0.8,
    }
    with pytest.raises(error, match=name):
        renyi_loss(**arguments | change)


def test_the_public_names_are_those_of_the_contract():
    public = {"grouped_lora", "linear_logprob", "renyi_loss", "renyi_reduce", "use_backend", "RenyiOutput", "BACKENDS"}
    assert public <= set(renyi_kernels.__all__)
    assert renyi_kernels.RenyiOutput._fields == ("loss", "responsibilities", "ess", "logp")
    assert BACKENDS == ("auto", "triton", "torch", "reference")
