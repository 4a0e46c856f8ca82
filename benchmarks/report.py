"""Tables and pictures of what was measured, drawn from the rows under bench_results/.

python -m benchmarks.report                    # prints the report: each case as last measured, by machine
python -m benchmarks.report --write            # into README.md, docs/benchmarks.md and bench_results/, with pictures
python -m benchmarks.report FILE …             # of these rows alone
python -m benchmarks.report FILE … --out DIR   # REPORT.md and pictures of these rows alone, in a folder

Rows of the smoke suite are no measurement and are left out.
"""

import argparse
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cases import SUITES, WORKS
from benchmarks.contestants import ALL_KEPT, CONTESTANTS, TUNED, contestants_of
from benchmarks.machine import require
from benchmarks.rows import is_smoke, read_rows, row_file
from benchmarks.tables import (
    BARE,
    OUR_DEFAULT,
    SHAPE,
    Row,
    accuracy_table,
    answering_peers,
    by_work,
    contestant_table,
    cost_table,
    groups,
    in_style,
    markdown,
    once,
    peer_table,
    peers_ahead,
    shape_of,
    sources,
    tiles,
    twin_table,
    verdict,
)  # fmt: skip

if __name__ == "__main__":
    require("numpy", "matplotlib")  # before growth imports the one; plots needs the other
from benchmarks import plots
from benchmarks.growth import AXES, AXIS_NAMES, GROWING, fixed_sizes, growth_table, log_slope, memory_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench_results"
FIGURES = "<!-- figures: drawn by `python -m benchmarks.report --write` -->", "<!-- /figures -->"
GLANCE = "<!-- glance: drawn by `python -m benchmarks.report --write` -->", "<!-- /glance -->"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
WANTED = {"cpu": ("cpu", "floor"), "cuda": ("gpu",)}  # suites of which every row belongs in a report
SUMMARY_SETS = ("headline", "main", "floor")
AT_A_GLANCE = {  # in README's first table
    "cpu": ("plain torch", "cut-cross-entropy torch_compile", "TRL ChunkedLogProbFunction", OUR_DEFAULT["cpu"]),
    "cuda": ("plain torch", "cut-cross-entropy cce", "TRL ChunkedLogProbFunction", OUR_DEFAULT["cuda"]),
}


def oldest_first(files: Iterable[Path]) -> list[Path]:
    """By the date that their names begin with."""
    return sorted(files, key=lambda path: path.name)


def row_files() -> list[Path]:
    return oldest_first(RESULTS.glob("*.jsonl"))


def newest_rows(files: list[Path]) -> dict[str, list[Row]]:
    """Rows by machine, named after the device of their files: of each case the newest sources with all its contestants.

    A later measurement of some of them replaces nothing; whom the package no longer has, and whom it measures only on
    request, does not count. Two machines of one device's name get a digest of their own behind it.
    """
    now = {c.name for c in CONTESTANTS if not c.name.endswith(TUNED)}
    newest: dict[tuple[str, str], dict[tuple, list[Row]]] = {}
    for path in files:
        device = re.sub(r"^\d{4}-\d\d-\d\d-", "", path.stem)
        for (case, machine, _), rows in measured_in(path).items():
            cases = newest.setdefault((device, machine), {})
            if {row["contestant"] for row in cases.get(case, [])} & now <= {row["contestant"] for row in rows}:
                cases[case] = of_runs(rows)
    machines = Counter(device for device, _ in newest)
    return {
        device if machines[device] == 1 else f"{device}-{zlib.crc32(machine.encode()):08x}": in_order(cases)
        for (device, machine), cases in newest.items()
    }


