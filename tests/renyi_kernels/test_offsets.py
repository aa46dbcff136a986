"""Tensors that reach over more than 2^31 elements: each kernel gives what it gives of the same values lying together.

What nobody touches of such a tensor takes no memory on a CPU. Layout as in the kernels: K particles, M rows, I/O in/out
features, R rank, B sequences.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import renyi_kernels.triton_ops.grouped_lora as lora_passes
import renyi_kernels.triton_ops.linear_logprob as logprob_passes
import renyi_kernels.triton_ops.linear_logprob_gemm as product_passes
import renyi_kernels.triton_ops.renyi_reduce as reduce_passes
from renyi_kernels.triton_ops import launches, tuning

from .alone import MARKER, is_wanted, run_alone

# on a GPU a wrong offset is an illegal access, after which nothing more can be launched in that process
pytestmark = getattr(pytest.mark, MARKER)

FAR = 2**31
PARTICLE = 2**30 + 64


@pytest.fixture
def spread(device):
    """spread(tensor, strides): the same values at these strides."""

    def build(tensor, *strides):
        reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        assert reach > FAR
        far = torch.empty(reach, dtype=tensor.dtype, device=device).as_strided(tensor.shape, strides)
        return far.copy_(tensor)

    return build


@pytest.fixture
def draw(normals, device):
    return lambda *shape: normals(5)(*shape).to(device, torch.float16)


def tallest_row(kernel):
    """The row of the table with the tallest tile, whatever device it is for."""
    found = [row for key, row in tuning._ROWS.items() if key[:2] == (kernel, 2)]
    return max(found, key=lambda row: row[0]["BLOCK_M"])


@pytest.fixture(params=["tallest_tile", "one_program"], scope="module")
def tile(request):
    """tile(kernel, like): rows of a tile, off a GPU the most of any device; then with one program for a whole sum."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            like_the_tallest = lambda kernel, *_: (
                {"BLOCK_R": 64, **tallest_row(kernel)[0]},
                {"num_warps": 4, "num_stages": 1},
            )
            patch.setattr(lora_passes, "blocks", like_the_tallest)
        if request.param == "one_program":
            patch.setattr(lora_passes, "programs_wanted", lambda device: 1)
        patch.setattr(launches, "_known", {})
        yield lambda kernel, like: lora_passes.blocks(kernel, like, 64)[0]["BLOCK_M"]


ARGUMENTS = {
    "shrink": ["x", "A", "S"],
    "expand": ["S", "B", "base", "out"],
    "up_backward": ["dY", "S", "B", "dS", "dB"],
    "down_backward": ["x", "dS", "dA"],
}
WRITTEN = {"shrink": ["S"], "expand": ["out"], "up_backward": ["dS", "dB"], "down_backward": ["dA"]}


def arguments_of(kernel, draw, K, M, R, I=33, O=66):
    """What a launcher takes, by name, in its order; what it writes to is filled with something else."""
    made = {"x": draw(K, M, I), "A": draw(K, R, I), "B": draw(K, O, R), "S": draw(K, M, R), "dY": draw(K, M, O)}
    made |= {"dS": draw(K, M, R), "dB": draw(K, O, R), "dA": draw(K, R, I), "base": draw(K, M, O), "out": draw(K, M, O)}
    return {name: made[name] for name in ARGUMENTS[kernel]}


def launch(kernel, arguments):
    """What the launcher writes; the given tensors are left alone, but for one that it is to write to where it lies."""
    a = SimpleNamespace(**{name: x.clone() if x.is_contiguous() else x for name, x in arguments.items()})
    K, R = next((len(x), x.shape[2]) for name, x in arguments.items() if name in ("S", "dS"))
    counters = lora_passes.new_counters(next(iter(arguments.values())), [R], K).zero_()
    if kernel == "shrink":
        lora_passes.shrink(a.x, a.A, a.S, counters)
    elif kernel == "expand":
        lora_passes.expand([a.S], [a.B], 2.0, [a.base], [a.out])
    elif kernel == "up_backward":
        lora_passes.up_backward([a.dY], [a.S], [a.B], 2.0, [a.dS], [a.dB], True, counters)
    else:
        lora_passes.down_backward(a.x, a.dS, a.dA, True, counters)
    assert not counters.any()
    return [getattr(a, name) for name in WRITTEN[kernel]]


