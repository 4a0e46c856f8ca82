"""What a GPU does with each part of a call, in one process: more of it in two minutes than benchmarks.run can tell.

    python -m benchmarks.gpu_probe OUT.jsonl --models Qwen3 --stages ceilings products calls tiles
    python -m benchmarks.gpu_probe OUT.jsonl --tiny    # a dry run, on a CPU with TRITON_INTERPRET=1: no measurement

Stages, in the order in which they are named:

    ceilings  a copy, and the library's product in bursts and under a load of seconds
    products  each product of the schedule alone, as it is asked for and as it might be
    calls     our call checked against float64: time beside the bare products, memory, time until the host is free
    peers     the same of the peers
    tiles     the candidates of the tile table, variants of its first row, and the ways to make dW
    kernels   what torch's profiler sees in one call
    graphs    ours, given num_valid, and plain torch as CUDA graphs: without the host
    one       a few launches of the table's first tile, for a profiler that replays kernels

Each figure is a row of JSON, written at once. A stage that raises has a row, and the next begins; the exit code is 1
then, and where an answer of ours is missing or wrong.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from asft_kernels.backends import triton_runs_on_cpu
from asft_kernels.backends.plan import Plan, default_cache_bytes, make_plan
from asft_kernels.kernels.configs import Tile, architecture_of, candidates, multiprocessors
from asft_kernels.kernels.tile_choice import Problem
from asft_kernels.tools import autotune
from benchmarks.calls import Result, bare_products, ours, per_token, plain_torch
from benchmarks.cases import MODELS, TRAINABLE, WORKS, Case, make_inputs
from benchmarks.contestants import BARE, CONTESTANTS, Contestant
from benchmarks.machine import about
from benchmarks.measure import extra_memory, release, seconds_of_call, wait
from benchmarks.oracle import compare, exact_answer, refusal, tolerance
from benchmarks.tables import MIB

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
OURS = "asft_kernels triton"
PEERS = ("plain torch", "TRL ChunkedLogProbFunction", "cut-cross-entropy cce", "cut-cross-entropy cce, filter_eps=None")
TURNS = {"cuda": 5, "cpu": 1}
# Of the table's first tile. What of it does not fit the chip is left out by autotune, with the reason.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"num_stages": 4},
    {"GROUP": 4},
    {"GROUP": 16},
    {"BLOCK_M": 256, "BLOCK_V": 128},
    {"BLOCK_D": 128, "num_stages": 2},
)


class Probe:
    """One shape, and the file that its rows go to."""

    def __init__(self, out: Path, model: str, tokens: int, *, tiny: bool):
        V, D = (256, 32) if tiny else MODELS[model]
        N = 32 if tiny else tokens
        self.case = Case("probe", TRAINABLE, N, N, D, V, model, pairs=4, dtype="bfloat16", device=DEVICE)
        self.out, self.about = out, about(DEVICE, "benchmarks.gpu_probe", sys.argv[1:])
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.bad = 0  # rows for which the exit code is 1

    @property
    def plan(self) -> Plan:
        """That of a call of this shape."""
        return make_plan(
            self.case.N, self.case.V, self.case.D, exp_bytes=DTYPE.itemsize, chunk_size=None,
            cache_bytes=default_cache_bytes(DEVICE), device_type=DEVICE,
            multiprocessors=multiprocessors(torch.device(DEVICE)),
        )  # fmt: skip

    def row(self, stage: str, name: str, **figures: Any) -> None:
        text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())
        print(f"{stage:9} {self.case.model:13} {name:44} {text}", flush=True)
        shape = {field: self.case.row[field] for field in ("model", "N", "D", "V", "dtype")}
        row = {"kind": "probe", "stage": stage, "name": name, **shape, **figures, "about": self.about}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def product(self, stage: str, name: str, flops: float, call: Callable[[], object]) -> None:
        seconds = seconds_of(call)
        self.row(stage, name, ms=1e3 * seconds, tflops=flops / seconds / 1e12)

    def run(self, stage: str) -> None:
        began = time.perf_counter()
        try:
            STAGES[stage](self)
        except Exception:
            self.bad += 1
            traceback.print_exc()
            self.row(stage, "the stage", failed=traceback.format_exc()[-600:])
        release(DEVICE)
        self.row(stage, "the stage", seconds=time.perf_counter() - began)


def seconds_of(call: Callable[[], object]) -> float:
    """As benchmarks.run measures a call; off a GPU, where it means nothing, one call by the clock."""
    if DEVICE == "cuda":
        return seconds_of_call(call, DEVICE)
    return autotune.on_host(call) / 1e3


def ceilings(probe: Probe) -> None:
    """What the memory and the matrix units give at all, and how far the clock falls under load."""
    size, n, load = (2**32, 8192, 1000) if DEVICE == "cuda" else (2**20, 64, 10)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target = torch.empty_like(source)
    seconds = seconds_of(partial(target.copy_, source))
    probe.row("ceilings", "copy, read and written", ms=1e3 * seconds, tb_per_s=2 * size / seconds / 1e12)
    del source, target
    x = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    out = torch.empty_like(x)
    product = partial(torch.mm, x, x, out=out)
    probe.product("ceilings", f"mm {n}^3 bf16, bursts", 2 * n**3, product)
    for count in (load * 7 // 10, load * 3 // 10):  # the second part is timed, when the first has warmed the chip
        wait(DEVICE)
        began = time.perf_counter()
        for _ in range(count):
            product()
        wait(DEVICE)
        seconds = (time.perf_counter() - began) / count
    probe.row("ceilings", f"mm {n}^3 bf16, sustained", ms=1e3 * seconds, tflops=2 * n**3 / seconds / 1e12)


def mm32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """fp32 of bf16 operands by the library; a CPU's has no such product and is given fp32."""
    if DEVICE == "cuda":
        return torch.mm(a, b, out=out, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float(), out=out)


