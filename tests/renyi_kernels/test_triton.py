"""What is special to the kernels: scratch memory, partial sums, registration with PyTorch, their choice.

On a GPU, and without one on the CPU, in Triton's interpreter.
Layout: K particles, M rows, I/O in/out features, R rank, B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch._C import _DisableTorchDispatch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import renyi_kernels.triton_ops.grouped_lora as lora_passes
import renyi_kernels.triton_ops.linear_logprob as logprob_passes
import renyi_kernels.triton_ops.renyi_reduce as reduce_passes
from renyi_kernels import grouped_lora, linear_logprob, lora_linears, renyi_loss, renyi_reduce, use_backend
from renyi_kernels.triton_ops import launches, tuning

from .marks import every_x

IGNORE = -100
ALPHA, SCALING = 0.8, 1.75

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run")


@pytest.fixture(scope="module")
def lora(normals, device):
    """[x, A, B, base_out] on the device, in fp32 unless told."""

    def build(K, M, I, O, R, shared_x=False, dtype=torch.float32):
        draw = normals(0)
        x = draw(M, I) if shared_x else draw(K, M, I)
        tensors = [x, draw(K, R, I) / I**0.5, draw(K, O, R) / R**0.5, draw(K, M, O)]
        return [tensor.to(device, dtype) for tensor in tensors]

    return build


@pytest.fixture(scope="module")
def two_maps(lora, normals, device):
    """x, weights, biases, A, B of lora_linears: two maps, one with a bias."""

    def build(K, M, I, O, R, shared_x=False, dtype=torch.float32):
        x, A, B, _ = lora(K, M, I, O, R, shared_x, dtype)
        draw = lambda *shape: normals(1)(*shape).to(device, dtype)
        return x, [draw(O, I), draw(3, I)], [draw(O), None], [A, draw(K, 2, I)], [B, draw(K, 3, 2)]

    return build


@pytest.fixture(scope="module")
def head(normals, device):
    """hidden, weight, labels (one token without), bias; the vocabulary is more than a tile of the kernel."""

    def build(lead=(2, 3), D=5, V=4500):
        draw = normals(2)
        labels = torch.arange(torch.Size(lead).numel()).reshape(lead) * 1009 % V
        labels[..., -1] = IGNORE
        floats = [draw(*lead, D), draw(V, D), draw(V)]
        hidden, weight, bias = (tensor.to(device, torch.float32) for tensor in floats)
        return hidden, weight, labels.to(device), bias

    return build


@pytest.fixture(scope="module")
def tokens(normals, device):
    """Log-likelihoods [K, B, T] and mask [B, T]."""

    def build(K, B, T):
        return -normals(3)(K, B, T).abs().to(device, torch.float32), (normals(4)(B, T) > 0).to(device)

    return build


def trained(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def with_gradients(outputs, leaves):
    """The outputs and, for uneven upstream gradients, the gradients of the leaves."""
    outputs = list(outputs)
    upstreams = [torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstreams)]


@pytest.fixture(scope="module")
def steps(lora, two_maps, head, tokens):
    """Each op as a function of a backend that gives its outputs and gradients."""

    def run_grouped_lora(backend, shape, shared_x):
        x, A, B, base_out = trained(*lora(*shape, shared_x=shared_x))
        return with_gradients([grouped_lora(x, A, B, SCALING, base_out, backend=backend)], [x, A, B, base_out])

    def run_lora_linears(backend, shape, shared_x):
        x, weights, biases, A, B = two_maps(*shape, shared_x=shared_x)
        (x,), A, B = trained(x), trained(*A), trained(*B)
        return with_gradients(lora_linears(x, weights, biases, A, B, SCALING, backend=backend), [x, *A, *B])

    def run_linear_logprob(backend):
        hidden, weight, labels, bias = head()
        (hidden,) = trained(hidden)
        options = {"bias": bias, "logit_softcap": 4.0, "logit_scale": 1.5, "backend": backend}
        return with_gradients([linear_logprob(hidden, weight, labels, **options)], [hidden])

    def run_renyi_reduce(backend):
        logp, mask = tokens(3, 4, 9)
        (logp,) = trained(logp)
        out = renyi_reduce(logp, ALPHA, mask=mask, backend=backend)
        return [*with_gradients([out.loss], [logp]), *out[1:]]

    found = {}
    # many blocks of rows; many of features; more rank than a block: partial sums of each kind
    for shape in [(2, 70, 34, 33, 3), (1, 3, 70, 200, 5), (1, 200, 33, 10, 70)]:
        for shared_x in (False, True):
            name = f"{list(shape)} {'shared' if shared_x else 'own'} x"
            found[f"grouped_lora {name}"] = lambda backend, a=shape, b=shared_x: run_grouped_lora(backend, a, b)
            found[f"lora_linears {name}"] = lambda backend, a=shape, b=shared_x: run_lora_linears(backend, a, b)
    return found | {"linear_logprob": run_linear_logprob, "renyi_reduce": run_renyi_reduce}


# scratch memory and partial sums


@pytest.fixture(scope="module")
def results(steps):
    """What each step gives on the kernels, and into how many parts their sums were split."""
    num_parts = []

    def spy(size, block, num_programs, like, split=lora_passes._split):
        part = split(size, block, num_programs, like)
        num_parts.append(-(-size // part))
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_passes, "_split", spy)
        patch.setattr(launches, "_known", {})
        return {name: step("triton") for name, step in steps.items()}, num_parts


def test_sums_made_of_parts_equal_gold(steps, results):
    outputs, num_parts = results
    assert sum(parts > 1 for parts in num_parts) >= 8
    for name, step in steps.items():
        for ours, truth in zip(outputs[name], step("reference"), strict=True):
            torch.testing.assert_close(ours, truth, rtol=0, atol=2e-5 * max(1.0, truth.abs().max().item()), msg=name)


def test_nothing_is_read_before_it_is_written(device, steps, results, poison):
    assert torch.empty(3, device=device).isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of products on a GPU that are not deterministic
        for name, step in steps.items():
            assert all(torch.equal(x, y) for x, y in zip(step("triton"), results[0][name], strict=True)), name


def test_two_runs_are_bitwise_equal(steps, results):
    for name, step in steps.items():
        assert all(torch.equal(x, y) for x, y in zip(step("triton"), results[0][name], strict=True)), name


@without_gpu
def test_whichever_program_is_the_last_the_sums_are_the_same(steps, results, monkeypatch):
    """The interpreter runs one program after another. Here it begins with those that are otherwise the last."""
    place = interpreter.InterpreterBuilder.set_grid_idx

    def reversed_(builder, *program):
        place(builder, *(size - 1 - number for size, number in zip(builder.grid_dim, program, strict=True)))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", reversed_)
    for name, step in steps.items():
        assert all(torch.equal(x, y) for x, y in zip(step("triton"), results[0][name], strict=True)), name


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels of `lora_linears` that were launched, in order."""
    names = []
    monkeypatch.setattr(launches, "_known", {})
    for name in ("shrink", "expand", "up_backward", "down_backward"):
        kernel = getattr(lora_passes, f"grouped_lora_{name}_kernel")

        class Spy:
            arg_names = kernel.arg_names

            def __getitem__(self, grid, name=name, kernel=kernel):
                names.append(name)

                def run(*args, **kwargs):
                    with _DisableTorchDispatch():  # the interpreter runs operators of its own
                        return kernel[grid](*args, **kwargs)

                return run

        monkeypatch.setattr(lora_passes, f"grouped_lora_{name}_kernel", Spy())
    return names


