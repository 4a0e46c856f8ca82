"""Compiles every kernel for every architecture of the tile table, on a machine that needs no GPU.

    python -m asft_kernels.compile_report [--arch sm_90] [--json FILE]

One row per kernel, architecture, operand dtype and variant: registers, spills, shared memory against
the chip's limit, and the matrix instructions found in the machine code. The launches are not listed
here: the backend and asft_sequence run on meta tensors (shapes without data) with the tile table
answering for the architecture in question, and whatever they launch is recorded and compiled.
Bias and softcap come alone, together and not at all; shapes are those of a language model, whose
pointers and strides count as divisible by 16, and once ("odd") such that nothing is.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from asft_kernels.backends import Logits, triton_fused
from asft_kernels.backends.plan import Plan
from asft_kernels.kernels.asft_sequence import asft_sequence, asft_sequence_grad
from asft_kernels.kernels.configs import ARCHITECTURES, assume_architecture
from asft_kernels.kernels.device_math import INTERPRETED

KIB = 1024
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "gfx942": 64 * KIB,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}
# What counts as a matrix instruction, by the machine's own name.
MATRIX = re.compile(r"\b((?:HGMMA|HMMA|IMMA|QGMMA|UTC[A-Z]*MMA|v_mfma)[\w.]*)")


@dataclass(frozen=True)
class Launch:
    """A kernel with all that decides its machine code."""

    fn: JITFunction
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]

    def compile(self, architecture: str) -> Any:
        source = ASTSource(
            self.fn,
            signature=dict(self.signature),
            constexprs=dict(self.constexprs),
            attrs={(i,): [["tt.divisibility", 16]] for i in self.divisible},
        )
        return triton.compile(source, target=TARGETS[architecture], options=dict(self.options))


@dataclass(frozen=True)
class Row:
    kernel: str
    architecture: str
    dtype: str
    variant: str  # flags that are set, and tile sizes
    num_warps: int
    registers: int
    spills: int  # loads and stores of spilled registers
    shared: int  # bytes of shared memory a program
    shared_limit: int
    matrix: dict[str, int]  # instruction -> occurrences


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Within it kernels do not run: what would be launched is appended to the list, once each."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        names = [p.name for p in self.params]
        options = {k: kwargs.pop(k) for k in list(kwargs) if k not in names}
        bound = dict(zip(names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        divisible: list[int] = []
        for i, p in enumerate(self.params):
            value: Any = bound[p.name]
            specialise = not p.do_not_specialize
            if p.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
                signature[p.name], constexprs[p.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[p.name] = "*" + TYPE_NAMES[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    divisible.append(i)
            elif isinstance(value, float):
                signature[p.name] = "fp32"
            else:
                signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialise and value % 16 == 0:
                    divisible.append(i)
        launch = Launch(
            self,
            tuple(signature.items()),
            tuple(constexprs.items()),
            tuple(divisible),
            tuple(sorted(options.items())),
        )
        if launch not in launches:
            launches.append(launch)

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches_for(architecture: str, dtype: torch.dtype, *, every: bool = True) -> list[Launch]:
    """What the package launches on that architecture for inputs of that dtype.

    Without `every`, what a quick test leaves out: bias or softcap alone but for bf16, and odd shapes but
    for bf16 with both.
    """
    low = dtype == torch.bfloat16
    with assume_architecture(architecture), record_launches() as launches, torch.device("meta"):
        _both_phases(2048, 4096, 2048, 32768, 16384, dtype, with_alone=every or low)
        if every or low:
            # No multiple of anything; blocks of 256 where D is 251, and a last chunk of 37 rows.
            _both_phases(2047, 4095, 251, 30040, 10001, dtype, with_alone=every, with_plain=every)
        if dtype == torch.float32:  # its inputs are fp32 log-probabilities whatever the model's dtype
            offsets, N = torch.empty(17, dtype=torch.int64), 2048
            terms = asft_sequence(torch.empty(N), offsets, lam=1.0, beta=1.0, sft_weight=1.0)
            asft_sequence_grad(terms.loss, terms.coef, offsets, N)
    return launches


def _both_phases(
    N: int, M: int, D: int, V: int, chunk: int, dtype: torch.dtype, *, with_alone: bool, with_plain: bool = True
) -> None:
    plan = Plan(V, chunk=chunk, cached=1)
    hidden, weight, bias = (torch.empty(s, dtype=dtype) for s in ((M, D), (V, D), (V,)))
    rows, labels, g = (*torch.empty(2, N, dtype=torch.int64).unbind(), torch.empty(N))
    by_column = torch.empty((D, V), dtype=dtype).t()  # a head that was stored transposed
    plain, softcapped = Logits(), Logits(0.5, 30.0)
    cases = [(weight, bias, softcapped)]
    cases += [(weight, None, plain), (by_column, None, plain)] if with_plain else []
    cases += [(weight, bias, plain), (weight, None, softcapped)] if with_alone else []
    for w, b, logits in cases:
        inputs = (hidden, w, b, rows, labels)
        triton_fused.forward(*inputs, logits, plan, needs_acc=False, needs_exps=False)
        saved = triton_fused.forward(*inputs, logits, plan, needs_acc=True, needs_exps=True)
        triton_fused.backward(
            g, *inputs, saved, logits, plan,
            needs_hidden=True, needs_weight=True, needs_bias=b is not None,
        )  # fmt: skip


def describe(launch: Launch, architecture: str, dtype: torch.dtype) -> Row:
    """Compiles one launch and reads its machine code."""
    compiled = launch.compile(architecture)
    if "cubin" in compiled.asm:
        registers, spills, code = _read_cubin(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        registers = _metadata(code, "vgpr_count")
        # The private segment holds spilled vector registers; a scalar one goes to a vector register.
        spills = _metadata(code, "vgpr_spill_count") + _metadata(code, "private_segment_fixed_size")
    variant = [k if v is True else f"{k}={v}" for k, v in launch.constexprs if v and k.isupper()]
    types = [kind for _, kind in launch.signature]
    known = [p.do_not_specialize or i in launch.divisible for i, p in enumerate(launch.fn.params)]
    if any(t in ("i32", "i64") and not k for t, k in zip(types, known, strict=True)):
        variant.append("odd")
    return Row(
        kernel=launch.fn.fn.__name__,
        architecture=architecture,
        dtype=TYPE_NAMES[dtype],
        variant=" ".join(variant),
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[architecture],
        matrix=dict(Counter(MATRIX.findall(code))),
    )


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, spill instructions, SASS) by the tools that come with Triton."""
    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True)
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    found = re.search(r"REG:(\d+)", usage.stdout)
    assert found, usage.stdout
    return int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)), code.stdout


