"""What a kernel becomes on a chip that need not be there: its launches recorded, compiled and read.

Read from the machine code: registers, spills, shared and tensor memory, how many programs fit a
multiprocessor at once, matrix instructions, and the main loop (the innermost backward branch around
products): its instructions, those that multiply, and what remains outside it (set-up and epilogue).
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

KIB = 1024


@dataclass(frozen=True)
class Chip:
    target: GPUTarget
    shared: int  # bytes that one program may have
    shared_all: int  # bytes that the programs of one multiprocessor share


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB),
}
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
}
# What counts as a matrix instruction, by the machine's own name.
MATRIX = re.compile(r"\b((?:HGMMA|HMMA|IMMA|QGMMA|UTC[A-Z]*MMA|v_mfma)[\w.]*)")
MULTIPLIES = re.compile(MATRIX.pattern + r"|\bFFMA2?\b")


@dataclass(frozen=True)
class Launch:
    """A kernel with all that decides its machine code."""

    fn: JITFunction
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return self.fn.fn.__name__

    def compile(self, architecture: str) -> Any:
        source = ASTSource(
            self.fn,
            signature=dict(self.signature),
            constexprs=dict(self.constexprs),
            attrs={(i,): [["tt.divisibility", 16]] for i in self.divisible},
        )
        return triton.compile(source, target=CHIPS[architecture].target, options=dict(self.options))


@dataclass(frozen=True)
class MachineCode:
    num_warps: int  # those of specialised warps included
    registers: int  # a thread
    spills: int  # loads and stores of spilled registers
    shared: int  # bytes of shared memory a program
    programs: int  # that fit a multiprocessor at once
    matrix: dict[str, int]  # matrix instruction -> occurrences
    loop: int  # instructions of the main loop, 0 without one
    loop_products: int  # those of them that multiply
    outside: int  # instructions outside it


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
            elif isinstance(value, TensorDescriptor):
                signature[p.name] = f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}>"
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


def machine_code(launch: Launch, architecture: str) -> MachineCode:
    compiled = launch.compile(architecture)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if "cubin" in compiled.asm:
        registers, spills, code = _read_cubin(compiled.asm["cubin"])
        tensor_columns = getattr(compiled.metadata, "tmem_size", 0) or 0
        limits = [
            2**16 // (32 * warps * _up(registers, 8)),
            64 // warps,
            CHIPS[architecture].shared_all // (shared + KIB),  # 1 KiB of each program is the system's
            *([512 // tensor_columns] if tensor_columns else []),
        ]
    else:
        code = compiled.asm["amdgcn"]
        registers = _metadata(code, "vgpr_count")
        # The private segment holds spilled vector registers; a scalar one goes to a vector register.
        spills = _metadata(code, "vgpr_spill_count") + _metadata(code, "private_segment_fixed_size")
        waves = min(8, 512 // _up(registers, 8))  # on each of a compute unit's 4 vector units
        limits = [4 * waves // warps, CHIPS[architecture].shared_all // max(shared, 1)]
    loop, products, total = _main_loop(code)
    return MachineCode(
        num_warps=warps,
        registers=registers,
        spills=spills,
        shared=shared,
        programs=min(limits),
        matrix=dict(Counter(MATRIX.findall(code))),
        loop=loop,
        loop_products=products,
        outside=total - loop,
    )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _main_loop(code: str) -> tuple[int, int, int]:
    """(its instructions, those that multiply, the kernel's instructions): SASS, or AMD's assembly."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L[\w$]+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)(.*)|\t([a-z]\w+)(.*)", line):
            instructions.append((found[1] or found[3], found[2] or found[4] or ""))
    loops = []
    for i, (operation, rest) in enumerate(instructions):
        target = re.search(r"\.L[\w$]+", rest) if "BRA" in operation or "branch" in operation else None
        if target and labels.get(target[0], i + 1) <= i:
            body = [name for name, _ in instructions[labels[target[0]] : i + 1]]
            products = sum(bool(MULTIPLIES.match(name)) for name in body)
            if products:
                loops.append((len(body), products))
    length, products = min(loops, default=(0, 0))  # the innermost
    return length, products, len(instructions)


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, spill instructions, SASS) by the tools that come with Triton; without a look at its data flow."""
    tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True, check=True)
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c", "-ndf"]))
        )
    found = re.search(r"REG:(\d+)", usage.stdout)
    assert found, usage.stdout
    return int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)), code.stdout


def _metadata(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}: *(\d+)", assembly)
    assert found, f"no {key} in the assembly's metadata"
    return int(found[1])
