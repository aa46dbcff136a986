"""Compile every kernel for every kind of GPU, on a machine without a GPU: `python -m renyi_kernels.aot`.

This calls the launchers on tensors without storage, in the dtypes and modes that the ops and the engine use. What they
would launch is compiled instead, with the constants of a run (alignment, sizes of one, block sizes of that device). A
table shows registers, spills, shared memory and matrix instructions. A compile error or a spill makes the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTERS = {**_DTYPES, torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


@dataclass
class Launch:
    """A kernel, and how Triton would compile it for one launch."""

    mode: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)  # by the place of an argument
    aligned: list[tuple[int, ...]] = field(default_factory=list)
    options: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_call(cls, mode: str, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
        """The launch as Triton's own launcher prepares it: a 1 is a constant, and multiples of 16 are marked."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        launch = cls(mode, kernel)
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, args, strict=False)) | kwargs
        launch.options = {name: values.pop(name) for name in list(values) if name not in names}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr:
                launch.signature[name], launch.constants[(index,)] = "constexpr", value
            elif isinstance(value, tuple):
                launch.signature[name] = tuple(
                    launch._kind(value[place], (index, place), parameter) for place in range(len(value))
                )
            elif isinstance(value, TensorDescriptor):
                launch.signature[name] = f"tensordesc<{_POINTERS[value.base.dtype]}{list(value.block_shape)}>"
            else:
                launch.signature[name] = launch._kind(value, (index,), parameter)
        return launch

    def _kind(self, value: Any, place: tuple[int, ...], parameter: Any) -> str:
        """The type of an argument that is given at run time; what is special about its value is noted."""
        if isinstance(value, Tensor):
            self.aligned.append(place)
            return f"*{_POINTERS[value.dtype]}"
        if isinstance(value, float):
            return parameter.annotation_type or "fp32"
        if value == 1:
            self.constants[place] = value
            return "constexpr"
        if value % 16 == 0:
            self.aligned.append(place)
        return "i32" if abs(value) < 2**31 else "i64"

    @property
    def key(self) -> tuple:
        return (
            self.kernel.__name__,
            *self.signature.items(),
            *sorted(self.constants.items()),
            *self.aligned,
            *sorted(self.options.items()),
        )


@dataclass(frozen=True)
class Compiled:
    """The result for one launch: registers of a thread, bytes of spill, bytes of shared memory; or the error."""

    kernel: str
    mode: str
    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: str = ""
    error: str = ""


def launches(target: str) -> list[Launch]:
    """Every different launch of the modes below on a device of that kind."""
    from triton.runtime.jit import JITFunction

    from renyi_kernels.triton_ops import (
        grouped_lora,
        launches as remembered,
        linear_logprob,
        linear_logprob_gemm,
        renyi_reduce,
        tuning,
    )

    found: dict[tuple, Launch] = {}
    mode = ""

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch.of_call(mode, kernel, args, kwargs)
        found.setdefault(launch.key, launch)

    with (
        patch.object(JITFunction, "run", record),
        patch.object(tuning, "architecture", lambda device: target),
        patch.object(linear_logprob_gemm, "architecture", lambda device: target),
        patch.object(tuning, "_VENDOR", {}),  # where a library is faster, there are other shapes that take the kernel
        patch.object(remembered, "_known", {}),
    ):
        for module, cases in (
            (grouped_lora, grouped_lora_modes),
            (linear_logprob, linear_logprob_modes),
            (linear_logprob_gemm, linear_logprob_gemm_modes),
            (renyi_reduce, renyi_reduce_modes),
        ):
            for mode, launcher, arguments in cases(module):  # noqa: B007 - `record` reads the mode
                launcher(*arguments)
    return list(found.values())


