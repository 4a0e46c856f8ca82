"""Time, memory and accuracy of every contestant on every case of a suite, in rows of JSON.

    python -m benchmarks.run                   # the suite of the device that is here: cpu or gpu
    python -m benchmarks.run main growth-n     # some of its sets
    python -m benchmarks.run floor             # ours beside its own products alone, on a CPU
    python -m benchmarks.run smoke             # everything once, tiny: does it all work here? 3 minutes, no measurement

Each contestant of a case runs in a process of its own, in most of set floor one for each round. After a first tiny call
(imports and compilation, reported apart) its answer is checked against float64: a wrong one has no time. Then its extra
memory is measured, and then the contestants take turns, round by round: in a turn a call is repeated until a quarter of
a second is full, and its median counts (on a GPU 0.3 s and the mean); the figure is the median of the turns. Rows are
written as cases end, or when Ctrl-C ends one: of fewer rounds then. A run that was cut off goes on where it stopped
when started again with the same sources and packages: what has a row is not measured again, but for the bare products
and our default call, with which each run compares what it measures.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from benchmarks import estimate
from benchmarks.cases import SUITES, Case, select
from benchmarks.contestants import BARE, CONTESTANTS, TUNED, Contestant, Ours, contestants_of
from benchmarks.machine import about, device_slug, progress
from benchmarks.runner import Prepared, Stopped, gemm_rate, measure_case
from benchmarks.tables import OUR_DEFAULT

Key = tuple


def key(row: dict) -> Key:
    """What makes a row the same measurement: sources, case, contestant, versions, tiles, checks that had failed."""
    return _key(row["kind"], row["set"], row["case"], row["contestant"], row.get("version"), row["about"])


def _key(kind: str, set_: str, case: str, contestant: str, version: str | None, facts: dict) -> Key:
    stored = facts.get("stored_tiles") if contestant.endswith(TUNED) or facts.get("tuned") != "0" else None
    fields = ("commit", "sources", "python", "torch", "triton", "tuned", "failed_checks")
    of_run = (facts.get(field) for field in fields)
    return kind, set_, case, contestant, version, stored, *of_run


def has_row(kind: str, case: Case, contestant: Contestant, done: set[Key], facts: dict) -> bool:
    return _key(kind, case.set, case.id, contestant.name, contestant.version, facts) in done


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


def missing(case: Case, names: list[str], done: set[Key], facts: dict) -> list[Contestant]:
    """Those asked for without a row, and what they are compared with: the bare products and our default."""
    every, yardsticks = contestants_of(case), (BARE, OUR_DEFAULT[case.device])
    asked = [c for c in every if c.name == BARE or asked_for(c, names)]
    left = [c for c in asked if not has_row("cost", case, c, done, facts)]
    return [c for c in every if c in left or c.name in yardsticks] if left else []


def run(cases: list[Case], names: list[str], path: Path, facts: dict, limit: float) -> int:
    """Measure what has no row in path yet, or one that failed; the number of our own rows that are not ok."""
    done = {key(row) for row in rows_of(path) if row["status"] != "failed"}
    plan = []
    for case in cases:
        left = missing(case, names, done, facts)
        if left:
            rate = gemm_rate(case.device, case.dtype)
            plan.append((case, left, estimate.seconds(case, left, rate)))
    total = sum(seconds for *_, seconds in plan)
    print(
        f"{len(plan)} of {len(cases)} cases to measure, about {total / 60:.0f} minutes; rows go to {path}", flush=True
    )
    if any(case.set == "smoke" for case, *_ in plan):
        print("smoke: tiny shapes, to see that everything works; no measurement, and left out of every report")
    bad = 0
    prepared = Prepared()
    bar = progress(total=round(total), disable=None, bar_format="{l_bar}{bar}| {elapsed}, about {remaining} left")
    try:
        for case, left, seconds in plan:
            bar.write(f"{case.set}: {case.id}")
            stopped = None
            try:
                rows = measure_case(case, left, prepared, limit=limit)
            except Stopped as stop:
                rows, stopped = stop.rows, stop
            rows = [row | {"about": facts} for row in rows]
            append(path, rows)
            if stopped:
                raise stopped
            for row in rows:
                bad += row["status"] != "ok" and row["package"] == "asft_kernels"
                bar.write("  " + summary(row))
            bar.update(round(seconds))
    finally:
        bar.close()
        prepared.close()
    return bad


def asked_for(contestant: Contestant, names: list[str]) -> bool:
    if isinstance(contestant, Ours) and contestant.tuned:  # by name alone: it needs what autotune stored
        names = [name for name in names if TUNED.strip(", ") in name]
        return any(name in contestant.name for name in names)
    return not names or any(name in contestant.name for name in names)


def contestant_lines(names: list[str], cases: list[Case], here: str) -> list[str]:
    """Who is asked for, in columns: name, package, whether it runs here, note."""

    def place(c: Contestant) -> str:
        if c.version == "not installed":
            return "not installed"
        if any(case.device == here and c.takes(case) for case in cases):
            return "runs here"
        return "in none of these cases" if here in c.devices else f"needs {' or '.join(c.devices)}"

    asked = [c for c in CONTESTANTS if asked_for(c, names)]
    table = [(c.name, f"{c.package} {c.version}", place(c), c.note) for c in asked]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]


def summary(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['contestant']:40} {row['status']}: {row['reason']}"
    ratio = f"{row['ratio']:6.2f} x" if row["ratio"] else ""
    memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:8.0f} MiB"
    return f"{row['contestant']:40} {row['seconds']:9.4f} s {ratio} {memory}"


def rounds(text: str) -> int:
    """Of argparse: a number of rounds."""
    if not (text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"got {text}, need a whole number, 1 or more")
    return int(text)


def limit(text: str) -> float:
    """Of argparse: a number of seconds."""
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, need a finite number of seconds above 0")
    return seconds


def sets_of_suites() -> str:
    lines = (f"  {name:6} {', '.join(dict.fromkeys(case.set for case in make()))}" for name, make in SUITES.items())
    return "\n".join(["suites and the sets in them:", *lines])


def main() -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    default = "gpu" if here == "cuda" else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=sets_of_suites(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", default=[default], help=f"suites, or sets of {default} (default: {default})")
    parser.add_argument("--rounds", type=rounds, help="turns of each contestant, instead of the case's number")
    parser.add_argument("--contestants", nargs="+", default=[], metavar="NAME", help="only names with this in them")
    parser.add_argument("--out", type=Path, help="file of rows (default: bench_results/DATE-DEVICE.jsonl)")
    parser.add_argument(
        "--limit",
        type=limit,
        default=120,
        help="seconds that one call may take, a first one five times that (default 120)",
    )
    parser.add_argument("--list", action="store_true", help="print the cases and contestants, and measure nothing")
    args = parser.parse_args()
    for name in args.contestants:
        if not any(asked_for(c, [name]) for c in CONTESTANTS):
            names = "".join(f"\n  {c.name}" for c in CONTESTANTS)
            parser.error(f"argument --contestants: got {name!r}, need part of one of these names:{names}")
    try:
        cases = select(args.sets, here)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print(*(f"{case.set}: {case.id}" for case in cases), sep="\n")
        print("", *contestant_lines(args.contestants, cases, here), sep="\n")
        return
    if any(case.device != here for case in cases):
        parser.error(f"these cases are for another device than the one here ({here})")
    if args.rounds:
        cases = [replace(case, rounds=args.rounds) for case in cases]
    path = args.out or Path("bench_results") / f"{date.today()}-{device_slug(here)}.jsonl"
    try:
        bad = run(cases, args.contestants, path, about(here, "benchmarks.run", sys.argv[1:]), args.limit)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the rows so far are in {path}, and the same command goes on")
    if bad:
        sys.exit(f"{bad} rows of asft_kernels are not ok: see their status and reason in {path}")


if __name__ == "__main__":
    main()
