"""Time and memory of one loss on the CPU, beside the bare matrix products and the strongest CPU rivals.

    python -m benchmarks.ratios                      # the default shape, some 3 minutes
    python -m benchmarks.ratios --vocab 128256 --rounds 3

Every contestant computes the same ASFT loss of the same tokens and its gradients; its loss must agree with ours before
it is timed. Contestants alternate, round after round, in one process; the figure is the median, with the range. The
bare products are those of our schedule, chunk by chunk into freshly allocated memory, and nothing else. Extra memory
is the peak of the resident set over that before the call, in a process of its own, after a first tiny call. Rows go to
bench_results/DATE-cpu-ratios.jsonl, one a measurement.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from asft_kernels import fused_asft_loss
from asft_kernels.backends.plan import DEFAULT_CACHE_BYTES, make_plan
from asft_kernels.objectives import ASFT
from asft_kernels.sequence import Logps

MIB = 2**20


class Case:
    """4 rows of hidden states of which N positions carry loss, and a head."""

    def __init__(self, N: int, M: int, D: int, V: int):
        gen = torch.Generator().manual_seed(0)
        self.N, self.M, self.D, self.V = N, M, D, V
        self.hidden = torch.randn(4, M // 4, D, generator=gen)
        self.weight = torch.randn(V, D, generator=gen) * 0.02
        labels = torch.randint(V, (M,), generator=gen)
        masked = torch.randperm(M, generator=gen)[N:]
        self.labels = labels.index_fill(0, masked, -100).view(4, -1)

    def leaves(self, head: bool) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(head)


def ours(case: Case, *, grad: bool = True, head: bool = False, cache_bytes: int | None = None) -> float:
    hidden, weight = case.leaves(head) if grad else (case.hidden, case.weight)
    loss = fused_asft_loss(hidden, weight, case.labels, shift=False, cache_bytes=cache_bytes)
    if grad:
        loss.backward()
    return loss.item()


def asft_of(logps: Tensor, case: Case) -> Tensor:
    """The same loss from any contestant's per-token log-probabilities, (M,), 0 where masked."""
    sums = logps.view(4, -1).double().sum(1)
    return ASFT()(Logps(sums, (case.labels != -100).sum(1))).loss.mean().float()


def plain_torch(case: Case, *, head: bool) -> float:
    hidden, weight = case.leaves(head)
    logits = torch.nn.functional.linear(hidden, weight).view(case.M, case.V)
    nll = torch.nn.functional.cross_entropy(logits, case.labels.view(-1), reduction="none")
    loss = asft_of(-nll, case)
    loss.backward()
    return loss.item()


def cce(case: Case, *, head: bool) -> float:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight = case.leaves(head)
    nll = linear_cross_entropy(
        hidden.view(case.M, case.D), weight, case.labels.view(-1), reduction="none", impl="torch_compile"
    )
    loss = asft_of(-nll, case)
    loss.backward()
    return loss.item()


def products(case: Case, count: int) -> None:
    """Nothing but our schedule's 1, 2, 3 or 4 products per chunk, into fresh memory."""
    plan = make_plan(
        case.N, case.V, case.D, exp_bytes=4, chunk_size=None, cache_bytes=DEFAULT_CACHE_BYTES, device_type="cpu"
    )
    cached = plan.cached if count == 3 else 0
    H = case.hidden.view(case.M, case.D)[: case.N]
    acc = torch.empty_like(H)
    grad = torch.empty_like(case.weight) if count >= 3 else None
    workspace = torch.empty(case.N, plan.chunk)
    exps = []
    for k, (start, stop) in enumerate(plan.slices):
        out = torch.empty(case.N, stop - start) if k < cached else workspace[:, : stop - start]
        E = torch.mm(H, case.weight[start:stop].T, out=out)
        if count >= 2:
            torch.addmm(acc, E, case.weight[start:stop], beta=min(k, 1), out=acc)
        if k < cached:
            exps.append(E)
    if grad is not None:
        for k, (start, stop) in enumerate(plan.slices):
            again = workspace[:, : stop - start]
            E = exps[k] if k < cached else torch.mm(H, case.weight[start:stop].T, out=again)
            torch.mm(E.T, H, out=grad[start:stop])


