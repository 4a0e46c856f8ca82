"""Compiles every kernel for every architecture of the tile table, on a machine that needs no GPU.

    python -m asft_kernels.tools.compile_report [--arch sm_90] [--json FILE] [--tiles]

One row per kernel, architecture, operand dtype and variant: registers, spills, shared memory against
the chip's limit, and the matrix instructions found in the machine code. The launches are not listed
here: the backends and asft_sequence run on meta tensors (shapes without data) with the tile table
answering for the architecture in question, and whatever they launch is recorded and compiled.
Bias and softcap come alone, together and not at all; shapes are those of a language model, whose
pointers and strides count as divisible by 16, and once ("odd") such that nothing is.

--tiles makes the table of docs/kernels.md instead: logits_exp with every tile of the table.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from asft_kernels import methods
from asft_kernels.backends import Logits, exp_dtype, triton_fused
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan
from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES, StatsGrads, Wanted
from asft_kernels.kernels.asft_sequence import asft_sequence, asft_sequence_grad
from asft_kernels.kernels.configs import ARCHITECTURES, STRIPS, Tile, tiles
from asft_kernels.kernels.device_math import INTERPRETED
from asft_kernels.kernels.exp_epilogue import empty_exps
from asft_kernels.kernels.logits_exp import logits_exp
from asft_kernels.kernels.pack_labels import pack_labels
from asft_kernels.kernels.tile_choice import assume_architecture
from asft_kernels.tools.machine_code import CHIPS, KIB, TYPE_NAMES, Launch, MachineCode, machine_code, record_launches

RANK = 16  # low-rank columns of a head with LoRA
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN, SOFTCAPPED = Logits(), Logits(0.5, 30.0)


@dataclass(frozen=True)
class Row:
    kernel: str
    architecture: str
    dtype: str
    variant: str  # flags that are set, and tile sizes
    code: MachineCode

    @property
    def fits(self) -> bool:
        return not self.code.spills and self.code.shared <= CHIPS[self.architecture].shared and self.code.programs > 0

    def __str__(self) -> str:
        matrix = " ".join(f"{n}x{name}" for name, n in sorted(self.code.matrix.items()))
        return (
            f"{self.architecture:7} {self.dtype:5} {self.kernel.removesuffix('_kernel'):20} "
            f"{self.code.num_warps:5} {self.code.registers:4} {self.code.spills:6} "
            f"{self.code.shared / KIB:6.1f}/{CHIPS[self.architecture].shared // KIB:<3}  {self.variant}  {matrix}"
        ).rstrip()


def launches_for(architecture: str, dtype: torch.dtype, *, every: bool = True) -> list[Launch]:
    """What the package launches on that architecture for inputs of that dtype.

    Without `every`, what a quick test leaves out: but for bf16, bias or softcap alone, and odd shapes; for bf16, bias
    or softcap alone of those.
    """
    low = dtype == torch.bfloat16
    with assume_architecture(architecture), record_launches() as launches, torch.device("meta"):
        _both_phases(2048, 4096, 2048, 32768, 16384, dtype, with_alone=every or low)
        alone = [(True, PLAIN), (False, SOFTCAPPED)] if every else []
        for bias, logits in [(True, SOFTCAPPED), (False, PLAIN), *alone]:
            _strips(2048, 2048, 16384, dtype, bias, logits)
            _with_stats(2048, 4096, 2048, 32768, 16384, dtype, bias, logits)
        if every or low:
            _with_stats(2047, 4095, 251, 30040, 15021, dtype, True, SOFTCAPPED)
            # No multiple of anything; blocks of 256 where D is 251, and a last chunk of 37 rows. Then odd chunks of
            # rows that are aligned.
            for D in (251, 1024):
                _both_phases(2047, 4095, D, 30040, 10001, dtype, with_alone=every)
            _strips(2047, 251, 10001, dtype, True, SOFTCAPPED)
        for method in methods.modules("compiled").values():
            method.launch(dtype, every=every)
        if dtype == torch.float32:  # its inputs are fp32 log-probabilities whatever the model's dtype
            _batch_and_loss()
    return launches


def usual_launches(architecture: str, dtype: torch.dtype) -> list[Launch]:
    """What a call launches there for a plain head without bias, and the batch and ASFT's loss around it."""
    N, D, V, chunk = 2048, 2048, 32768, 16384
    with assume_architecture(architecture), record_launches() as launches, torch.device("meta"):
        head, rows = HeadRows(torch.empty((V, D), dtype=dtype)), torch.empty(N, dtype=torch.int64)
        _one_call((torch.empty((N, D), dtype=dtype), head, None, rows, rows), PLAIN, Plan(V, chunk, cached=1))
        _batch_and_loss()
    return launches


