"""A recording does what the plain call does, or it is not used.

Without a GPU, a recording is a plain call on the memory of the recording. A graph that repeats something else than the
call is played by `repeats`.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch

from renyi_engine.core import Pool, Recordings, Surroundings, cuda_graphs


class Work:
    """A function that adds to `total`, reads `factor`, and counts its calls."""

    def __init__(self) -> None:
        self.total, self.factor = torch.zeros(3), torch.tensor(2.0)
        self.calls, self.mode, self.problem = 0, "usual", None

    def __call__(self, inputs):
        self.calls += 1
        if self.problem is not None:
            raise self.problem
        product = self.factor * inputs["x"]
        if self.mode != "reads":
            self.total += product[:3]
        return {"loss": product.sum(), "product": product}

    def recordings(self, **options):
        surroundings = Surroundings(lambda: [self.total], lambda: [self.factor], lambda: self.mode)
        options = {"tolerance": 1e-6, "pool": Pool()} | options
        return Recordings(self, torch.device("cpu"), surroundings, **options)


@pytest.fixture
def work():
    return Work()


def inputs(size=4, value=1.0):
    return {"x": torch.arange(float(size)) + value}


def check(work, run, given):
    """That the outputs are right, and that the work was done once."""
    before = work.total.clone()
    outputs = run(given)
    product = work.factor * given["x"]
    assert outputs["product"].equal(product)
    assert outputs["loss"].equal(product.sum())
    assert work.total.equal(before + product[:3])
    return outputs


def test_every_call_gives_what_the_function_gives_and_adds_once(work):
    run = work.recordings()
    kept = [check(work, run, inputs(value=value)) for value in (1.0, 5.0, 9.0)]
    assert run.num_made == 1
    # later calls do not write over what earlier ones gave
    assert [out["product"][0].item() for out in kept] == [2.0, 10.0, 18.0]


def test_a_shape_a_type_a_constant_and_a_mode_have_recordings_of_their_own(work):
    run = work.recordings(constants=["most"])
    for given in (
        inputs(4),
        inputs(6),
        inputs(4) | {"ids": torch.arange(4)},
        inputs(4) | {"most": torch.tensor([1, 2])},
    ):
        check(work, run, given)
    assert run.num_made == 4
    check(work, run, inputs(4) | {"most": torch.tensor([1, 3])})
    check(work, run, inputs(4) | {"most": torch.tensor([1, 2])})
    assert run.num_made == 5
    work.mode = "another"
    check(work, run, inputs(4))
    assert run.num_made == 6


def test_constants_are_read_where_they_lie(work):
    seen = []

    def function(inputs):
        seen.append(inputs["most"].tolist())
        return {"x": inputs["x"] * 1}

    run = Recordings(function, torch.device("cpu"), Surroundings(), tolerance=0.0, constants=["most"], pool=Pool())
    for most in (3, 4, 3):
        run({"x": torch.ones(2), "most": torch.tensor([most])})
    assert seen == [[3], [3], [4], [4], [3]]  # twice for each recording that is made, and once to repeat one


@pytest.mark.parametrize("moved", ["total", "factor"])
def test_what_lies_elsewhere_now_is_recorded_anew(work, moved):
    run = work.recordings()
    for size in (4, 6):
        check(work, run, inputs(size))
    setattr(work, moved, getattr(work, moved).clone())
    calls = []
    for size in (4, 6, 4, 6):
        before = work.calls
        check(work, run, inputs(size))
        calls.append(work.calls - before)
    assert calls == [2, 2, 1, 1]
    assert run.num_made == 2


def test_recordings_of_one_pool_are_dropped_together(work):
    pool = Pool()
    several = [work.recordings(pool=pool) for _ in range(2)]
    for run in several:
        check(work, run, inputs())
    pool.drop()
    assert [run.num_made for run in several] == [0, 0]
    check(work, several[0], inputs())


def test_inputs_of_the_inference_mode_can_be_replaced_later(work):
    run = work.recordings()
    with torch.inference_mode():
        run({"x": torch.arange(4.0)})
    check(work, run, inputs())


def test_more_shapes_than_there_may_be_are_run_as_they_are(work):
    run = work.recordings()
    for size in range(3, 3 + cuda_graphs.MOST_SHAPES):
        check(work, run, inputs(size))
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs .there are more than 8 shapes of inputs"):
        check(work, run, inputs(99))
    assert run.num_made == 0
    check(work, run, inputs(4))  # and says nothing more


@pytest.fixture
def repeats(monkeypatch):
    """repeats(function): recordings repeat function(call) in place of the call."""

    def use(make):
        real = cuda_graphs._Recording.__init__

        def init(self, *args):
            real(self, *args)
            self._replay = make(self._replay)

        monkeypatch.setattr(cuda_graphs._Recording, "__init__", init)

    return use


@pytest.mark.parametrize("output", ["loss", "product"])
def test_a_recording_with_other_outputs_is_not_used(work, repeats, output):
    def other(call):
        return lambda: {name: value + (name == output) for name, value in call().items()}

    repeats(other)
    run = work.recordings()
    with pytest.warns(UserWarning, match=f"a recording gives other values of {output} than a plain call"):
        check(work, run, inputs())
    check(work, run, inputs(value=3.0))
    assert run.num_made == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool])
def test_outputs_of_any_type_are_compared(repeats, dtype):
    """The norm of the fp16 ones is beyond fp16."""

    def run():
        outputs = {"out": torch.full((400,), 5e3).to(dtype)}
        Recordings(lambda inputs: outputs, torch.device("cpu"), Surroundings(), tolerance=0.05, pool=Pool())({})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    repeats(lambda call: lambda: {"out": call()["out"] * (torch.arange(400) % 4 > 0)})
    with pytest.warns(UserWarning, match="a recording gives other values of out than a plain call"):
        run()


def test_an_output_that_nobody_compares_may_differ(work, repeats):
    repeats(lambda call: lambda: {name: value + (name == "product") for name, value in call().items()})
    run = work.recordings(compared=lambda outputs: ["loss"])
    check(work, run, inputs())
    assert run.num_made == 1


@pytest.mark.parametrize("times", [0, 2])
def test_a_recording_that_adds_something_else_is_not_used(work, repeats, times):
    def other(call):
        def replay():
            before = work.total.clone()
            outputs = call()
            work.total.copy_(before + times * (work.total - before))
            return outputs

        return replay

    repeats(other)
    run = work.recordings()
    work.total += 7.0  # what was there before hides nothing
    with pytest.warns(UserWarning, match="a recording adds other values than a plain call"):
        check(work, run, inputs())
    check(work, run, inputs(value=3.0))


def test_values_that_are_not_finite_agree_with_themselves_alone(work, repeats):
    run = work.recordings()
    given = inputs()
    given["x"][1:3] = torch.tensor([torch.nan, torch.inf])
    assert run(given)["product"].isnan().tolist() == [False, True, False, False]
    assert run.num_made == 1
    repeats(lambda call: lambda: {name: value.nan_to_num() for name, value in call().items()})
    other = Work()
    other.total = torch.zeros(3)
    with pytest.warns(UserWarning, match="other values of loss"):
        other.recordings()(given)


def test_a_function_that_cannot_be_recorded_runs_as_it_is(work, repeats):
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    repeats(refuse)
    run = work.recordings()
    with pytest.warns(UserWarning, match=r"RuntimeError: operation not permitted when stream is capturing"):
        check(work, run, inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(work, run, inputs(value=2.0))


@pytest.mark.parametrize("where", ["the plain call", "the recording"])
def test_out_of_memory_is_the_callers_and_drops_all_recordings(work, repeats, where):
    run = work.recordings()
    check(work, run, inputs(4))
    error = torch.OutOfMemoryError("CUDA out of memory")
    if where == "the plain call":
        work.problem = error
    else:

        def refuse(call):
            raise error

        repeats(refuse)
    before = work.total.clone()
    with pytest.raises(torch.OutOfMemoryError):
        run(inputs(6))
    assert run.num_made == 0
    assert work.total.equal(before)  # who tries again does not add twice


def test_an_error_of_the_function_is_the_callers(work):
    work.problem = ValueError("labels: expected something else")
    with pytest.raises(ValueError, match="labels: expected something else"):
        work.recordings()(inputs())


def test_a_deep_copy_of_a_pool_is_another_and_recordings_are_not_copied(work):
    pool = Pool()
    assert copy.deepcopy(pool) is not pool
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(work.recordings())


def test_a_pool_whose_graphs_are_gone_is_not_used_again(monkeypatch):
    """torch ends the process with an internal error if it is."""
    pools, handles, reset = [], iter(range(9)), []

    class Graph:
        def replay(self):
            pass

        def reset(self):
            reset.append(pools[-1])

    def refuse():
        raise ValueError("no")

    @contextmanager
    def capturing(graph, *, pool, stream, capture_error_mode):
        pools.append(pool)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles), raising=False)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    pool = Pool()
    kept = [pool.record(None, dict) for _ in range(2)]
    assert kept[0]() == {}
    kept.pop()
    kept.append(pool.record(None, dict))
    assert pools == [0, 0, 0]
    kept.clear()
    kept.append(pool.record(None, dict))
    assert pools == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="no"):  # nor is that of a graph that could not be made
        pool.record(None, refuse)
    assert reset == [1]  # torch's graph holds its memory until it is reset, and it is kept
    kept.append(pool.record(None, dict))
    assert pools == [0, 0, 0, 1, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_would_have_done():
    device = torch.device("cuda")
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def function(inputs):
        x = inputs["x"].to(device, non_blocking=True)  # a plain call gets the inputs where they lie
        loss = (x @ weight).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    surroundings = Surroundings(lambda: [weight.grad], lambda: [weight])
    run = Recordings(function, device, surroundings, tolerance=1e-5, pool=Pool())
    for size in (32, 16, 32, 16, 32):
        x = torch.randn(size, 64).pin_memory()
        weight.grad.zero_()
        loss = run({"x": x})["loss"]
        gradient = weight.grad.clone()
        weight.grad.zero_()
        torch.testing.assert_close(loss, function({"x": x.to(device)})["loss"])
        torch.testing.assert_close(gradient, weight.grad)
    assert run.num_made == 2
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asks = Recordings(
            lambda inputs: {"x": inputs["x"][inputs["x"] > 0]}, device, Surroundings(), tolerance=0.0, pool=Pool()
        )
        x = torch.tensor([1.0, -1.0, 2.0])
        assert [asks({"x": x.to(device)})["x"].tolist() for _ in range(2)] == [[1.0, 2.0]] * 2
    assert any("not recorded as CUDA graphs" in str(each.message) for each in told)
