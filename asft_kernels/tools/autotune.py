"""Times the candidates for a chunk's exponentials (tiles, strips) and for dW on this device, and stores the times.

Later calls take the fastest:

    python -m asft_kernels.tools.autotune --hidden-size 4096 --vocab 151936 --dtype bfloat16 [--tokens 2048 8192]
    python -m asft_kernels.tools.autotune --show

Nothing is tuned unless this command runs: the table's first tile is used, and results repeat bit by bit
from one machine to the next. A stored choice holds for calls of the same dtype, hidden size, softcap or
none, and number of tokens to the next power of 2; ASFT_KERNELS_TUNED=0 ignores it, and so does another
Triton or another table. A candidate that does not run, or whose result differs from torch's by more than
roundings can, is left out; where none is right the command fails. An error after which the device answers nothing
more ends the command: what was timed before it stays.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton

from asft_kernels.backends import exp_dtype, triton_runs_on_cpu
from asft_kernels.backends.plan import make_plan
from asft_kernels.backends.triton_fused import GRADIENTS
from asft_kernels.core.linear_logps import exact_products
from asft_kernels.kernels.configs import Strips, Tile, architecture_of, candidates, forms, multiprocessors
from asft_kernels.kernels.exp_epilogue import TileSums, empty_exps
from asft_kernels.kernels.logits_exp import logits_exp, operand_rows
from asft_kernels.kernels.tile_choice import Problem, cache_file, store_times, stored_times

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Case:
    """One chunk of a call: random hidden states, a head of unit rows, logits of a few units."""

    def __init__(self, problem: Problem, vocab: int, device: torch.device):
        N, D, dtype = problem.tokens, problem.hidden_size, problem.dtype
        stored = exp_dtype("triton", dtype)
        self.plan = make_plan(
            N, vocab, D, exp_bytes=stored.itemsize, chunk_size=None, cache_bytes=0, device_type=device.type,
            multiprocessors=multiprocessors(device),
        )  # fmt: skip
        width = self.plan.chunk
        gen = torch.Generator(device).manual_seed(0)
        random = partial(torch.randn, generator=gen, device=device)
        self.hidden, self.weight = random(N, D).to(dtype), (random(width, D) / D**0.5).to(dtype)
        self.rows = torch.arange(N, device=device)
        self.labels = torch.randint(width, (N,), generator=gen, device=device)
        self.ref = torch.zeros(N, device=device)
        self.softcap = 30.0 if problem.softcap else None
        self.exps = empty_exps(N, width, stored, device)

    def call(self, tile: Tile | Strips) -> Callable[[], TileSums | None]:
        return partial(
            logits_exp, self.exps, operand_rows(self.hidden, self.rows, tile), self.weight, None, self.rows,
            self.labels, self.ref, first=0, scale=1.0, softcap=self.softcap, sums=True, tile=tile,
        )  # fmt: skip

    def right(self) -> torch.Tensor:
        """(N, width + 1) fp32: E' and, last, the sums, as `logits_exp` defines them, by torch."""
        logits, slope = self.hidden.float() @ self.weight.float().T, 1.0
        if self.softcap is not None:
            capped = (logits / self.softcap).tanh()
            logits, slope = self.softcap * capped, 1 - capped.square()
        exps = logits.exp().scatter_(1, self.labels[:, None], 0)
        return torch.cat([exps * slope, exps.sum(1, keepdim=True)], 1)

    def largest_difference(self) -> float:
        """Of two correct results, relative: D roundings of |h| |w| in each exponent, and one of each that is stored."""
        size = self.hidden.float().norm(dim=1).max() * self.weight.float().norm(dim=1).max()
        return 2 * (len(self.hidden[0]) + 4) * 2**-24 * size.item() + 2 * torch.finfo(self.exps.dtype).eps