class Operators(TorchDispatchMode):
    """Notes the operators that work on values."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.__name__:
            self.found.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def side_by_side(tensors):
    """The tensors [K, ...] as views of one matrix [K, P]."""
    matrix = torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)
    parts = matrix.split([tensor[0].numel() for tensor in tensors], dim=1)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@pytest.mark.parametrize("num_maps", [1, 3, 5])
def test_maps_of_one_input_share_each_launch_and_nothing_is_copied_or_added_up_elsewhere(lora, launched, num_maps):
    """As a training step runs them: what A and B are read from, and where their gradients go, are views of matrices."""
    K, M, I, R = 2, 70, 34, 3
    x, A, B, _ = lora(K, M, I, 70, R)
    A, B = [A] * num_maps, [B[:, : 70 - 20 * (j % 3)] for j in range(num_maps)]
    block, *of_B = side_by_side([torch.cat(A, dim=1), *B])
    held, *held_B = side_by_side([torch.zeros_like(t) for t in (block, *of_B)])
    weights = [x.new_ones(b.shape[1], I) for b in B]
    leaves = trained(x, *A, *B)
    x, A, B = leaves[0], leaves[1 : 1 + num_maps], leaves[1 + num_maps :]
    options = {"copies": (block, of_B), "gradients": lambda: (held, held_B), "backend": "triton"}
    with Operators() as operators:
        outs = lora_linears(x, weights, [None] * num_maps, A, B, SCALING, **options)
    assert launched == ["shrink", "expand"]
    upstream = [torch.ones_like(out) for out in outs]
    with operators:
        torch.autograd.grad(outs, leaves, upstream, allow_unused=True)
    assert launched == ["shrink", "expand", "up_backward", "expand", "down_backward"]
    assert operators.found == {"mm", "addmm"}
    assert all(g.any() for g in (held, *held_B))


@pytest.mark.parametrize("wanted", [1, 2, 8, 57, 300])
def test_there_are_counters_enough(wanted, monkeypatch):
    """Each plan of a backward needs no more than `new_counters` gives, whatever the shapes and the device are."""
    monkeypatch.setattr(lora_passes, "programs_wanted", lambda device: wanted)
    split = 0
    for dtype, K, M, O, R in itertools.product(
        (torch.float32, torch.bfloat16),
        (1, 3, 16),
        (1, 33, 300, 5000),
        ((1,), (576, 192, 192), (8960, 8960), (40,) * 5),
        (1, 16, 70),
    ):
        x, ranks = torch.empty(K, M, 640, dtype=dtype, device="meta"), [R + j for j in range(len(O))]
        count = lora_passes.new_counters(x, ranks, K).numel()
        plans = [
            lora_passes._plan_of_up_backward(x, K, M, O, tuple(ranks)),
            lora_passes._plan_of_down_backward(x, sum(ranks)),
            lora_passes._plan_of_down_backward(x[:1], K * sum(ranks)),
        ]
        assert max(plan.num_counters for plan in plans) <= count, (dtype, K, M, O, R)
        split += sum(plan.num_counters > 0 for plan in plans)
    assert split > 50


@every_x
def test_fp16_sums_made_of_parts_err_at_most_half_again_as_much_as_naive(lora, shared_x):
    inputs = lora(2, 150, 140, 200, 70, shared_x, torch.float16)

    def run(backend, dtype):
        leaves = trained(*(tensor.to(dtype) for tensor in inputs))
        x, A, B, base_out = leaves
        return with_gradients([grouped_lora(x, A, B, SCALING, base_out, backend=backend)], leaves)

    runs = run("triton", torch.float16), run("reference", torch.float16), run("reference", torch.float64)
    for ours, naive, gold in zip(*runs, strict=True):
        assert ours.dtype == torch.float16
        error, naive_error = (ours - gold).abs().max(), (naive - gold).abs().max()
        assert error <= 1.5 * naive_error + 1e-3 * gold.abs().max()


# launches that are remembered


@pytest.fixture
def asked(monkeypatch, lora):
    """asked(tensors) is what `down_backward` of these [x, dS, dA] launches: ("triton" or "compiled", arguments)."""
    calls = []
    monkeypatch.setattr(launches, "_known", {})

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: calls.append(("compiled", list(args)))

    class Kernel:
        arg_names = lora_passes.grouped_lora_down_backward_kernel.arg_names

        def __getitem__(self, grid):
            def run(*args, **kwargs):
                calls.append(("triton", [*args, *(kwargs[name] for name in self.arg_names if name in kwargs)]))
                return Compiled()

            return run

    monkeypatch.setattr(lora_passes, "grouped_lora_down_backward_kernel", Kernel())

    def run(x, dS, dA, add=False):
        counters = lora_passes.new_counters(x, [dS.shape[2]], len(x)).zero_()
        lora_passes.down_backward(x, dS, dA, add, counters)
        return calls[-1]

    return run


def test_a_launch_of_a_known_form_goes_to_the_compiled_kernel_with_all_its_arguments(asked):
    tensors = lambda: [torch.zeros(2, 5, 6), torch.zeros(2, 5, 3), torch.zeros(2, 3, 6)]
    (first, given_), (second, again) = asked(*tensors()), asked(*tensors())
    assert (first, second) == ("triton", "compiled")
    assert len(again) == len(lora_passes.grouped_lora_down_backward_kernel.arg_names)
    for x, y in zip(given_, again, strict=True):
        assert x is not y if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("what", ["dtype", "shape", "stride", "alignment", "option", "device kind"])
def test_what_triton_compiles_anew_for_is_another_form(asked, monkeypatch, what):
    build = lambda *shape: torch.zeros(shape)
    x, dS, dA = build(2, 5, 8), build(2, 5, 3), build(2, 3, 8)
    asked(x, dS, dA)
    assert asked(x, dS, dA)[0] == "compiled"
    others = {
        "dtype": (x, dS, dA.half()),
        "shape": (x[:, :4], dS[:, :4], dA),
        "stride": (x, build(2, 5, 4)[..., :3], dA),
        "alignment": (build(2 * 5 * 8 + 1)[1:].view(2, 5, 8), dS, dA),
        "option": (x, dS, dA, True),
        "device kind": (x, dS, dA),
    }
    if what == "device kind":
        monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    assert asked(*others[what])[0] == "triton"


# registration with PyTorch


@pytest.fixture
def registered(lora, two_maps, head, tokens):
    """name -> arguments of each registered operator, in every mode that it has."""

    def build():
        cases = []
        for shared_x in (False, True):
            x, A, B, base_out = lora(2, 3, 5, 4, 2, shared_x)
            _, *kept = torch.ops.renyi_kernels.grouped_lora(x, A, B, SCALING, None)
            for base in (base_out[0],) if shared_x else (None, base_out):
                leaves = trained(x, A, B) + [SCALING] + ([None] if base is None else trained(base))
                cases.append(("grouped_lora", tuple(leaves)))
            cases.append(("grouped_lora_backward", (base_out, x, A, B, *kept, SCALING, not shared_x)))
            x, weights, biases, A, B = two_maps(2, 3, 5, 4, 2, shared_x)
            biases = [weights[0].new_empty(0) if bias is None else bias for bias in biases]
            for path in ("triton",) if shared_x else ("triton", "torch"):
                *outs, S, counters = torch.ops.renyi_kernels.lora_linears(x, weights, biases, A, B, [], SCALING, path)
                leaves = (*trained(x), weights, biases, trained(*A), trained(*B), [], SCALING, path)
                cases.append(("lora_linears", leaves))
                need_dx = path == "triton" and not shared_x
                backward = (outs, x, S, counters, weights, A, B, [], SCALING, need_dx, path)
                cases.append(("lora_linears_backward", backward))
                values = [torch.cat(A, dim=1), *(b.clone() for b in B)]
                cases.append(("lora_linears", (*leaves[:5], values, *leaves[6:])))
                cases.append(("lora_linears_backward", (*backward[:7], values, *backward[8:])))
        hidden, weight, labels, bias = head((6,), 5, 7)
        for path in ("triton", "torch"):
            for need_grad in (True, False):
                leaf = trained(hidden)[0] if need_grad else hidden
                cases.append(("linear_logprob", (leaf, weight, labels, bias, 4.0, 1.5, 1.0, False, need_grad, path)))
                every = (leaf, weight, labels.clamp(min=0), bias, 4.0, 1.5, 1.0, True, need_grad, path)
                cases.append(("linear_logprob", every))
        cases.append(("linear_logprob_backward", (torch.ones(6, device=hidden.device), hidden, labels)))
        logp, mask = tokens(3, 4, 9)
        alpha = torch.tensor(ALPHA, dtype=torch.float64, device=logp.device)
        relative = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64, device=logp.device)
        loss, r, _, s = torch.ops.renyi_kernels.renyi_reduce(logp, mask, alpha, None)
        for some_mask, weights in ((mask, None), (None, relative)):
            cases.append(("renyi_reduce", (*trained(logp), some_mask, alpha, weights)))
            cases.append(("renyi_reduce_backward", (torch.ones_like(loss), r, s, some_mask, 9, logp.dtype)))
        return cases

    return build


OPS = ["grouped_lora", "lora_linears", "linear_logprob", "renyi_reduce"]


@pytest.mark.parametrize("op", [f"{op}{part}" for op in OPS for part in ("", "_backward")])
def test_opcheck_passes(registered, op):
    cases = [arguments for name, arguments in registered() if name == op]
    assert cases
    for arguments in cases:
        torch.library.opcheck(getattr(torch.ops.renyi_kernels, op).default, arguments)


@pytest.fixture
def calls(lora, two_maps, head, tokens):
    """Each public op as (function of its leaves and a backend, leaves)."""

    def build(name):
        if name.startswith("grouped_lora"):
            leaves = trained(*lora(2, 3, 5, 4, 2, shared_x="shared" in name))
            return lambda x, A, B, base, **k: grouped_lora(x, A, B, SCALING, base, **k), leaves
        if name.startswith("lora_linears"):
            x, weights, biases, A, B = two_maps(2, 3, 5, 4, 2, shared_x="shared" in name)

            copies = (torch.cat(A, dim=1), [b.clone() for b in B]) if "copies" in name else None

            def maps(x, A0, A1, B0, B1, **k):
                adapters = [A0, A1], [B0, B1]
                return torch.cat(lora_linears(x, weights, biases, *adapters, SCALING, copies=copies, **k), dim=-1)

            return maps, trained(x, *A, *B)
        if name == "linear_logprob":
            hidden, weight, labels, bias = head((6,), 5, 7)
            return lambda hidden, **k: linear_logprob(hidden, weight, labels, bias=bias, **k), trained(hidden)
        if name == "renyi_loss":
            hidden, weight, _, bias = head((3, 2, 4), 5, 7)
            labels = head((2, 4), 5, 7)[2]
            return lambda hidden, **k: renyi_loss(hidden, weight, labels, ALPHA, bias=bias, **k).loss, trained(hidden)
        logp, mask = tokens(3, 4, 9)
        if name == "renyi_reduce weights":
            weights = torch.tensor([0.3, 0.0, 0.7], device=logp.device)
            return lambda s, **k: renyi_reduce(s, ALPHA, mask=mask, weights=weights, **k).loss, trained(logp)
        if name == "renyi_reduce pairs":
            return lambda s, **k: renyi_reduce(s, ALPHA, **k).loss, trained(logp[..., 0])
        return lambda s, **k: renyi_reduce(s, ALPHA, mask=mask, **k).loss, trained(logp)

    return build


CALLS = [
    "grouped_lora",
    "grouped_lora shared x",
    "lora_linears",
    "lora_linears shared x",
    "lora_linears copies",
    "linear_logprob",
    "renyi_loss",
    "renyi_reduce",
    "renyi_reduce weights",
    "renyi_reduce pairs",
]


@pytest.mark.parametrize(("backend", "by"), [("triton", "argument"), ("triton", "block"), ("torch", "argument")])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_without_a_break_an_op_gives_what_it_gives_eagerly(calls, backend, name, by):
    op, leaves = calls(name)
    expected = with_gradients([op(*leaves, backend=backend)], leaves)
    torch._dynamo.reset()
    if by == "argument":
        compiled = torch.compile(lambda *leaves: op(*leaves, backend=backend), fullgraph=True, backend="aot_eager")
        ours = with_gradients([compiled(*leaves)], leaves)
    else:
        compiled = torch.compile(lambda *leaves: op(*leaves), fullgraph=True, backend="aot_eager")
        with use_backend(backend):
            ours = with_gradients([compiled(*leaves)], leaves)
    torch._dynamo.reset()
    for x, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, truth, rtol=0, atol=2e-6 * max(1.0, truth.abs().max().item()))


# the choice of the kernels


def test_a_device_that_is_not_in_the_table_takes_the_default_tiles():
    kernels = {key[0] for key in tuning._ROWS}
    assert kernels == {"shrink", "expand", "up_backward", "down_backward"}
    for kernel in kernels:
        for itemsize in (2, 4):
            for block_r in (16, 32, 64):
                default = tuning.row(kernel, itemsize, "none", block_r)
                for arch in ("sm_75", "sm_121", "gfx90a", "gfx1100", "", "any"):
                    assert tuning.row(kernel, itemsize, arch, block_r) == default


@pytest.mark.parametrize(
    ("kernel", "rows", "outputs", "rank", "by_vendor"),
    [
        ("expand", 1024, 1536, 8, True),
        ("expand", 1024, 1537, 8, False),
        ("expand", 1023, 1536, 8, False),
        ("expand", 1024, 1536, 17, False),
        ("up_backward", 1024, 8960, 64, True),
        ("up_backward", 1024, 8959, 64, False),
        ("up_backward", 1024, 8960, 32, False),
    ],
)
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_products_of_the_vendor_run_where_the_table_says_that_they_are_faster(
    monkeypatch, kernel, rows, outputs, rank, by_vendor, arch
):
    monkeypatch.setattr(tuning, "architecture", lambda device: arch)
    empty = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
    S, B, Y = [empty(2, rows, rank)], [empty(2, outputs, rank)], [empty(2, rows, outputs)]
    ran = []

    class Notes:
        arg_names = ()

        def __getitem__(self, grid):
            return lambda *args, **kwargs: ran.append("kernel")

    monkeypatch.setattr(launches, "_known", {})
    monkeypatch.setattr(lora_passes, f"grouped_lora_{kernel}_kernel", Notes())
    monkeypatch.setattr(lora_passes.torch_passes, kernel, lambda *args: ran.append("vendor"))
    if kernel == "expand":
        lora_passes.expand(S, B, SCALING, Y, Y)
    else:
        lora_passes.up_backward(Y, S, B, SCALING, S, B, True, lora_passes.new_counters(S[0], [rank], 2))
    assert ran == ["vendor" if by_vendor and arch == "sm_90" else "kernel"]


@pytest.mark.parametrize(("rank", "expected"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 64), (4096, 64)])
def test_the_block_of_a_rank_covers_it_up_to_a_limit(rank, expected):
    assert tuning.block_r(rank) == expected


@without_gpu
def test_without_a_gpu_or_the_interpreter_the_error_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend='triton'.*renyi_reduce.*no GPU.*'auto' or 'torch'"):
        renyi_reduce(torch.zeros(2, 3), ALPHA, backend="triton")
    with use_backend("triton"), pytest.raises(ValueError, match=r"lora_linears.*no GPU"):
        lora_linears(
            torch.zeros(1, 2, 3), [torch.zeros(4, 3)], [None], [torch.zeros(1, 1, 3)], [torch.zeros(1, 4, 1)], 1.0
        )


def test_fp64_is_refused(device):
    with pytest.raises(ValueError, match=r"backend='triton'.*renyi_reduce"):
        renyi_reduce(torch.zeros(2, 3, dtype=torch.float64, device=device), ALPHA, backend="triton")


def test_the_interpreter_is_not_chosen_unless_asked_for(monkeypatch):
    monkeypatch.setattr(reduce_passes, "forward", lambda *_: pytest.fail("ran the kernels"))
    renyi_reduce(torch.zeros(2, 3), ALPHA)
    renyi_reduce(torch.zeros(2, 3), ALPHA, backend="auto")


@with_gpu
def test_auto_is_the_kernels_on_a_gpu(monkeypatch):
    ran = []
    forward = reduce_passes.forward
    monkeypatch.setattr(reduce_passes, "forward", lambda *a: ran.append(1) or forward(*a))
    renyi_reduce(torch.zeros(2, 3, device="cuda"), ALPHA)
    renyi_reduce(torch.zeros(2, 3, device="cuda", dtype=torch.float64), ALPHA)
    assert ran == [1]


# labels


def test_labels_may_lie_on_the_cpu(head):
    hidden, weight, labels, bias = head((6,), 5, 7)
    runs = []
    for place in (labels, labels.cpu()):
        (leaf,) = trained(hidden)
        runs.append(with_gradients([linear_logprob(leaf, weight, place, bias=bias, backend="triton")], [leaf]))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("stray", [-1, 7, 8, 2**31, -(2**40)])
def test_a_label_outside_the_vocabulary_gives_nan_to_its_token_and_to_no_other(head, stray):
    # what a GPU is left with: looking at labels there would make the op wait
    hidden, weight, labels, _ = head((6,), 5, 7)
    run = lambda target: logprob_passes.logprob_pass(hidden @ weight.T, target, None, None, 1.0, None)[0]
    labels = labels % 7
    expected = run(labels)
    ours = run(labels.index_fill(0, torch.tensor([2], device=labels.device), stray))
    others = [0, 1, 3, 4, 5]
    assert ours[2].isnan()
    assert torch.equal(ours[others], expected[others])