def of_runs(rows: list[Row]) -> list[Row]:
    """Of a case's rows with the same sources each contestant's last, run by run, beside what that run compares it with.

    A run that measured some contestants later did so with the bare products and our default, which stay with them,
    marked `again`; the run that most contestants are from comes first.
    """
    last = {row["contestant"]: row["run"] for row in rows}
    yardsticks = (BARE, OUR_DEFAULT[rows[0]["device"]]) if rows[0]["kind"] == "cost" else ()
    others = Counter(run for name, run in last.items() if name not in yardsticks) or Counter(last.values())
    (first, _), *_ = others.most_common(1)
    in_first = {row["contestant"] for row in rows if row["run"] == first}
    found = []
    for run in sorted(others, key=lambda run: run != first):  # stable: the others in their order
        for row in (row for row in rows if row["run"] == run):
            if row["contestant"] in yardsticks:
                again = run != first and row["contestant"] in in_first
                found.append(row | {"again": True} if again else row)
            elif last[row["contestant"]] == run:
                found.append(row)
    there = {row["contestant"] for row in found}
    return found + [row for row in rows if row["contestant"] not in there and last[row["contestant"]] == row["run"]]


def absent(rows: list[Row]) -> str:
    """How many rows of the suites are not among those of a device, by set; "" where all are there."""
    there = {(r["set"], r["case"], r["contestant"]) for r in rows if r["kind"] == "cost"}
    cases = [case for suite in WANTED[rows[0]["device"]] for case in SUITES[suite]()]
    wanted = [(case.set, case.id, c.name) for case in cases for c in contestants_of(case) if not c.name.endswith(TUNED)]
    missing = Counter(row[0] for row in wanted if row not in there)
    if not missing:
        return ""
    by_set = ", ".join(f"{name} {count}" for name, count in missing.items())
    return f"{missing.total()} of the {len(wanted)} rows of the suite have no row here: {by_set}."


def measured_in(path: Path) -> dict[tuple, list[Row]]:
    """Rows by (case, machine, commit), in the order of the file: of one run, or of several of the same sources."""
    found: dict[tuple, list[Row]] = {}
    for row in read_rows(path):
        if not is_smoke(row):
            case = tuple(row.get(field) for field in ("kind", "set", "inputs", "source", "work", *SHAPE))
            found.setdefault((case, row["about"]["machine"], row["about"]["commit"]), []).append(row)
    return found


def in_order(cases: dict[tuple, list[Row]]) -> list[Row]:
    """Case by case; the cases of a set stand together, sets in order of their first."""
    sets = groups((row for rows in cases.values() for row in rows), "kind", "set")
    return [row for rows in sets.values() for row in rows]


def report(files: list[Path]) -> str:
    """The full report, Markdown."""
    lines = [
        "# What was measured",
        "",
        "Drawn by `python -m benchmarks.report --write` from the rows named under each table; no figure is typed.",
        "",
        "- *Bare products*, the yardstick, are the matrix products of our schedule alone, chunk by chunk into fresh",
        "  memory.",
        "- The best figure of each column is bold, per gradients wanted. An answer further from float64 than its",
        "  dtype's rounding allows is *refused* and gets no time; what raised or ran out of memory has *failed*.",
        "- Extra memory is the peak of one call over what was there before it, the gradients that it returns included.",
        "- Errors are relative (Frobenius norm) to float64 on the same inputs.",
    ]
    measured = newest_rows(files)
    for kind, title in DEVICES.items():
        of_kind = {name: rows for name, rows in measured.items() if rows[0]["device"] == kind}
        for name, rows in of_kind.items():
            lines += ["", f"## {title}: {rows[0]['about']['machine']}", *device_report(rows, name)]
        if not of_kind:
            lines += ["", f"## {title}", "", f"No {title}: not measured yet."]
    return "\n".join(lines) + "\n"


