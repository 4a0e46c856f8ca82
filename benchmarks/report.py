"""Tables and pictures of what was measured, drawn from the rows under bench_results/.

python -m benchmarks.report                  # prints the report of the newest rows of each device
python -m benchmarks.report --write          # README's summary, bench_results/REPORT.md and its pictures
python -m benchmarks.report FILE … --write   # from these rows instead
"""

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path

from benchmarks import plots
from benchmarks.cases import WORKS
from benchmarks.growth import AXES, AXIS_NAMES, GROWING, fixed_sizes, growth_table, log_slope, memory_table
from benchmarks.tables import (
    BARE,
    MIB,
    OURS,
    Row,
    accuracy_table,
    best,
    contestant_table,
    cost_table,
    groups,
    in_style,
    markdown,
    peers_ahead,
    shape_of,
    sources,
    verdict,
)  # fmt: skip

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench_results"
BEGIN, END = "<!-- figures: drawn by `python -m benchmarks.report --write` -->", "<!-- /figures -->"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
SHAPE = ("set", "model", "loss", "N", "M", "D", "V", "pairs", "dtype")
OUR_DEFAULT = {"cpu": f"{OURS} torch", "cuda": f"{OURS} triton"}


def newest_files() -> list[Path]:
    """The last file of rows of each device, by the date that its name begins with."""
    newest: dict[str, Path] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        named = re.fullmatch(r"\d{4}-\d\d-\d\d-(.+)", path.stem)
        if named:
            newest[named[1]] = path
    return list(newest.values())


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; of a measurement that was repeated, the last."""
    rows = {}
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # a run that was ended may leave half a line
            row = json.loads(line)
            rows[tuple(row.get(f) for f in ("kind", "case", "inputs", "work", "contestant", *SHAPE))] = row
    return list(rows.values())


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
    by_device: dict[str, list[Path]] = {device: [] for device in DEVICES}
    for path in files:
        for device in dict.fromkeys(row["device"] for row in read_rows(path)):
            by_device[device].append(path)
    for device, paths in by_device.items():
        for path in paths:
            rows = [row for row in read_rows(path) if row["device"] == device]
            lines += ["", f"## {DEVICES[device]}: {rows[0]['about']['machine']}", *device_report(rows, path)]
        if not paths:
            lines += ["", f"## {DEVICES[device]}", "", f"No {DEVICES[device]}: not measured yet."]
    return "\n".join(lines) + "\n"


def device_report(rows: list[Row], path: Path) -> list[str]:
    lines: list[str] = []
    cost = [r for r in rows if r["kind"] == "cost"]
    if cost:
        lines += ["", "### Contestants", "", *contestant_table(cost), "", sources(cost, path.name)]
    for (set_name,), in_set in groups((r for r in cost if r["set"] not in AXES), "set").items():
        lines += ["", f"### Cost: {set_name}"]
        for case in groups(in_set, *SHAPE).values():
            lines += ["", f"**{shape_of(case[0])}, loss {case[0]['loss']}**", "", *cost_table(case)]
            lines += ["", verdict(case), "", sources(case, path.name)]
    for set_name in (s for s in AXES if any(r["set"] == s for r in cost)):
        in_set = [r for r in cost if r["set"] == set_name]
        lines += ["", f"### Growth: {AXIS_NAMES[set_name]}"]
        for case in groups(in_set, *(f for f in SHAPE if f not in GROWING[set_name])).values():
            lines += ["", f"{fixed_sizes(case[0], set_name)}. Seconds, and the slope of log time:", ""]
            lines += [*growth_table(case, set_name), ""]
            if set_name == "growth-n":
                lines += ["Extra memory; the formula is that of [docs/algorithm.md](../docs/algorithm.md#memory):", ""]
                lines += [*memory_table(case), ""]
            lines.append(sources(case, path.name))
    if cost:
        lines += ["", "### Pictures", "", *(f"![{name}]({name})" for name in plots.names(rows, path))]
    accuracy = [r for r in rows if r["kind"] == "accuracy"]
    if accuracy:
        lines += ["", "### Accuracy"]
        for case in groups(accuracy, "inputs", "source", "dtype", "loss").values():
            of = f"{case[0]['inputs']} inputs" + (f" ({case[0]['source']})" if case[0]["source"] else "")
            lines += ["", f"**{of}, {case[0]['dtype']}, loss {case[0]['loss']}**", "", *accuracy_table(case)]
            lines += ["", sources(case, path.name)]
    return lines


# --- README -----------------------------------------------------------------------------------------------------------


def summary(files: list[Path]) -> str:
    """The README's part: the main shapes, where a peer wins, how it grows, and what is not measured."""
    lines: list[str] = []
    seen = set()
    for path in files:
        rows = read_rows(path)
        device = rows[0]["device"]
        seen.add(device)
        lines += [f"**{DEVICES[device]}: {rows[0]['about']['machine']}**", ""]
        main = [r for r in rows if r["kind"] == "cost" and r["set"] in ("main", "floor")]
        for case in groups(main, *SHAPE).values():
            if case[0]["loss"] == "asft":
                lines += [f"{shape_of(case[0])}; time in units of the bare products, and extra MiB:", ""]
                lines += [*summary_table(case), ""]
        lines += [*where_peers_win(rows), "", growth_sentence(rows, device), ""]
        lines += [sources(main or rows, f"bench_results/{path.name}"), ""]
    predicted = {"cuda": "; [docs/gpu-model.md](docs/gpu-model.md) says what is predicted"}
    lines += [f"{DEVICES[d]}: not measured yet{predicted.get(d, '')}.\n" for d in DEVICES if d not in seen]
    more = "[bench_results/REPORT.md](bench_results/REPORT.md) has every shape, dtype and peer, accuracy and pictures"
    return "\n".join([*lines, f"{more}; `make bench` measures them again.", ""])


