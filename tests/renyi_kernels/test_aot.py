"""Every kernel compiles for every kind of GPU, without spilling registers; no GPU is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from renyi_kernels import aot


def run(*arguments, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_target_without_a_spill():
    done = run("-m", "renyi_kernels.aot")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines() if "_kernel " in line]
    kernels = {row[0] for row in rows}
    assert kernels == {
        "grouped_lora_shrink_kernel",
        "grouped_lora_expand_kernel",
        "grouped_lora_up_backward_kernel",
        "grouped_lora_down_backward_kernel",
        "linear_logprob_pass_kernel",
        "linear_logprob_gradient_kernel",
        "linear_logprob_gemm_target_kernel",
        "linear_logprob_gemm_kernel",
        "linear_logprob_gemm_range_kernel",
        "linear_logprob_gemm_sum_kernel",
        "renyi_reduce_forward_kernel",
        "renyi_reduce_backward_kernel",
    }
    for target in aot.TARGETS:
        assert {row[0] for row in rows if row[2] == target} == kernels
    assert {row[4] for row in rows} == {"0"}
    # tensor cores of each generation wherever there is a matrix product of 16-bit numbers
    units = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    multiply = ("grouped_lora", "linear_logprob_gemm_kernel")
    products = [row for row in rows if row[0].startswith(multiply) and row[1].startswith(("bf16", "fp16"))]
    assert len(products) > 100
    assert [row for row in products if row[6:] != [units[row[2]]]] == []


def test_launches_are_specialised_as_at_run_time():
    program = (
        "from renyi_kernels import aot\n"
        "for each in aot.launches('sm_90'):\n"
        "    if each.mode in ('K=8 T=2048', 'bf16 rank 8 into dx', 'bf16 rank 8 in place'):\n"
        "        print(each.kernel.__name__, each.signature, each.constants)\n"
    )
    done = run("-c", program)
    *expands, reduce = (line for line in done.stdout.splitlines() if "backward" not in line)
    assert "'alpha_ptr': '*fp64'" in reduce
    # the innermost stride of one is a constant, whichever side of B is the innermost
    assert [("'B_strides_r': ('constexpr',)" in line, "'B_strides_o': ('constexpr',)" in line) for line in expands] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("found", "code"),
    [({}, 0), ({"spills": 8}, 1), ({"error": "CompilationError: no"}, 1)],
    ids=["clean", "spills", "error"],
)
def test_a_spill_or_an_error_is_the_exit_code(monkeypatch, capsys, found, code):
    class Serial:
        def __init__(self, **_):
            self.map = map

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "ProcessPoolExecutor", Serial)
    monkeypatch.setattr(aot, "compile_for", lambda target: [aot.Compiled("a_kernel", "a mode", target, **found)])
    assert aot.main(["--targets", "sm_90"]) == code
    printed = capsys.readouterr().out
    assert "a_kernel" in printed
    assert found.get("error", "sm_90 1") in printed


def test_under_the_interpreter_it_says_that_it_cannot():
    done = run("-m", "renyi_kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