def grouped_lora_modes(ops: Any) -> Iterator[tuple]:
    """For each dtype and rank: an input of each particle or a shared one; a base in place, shared or none; one map or
    three; gradients in fp32 or not, added or not. For the largest rank also with 64 bits in every offset."""
    for dtype, name in _DTYPES.items():
        for K, M, I, O, R in ((8, 2048, 1536, 8960, 8), (8, 2048, 1536, 8960, 24), (8, 2048, 1536, 8960, 64), (1,) * 5):
            empty = partial(torch.empty, dtype=dtype, device="meta")
            x, A, B, S, Y = empty(K, M, I), empty(K, R, I), empty(K, O, R), empty(K, M, R), empty(K, M, O)
            # for a shared input: one product with the A of all particles
            one_x, one_A, one_S = empty(1, M, I), empty(1, K * R, I), empty(1, M, K * R)
            shared_S = one_S.view(M, K, R).transpose(0, 1)
            counters = ops.new_counters(x, [R], K)
            mode = f"{name} rank {R}"
            yield mode, ops.shrink, (x, A, S, counters)
            yield f"{mode} shared x", ops.shrink, (one_x, one_A, one_S, counters)
            yield f"{mode} in place", ops.expand, ([S], [B], 2.0, [Y], [Y])
            yield f"{mode} no base", ops.expand, ([S], [B], 2.0, None, [Y])
            yield f"{mode} shared base", ops.expand, ([shared_S], [B], 2.0, [Y[:1]], [Y])
            yield f"{mode} into dx", ops.expand, ([S], [A.mT], 1.0, [x], [x])
            # three maps, of 1536, 256 and 256 outputs: their S are columns of one tensor
            maps = [empty(K, M, o) for o in (1536, 256, 256)] if O > 1 else [Y] * 3
            of_maps, all_S = [empty(K, y.shape[2], R) for y in maps], empty(K, M, 3 * R).split(R, dim=2)
            yield f"{mode} three maps in place", ops.expand, (all_S, of_maps, 2.0, maps, maps)
            few_Y, few_S = empty(K, 17, O), empty(K, 17, R)  # in one part, so there are no partial sums
            dB, dA, one_dA = (torch.empty_like(t) for t in (B, A, one_A))
            yield mode, ops.up_backward, ([Y], [S], [B], 2.0, [S], [dB], False, counters)
            yield f"{mode} few rows", ops.up_backward, ([few_Y], [few_S], [B], 2.0, [few_S], [dB], False, counters)
            yield mode, ops.down_backward, (x, S, dA, False, counters)
            yield f"{mode} few rows", ops.down_backward, (x[:1, :17], few_S[:1], dA[:1], False, counters)
            yield f"{mode} shared x", ops.down_backward, (one_x, one_S, one_dA, False, counters)
            # as a training step of the engine runs it
            all_dB, dA = [torch.empty_like(b, dtype=torch.float32) for b in of_maps], dA.float()
            few_maps, few_all_S = [y[:, :17] for y in maps], [s[:, :17] for s in all_S]
            counters = ops.new_counters(x, [R] * 3, K)
            rest = (all_dB, True, counters)
            mode += ", gradients added"
            yield f"{mode}, three maps", ops.up_backward, (maps, all_S, of_maps, 2.0, all_S, *rest)
            yield f"{mode}, few rows", ops.up_backward, (few_maps, few_all_S, of_maps, 2.0, few_all_S, *rest)
            yield mode, ops.down_backward, (x, S, dA, True, counters)
            if R == 64:
                far = lambda t: t.as_strided(t.shape, (0, 2**26, 1))  # 32 such rows pass 2^31 elements
                yield f"{mode}, far rows", ops.shrink, (far(x), A, S, counters)
                yield f"{mode}, far rows", ops.expand, ([S], [B], 2.0, [far(Y)], [far(Y)])
                yield f"{mode}, far rows", ops.up_backward, ([far(Y)], [S], [B], 2.0, [S], [dB], False, counters)
                yield f"{mode}, far rows", ops.down_backward, (far(x), S, dA, False, counters)