def _batch_and_loss() -> None:
    offsets, N = torch.empty(17, dtype=torch.int64), 2048
    terms = asft_sequence(torch.empty(N), offsets, lam=1.0, beta=1.0, sft_weight=1.0)
    asft_sequence_grad(terms.loss, terms.coef, offsets, N)
    labels, ends = torch.empty(4096, dtype=torch.int64), torch.empty(4096, dtype=torch.bool)
    for extra, borders in ((None, None), (labels, offsets)):
        for shift in (True, False):
            of_borders = ends if shift and borders is not None else None
            pack_labels(labels, extra, borders, of_borders, length=512, shift=shift, ignore_index=-100)


def _strips(N: int, D: int, width: int, dtype: torch.dtype, bias: bool, logits: Logits) -> None:
    hidden, weight = (torch.empty(s, D, dtype=dtype) for s in (N, width))
    rows, labels = torch.empty(2, N, dtype=torch.int64).unbind()
    for store, sums in ((True, True), (False, True), (True, False)):
        logits_exp(
            empty_exps(N, width, exp_dtype("triton", dtype), hidden.device) if store else None, hidden, weight,
            torch.empty(width, dtype=dtype) if bias else None, rows, labels, torch.empty(N),
            first=0, scale=logits.scale, softcap=logits.softcap, sums=sums, tile=STRIPS[0],
        )  # fmt: skip


def _both_phases(N: int, M: int, D: int, V: int, chunk: int, dtype: torch.dtype, *, with_alone: bool) -> None:
    plan = Plan(V, chunk=chunk, cached=1)
    hidden, weight, bias = (torch.empty(s, dtype=dtype) for s in ((M, D), (V, D), (V,)))
    rows, labels = torch.empty(2, N, dtype=torch.int64).unbind()
    by_column = torch.empty((D, V), dtype=dtype).t()  # a head that was stored transposed
    low_rank = HeadRows(torch.empty((V, D - RANK), dtype=dtype), torch.empty((V, RANK)))
    plain, transposed = HeadRows(weight), HeadRows(by_column)
    cases = [(plain, bias, SOFTCAPPED), (plain, None, PLAIN), (transposed, None, PLAIN), (low_rank, None, PLAIN)]
    cases += [(plain, bias, PLAIN), (plain, None, SOFTCAPPED)] if with_alone else []
    for w, b, logits in cases:
        _one_call((hidden, w, b, rows, labels), logits, plan)


def _one_call(inputs: tuple[Tensor, HeadRows, Tensor | None, Tensor, Tensor], logits: Logits, plan: Plan) -> None:
    _, head, bias, rows, _ = inputs
    triton_fused.forward(*inputs, logits, plan, needs_acc=False, needs_exps=False)
    saved = triton_fused.forward(*inputs, logits, plan, needs_acc=True, needs_exps=True)
    triton_fused.backward(
        torch.empty(len(rows)), *inputs, saved, logits, plan,
        needs_hidden=True, needs_weight=head.low_rank is None, needs_low_rank=head.low_rank is not None,
        needs_bias=bias is not None,
    )  # fmt: skip


def _with_stats(N: int, M: int, D: int, V: int, chunk: int, dtype: torch.dtype, bias: bool, logits: Logits) -> None:
    """Both phases with every figure, one chunk kept where phase 2 can do with that, as linear_logps decides."""
    wanted = Wanted(frozenset(NAMES), frozenset(DIFFERENTIABLE))
    plan = Plan(V, chunk=chunk, cached=0 if wanted.recomputes(logits.softcap) else 1)
    rows, labels, g = (*torch.empty(2, N, dtype=torch.int64).unbind(), torch.empty(N))
    hidden, weight = (torch.empty((s, D), dtype=dtype) for s in (M, V))
    inputs = (hidden, HeadRows(weight), torch.empty(V, dtype=dtype) if bias else None, rows, labels)
    saved = triton_fused.forward(*inputs, logits, plan, needs_acc=True, needs_exps=True, wanted=wanted)
    for grads in (StatsGrads(g, g, g), StatsGrads(g, None, None)):
        triton_fused.backward(
            g, *inputs, saved, logits, plan, needs_hidden=True, needs_weight=True, needs_low_rank=False,
            needs_bias=bias, stats_grads=grads,
        )  # fmt: skip