CONTESTANTS: dict[str, dict[str, Callable[[Case], float | None]]] = {
    "no gradient": {
        "bare products": lambda c: products(c, 1),
        "asft_kernels": lambda c: ours(c, grad=False),
    },
    "frozen head": {
        "bare products": lambda c: products(c, 2),
        "asft_kernels": lambda c: ours(c),
        "cut-cross-entropy torch_compile": lambda c: cce(c, head=False),
        "plain torch": lambda c: plain_torch(c, head=False),
    },
    "trainable head": {
        "bare products": lambda c: products(c, 3),
        "asft_kernels": lambda c: ours(c, head=True),
        "cut-cross-entropy torch_compile": lambda c: cce(c, head=True),
        "plain torch": lambda c: plain_torch(c, head=True),
    },
    "trainable head, cache_bytes=0": {
        "bare products": lambda c: products(c, 4),
        "asft_kernels": lambda c: ours(c, head=True, cache_bytes=0),
    },
}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_memory(call: Callable[[Case], float | None], case: Case) -> int:
    """Peak bytes of the resident set during the call over those before it; call it in a fresh process."""
    call(Case(8, 16, 8, 64))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak, VmHWM, counts from here
    call(case)
    return resident("VmHWM") - before


def machine() -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": of("torch"),
        "cut-cross-entropy": of("cut-cross-entropy"),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--valid", type=int, default=1024, help="tokens that carry loss, N")
    parser.add_argument("--positions", type=int, default=2048, help="positions of the batch, M (a multiple of 4)")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, D")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary, V")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("bench_results") / f"{date.today()}-cpu-ratios.jsonl")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = Case(args.valid, args.positions, args.hidden, args.vocab)
    if args.memory_of:
        work, name = args.memory_of
        print(extra_memory(CONTESTANTS[work][name], case))
        return
    args.out.parent.mkdir(exist_ok=True)
    shape = {"N": args.valid, "M": args.positions, "D": args.hidden, "V": args.vocab, "dtype": "float32"}
    same_shape = [f"--valid={case.N}", f"--positions={case.M}", f"--hidden={case.D}", f"--vocab={case.V}"]
    command = "python -m benchmarks.ratios " + " ".join(sys.argv[1:])
    about = {"date": str(date.today()), "command": command.strip(), **machine()}
    print(f"N={args.valid} of M={args.positions}, D={args.hidden}, V={args.vocab}, fp32; {about['cpu']}")
    print(f"{'':30} {'contestant':32} {'median s':>9} {'range':>15} {'x products':>10} {'extra MiB':>9}")
    with args.out.open("a") as out:
        for work, contestants in CONTESTANTS.items():
            losses = {name: call(case) for name, call in contestants.items()}  # warm, and checked
            for name, loss in losses.items():
                if loss is not None and abs(loss - losses["asft_kernels"]) > 1e-4 * abs(loss):
                    raise SystemExit(f"{name}: loss {loss}, ours {losses['asft_kernels']}: wrong answers have no speed")
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(args.rounds):
                for name, call in contestants.items():
                    began = time.perf_counter()
                    call(case)
                    seconds[name].append(time.perf_counter() - began)
            bare = statistics.median(seconds["bare products"])
            for name, times in seconds.items():
                child = [sys.executable, "-m", "benchmarks.ratios", *same_shape, "--memory-of", work, name]
                memory = int(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
                median = statistics.median(times)
                row = {
                    "work": work, "contestant": name, **shape, "seconds": median, "min": min(times),
                    "max": max(times), "rounds": args.rounds, "ratio": median / bare, "extra_bytes": memory, **about,
                }  # fmt: skip
                out.write(json.dumps(row) + "\n")
                out.flush()
                spread = f"{min(times):.3f}-{max(times):.3f}"
                print(
                    f"{work:30} {name:32} {median:9.3f} {spread:>15} {median / bare:10.3f} {memory / MIB:9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