def _metadata(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}: *(\d+)", assembly)
    assert found, f"no {key} in the assembly's metadata"
    return int(found[1])


def report(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[Row]:
    """One row per distinct launch, compiled one after another (Triton keeps what it has compiled)."""
    if INTERPRETED.value:
        raise RuntimeError(
            "compile_report: TRITON_INTERPRET is set in this process, so kernels were made for the "
            "interpreter and cannot be compiled; unset it and start again"
        )
    for architecture in architectures:
        for dtype in DTYPES:
            for launch in launches_for(architecture, dtype):
                yield describe(launch, architecture, dtype)


def _line(row: Row) -> str:
    matrix = " ".join(f"{n}x{name}" for name, n in sorted(row.matrix.items()))
    return (
        f"{row.architecture:7} {row.dtype:5} {row.kernel.removesuffix('_kernel'):20} "
        f"{row.num_warps:5} {row.registers:4} {row.spills:6} "
        f"{row.shared / KIB:6.1f}/{row.shared_limit // KIB:<3}  {row.variant}  {matrix}"
    ).rstrip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m asft_kernels.compile_report",
        description="Compile every kernel without a GPU: registers, spills, shared memory (KiB, "
        "used/limit), matrix instructions.",
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    print(f"torch {torch.__version__}, triton {triton.__version__}; compiled, not run")
    print("arch    dtype kernel               warps regs spills shared KiB  variant, instructions")
    rows = []
    for row in report(tuple(options.arch or ARCHITECTURES)):
        rows.append(row)
        print(_line(row), flush=True)
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        text = json.dumps({**versions, "rows": [asdict(r) for r in rows]}, indent=1)
        options.json.write_text(text + "\n")
    if any(r.spills or r.shared > r.shared_limit for r in rows):
        sys.exit("a kernel spills or needs more shared memory than its chip has")
    print(f"{len(rows)} compiled, none spills or passes its chip's shared memory")


if __name__ == "__main__":
    main()
