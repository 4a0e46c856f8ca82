"""One case: every contestant checked, its memory measured, then all timed in turn, round by round."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import WORKS, Case, Inputs, make_inputs
from benchmarks.contestants import BARE, Contestant
from benchmarks.machine import GIB, available_memory, import_seconds
from benchmarks.measure import CPU_SECONDS, GPU_SECONDS, GemmRate
from benchmarks.worker import Contender, Preparation, Worker, WorkerFailed

MEMORY_LIMIT = 24 * GIB  # of a worker at most: less where the machine has less, as the row then says
RESTING = {"cpu": GIB // 4, "cuda": GIB // 2}  # bytes of a worker between its calls, inputs aside
# Share of the available memory that idle workers may take; the rest is for the peak of the one that works.
IDLE_SHARE = {"cpu": 0.2, "cuda": 0.6}
FIRST = 5  # times as long as another call may a first one take, which compiles
NO_ERRORS = dict.fromkeys(("err_loss", "err_dh", "err_dw", "tol_loss", "tol_grad"))


class Prepared:
    """Inputs and exact answers of one case at a time, on disk, for as long as the following cases share them."""

    def __init__(self, make: Callable[[Case], Inputs] = make_inputs):
        self.make, self.case, self.folder = make, None, None

    def folder_of(self, case: Case) -> Path:
        if self.folder is None or self.case != case.same_inputs:
            self.close()
            self.folder = tempfile.TemporaryDirectory(prefix="asft-benchmark-")
            worker = Worker(Preparation, case, Path(self.folder.name), self.make)
            try:
                worker.ask("run", limit=1800)
            finally:
                worker.close()
            self.case = case.same_inputs
        return Path(self.folder.name)

    def close(self) -> None:
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = self.case = None


@dataclass
class Entry:
    """A contestant in a case: its worker while there is one, and what is known of it."""

    contestant: Contestant
    worker: Worker | None = None
    status: str = "ok"
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def close(self, patience: float = 5) -> None:
        if self.worker is not None:
            self.worker.close(patience)
            self.worker = None

    def fail(self, reason: str, status: str = "failed") -> None:
        self.status, self.seconds = status, []
        self.facts["reason"] = reason
        self.close()


@lru_cache
def gemm_rate(device: str, dtype: str) -> float:
    """Measured once a run, in a process of its own."""
    worker = Worker(GemmRate, device, dtype)
    try:
        return worker.ask("run")
    finally:
        worker.close()


package_import_seconds = lru_cache(import_seconds)


class Stopped(KeyboardInterrupt):
    """Ctrl-C in the middle of a case; rows: of the contestants that were timed, or failed, until then."""

    def __init__(self, rows: list[dict]):
        super().__init__()
        self.rows = rows


def fit_together(case: Case, contestants: int, available: int) -> bool:
    """Whether the workers of all contestants may stay for all rounds; else each round starts its own."""
    inputs_bytes = (case.M + case.V) * case.D * case.torch_dtype.itemsize
    return contestants * (inputs_bytes + RESTING[case.device]) < IDLE_SHARE[case.device] * available


def _check(entry: Entry, case: Case, folder: Path, memory_limit: int | None, limit: float) -> None:
    """First call, answer and memory; the worker stays for the rounds."""
    entry.facts["import_s"] = package_import_seconds(entry.contestant.module)
    try:
        entry.worker = Worker(Contender, entry.contestant, case, folder, memory_limit=memory_limit)
        entry.facts["first_call_s"] = entry.worker.ask("start", limit=FIRST * limit)
        entry.facts |= entry.worker.ask("check", limit=FIRST * limit)
        if entry.facts.get("reason"):
            entry.fail(entry.facts["reason"], "refused")
        else:
            entry.facts["tile"] = entry.worker.ask("tile", limit=limit)
            entry.facts["extra_bytes"] = entry.worker.ask("memory", limit=limit)
    except WorkerFailed as failure:
        entry.fail(str(failure))


def measure_case(case: Case, contestants: list[Contestant], prepared: Prepared, *, limit: float = 300) -> list[dict]:
    """The rows of a case, but for what is the same in all rows of a run. limit: seconds that one call may take."""
    available = available_memory(case.device)
    memory_limit = min(MEMORY_LIMIT, int(0.8 * available)) if case.device == "cpu" else None
    together = not case.apart and fit_together(case, len(contestants), available)
    case = replace(case, apart=not together)
    entries = [Entry(contestant, facts={"memory_limit": memory_limit}) for contestant in contestants]
    try:
        folder = prepared.folder_of(case)
    except WorkerFailed as failure:
        for entry in entries:
            entry.fail(f"no inputs or exact answers: {failure}")
        return _rows(case, entries)
    try:
        for entry in entries:
            _check(entry, case, folder, memory_limit, limit)
            if not together:
                entry.close()
        for turn in range(case.rounds):
            # Back and forth: nobody always comes after the one that leaves the caches or the clock at their worst.
            for entry in entries if turn % 2 == 0 else reversed(entries):
                if entry.status == "ok":
                    _time(entry, case, folder, memory_limit, limit, together)
    except KeyboardInterrupt:
        for entry in entries:
            entry.close(patience=0)
        raise Stopped(_rows(case, [e for e in entries if e.seconds or e.status != "ok"])) from None
    finally:
        for entry in entries:
            entry.close()
    return _rows(case, entries)


def _time(entry: Entry, case: Case, folder: Path, memory_limit: int | None, limit: float, together: bool) -> None:
    try:
        if entry.worker is None:
            entry.worker = Worker(Contender, entry.contestant, case, folder, memory_limit=memory_limit)
            entry.worker.ask("start", limit=FIRST * limit)
            entry.worker.ask("time", limit=FIRST * limit)  # compiles and warms, not counted
        entry.seconds.append(entry.worker.ask("time", limit=limit))
        if not together:
            entry.close()
    except WorkerFailed as failure:
        entry.fail(str(failure))


def _rows(case: Case, entries: list[Entry]) -> list[dict]:
    bare = next((median(e.seconds) for e in entries if e.contestant.name == BARE and e.seconds), None)
    return [_row(case, entry, bare) for entry in entries]


def _row(case: Case, entry: Entry, bare: float | None) -> dict:
    contestant, seconds = entry.contestant, entry.seconds
    middle = median(seconds) if seconds else None
    rate = gemm_rate(case.device, case.dtype)
    flops = (1 + WORKS.index(case.work)) * 2 * case.N * case.V * case.D
    return {
        "kind": "cost",
        **case.row,
        "contestant": contestant.name,
        "package": contestant.package,
        "version": contestant.version,
        "note": contestant.note,
        "gemms": contestant.products(case),
        "status": entry.status,
        "reason": "",
        "first_call_s": None,
        "import_s": None,
        "extra_bytes": None,
        "tile": None,
        **NO_ERRORS,
        **entry.facts,
        "seconds": middle,
        "seconds_min": min(seconds, default=None),
        "seconds_max": max(seconds, default=None),
        "rounds": len(seconds),
        "round_seconds": CPU_SECONDS if case.device == "cpu" else GPU_SECONDS,
        "ratio": middle / bare if middle and bare else None,
        "gemm_share": flops / middle / rate if middle else None,
        "gemm_flops_per_s": rate,
    }