def tile_launch(tile: Tile, dtype: torch.dtype, *, softcap: bool, bias: bool = False) -> Launch:
    """logits_exp with one tile, as phase 1 with gradients launches it."""
    N, D, V = 2048, 2048, 16384
    with record_launches() as launches, torch.device("meta"):
        hidden, weight = (torch.empty(s, D, dtype=dtype) for s in (N, V))
        exps = torch.empty(N, V, dtype=exp_dtype("triton", dtype))
        rows, labels = torch.empty(2, N, dtype=torch.int64).unbind()
        logits_exp(
            exps, hidden, weight, torch.empty(V, dtype=dtype) if bias else None, rows, labels, torch.empty(N),
            first=0, scale=1.0, softcap=30.0 if softcap else None, sums=True, tile=tile,
        )  # fmt: skip
    return launches[0]


def tile_table(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[str]:
    """Markdown: every tile of the table with what its machine code says."""
    yield f"Triton {triton.__version__}, bf16 and fp32, with sums and E stored, no bias. Compiled, not run."
    yield ""
    yield (
        "| chip | operands | tile | registers | spills | shared KiB | programs | operations a byte | loop instructions "
        "| of them products | instructions outside | reason |"
    )
    yield "| --- | --- | --- " + "| ---: " * 8 + "| --- |"
    for architecture in architectures:
        for dtype in (torch.bfloat16, torch.float32):
            for softcap in (False, True):
                rows = tiles(architecture, dtype, softcap=softcap)
                if softcap and rows == tiles(architecture, dtype, softcap=False):
                    continue
                for tile in rows:
                    code = machine_code(tile_launch(tile, dtype, softcap=softcap), architecture)
                    newer = "; Triton {}.{} or newer".format(*tile.triton) if tile.triton > Tile.triton else ""
                    per_byte = 2 * tile.BLOCK_M * tile.BLOCK_V / ((tile.BLOCK_M + tile.BLOCK_V) * dtype.itemsize)
                    yield (
                        f"| {architecture} | {TYPE_NAMES[dtype]}{', softcap' * softcap} | {tile} | {code.registers} "
                        f"| {code.spills} | {code.shared / KIB:.0f} | {code.programs} | {per_byte:.0f} | {code.loop} "
                        f"| {code.loop_products} | {code.outside} | {tile.why}{newer} |"
                    )


def describe(launch: Launch, architecture: str, dtype: torch.dtype) -> Row:
    """Compiles one launch and reads its machine code."""
    variant = [k if v is True else f"{k}={v}" for k, v in launch.constexprs if v and k.isupper()]
    types = [kind for _, kind in launch.signature]
    known = [p.do_not_specialize or i in launch.divisible for i, p in enumerate(launch.fn.params)]
    if any(t in ("i32", "i64") and not k for t, k in zip(types, known, strict=True)):
        variant.append("odd")
    return Row(launch.name, architecture, TYPE_NAMES[dtype], " ".join(variant), machine_code(launch, architecture))


def report(architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[Row]:
    """One row per distinct launch, compiled one after another (Triton keeps what it has compiled).

    How many there are of each architecture and dtype is said to stderr first.
    """
    if INTERPRETED.value:
        raise RuntimeError(
            "compile_report: TRITON_INTERPRET is set in this process, so kernels were made for the "
            "interpreter and cannot be compiled; unset it and start again"
        )
    for architecture in architectures:
        for dtype in DTYPES:
            launches = launches_for(architecture, dtype)
            note = f"{architecture} {TYPE_NAMES[dtype]}: {len(launches)} kernels, some seconds each where they are new"
            print(note, file=sys.stderr, flush=True)
            for launch in launches:
                yield describe(launch, architecture, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m asft_kernels.tools.compile_report",
        description="Compile every kernel without a GPU: registers, spills, shared memory (KiB, "
        "used/limit), matrix instructions.",
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON")
    parser.add_argument("--tiles", action="store_true", help="instead, logits_exp with every tile, as Markdown")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    architectures = tuple(options.arch or ARCHITECTURES)
    if options.tiles:
        for line in tile_table(architectures):
            print(line, flush=True)
        return
    print(f"torch {torch.__version__}, triton {triton.__version__}; compiled, not run")
    print("arch    dtype kernel               warps regs spills shared KiB  variant, instructions")
    rows = []
    for row in report(architectures):
        rows.append(row)
        print(row, flush=True)
    if options.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        text = json.dumps({**versions, "rows": [asdict(r) for r in rows]}, indent=1)
        options.json.write_text(text + "\n")
    if not all(row.fits for row in rows):
        sys.exit("a kernel spills or needs more of a resource than its chip has")
    print(f"{len(rows)} compiled, none spills or passes its chip's shared memory")


if __name__ == "__main__":
    main()