def addmm32(acc: Tensor, a: Tensor, b: Tensor, beta: int) -> Tensor:
    if DEVICE == "cuda":
        return torch.addmm(acc, a, b, beta=beta, out=acc, out_dtype=torch.float32)
    return torch.addmm(acc, a.float(), b.float(), beta=beta, out=acc)


def products(probe: Probe) -> None:
    N, D, chunk = probe.case.N, probe.case.D, probe.plan.chunk
    flops = 2 * N * chunk * D
    of = partial(probe.product, "products")
    hidden, weight = (torch.randn(rows, D, device=DEVICE).to(DTYPE) for rows in (N, chunk))
    exps = torch.empty(N, chunk, device=DEVICE, dtype=DTYPE)
    of(f"H W^T, {chunk} rows, bf16 out", flops, lambda: torch.mm(hidden, weight.T, out=exps))
    exps.uniform_()
    for width in (chunk, chunk // 8, chunk // 16):
        logits = torch.empty(N, width, device=DEVICE)
        call = partial(mm32, hidden, weight[:width].T, logits)
        of(f"H W^T, {width} rows, fp32 out", 2 * N * width * D, call)
        del logits, call
    acc = torch.zeros(N, D, device=DEVICE)
    for beta in (1, 0):
        of(f"O + E W, beta={beta}, fp32 out", flops, partial(addmm32, acc, exps, weight, beta))
        acc.zero_()
    low = torch.empty(N, D, device=DEVICE, dtype=DTYPE)
    of("E W, bf16 out", flops, lambda: torch.mm(exps, weight, out=low))
    grad, rounded = torch.empty(chunk, D, device=DEVICE), torch.empty(chunk, D, device=DEVICE, dtype=DTYPE)
    for rows in (chunk // 8, chunk // 4, chunk):
        call = partial(addmm32, grad[:rows], exps[:, :rows].T, hidden, 0)
        of(f"E^T H, slice of {rows} rows, fp32 out", 2 * N * rows * D, call)
    of(f"E^T H, {chunk} rows, bf16 out", flops, lambda: torch.mm(exps.T, hidden, out=rounded))
    part = slice(chunk // 8)
    seconds = seconds_of(lambda: rounded[part].copy_(grad[part]))
    moved = (4 + 2) * part.stop * D
    probe.row("products", f"round a slice of {part.stop} rows", ms=1e3 * seconds, tb_per_s=moved / seconds / 1e12)


def first_tile(device: torch.device) -> Tile:
    return next(c for c in candidates(architecture_of(device), DTYPE, softcap=False) if isinstance(c, Tile))


def tiles(probe: Probe) -> None:
    """By autotune, which compares each with torch first."""
    device = torch.device(DEVICE)
    if DEVICE == "cpu" and not triton_runs_on_cpu():
        return probe.row("tiles", "all", left_out="needs a GPU, or TRITON_INTERPRET=1")
    first = first_tile(device)
    tried = [("", candidate) for candidate in candidates(architecture_of(device), DTYPE, softcap=False)]
    for change in VARIANTS:
        text = ", ".join(f"{field} {value}" for field, value in change.items())
        tried.append((f" ({text})", replace(first, **change)))
    problem = Problem(DTYPE, probe.case.D, probe.case.N, softcap=False)
    timer = autotune.on_device if DEVICE == "cuda" else autotune.on_host
    flops = 2 * probe.case.N * probe.plan.chunk * probe.case.D
    for text, candidate in tried:
        times = autotune.tune(problem, probe.case.V, device, timer, tiles=(candidate,))
        for name, ms in times.items():
            probe.row("tiles", f"{name}{text}", ms=ms, tflops=flops / ms / 1e9)
        if not times:
            probe.row("tiles", f"{candidate}{text}", left_out="does not run here or differs from torch's")
    flops = 2 * probe.case.N * probe.case.V * probe.case.D
    for form, ms in autotune.tune_gradient(problem, probe.case.V, device, timer).items():
        probe.row("tiles", f"dW {form}", ms=ms, tflops=flops / ms / 1e9)


def calls(probe: Probe) -> None:
    compared(probe, "calls", (OURS,))


def peers(probe: Probe) -> None:
    compared(probe, "peers", PEERS)


def compared(probe: Probe, stage: str, names: tuple[str, ...]) -> None:
    """Answer, memory and time of contestants, in turns, beside the bare products."""
    inputs = make_inputs(probe.case)
    exact = exact_answer(probe.case, inputs)
    contestants = taking_part(probe, stage, (BARE, *names))
    for work in WORKS:
        case = replace(probe.case, work=work)
        found: dict[str, tuple[Callable[[], Result], dict[str, Any]]] = {}
        for contestant in contestants:
            call = partial(contestant.run, case, inputs)
            try:
                found[contestant.name] = call, first_call(contestant, case, call, exact)
            except Exception as error:  # whatever a peer, a compiler or a driver may raise
                probe.bad += contestant.name == OURS
                probe.row(stage, f"{contestant.name}, {work}", failed=f"{type(error).__name__}: {str(error)[:300]}")
            release(DEVICE)
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(TURNS[DEVICE]):
            for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(seconds_of(found[name][0]))
        bare = median(times[BARE])
        for name, (call, facts) in found.items():
            ms = [1e3 * seconds for seconds in times[name]]
            probe.bad += name == OURS and bool(facts.get("wrong"))
            probe.row(
                stage, f"{name}, {work}", ms=median(ms), least_ms=min(ms), most_ms=max(ms),
                x_bare=median(ms) / bare / 1e3, host_ms=1e3 * host_seconds(call), **facts,
            )  # fmt: skip


def taking_part(probe: Probe, stage: str, names: tuple[str, ...]) -> list[Contestant]:
    """Those of the names that run here; the others have a row that says why not."""
    found = []
    for contestant in (c for c in CONTESTANTS if c.name in names):
        if contestant.version == "not installed":
            probe.row(stage, contestant.name, left_out=f"{contestant.package} is not installed")
        elif not contestant.takes(probe.case):
            probe.row(stage, contestant.name, left_out=f"needs {' or '.join(contestant.devices)}")
        else:
            found.append(contestant)
    return found


def first_call(contestant: Contestant, case: Case, call: Callable[[], Result], exact: Any) -> dict[str, Any]:
    """Its seconds, which hold compilation, and how far it is from float64; then the memory of a second one."""
    began = time.perf_counter()
    result = call()
    wait(case.device)
    facts: dict[str, Any] = {"first_s": time.perf_counter() - began}
    if contestant.checked:
        errors, allowed = compare(result, exact), tolerance(case, exact, contestant.package)
        facts |= {"err_loss": errors.loss, "err_dh": errors.grad_hidden, "err_dw": errors.grad_weight}
        facts["wrong"] = refusal(errors, allowed)
    del result
    extra = extra_memory(call, case.device)
    return facts | {"extra_mib": None if extra is None else extra / MIB}


def host_seconds(call: Callable[[], object]) -> float:
    """Until the call returns: where it passes the device's time, the host is what a call waits for."""
    wait(DEVICE)
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    wait(DEVICE)
    return seconds


def kernels(probe: Probe, most: int = 14) -> None:
    """The kernels of one call, their times summed by name, the longest first."""
    inputs = make_inputs(probe.case)
    for contestant in taking_part(probe, "kernels", (BARE, OURS)):
        for work in WORKS:
            call = partial(contestant.run, replace(probe.case, work=work), inputs)
            for _ in range(2):
                call()
            wait(DEVICE)
            on_gpu = DEVICE == "cuda"
            with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as seen:
                call()
                wait(DEVICE)
            events = [event for event in seen.events() if not on_gpu or str(event.device_type).endswith("CUDA")]
            spans: dict[str, list[float]] = {}
            for event in events:
                spans.setdefault(event.name, []).append(event.time_range.elapsed_us())
            first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
            of = f"{contestant.name}, {work}"
            busy = sum(map(sum, spans.values()))
            probe.row("kernels", of, kernels=len(events), busy_ms=busy / 1e3, span_ms=(last - first) / 1e3)
            for name, us in sorted(spans.items(), key=lambda item: -sum(item[1]))[:most]:
                figures = {"ms": sum(us) / 1e3, "least_us": min(us), "most_us": max(us)}
                probe.row("kernels", f"  {name[:90]}", of=of, launches=len(us), **figures)


def graphs(probe: Probe) -> None:
    if DEVICE == "cpu":
        return probe.row("graphs", "all", left_out="needs a CUDA or ROCm device")
    inputs = make_inputs(probe.case)
    for work in WORKS:
        case = replace(probe.case, work=work)
        ways = {
            f"{OURS}, num_valid given": partial(ours, case, inputs, backend="triton", num_valid=case.N),
            "plain torch": partial(per_token, plain_torch, case, inputs),
        }
        bare = seconds_of(partial(bare_products, case, inputs))
        for name, call in ways.items():
            for _ in range(3):  # compiles
                eager = call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call()
            graph.replay()
            wait(DEVICE)
            equal = all(a is b or bool(torch.equal(a, b)) for a, b in zip(captured, eager, strict=True))
            probe.bad += name.startswith(OURS) and not equal
            seconds = [seconds_of(way) for way in (graph.replay, call)]
            probe.row(
                "graphs", f"{name}, {work}", ms=1e3 * seconds[0], eager_ms=1e3 * seconds[1],
                x_bare=seconds[0] / bare, equal=equal,
            )  # fmt: skip


def one(probe: Probe) -> None:
    device = torch.device(DEVICE)
    if DEVICE == "cpu" and not triton_runs_on_cpu():
        return probe.row("one", "all", left_out="needs a GPU, or TRITON_INTERPRET=1")
    problem = Problem(DTYPE, probe.case.D, probe.case.N, softcap=False)
    first = first_tile(device)

    def thrice(call: Callable[[], object]) -> float:
        return sum(autotune.on_host(call) for _ in range(3))

    times = autotune.tune(problem, probe.case.V, device, thrice, tiles=(first,))
    probe.row("one", str(first), launches=4, agreed=bool(times))


STAGES = {stage.__name__: stage for stage in (ceilings, products, calls, tiles, peers, kernels, graphs, one)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file that the rows are added to")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Qwen3"], help="whose sizes (default: Qwen3)")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="valid tokens (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="(default: all)")
    parser.add_argument("--tiny", action="store_true", help="32 tokens, a vocabulary of 256: no measurement")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.tiny:
        parser.error("found no CUDA or ROCm device to measure; --tiny tries the stages on a CPU")
    bad = 0
    for model in args.models:
        probe = Probe(args.out, model, args.tokens, tiny=args.tiny)
        for stage in args.stages:
            probe.run(stage)
        bad += probe.bad
    if bad:
        sys.exit(f"{bad} stages or answers of asft_kernels failed or are wrong, see above")


if __name__ == "__main__":
    main()