def device_report(rows: list[Row], device: str) -> list[str]:
    lines: list[str] = []
    cost = [r for r in rows if r["kind"] == "cost"]
    if cost:
        lines += ["", "### Contestants", "", *contestant_table(cost), "", sources(cost)]
    for (set_name,), in_set in groups((r for r in cost if r["set"] not in AXES), "set").items():
        lines += ["", f"### Cost: {set_name}"]
        for case in groups(in_set, *SHAPE).values():
            lines += ["", f"**{shape_of(case[0])}, loss {case[0]['loss']}**", "", *cost_table(case)]
            lines += ["", verdict(case), *(x for line in tiles(case) for x in ("", line)), "", sources(case)]
        if set_name == "beyond-plain":
            lines += ["", *map(beyond_plain, dict.fromkeys((r["M"], r["V"]) for r in in_set))]
        twins = twin_table(in_set)
        if twins:
            lines += ["", f"bf16 against fp32 time, {set_name}:", "", *twins, "", sources(in_set)]
    for set_name in (s for s in AXES if any(r["set"] == s for r in cost)):
        in_set = [r for r in cost if r["set"] == set_name]
        lines += ["", f"### Growth: {AXIS_NAMES[set_name]}"]
        for case in groups(in_set, *(f for f in SHAPE if f not in GROWING[set_name])).values():
            lines += ["", f"{fixed_sizes(case[0], set_name)}. Seconds, and the slope of log time:", ""]
            lines += [*growth_table(case, set_name), ""]
            if set_name == "growth-n":
                lines += [
                    "Extra memory; the formula is what [`estimate`](../docs/cost.md#before-it-runs) says that torch's "
                    "allocator is asked for; of what is freed malloc keeps some:",
                    "",
                ]
                lines += [*memory_table(case), ""]
            lines.append(sources(case))
    if cost and absent(rows):
        lines += ["", absent(rows)]
    if cost:
        lines += ["", "### Where a peer wins", "", *where_peers_win(rows)]
        lines += ["", "### Pictures", "", *(f"![{name}]({name})" for name in plots.names(rows, device))]
    accuracy = [r for r in rows if r["kind"] == "accuracy"]
    if accuracy:
        lines += ["", "### Accuracy"]
        for case in groups(accuracy, "inputs", "source", "dtype", "loss").values():
            of = f"{case[0]['inputs']} inputs" + (f" ({case[0]['source']})" if case[0]["source"] else "")
            lines += ["", f"**{of}, {case[0]['dtype']}, loss {case[0]['loss']}**", "", *accuracy_table(case)]
            lines += ["", sources(case)]
    return lines


# --- README.md and docs/benchmarks.md ---------------------------------------------------------------------------------


def summary(files: list[Path]) -> str:
    """The part of docs/benchmarks.md: our time over the bare products', peers' over ours, growth, what is missing."""
    lines: list[str] = []
    measured = newest_rows(files)
    for rows in sorted(measured.values(), key=lambda rows: list(DEVICES).index(rows[0]["device"])):
        device = rows[0]["device"]
        lines += [f"**{DEVICES[device]}: {rows[0]['about']['machine']}**", ""]
        cost = [r for r in rows if r["kind"] == "cost"]
        main = [r for name in SUMMARY_SETS for r in cost if r["set"] == name and r["loss"] == "asft"]
        if main:
            lines += [f"Time of `{OUR_DEFAULT[device]}` over that of the bare products, ASFT loss:", ""]
            lines += [*shape_table(main), ""]
        if cost:
            low = " In bf16 peers use the CPU's bf16 units, where it has them; ours upcasts to fp32."
            upcasts = device == "cpu" and any(r["dtype"] == "bfloat16" for r in cost)
            lines += [
                "Time and extra memory of peers over ours, least to most of all cases (a shape, a loss and the "
                "gradients wanted, which several peers may share); bold: below 1 somewhere, where a peer wins."
                + low * upcasts
                + " Failed: out of memory, or see the report." * any(r["status"] == "failed" for r in cost),
                "",
                *peer_table(cost),
                "",
                f"{where_peers_win(rows)[0].rstrip(':.')}. {growth_sentence(rows, device)}",
                "",
                *[f"{absent(rows)}\n"] * bool(absent(rows)),
                sources(cost, "../bench_results/"),
                "",
            ]
    missing = DEVICES.keys() - {rows[0]["device"] for rows in measured.values()}
    predicted = {"cuda": "; [gpu-model.md](gpu-model.md) says what is predicted"}
    lines += [f"{DEVICES[d]}: not measured yet{predicted.get(d, '')}.\n" for d in DEVICES if d in missing]
    more = (
        "[bench_results/REPORT.md](../bench_results/REPORT.md) has every shape, dtype and peer, accuracy and pictures"
    )
    return "\n".join([*lines, f"{more}; `make bench` measures them again.", ""])