def linear_logprob_modes(ops: Any) -> Iterator[tuple]:
    """For each dtype of the gradient, or none: with and without bias and soft cap; with rows that are aligned or not.
    Then the gradient from the second product, in each dtype, with a head of whole rows and with one of every other."""
    target, rows = torch.empty(1024, dtype=torch.int64, device="meta"), torch.empty(1024, device="meta")
    for V in (151936, 50257):
        aligned = lambda dtype, V=V: torch.empty((1024, -(-V // 32) * 32), dtype=dtype, device="meta")[:, :V]
        products = aligned(torch.float32)
        for dtype in (None, *_DTYPES):
            E = None if dtype is None else aligned(dtype)
            for softcap in (None, 30.0):
                for bias in (None, torch.empty(V, dtype=dtype, device="meta")):
                    mode = f"{'forward' if dtype is None else _DTYPES[dtype]} V={V}"
                    mode += (" bias" if bias is not None else "") + (" softcap" if softcap else "")
                    yield mode, ops.logprob_pass, (products, target, bias, softcap, 1.0, E)
    for D in (1536, 577):
        for dtype, name in _DTYPES.items():
            P, out = torch.empty((1024, D), device="meta"), torch.empty((1024, D), dtype=dtype, device="meta")
            for step in (1, 2):
                weight = torch.empty((50257, step * D), dtype=dtype, device="meta")[:, ::step]
                mode = f"{name} D={D}" + (" every other" if step > 1 else "")
                yield mode, ops.gradient_pass, (P, weight, target, rows, rows, out)


def linear_logprob_gemm_modes(ops: Any) -> Iterator[tuple]:
    """With rows that the copy engine takes and with odd ones, with and without bias, soft cap and gradient."""
    for dtype, D, softcap, need_grad in (
        (torch.bfloat16, 1536, None, True),
        (torch.bfloat16, 1536, 30.0, True),
        (torch.bfloat16, 1537, None, True),
        (torch.bfloat16, 1536, None, False),
        (torch.float32, 1536, 30.0, True),
    ):
        N, V = 1024, 151936
        empty = partial(torch.empty, dtype=dtype, device="meta")
        E, bias = (empty(N, V) if need_grad else None), (empty(V) if softcap else None)
        mode = f"{_DTYPES[dtype]} D={D}{' bias softcap' if softcap else ''}{'' if need_grad else ' forward'}"
        yield mode, ops.logprob_product, (empty(N, D), empty(V, D), empty(N, dtype=torch.int64), bias, softcap, 1.0, E)


def renyi_reduce_modes(ops: Any) -> Iterator[tuple]:
    """Few particles and many, sequences and tokens, with and without a mask, with and without weights."""
    alpha = torch.empty((), dtype=torch.float64, device="meta")
    for K in (1, 8, 64):
        weights = alpha.expand(K)
        for T in (1, 2048):
            tokens, pairs = torch.empty((K, 4, T), device="meta"), torch.empty((K, 4), device="meta")
            for mask in (None, torch.empty((4, T), dtype=torch.bool, device="meta")):
                mode = f"K={K} T={T}{'' if mask is None else ' mask'}"
                yield mode, ops.forward, (tokens, mask, alpha)
                yield mode, ops.backward, (pairs[0], pairs, pairs, mask, T, torch.float32)
            yield f"{mode} weights", ops.forward, (tokens, mask, alpha, weights)


def compile_for(target: str) -> list[Compiled]:
    """Compile every launch for a target. An error is a result too."""
    return [_compile(launch, target) for launch in launches(target)]


def _compile(launch: Launch, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = launch.kernel.__name__
    attributes = {place: [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    try:
        made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)
    except Exception as error:  # the compiler may raise anything, and this looks for it
        lines = str(error).strip().splitlines() or [""]
        return Compiled(name, launch.mode, target, error=f"{type(error).__name__}: {lines[-1][:200]}")
    text = made.asm.get("ptx") or made.asm["amdgcn"]
    matrix = next((each for each in _MATRIX_INSTRUCTIONS if each in text), "")
    used = _used_on_nvidia(made.asm["cubin"]) if "cubin" in made.asm else _used_on_amd(text)
    return Compiled(name, launch.mode, target, *used, shared=made.metadata.shared, matrix=matrix)


def _used_on_nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes that a thread keeps in local memory)"""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    found = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _used_on_amd(assembly: str) -> tuple[int, int]:
    """(vector registers of a thread, spilled registers of both kinds)"""
    count = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]
    return count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count")


def table(results: list[Compiled]) -> str:
    """A line for each launch, in columns. A launch that did not compile has no numbers, and its line ends with the
    error."""
    rows = [("kernel", "mode", "target", "registers", "spills", "shared B", "matrix")]
    for r in results:
        numbers = ("", "", "") if r.error else (str(r.registers), str(r.spills), str(r.shared))
        rows.append((r.kernel, r.mode, r.target, *numbers, r.error or r.matrix))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m renyi_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="kinds of GPU")
    chosen = parser.parse_args(arguments).targets
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it")
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = [result for found in pool.map(compile_for, chosen) for result in found]
    print(table(results))
    per_target = Counter(r.target for r in results)
    counts = ", ".join(f"{target} {count}" for target, count in per_target.items())
    errors, spills = sum(bool(r.error) for r in results), sum(r.spills > 0 for r in results)
    print(f"\ncompiled: {counts}; errors: {errors}; with spills: {spills}")
    return 1 if errors or spills else 0


if __name__ == "__main__":
    sys.exit(main())