class GradientCase:
    """All of dW, each of whose chunks is made of the same exponentials; labels as frequent as by Zipf's law."""

    def __init__(self, problem: Problem, vocab: int, device: torch.device):
        case = Case(problem, vocab, device)
        gen = torch.Generator(device).manual_seed(0)
        (N, D), self.plan, self.hidden, self.rows = case.hidden.shape, case.plan, case.hidden, case.rows
        self.exps = empty_exps(N, case.exps.shape[1], case.exps.dtype, device)
        self.exps.copy_(torch.rand(self.exps.shape, generator=gen, device=device))
        self.labels = (vocab ** torch.rand(N, generator=gen, device=device)).long().clamp(max=vocab - 1)
        self.pull = torch.randn(N, generator=gen, device=device)
        self.scaled = torch.randn(N, D, generator=gen, device=device).to(problem.dtype)
        self.weight = torch.empty(vocab, D, dtype=problem.dtype, device=device)  # its shape and dtype are asked for

    def call(self, form: str) -> Callable[[], torch.Tensor]:
        def gradient() -> torch.Tensor:
            dW = GRADIENTS[form](
                self.weight, self.plan, self.hidden, self.rows, self.labels, self.pull, self.scaled
            )  # fmt: skip
            for k, (start, stop) in enumerate(self.plan.slices):
                dW.add(k, self.exps[:, : stop - start])
            return dW.finish()

        return gradient

    def excess(self, got: torch.Tensor) -> float:
        """How far any row lies beyond one rounding, in units of the sum of the sizes of its terms."""
        excess, H = [0.0], self.scaled.float()
        for start, stop in self.plan.slices:
            E, inside = self.exps[:, : stop - start].float(), (self.labels >= start) & (self.labels < stop)
            own = (self.pull[:, None] * self.hidden.float())[inside]
            right, size = (
                (E.T @ h).index_add(0, self.labels[inside] - start, x) for h, x in ((H, own), (H.abs(), own.abs()))
            )
            off = (got[start:stop].float() - right).abs() - torch.finfo(got.dtype).eps * right.abs()
            excess.append((off / size.clamp(min=1e-30)).max().item())
        return float("nan") if any(x != x for x in excess) else max(excess)

    def largest_excess(self) -> float:
        """N + 8 roundings of fp32 sums, in each of the two results; matrix units may cut where others round."""
        return 3 * (len(self.rows) + 8) * 2**-24


class DeviceLost(Exception):
    """After a candidate's error the device answers no call of this process. times: of the candidates before it."""

    def __init__(self, message: str, times: dict[str, float]):
        super().__init__(message)
        self.times = times


def answers(device: torch.device) -> bool:
    """Whether this process can still use the device: an illegal address, for one, fails every later call, too."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def on_device(call: Callable[[], object]) -> float:
    return triton.testing.do_bench(call, return_mode="median")  # pyright: ignore[reportReturnType]


def on_host(call: Callable[[], object]) -> float:
    """One call by the clock: for the interpreter, whose times mean nothing."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


Timer = Callable[[Callable[[], object]], float]


def tune(
    problem: Problem,
    vocab: int,
    device: torch.device,
    timer: Timer,
    tiles: tuple[Tile | Strips, ...] | None = None,
) -> dict[str, float]:
    """Milliseconds that a chunk's exponentials take by every candidate that runs and agrees with torch.

    Prints a line for each. Raises DeviceLost where a candidate's error leaves a device that answers no later one.
    """
    case = Case(problem, vocab, device)
    if tiles is None:
        tiles = candidates(architecture_of(device), problem.dtype, softcap=problem.softcap)
    right = case.right()
    N, width = case.exps.shape
    print(f"{problem}: {width} vocabulary rows a chunk", flush=True)

    def off(sums: TileSums | None) -> float:
        assert sums is not None
        got = torch.cat([case.exps.float(), sums.sums.sum(0)[:, None]], 1)
        case.exps.fill_(torch.nan)  # for the next one
        return ((got - right).abs() / right.clamp(min=1e-30)).max().item()  # a label's is 0 in both

    case.exps.fill_(torch.nan)
    calls = {str(tile): case.call(tile) for tile in tiles}
    operations = 2 * N * width * problem.hidden_size
    return _timed(str(problem), calls, off, case.largest_difference(), operations, device, timer)