def at_a_glance(files: list[Path]) -> dict[tuple, list[Row]]:
    """Rows of plain torch, the best-known peers and ours at one real vocabulary, by (machine, gradients wanted).

    Machines where all of them were measured, newest rows last: GPUs, or CPUs where no GPU is among them.
    """
    shown = [
        row | {"machine": row["about"]["machine"]}
        for rows in newest_rows(files).values()
        for row in by_work(once(rows))
        if row["kind"] == "cost" and row["set"] in ("headline", "main") and row["loss"] == "asft"
        if row["model"].startswith("Qwen3")
        if row["contestant"] in AT_A_GLANCE[row["device"]]
    ]
    cases = groups(shown, "machine", "work")
    whole = {key: case for key, case in cases.items() if {r["contestant"] for r in case} >= {*wanted(case)}}
    on_gpus = {key: case for key, case in whole.items() if case[0]["device"] == "cuda"}
    return on_gpus or whole


def wanted(case: list[Row]) -> tuple[str, ...]:
    return AT_A_GLANCE[case[0]["device"]]


def glance(files: list[Path]) -> str:
    """README's table and picture."""
    parts: list[str] = []
    cases = at_a_glance(files)
    for shape in groups((row for case in cases.values() for row in case), *SHAPE).values():
        lines = []
        for (machine, work), case in groups(shape, "machine", "work").items():
            at = {row["contestant"]: row for row in case}
            lines.append([f"{machine}, {work}", *(glance_cell(at[name]) for name in wanted(case))])
        parts += [f"One ASFT loss ({shape_of(shape[0])}), {measured_as(shape)}: time and memory beyond the inputs", ""]
        parts += [*markdown(["", "plain torch", "cut-cross-entropy", "TRL", "**ours**"], lines, words=1), ""]
    if cases:
        parts += [f"![The same as bars](bench_results/{plots.GLANCE})", ""]
    return "\n".join(parts)


def measured_as(rows: list[Row]) -> str:
    """How often and when rows were measured."""
    rounds = sorted({row["rounds"] for row in rows if row["status"] == "ok"})
    dates = sorted({row["about"]["date"] for row in rows})
    return f"medians of {' to '.join(map(str, sorted({rounds[0], rounds[-1]})))} rounds, {', '.join(dates)}"


def glance_cell(row: Row) -> str:
    if row["status"] != "ok":
        return ": ".join(filter(None, (row["status"], (row["reason"] or "").replace(" of itself", "").split(";")[0])))
    seconds = row["seconds"]
    time = f"{in_style(1e3 * seconds, '#.3g')} ms" if seconds < 0.1 else f"{in_style(seconds, '#.3g')} s"
    return f"{time}, {row['extra_bytes'] / 2**20:.0f} MiB"


def shape_table(rows: list[Row]) -> list[str]:
    """Our default over the bare products: a line a shape, a column for each of the gradients wanted."""
    ours = [r for r in once(rows) if r["contestant"] == OUR_DEFAULT[r["device"]]]
    lines = []
    for line in groups(ours, *SHAPE).values():
        at = {r["work"]: r for r in reversed(line)}  # a shape of two sets: the first one's
        lines.append([shape_of(line[0]), *(ratio_cell(at.get(work)) for work in WORKS)])
    kept = [r for r in once(rows) if r["contestant"].endswith(ALL_KEPT) and r["ratio"]]
    notes = [f"{shape_of(r)}: there E passes `cache_bytes`; with all of it kept {r['ratio']:.2f}." for r in kept]
    return [*markdown(["shape", *WORKS], lines, words=1), *(line for note in notes for line in ("", note))]


def ratio_cell(row: Row | None) -> str:
    if row is None or row["status"] != "ok":
        return "–" if row is None else row["status"]
    return "–" if row["ratio"] is None else f"{row['ratio']:.2f}"


