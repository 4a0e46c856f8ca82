"""Processes that do the work: one a contestant, asked step by step, so that the runner can take them in turn.

A worker that raises, dies or does not answer in time raises WorkerFailed in the runner, with the reason, and nothing
else happens. Workers are forked from a server that has torch loaded and has run nothing.
"""

import gc
import importlib
import multiprocessing
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.calls import Result
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.contestants import Contestant, Ours
from benchmarks.machine import GIB
from benchmarks.measure import extra_memory, release, seconds_of_call, wait
from benchmarks.oracle import Exact, compare, exact_answer, refusal, tolerance

INPUTS, EXACT = "inputs.pt", "exact.pt"


class WorkerFailed(Exception):
    """What went wrong in a worker, in one line."""


class Worker:
    """A process around one object: `ask("step")` calls its method there and returns the result."""

    def __init__(self, make: Callable[..., Any], *args: Any, memory_limit: int | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args, memory_limit), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, step: str, *args: Any, limit: float = 600) -> Any:
        """Raises WorkerFailed, after which the process is gone."""
        try:
            self.connection.send((step, args))
            if not self.connection.poll(limit):
                self.close(patience=0)
                raise WorkerFailed(f"no answer within {limit:.0f} s")
            done, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.close()
            ended = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
            raise WorkerFailed(f"the process died: {ended}") from None
        if not done:
            self.close()
            raise WorkerFailed(answer)
        return answer

    def close(self, patience: float = 5) -> None:
        """The process ends by itself when nobody asks any more; after patience it is killed."""
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, make: Callable[..., Any], args: tuple, memory_limit: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes of its own, which would outlive this one
    if memory_limit is not None:  # of private writable memory, so that a large allocation fails instead of the machine
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
    server = make(*args)
    while True:
        try:
            step, step_args = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(server, step)(*step_args)
        except Exception as error:
            answer = False, _reason(error, memory_limit)
        connection.send(answer)


def _reason(error: Exception, memory_limit: int | None) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    text = re.sub(r"^\[enforce fail at [^]]*\] err == 0\. ", "", text)  # of torch's CPU allocator
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if not memory:
        return f"{type(error).__name__}: {text}"
    limit = "" if memory_limit is None else f" under a limit of {memory_limit / GIB:.1f} GiB"
    return f"out of memory{limit}: {text}"


class Preparation:
    """Makes a case's inputs and exact answers and leaves them in a folder."""

    def __init__(self, case: Case, folder: Path, make: Callable[[Case], Inputs] = make_inputs):
        self.case, self.folder, self.make = case, folder, make

    def run(self) -> None:
        torch.save(self.make(self.case)._asdict(), self.folder / INPUTS)
        exact = exact_answer(self.case, load_inputs(self.folder, self.case.device))
        torch.save(exact._asdict(), self.folder / EXACT)


def load_inputs(folder: Path, device: str) -> Inputs:
    return Inputs(**torch.load(folder / INPUTS, map_location=device))


def load_exact(folder: Path, result: Result) -> Exact:
    """The gradients that the result has, where it has them: those of a head are gigabytes."""
    exact = Exact(**torch.load(folder / EXACT, mmap=True))
    given = zip(("grad_hidden", "grad_weight"), result[1:], strict=True)
    moved = {name: getattr(exact, name).to(x.device) for name, x in given if x is not None}
    return exact._replace(**moved)


class Contender:
    """One contestant on one case: first a tiny call, then a checked one, then memory and time."""

    inputs: Inputs

    def __init__(self, contestant: Contestant, case: Case, folder: Path):
        self.contestant, self.case, self.folder = contestant, case, folder

    def start(self) -> float:
        """Seconds of the first call, of a few tokens, after the import of its package."""
        try:
            importlib.import_module(self.contestant.module)
        except ModuleNotFoundError as error:
            raise RuntimeError(f'{error.name} is not installed: pip install -e ".[bench]"') from error
        if isinstance(self.contestant, Ours) and self.contestant.tuned:
            os.environ["ASFT_KERNELS_TUNED"] = "1"
        tiny = self.case.tiny()
        inputs = make_inputs(tiny)
        began = time.perf_counter()
        self.contestant.run(tiny, inputs)
        wait(self.case.device)
        seconds = time.perf_counter() - began
        self.load(self.case, self.folder)
        return seconds

    def load(self, case: Case, folder: Path) -> None:
        """Go over to a case whose inputs are in a folder."""
        self.case, self.folder, self.inputs = case, folder, load_inputs(folder, case.device)

    def call(self) -> Result:
        return self.contestant.run(self.case, self.inputs)

    def check(self) -> dict[str, Any]:
        """The first call at full size, against float64: the errors, what is allowed, and why it is refused, if so."""
        result = self.call()
        if not self.contestant.checked:
            del result
            release(self.case.device)
            return {}
        exact = load_exact(self.folder, result)
        errors, allowed = compare(result, exact), tolerance(self.case, exact, self.contestant.package)
        del result, exact
        release(self.case.device)
        return {
            "err_loss": errors.loss,
            "err_dh": errors.grad_hidden,
            "err_dw": errors.grad_weight,
            "tol_loss": allowed.loss,
            "tol_grad": allowed.grad,
            "reason": refusal(errors, allowed),
        }

    def tile(self) -> str | None:
        """That of this package's Triton backend, with "tuned: " before one that autotune measured; None of others."""
        if not isinstance(self.contestant, Ours) or self.contestant.backend != "triton":
            return None
        from asft_kernels.backends import Logits, triton_fused

        hidden, rows = self.inputs.hidden.flatten(0, 1), torch.empty(self.case.N)
        tile = triton_fused._tile(hidden, triton_fused.chunks_aligned(self.inputs.weight), rows, Logits())
        measured = tile.why.startswith("measured")
        if self.contestant.tuned and not measured:
            raise RuntimeError("no stored tile for this problem: run python -m asft_kernels.tools.autotune")
        return f"tuned: {tile}" if measured else str(tile)

    def memory(self) -> int | None:
        gc.collect()
        return extra_memory(self.call, self.case.device)

    def time(self) -> float:
        return seconds_of_call(self.call, self.case.device)
