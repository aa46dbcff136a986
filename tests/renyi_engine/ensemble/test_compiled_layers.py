"""Compiled decoder layers give what uncompiled ones give, for few compilations; others run uncompiled and say so.

Almost all tests let torch.compile trace the layers and run what it traced ("eager") or also differentiate it before
("aot_eager"). Only one makes code, which takes longest.
"""

from __future__ import annotations

import copy
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from renyi_engine.data import Example, collate, pack
from renyi_engine.ensemble import compile_trial, compiled_layers, installation, sequence_attention, varlen
from renyi_engine.ensemble.adapted_maps import Rows
from renyi_kernels import use_backend

from ..apart import attach_apart
from .test_packed_attention import build, gradient

KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "attention": "eager"},
    "gpt2": {},
    "gpt_oss": {"sliding_window": 5, "attention": "eager"},
}


def families(*lengths, pair=True):
    """Sequences of these lengths, and two more that begin alike."""
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (*lengths, 4, 6, 5)]
    begun = [Example(0, texts[-3] + ids, [-100] * 4 + ids) for ids in texts[-2:]]
    return [*([Example(0, ids, ids)] for ids in texts[: len(lengths)]), *([begun] if pair else [])]


def packed(*lengths):
    return pack(families(*lengths))


def padded(*lengths):
    return collate([example for family in families(*lengths, pair=False) for example in family], 0)


ROW, OTHER_ROW = packed(17, 9), packed(5, 8, 21)


def measured(ensemble, batch):
    ensemble.zero_grad()
    logp = ensemble.sequence_logprob(batch)
    logp.sum().backward()
    return logp.detach(), gradient(ensemble)


def assert_same(found, truth):
    torch.testing.assert_close(found[0], truth[0], rtol=1e-5, atol=1e-5)
    assert (found[1] - truth[1]).norm() <= 1e-5 * truth[1].norm()


def no_tickets():
    """That nobody holds a ticket any more, as all backwards are over. What torch made to compile refers to itself."""
    gc.collect()
    return not sequence_attention._shown


def compilations():
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _own_compilations():
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(ensemble, backend="eager"):
    ensemble.compile_layers(backend=backend)
    return ensemble