def far_from_row_to_row(tensor, reach):
    """Strides at which `reach` rows of a particle pass 2^31 elements."""
    row = -(-FAR // reach // 64) * 64 + 64
    return (0 if tensor.shape[0] == 1 else row * tensor.shape[1], row, 1)


@pytest.mark.parametrize(("kernel", "far"), [(kernel, name) for kernel, names in ARGUMENTS.items() for name in names])
def test_rows_that_lie_far_apart_within_a_tile(spread, draw, tile, kernel, far):
    M = 2 * tile(kernel, draw(1)) + 1
    arguments = arguments_of(kernel, draw, 1, M, R=66)
    expected = launch(kernel, arguments)
    # a tile's worth of rows passes 2^31, however tall it is; of an adapter its own rows do
    reach = min(tile(kernel, draw(1)), arguments[far].shape[1]) - 1
    moved = spread(arguments[far], *far_from_row_to_row(arguments[far], reach))
    ours = launch(kernel, arguments | {far: moved})
    assert all(x.any() and torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kernel", ARGUMENTS)
def test_particles_that_lie_far_apart(spread, draw, kernel):
    arguments = arguments_of(kernel, draw, 3, 2, R=2)
    expected = launch(kernel, arguments)
    for name in ARGUMENTS[kernel]:
        ours = launch(kernel, arguments | {name: spread(arguments[name], PARTICLE, 128, 1)})
        assert all(x.any() and torch.equal(x, y) for x, y in zip(ours, expected, strict=True)), name


def test_the_transposed_adapter_of_an_input_gradient_may_be_far(spread, draw):
    """`expand` with A as its B: there the rank goes from row to row."""
    S, A, out = draw(1, 3, 66), draw(1, 66, 33), draw(1, 3, 33)
    packed, far = out.clone(), out.clone()
    lora_passes.expand([S], [A.mT], 1.0, [packed], [packed])
    lora_passes.expand([S], [spread(A, *far_from_row_to_row(A, 65)).mT], 1.0, [far], [far])
    assert not torch.equal(packed, out)
    assert torch.equal(far, packed)


@pytest.mark.parametrize(
    ("kernel", "far"), [("expand", "B"), ("expand", "out"), ("up_backward", "dY"), ("up_backward", "B")]
)
def test_the_far_map_may_be_the_second_of_a_launch(spread, draw, tile, kernel, far):
    M = tile(kernel, draw(1)) + 1
    maps = [arguments_of(kernel, draw, 1, M, R=3, O=O) for O in (5, 66)]
    reach = min(tile(kernel, draw(1)), maps[1][far].shape[1]) - 1
    moved = spread(maps[1][far], *far_from_row_to_row(maps[1][far], reach))

    def run(second):
        given_ = {name: [maps[0][name].clone(), second[name]] for name in ARGUMENTS[kernel]}
        if kernel == "expand":
            lora_passes.expand(given_["S"], given_["B"], 2.0, given_["base"], given_["out"])
        else:
            counters = lora_passes.new_counters(maps[0]["dY"], [3, 3], 1).zero_()
            both = (given_[name] for name in ("dS", "dB"))
            lora_passes.up_backward(given_["dY"], given_["S"], given_["B"], 2.0, *both, False, counters)
        return [x for name in WRITTEN[kernel] for x in given_[name]]

    copies = lambda: {name: x.clone() for name, x in maps[1].items()}
    ours, expected = run(copies() | {far: moved}), run(copies())
    assert all(x.any() and torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_only_a_far_tile_pays_for_long_offsets(draw):
    """A million rows of 8960 are far from one end to the other, and no tile of them is."""
    assert not lora_passes._far(256 * 151_936)
    assert lora_passes._far(256 * 2**23)


@pytest.fixture(scope="module")
def alpha(device):
    return torch.tensor(0.8, dtype=torch.float64, device=device)


@pytest.mark.parametrize("strides", [(PARTICLE, 64, 1), (8, 2**25, 1), (2**25, 8, 2**29)], ids=["K", "B", "T"])
def test_the_reduction_reads_far_log_likelihoods(spread, draw, alpha, strides):
    K, B = (2, 65) if strides[0] == 8 else (3, 2)
    logp = -draw(K, B, 5).abs()
    expected = reduce_passes.forward(logp, None, alpha)
    for ours, theirs in zip(reduce_passes.forward(spread(logp, *strides), None, alpha), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strides", [(FAR, 1), (1, 2**29)], ids=["B", "T"])
def test_the_reduction_reads_a_far_mask(spread, draw, device, alpha, strides):
    logp, mask = -draw(3, 2, 6).abs(), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]], device=device).bool()
    far = spread(mask, *strides)
    expected = reduce_passes.forward(logp, mask, alpha)
    ours = reduce_passes.forward(logp, far, alpha)
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
    options = (expected[1], expected[3], 6, torch.float32)
    upstream = torch.ones(2, device=device)
    gradients = [reduce_passes.backward(upstream, *options[:2], m, *options[2:]) for m in (far, mask)]
    assert torch.equal(*gradients)


def test_the_log_probability_pass_works_on_far_rows(spread, draw, device):
    products, target = draw(3, 65).float(), torch.tensor([0, 7, 64], device=device)
    far = spread(products, PARTICLE, 1)
    E = products.half()
    far_E = spread(E, PARTICLE, 1)
    packed = logprob_passes.logprob_pass(products, target, None, None, 1.0, E)
    ours = logprob_passes.logprob_pass(far, target, None, None, 1.0, far_E)
    assert all(torch.equal(x, y) for x, y in zip((*ours, far_E), (*packed, E), strict=True))


@pytest.mark.parametrize("far", ["P", "weight", "out"])
def test_the_gradient_of_the_head_takes_far_rows(spread, draw, device, far):
    target = torch.tensor([0, 2, 1], device=device)
    tensors = {"P": draw(3, 65).float(), "weight": draw(3, 65), "out": draw(3, 65)}
    moved = {name: spread(x, PARTICLE, 1) if name == far else x.clone() for name, x in tensors.items()}
    for P, weight, out in (tensors.values(), moved.values()):
        logprob_passes.gradient_pass(P, weight, target, P[:, 0].contiguous(), P[:, 1].contiguous(), out)
    assert torch.equal(moved["out"], tensors["out"])


@pytest.mark.parametrize("far", ["hidden", "weight", "E"])
def test_the_product_with_epilogue_takes_far_rows(spread, draw, device, far):
    target = torch.tensor([0, 2, 1], device=device)
    tensors = {"hidden": draw(3, 9), "weight": draw(3, 9), "E": draw(3, 3)}
    moved = {name: spread(x, PARTICLE, 1) if name == far else x.clone() for name, x in tensors.items()}
    runs = []
    for hidden, weight, E in (tensors.values(), moved.values()):
        runs.append((*product_passes.logprob_product(hidden, weight, target, None, None, 1.0, E), E))
    assert all(x.any() and torch.equal(x, y) for x, y in zip(*runs, strict=True))


# the process of its own


def test_a_test_that_kills_its_process_fails_here_and_takes_nobody_along(tmp_path):
    tests = (
        "import os\ndef test_dies():\n    os.abort()\ndef test_lives():\n    assert 'RENYI_TEST_ALONE' in os.environ\n"
    )
    (tmp_path / "test_it.py").write_text(tests)
    with pytest.raises(pytest.fail.Exception, match="in a process of its own"):
        run_alone("test_it.py::test_dies", tmp_path)
    run_alone("test_it.py::test_lives", tmp_path)


def test_only_a_marked_test_on_a_gpu_gets_a_process_of_its_own_and_only_once(monkeypatch):
    marked, plain = (SimpleNamespace(get_closest_marker=lambda name, it=it: it) for it in (pytestmark, None))
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        assert [is_wanted(marked), is_wanted(plain)] == [on_gpu, False]
    monkeypatch.setenv("RENYI_TEST_ALONE", "1")
    assert not is_wanted(marked)