def tune_gradient(problem: Problem, vocab: int, device: torch.device, timer: Timer) -> dict[str, float]:
    """The same of the ways to sum and round dW, where there are several."""
    ways = forms(problem.dtype, problem.tokens)
    if len(ways) == 1:
        return {}
    case = GradientCase(problem, vocab, device)
    print(problem.of_gradient, flush=True)
    calls = {form: case.call(form) for form in ways}
    operations = 2 * problem.tokens * vocab * problem.hidden_size
    return _timed(problem.of_gradient, calls, case.excess, case.largest_excess(), operations, device, timer)


def _timed(
    what: str,
    calls: dict[str, Callable[[], Any]],
    off: Callable[[Any], float],
    allowed: float,
    operations: float,
    device: torch.device,
    timer: Timer,
) -> dict[str, float]:
    times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            with exact_products(device.type):
                differs = off(call())
                if not differs <= allowed:  # NaN fails, too
                    print(f"  {name:55} left out: differs from torch's by {differs:.1e} (relative)", flush=True)
                    continue
                times[name] = timer(call)
        except Exception as error:  # whatever a compiler or a driver may raise
            said = f"{type(error).__name__}: {str(error).strip()[:200]}"
            if not answers(device):
                raise DeviceLost(f"{what}: the device answers no more after {name}: {said}", times) from error
            print(f"  {name:55} left out: {said}", flush=True)
            continue
        rate = operations / times[name] / 1e9
        print(f"  {name:55} {times[name]:9.3f} ms {rate:8.2f} TFLOP/s", flush=True)
    return times


def show(device: torch.device) -> None:
    print(cache_file(device))
    problems = stored_times(device)
    for problem, times in problems.items():
        print(problem)
        for tile, ms in sorted(times.items(), key=lambda item: item[1]):
            print(f"  {tile:55} {ms:9.3f} ms")
    if not problems:
        print("nothing stored: the table's first tile is used for every call")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m asft_kernels.tools.autotune",
        description="Time the candidates of the tile table on this device and store the times: later calls of the same "
        "dtype, hidden size, softcap or none, and number of tokens take the fastest.",
    )
    parser.add_argument("--hidden-size", type=int, help="D of the model; required except with --show")
    parser.add_argument("--vocab", type=int, help="V of the model; required except with --show")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of hidden states and head (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096, 8192],
        metavar="N",
        help="valid tokens of a call: timed at N, stored for all calls whose number of tokens has the same next power "
        "of 2 as N (5000 and 8192 share a choice, 4096 has another) (default: %(default)s)",
    )
    parser.add_argument("--softcap", action="store_true", help="for a model whose logits are soft-capped")
    parser.add_argument("--show", action="store_true", help="print what is stored for this device, tune nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not triton_runs_on_cpu():
        parser.error("found no CUDA or ROCm device to time; set TRITON_INTERPRET=1 to try the command on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.show:
        if device.type == "cpu":
            parser.error("--show: nothing is ever stored for a CPU")
        return show(device)
    if not options.hidden_size or not options.vocab:
        parser.error("--hidden-size and --vocab: need both, or --show")
    if options.hidden_size % 16:
        parser.error(
            f"--hidden-size: got {options.hidden_size}, need a multiple of 16; calls of other sizes take a tile of "
            "their own, and nothing that is stored"
        )
    timer = on_device if device.type == "cuda" else on_host
    for tokens in options.tokens:
        problem = Problem(DTYPES[options.dtype], options.hidden_size, tokens, options.softcap)
        for what, measure in ((str(problem), tune), (problem.of_gradient, tune_gradient)):
            lost = None
            try:
                times = measure(problem, options.vocab, device, timer)
            except DeviceLost as error:
                lost, times = error, error.times
            if lost and not times:
                raise SystemExit(f"{lost}\nnothing is stored for it, and later problems were not tried")
            if not times and measure is tune:
                raise SystemExit(f"{what}: no candidate is right on this device, see above; nothing is stored for it")
            if times and device.type == "cpu":
                print("interpreted on a CPU: no measurement of a device, nothing is stored")
            elif times:
                print(f"stored in {store_times(device, what, times)}")
            if lost:
                raise SystemExit(f"{lost}\nonly the candidates before it are stored, and later problems were not tried")


if __name__ == "__main__":
    main()
