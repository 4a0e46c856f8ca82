"""Time, memory and accuracy of every contestant on every case of a suite, in rows of JSON.

    python -m benchmarks.run                   # the suite of the device that is here: cpu or gpu
    python -m benchmarks.run main growth-n     # some of its sets
    python -m benchmarks.run floor             # ours beside its own products alone, on a CPU
    python -m benchmarks.run smoke             # everything once, tiny: does it all work here?

Each contestant of a case runs in a process of its own. After a first tiny call (imports and compilation, reported
apart) its answer is checked against float64: a wrong one has no time. Then its extra memory is measured, and then the
contestants take turns, a call each round; the figure is the median. Rows are written as cases end, or when Ctrl-C ends
one: of fewer rounds then. A run that was cut off goes on where it stopped when started again with the same sources:
what has a row is not measured again.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import estimate
from benchmarks.cases import SUITES, Case, select
from benchmarks.contestants import BARE, CONTESTANTS, Contestant, contestants_of
from benchmarks.machine import about, device_slug
from benchmarks.runner import Prepared, Stopped, gemm_rate, measure_case

Key = tuple[str, str, str, str, str]


def key(row: dict) -> Key:
    """What makes a row the same measurement."""
    return row["about"]["commit"], row["kind"], row["set"], row["case"], row["contestant"]


def rows_of(path: Path) -> list[dict]:
    """Rows of an earlier run; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * bool(cut_off) + "".join(json.dumps(row) + "\n" for row in rows))


def missing(case: Case, contestants: list[Contestant], done: set[Key], commit: str) -> list[Contestant]:
    """Contestants without a row, and the bare products with them, which their ratios need."""
    left = [c for c in contestants if (commit, "cost", case.set, case.id, c.name) not in done]
    return [c for c in contestants if c in left or c.name == BARE] if left else []


def run(cases: list[Case], names: list[str], path: Path, facts: dict, limit: float) -> int:
    """Measure what has no row in path yet; the number of rows that are not ok."""
    done = {key(row) for row in rows_of(path)}
    plan = []
    for case in cases:
        contestants = [
            c for c in contestants_of(case) if not names or c.name == BARE or any(n in c.name for n in names)
        ]
        left = missing(case, contestants, done, facts["commit"])
        if left:
            rate = gemm_rate(case.device, case.dtype)
            plan.append((case, left, estimate.seconds(case, left, rate)))
    total = sum(seconds for *_, seconds in plan)
    print(
        f"{len(plan)} of {len(cases)} cases to measure, about {total / 60:.0f} minutes; rows go to {path}", flush=True
    )
    bad = 0
    prepared = Prepared()
    bar = tqdm(total=round(total), disable=None, bar_format="{l_bar}{bar}| {elapsed}, about {remaining} left")
    try:
        for case, left, seconds in plan:
            bar.write(f"{case.set}: {case.id}")
            stopped = None
            try:
                rows = measure_case(case, left, prepared, limit=limit)
            except Stopped as stop:
                rows, stopped = stop.rows, stop
            rows = [row | {"about": facts} for row in rows]
            append(path, [row for row in rows if key(row) not in done])
            if stopped:
                raise stopped
            for row in rows:
                bad += row["status"] != "ok"
                bar.write("  " + summary(row))
            bar.update(round(seconds))
    finally:
        bar.close()
        prepared.close()
    return bad


def summary(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['contestant']:40} {row['status']}: {row['reason']}"
    ratio = f"{row['ratio']:6.2f} x" if row["ratio"] else ""
    memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:8.0f} MiB"
    return f"{row['contestant']:40} {row['seconds']:9.4f} s {ratio} {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    default = "gpu" if here == "cuda" else "cpu"
    parser.add_argument("sets", nargs="*", default=[default], help=f"{', '.join(SUITES)}, or sets of {default}")
    parser.add_argument("--rounds", type=int, help="timed calls of each contestant, instead of the case's own number")
    parser.add_argument("--contestants", nargs="+", default=[], metavar="NAME", help="only names with this in them")
    parser.add_argument("--out", type=Path, help="file of rows (default: bench_results/DATE-DEVICE.jsonl)")
    parser.add_argument(
        "--limit",
        type=float,
        default=120,
        help="seconds that one call may take, a first one five times that (default 120)",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and contestants, and measure nothing")
    args = parser.parse_args()
    try:
        cases = select(args.sets, here)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print(*(f"{case.set}: {case.id}" for case in cases), sep="\n")
        print(*(f"{c.name} ({c.package} {c.version}): {c.note}" for c in CONTESTANTS), sep="\n")
        return
    if any(case.device != here for case in cases):
        parser.error(f"these cases are for another device than the one here ({here})")
    if args.rounds:
        cases = [replace(case, rounds=args.rounds) for case in cases]
    path = args.out or Path("bench_results") / f"{date.today()}-{device_slug(here)}.jsonl"
    try:
        run(cases, args.contestants, path, about(here, "benchmarks.run", sys.argv[1:]), args.limit)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the rows so far are in {path}, and the same command goes on")


if __name__ == "__main__":
    main()