def ensemble_of(kind="llama", num_layers=1, **settings):
    """A layer is enough where nothing depends on the layers above it, and takes less time to compile."""
    settings = {"attention": "sdpa", "num_hidden_layers": num_layers} | KINDS[kind] | settings
    return attach_apart(build(kind, **settings), num_particles=2, r=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gets_what_it_gets_uncompiled(kind):
    ensemble = ensemble_of(kind)
    truth = [measured(ensemble, row) for row in (ROW, OTHER_ROW)]
    compiled(ensemble)
    for row, expected in zip((ROW, OTHER_ROW), truth, strict=True):
        assert_same(measured(ensemble, row), expected)
    assert compilations() == 1
    assert no_tickets()


def test_layers_of_a_kind_share_code(monkeypatch):
    """The first adapted layer is of a kind of its own: it reads what the particles share. Norms are as on a GPU."""
    monkeypatch.setattr(installation, "norms_in_one_kernel", lambda device: True)
    ensemble = ensemble_of(num_layers=4)
    truth = measured(ensemble, ROW)
    assert_same(measured(compiled(ensemble, "aot_eager"), ROW), truth)
    assert compilations() == 2


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_padded_batches_of_two_sizes_are_compiled_for_all_lengths(kind):
    ensemble = ensemble_of(kind)
    batches = [padded(17, 9), padded(5, 21), padded(8, 3, 6), padded(8, 3, 6, 4)]
    truth = [measured(ensemble, batch) for batch in batches]
    compiled(ensemble)
    for batch, expected, known in zip(batches, truth, (1, 1, 2, 2), strict=True):
        assert_same(measured(ensemble, batch), expected)
        assert compilations() == known


def test_every_kind_of_forward_has_its_own_code_or_none():
    ensemble = ensemble_of()

    def scored():
        with torch.no_grad():
            yield ensemble.sequence_logprob(ROW)
            with ensemble.disable_adapters():
                yield ensemble.sequence_logprob(ROW)
                yield ensemble.model(ROW["input_ids"]).logits
            with ensemble.running(Rows.OWN):
                yield ensemble.sequence_logprob(padded(5, 5))
            with use_backend("reference"):
                yield ensemble.sequence_logprob(OTHER_ROW)
            yield ensemble.generate(torch.arange(3, 9)[None], max_new_tokens=4, temperature=0, eos_token_id=[])

    truth = list(scored())
    compiled(ensemble)
    for found, expected, known in zip(scored(), truth, (1, 2, 2, 2, 2, 2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert compilations() == known


def test_layers_below_the_first_adapted_one_are_compiled_for_one_row():
    ensemble = attach_apart(build(), num_particles=2, r=2, layers_to_transform=[1])
    assert ensemble.num_shared_layers == 1
    truth = measured(ensemble, ROW)
    assert_same(measured(compiled(ensemble), ROW), truth)
    assert compilations() == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_compiled_again(reentrant):
    ensemble = ensemble_of().train()
    truth = measured(ensemble, ROW)
    ensemble.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(measured(compiled(ensemble, "aot_eager"), ROW), truth)
    assert compilations() >= 1
    assert not any(layer.training for layer in ensemble.layers)


def test_half_precision_gives_the_same_up_to_rounding():
    ensemble = ensemble_of(dtype=torch.bfloat16)
    truth = measured(ensemble, ROW)
    found = measured(compiled(ensemble, "aot_eager"), ROW)
    for one, other in zip(found, truth, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


def test_inductor_makes_right_code():
    ensemble = ensemble_of()
    truth = measured(ensemble, ROW)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* run uncompiled")  # by which it would be right too
        assert_same(measured(compiled(ensemble, "inductor"), ROW), truth)
    assert compilations() == 1


def test_code_of_another_version_of_the_operators_is_not_taken_from_the_disk(monkeypatch):
    """torch's cache does not look into operators: it would call the backward as it was called then."""
    found = []

    def code(layer, args, kwargs):
        found.append(torch.compiler.config.cache_key_tag)
        return args[0] if args else kwargs["hidden_states"]

    ensemble = compiled(ensemble_of())
    layers = ensemble._installation.compiled
    for tag in ("one version", "another"):
        monkeypatch.setattr(compiled_layers, "_tag", lambda tag=tag: tag)
        mode = compiled_layers.Mode(False, Rows.SHARED, None, "torch")
        layers._code[mode] = code
        layers._run(mode, ensemble.layers[0], None, torch.zeros(1, 2, 3))
    assert found == ["one version", "another"]
    assert torch.compiler.config.cache_key_tag == ""


def test_threads_share_the_code():
    ensemble = ensemble_of()

    def score(row):
        with torch.no_grad():
            return ensemble.sequence_logprob(row)

    truth = [score(row) for row in (ROW, OTHER_ROW) * 4]
    compiled(ensemble)
    with ThreadPoolExecutor(4) as threads:
        for found, expected in zip(threads.map(score, (ROW, OTHER_ROW) * 4), truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert compilations() == 1


def test_detach_gives_the_model_back():
    model = build()
    attributes = [set(vars(module)) for module in model.modules()]
    compiled(attach_apart(model, num_particles=2, r=2)).detach()
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_a_deep_copy_has_code_of_its_own():
    ensemble = ensemble_of()
    truth = measured(ensemble, ROW)
    compiled(ensemble)
    twin = copy.deepcopy(ensemble)
    ensemble.detach()
    assert_same(measured(twin, ROW), truth)
    assert compilations() == 1


# ---------------------------------------------------------------------- refused


def breaking(ensemble, monkeypatch):
    mlp = type(ensemble.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: (torch._dynamo.graph_break(), forward(self, x))[1])
    return "eager"


def wrong_values(ensemble, monkeypatch):
    return lambda graph, inputs: lambda *args: tuple(out.roll(1, -1) for out in graph(*args))


def without_a_compiler(ensemble, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    return backend


@pytest.mark.parametrize(
    ("obstacle", "why"),
    [
        (breaking, r"Unsupported: "),
        (wrong_values, r"compiled they give other hidden states"),
        (without_a_compiler, r"RuntimeError: no working C\+\+ compiler"),
    ],
)
def test_what_cannot_be_compiled_runs_uncompiled_and_one_line_says_why(obstacle, why, monkeypatch):
    ensemble = ensemble_of()
    compiled(ensemble, obstacle(ensemble, monkeypatch))
    with pytest.warns(UserWarning, match=rf"^LlamaForCausalLM: .* run uncompiled .* \({why}.*\)$") as said:
        found = measured(ensemble, ROW)
    assert len(said) == 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        ensemble.sequence_logprob(ROW)
    ensemble.detach()
    assert_same(found, measured(attach_apart(ensemble.model, num_particles=2, r=2), ROW))


def test_layers_with_a_forward_of_somebody_elses_are_left_alone():
    ensemble = ensemble_of()
    layer = ensemble.layers[0]
    layer.forward = forward = layer.forward
    with pytest.warns(UserWarning, match="^LlamaForCausalLM: its decoder layers run uncompiled, because somebody else"):
        ensemble.compile_layers()
    assert layer.forward is forward


def test_what_no_trial_had_runs_uncompiled_from_then_on():
    """Here autocasting, which needs code of its own, and there is room for no more."""
    ensemble = compiled(ensemble_of())
    measured(ensemble, ROW)
    with (
        torch._dynamo.config.patch(recompile_limit=compilations()),
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="^LlamaDecoderLayer: .* uncompiled") as said,
    ):
        found = [measured(ensemble, ROW), measured(ensemble, ROW)]
    assert len(said) == 1
    assert_same(*found)


def test_gradients_are_compared_too():
    parameters = [torch.ones(2, 3, requires_grad=True)]
    with torch.enable_grad():
        truth = compile_trial.measure(lambda: parameters[0] * 2.0, parameters)
        read = lambda: parameters[0] * 3.0 - parameters[0].detach()
        assert compile_trial.obstacle(read, parameters, truth) == "compiled they give other gradients"
        assert compile_trial.obstacle(lambda: parameters[0] * 2.0, parameters, truth) is None


# ---------------------------------------------------------------------- one call for the whole row


@torch.library.custom_op("renyi_tests::varlen", mutates_args=())
def varlen_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: torch.Tensor, ends_k: torch.Tensor, scale: float
) -> torch.Tensor:
    return by_part(q, k, v, ends_q, ends_k, scale)


def by_part(q, k, v, ends_q, ends_k, scale):
    outputs = []
    for part in range(len(ends_q) - 1):
        queries = q[ends_q[part] : ends_q[part + 1]].transpose(0, 1)
        keys, values = (states[ends_k[part] : ends_k[part + 1]].transpose(0, 1) for states in (k, v))
        sees = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - queries.shape[1])
        outputs.append(scaled_dot_product_attention(queries, keys, values, sees, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


@varlen_forward.register_fake
def _(q, k, v, ends_q, ends_k, scale):
    return q.new_empty(q.shape)


@torch.library.custom_op("renyi_tests::varlen_backward", mutates_args=())
def varlen_backward(
    upstream: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, pull_back = torch.func.vjp(lambda q, k, v: by_part(q, k, v, ends_q, ends_k, scale), q, k, v)
    return pull_back(upstream)


@varlen_backward.register_fake
def _(upstream, q, k, v, ends_q, ends_k, scale):
    return tuple(state.new_empty(state.shape) for state in (q, k, v))


def keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


varlen_forward.register_autograd(
    lambda ctx, upstream: (*varlen_backward(upstream, *ctx.saved_tensors, ctx.scale), None, None, None),
    setup_context=keep,
)


def test_attention_in_one_call_is_compiled_for_all_rows(monkeypatch):
    """With a stand-in for the kernel of a GPU, which is an operator too."""

    def kernel(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size):
        return varlen_forward(q, k, v, ends_q, ends_k, scale)

    ensemble = ensemble_of()
    rows = [ROW, OTHER_ROW, pack(families(7, 4, pair=False))]
    truth = [measured(ensemble, row) for row in rows]
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "is_for_the_kernel", lambda states: True)
    compiled(ensemble, "aot_eager")
    for row, expected in zip(rows, truth, strict=True):
        assert_same(measured(ensemble, row), expected)
    assert no_tickets()
    assert 1 <= compilations() <= 3