def summary_table(rows: list[Row]) -> list[str]:
    works = [work for work in WORKS if any(r["work"] == work for r in rows)]
    fastest = {work: best([r for r in rows if r["work"] == work], lambda r: r["ratio"], ".2f") for work in works}
    lines = []
    for (contestant,), line in groups(rows, "contestant").items():
        at = {r["work"]: r for r in line}
        lines.append([contestant, *(summary_cell(at.get(work), fastest[work]) for work in works)])
    return markdown(["contestant", *works], lines, words=1)


def summary_cell(row: Row | None, fastest: str | None) -> str:
    if row is None:
        return "–"
    if row["status"] != "ok":
        return row["status"]
    if row["contestant"] == BARE or row["ratio"] is None:
        return f"{in_style(row['seconds'], '#.3g')} s"
    ratio = f"{row['ratio']:.2f}"
    return f"{f'**{ratio}**' if ratio == fastest else ratio} ×, {row['extra_bytes'] / MIB:.0f} MiB"


def where_peers_win(rows: list[Row]) -> list[str]:
    """One line a case, of all that were measured but the growth sets."""
    cases = groups((r for r in rows if r["kind"] == "cost" and r["set"] not in AXES), *SHAPE)
    found = [
        f"- {shape_of(case[0])}, loss {case[0]['loss']}: {'; '.join(peers_ahead(case))}"
        for case in cases.values()
        if peers_ahead(case)
    ]
    if not found:
        return [f"In none of the {len(cases)} cases does a peer take less time or memory than ours."]
    return [f"A peer takes less time or memory than ours in {len(found)} of {len(cases)} cases:", "", *found]


def growth_sentence(rows: list[Row], device: str) -> str:
    """Slopes of our default path, trainable head."""
    found = []
    for set_name, symbol in (("growth-n", "N"), ("growth-v", "V"), ("growth-pairs", "pairs")):
        line = [r for r in rows if r["kind"] == "cost" and r["set"] == set_name and r["status"] == "ok"]
        ours = [r for r in line if r["contestant"] == OUR_DEFAULT[device] and r["work"] == WORKS[-1]]
        slope = log_slope([(AXES[set_name](r), r["seconds"]) for r in ours])
        if slope is not None:
            found.append(f"{symbol}^{slope:.2f}")
    return f"With a trainable head our time grows as {', '.join(found)}." if found else "Growth: not measured yet."


def written(readme: str, files: list[Path]) -> str:
    """The README with the summary between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{summary(files)}{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="rows (default: each device's newest)")
    parser.add_argument("--write", action="store_true", help="into README.md and bench_results/ instead of printing")
    args = parser.parse_args()
    files = args.files or newest_files()
    if not files:
        parser.error(f"{RESULTS} holds no rows; measure first: make bench")
    if not args.write:
        print(report(files))
        return
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), files))
    (RESULTS / "REPORT.md").write_text(report(files))
    for path in files:
        plots.draw(read_rows(path), path, RESULTS)


if __name__ == "__main__":
    main()