def where_peers_win(rows: list[Row]) -> list[str]:
    """How many cases there are, of all in which a peer was measured, and a line a shape and loss."""
    shapes = groups((r for r in rows if r["kind"] == "cost"), "set", *SHAPE).values()
    cases = [case for shape in shapes for case in groups(shape, "work").values() if answering_peers(case)]
    won = sum(bool(peers_ahead(case)) for case in cases)
    if not won:
        return [f"In none of the {len(cases)} cases does a peer take less time or memory than ours."]
    found = [
        f"- {shape_of(shape[0])}, loss {shape[0]['loss']}: {'; '.join(peers_ahead(shape))}"
        for shape in shapes
        if peers_ahead(shape)
    ]
    return [f"A peer takes less time or memory than ours in {won} of {len(cases)} cases:", "", *found]


def beyond_plain(sizes: tuple[int, int]) -> str:
    M, V = sizes
    return (
        "By arithmetic, not measured: plain torch's log-softmax and two gradients of its size are 3 · 4 · M · V bytes, "
        f"{3 * 4 * M * V / 2**30:.0f} GiB; how much a contestant could take here stands with its rows."
    )


def growth_sentence(rows: list[Row], device: str) -> str:
    """Slopes of our default path, trainable head."""
    found = []
    for set_name, symbol in (("growth-n", "N"), ("growth-v", "V"), ("growth-pairs", "pairs")):
        wanted = ("cost", set_name, "ok", WORKS[-1])
        line = [r for r in once(rows) if (r["kind"], r["set"], r["status"], r["work"]) == wanted]
        points = [
            [(AXES[set_name](r), r["seconds"]) for r in line if r["contestant"] == name]
            for name in (OUR_DEFAULT[device], BARE)
        ]
        slope, bare = map(log_slope, points)
        if slope is not None:
            sizes = [x for x, _ in points[0]]
            beside = "" if bare is None else f", bare products {symbol}^{bare:.2f}"
            found.append(f"{symbol}^{slope:.2f} ({symbol} from {min(sizes):g} to {max(sizes):g}{beside})")
    return f"With a trainable head our time grows as {', '.join(found)}." if found else "Growth: not measured yet."


def written(page: str, marks: tuple[str, str], text: str) -> str:
    """A page with the text between its marks."""
    begin, end = marks
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"


def drawn_pages(files: list[Path]) -> dict[Path, str]:
    """README.md and docs/benchmarks.md as they should be."""
    parts = {ROOT / "README.md": (GLANCE, glance(files)), ROOT / "docs" / "benchmarks.md": (FIGURES, summary(files))}
    return {path: written(path.read_text(), marks, text) for path, (marks, text) in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=row_file, metavar="FILE", help="rows (default: bench_results/*.jsonl)")
    parser.add_argument("--write", action="store_true", help="into README.md, docs/benchmarks.md and bench_results/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="into this folder; the pages stay as they are")
    args = parser.parse_args()
    if args.write and (args.files or args.out):
        parser.error("--write takes no FILE and no --out: the pages link the files in bench_results/, and no others")
    files = oldest_first(args.files) or row_files()
    if not files:
        parser.error(f"{RESULTS} holds no rows; measure first: make bench")
    smoke = sum(is_smoke(row) for path in files for row in read_rows(path))
    if smoke:
        print(f"left out: {smoke} rows of the smoke suite, which are no measurement", file=sys.stderr)
    folder = RESULTS if args.write else args.out
    if folder is None:
        print(report(files))
        return
    if args.write:
        for page, text in drawn_pages(files).items():
            page.write_text(text)
        plots.draw_glance(list(at_a_glance(files).values()), AT_A_GLANCE, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "REPORT.md").write_text(report(files))
    for device, rows in newest_rows(files).items():
        plots.draw(rows, device, folder)
    print(f"{folder / 'REPORT.md'} and its pictures are written, the pages' figures {'too' * args.write or 'are not'}")


if __name__ == "__main__":
    main()
