"""Markdown tables of benchmark rows (one dict a measurement, as benchmarks.run and benchmarks.accuracy write them)."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from asft_kernels.backends.plan import DEFAULT_CACHE_BYTES, default_chunk
from benchmarks.cases import WORKS

Row = dict[str, Any]

MIB = 2**20
BARE = "bare products"
OURS = "asft_kernels"
# What grows in each growth set.
AXES: dict[str, Callable[[Row], float]] = {
    "growth-n": lambda r: r["N"],
    "growth-v": lambda r: r["V"],
    "growth-pairs": lambda r: r["pairs"],
    "valid-share": lambda r: round(r["N"] / r["M"], 3),
}
AXIS_NAMES = {
    "growth-n": "valid tokens, N",
    "growth-v": "vocabulary, V",
    "growth-pairs": "pairs",
    "valid-share": "share of valid tokens, N / M",
}


def groups(rows: Iterable[Row], *fields: str) -> dict[tuple, list[Row]]:
    """Rows by the values of these fields, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[f] for f in fields), []).append(row)
    return found


def markdown(header: list[str], lines: Iterable[list[str]], *, words: int = 2) -> list[str]:
    """A table whose first columns are words and stand to the left; figures stand to the right."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def sources(rows: list[Row], file: str) -> str:
    """Machine, versions, commit, command, rounds and file of the rows that a table is made of."""

    def of(field: str) -> str:
        return ", ".join(dict.fromkeys(str(r["about"][field]) for r in rows if r["about"].get(field)))

    packages = dict.fromkeys((r["package"], r["version"]) for r in rows if r.get("version"))
    versions = ", ".join(f"{package} {version}" for package, version in packages if package not in (OURS, "torch"))
    machine = [of("machine"), of("capability")]
    machine += [f"{of(field)} {unit}" for field, unit in (("memory_gib", "GiB"), ("threads", "threads")) if of(field)]
    parts = [
        ", ".join(filter(None, machine)),
        f"driver {of('driver')}" if of("driver") else "",
        f"CUDA {of('cuda')}" if of("cuda") else "",
        f"Python {of('python')}, torch {of('torch')}{', ' + versions if versions else ''}",
        f"commit {of('commit')}",
        f"`{of('command')}`, {of('date')}",
    ]
    rounds = sorted({r["rounds"] for r in rows if r.get("rounds")})
    if rounds:
        parts.append(f"median of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds")
    return f"<sub>{'; '.join(filter(None, parts))}; rows in [{file}]({file}).</sub>"


# --- cost -------------------------------------------------------------------------------------------------------------

# name, value of a row, format; the smallest is the best
COST: list[tuple[str, Callable[[Row], float | None], str]] = [
    ("seconds", lambda r: r["seconds"], "#.3g"),
    ("× bare products", lambda r: r["ratio"], ".2f"),
    ("extra MiB", lambda r: None if r["extra_bytes"] is None else r["extra_bytes"] / MIB, ".0f"),
    ("error of loss", lambda r: r["err_loss"], ".0e"),
    ("of dH", lambda r: r["err_dh"], ".1e"),
    ("of dW", lambda r: r["err_dw"], ".1e"),
]


def shape_of(row: Row) -> str:
    """A case in words, without the gradients wanted."""
    tokens = f"N = {row['N']}" + (f" of {row['M']} positions" if row["M"] != row["N"] else "")
    model = f"{row['model']}: " if row["model"] else ""
    return f"{model}{tokens}, D = {row['D']}, V = {row['V']}, {row['pairs']} pairs, {row['dtype']}"


def by_work(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: WORKS.index(r["work"]))  # stable: contestants keep their order


def best(rows: list[Row], value: Callable[[Row], float | None], style: str) -> str | None:
    """The smallest figure as printed, over contestants whose answer is right; the yardstick is no contestant."""
    figures = [value(r) for r in rows if r["status"] == "ok" and r["contestant"] != BARE]
    known = [x for x in figures if x is not None]
    return in_style(min(known), style) if known else None


def in_style(figure: float, style: str) -> str:
    return format(figure, style).removesuffix(".")  # "#.3g" keeps zeros, and of 123 the point


def cost_table(rows: list[Row]) -> list[str]:
    """Contestants of one shape and loss by the gradients wanted; the best in each column is bold."""
    lines = []
    for work, contestants in groups(by_work(rows), "work").items():
        tops = [best(contestants, value, style) for _, value, style in COST]
        for r in contestants:
            cells = [work[0], r["contestant"]]
            if r["status"] == "ok":
                for (_, value, style), top in zip(COST, tops, strict=True):
                    figure = value(r)
                    text = "–" if figure is None else in_style(figure, style)
                    cells.append(f"**{text}**" if text == top and r["contestant"] != BARE else text)
                cells.append(f"{r['seconds_min']:#.3g}–{r['seconds_max']:#.3g}")
            else:
                cells += [f"{r['status']}: {one_line(r['reason'])}", *["–"] * len(COST)]
            lines.append(cells)
    return markdown(["gradients", "contestant", *(name for name, *_ in COST), "range, s"], lines)


def one_line(reason: str | None) -> str:
    """A reason that fits into a cell."""
    text = " ".join((reason or "no reason given").split()).replace("|", "\\|")
    return text if len(text) <= 120 else text[:119] + "…"


def peers_ahead(rows: list[Row]) -> list[str]:
    """Where a peer's time or memory is below that of our best, at one shape, in words."""
    found = []
    for (work,), contestants in groups(by_work(rows), "work").items():
        right = [r for r in contestants if r["status"] == "ok" and r["contestant"] != BARE]
        for what, field in (("time", "seconds"), ("memory", "extra_bytes")):
            ours = min((r[field] for r in right if r["package"] == OURS), default=0)
            peers = sorted((r[field], r["contestant"]) for r in right if r["package"] != OURS)
            found += [f"{name} in {what}, {work} ({x / ours:.2f} × ours)" for x, name in peers if x < 0.995 * ours]
    return found


def verdict(rows: list[Row]) -> str:
    found = peers_ahead(rows)
    return f"**A peer wins:** {'; '.join(found)}." if found else "No peer takes less time or memory here."


# --- growth -----------------------------------------------------------------------------------------------------------


def growth_table(rows: list[Row], set_name: str) -> list[str]:
    """Seconds at each size, and the log-log slope of time: 1 is linear, 0 does not depend on it."""
    axis = AXES[set_name]
    sizes = sorted({axis(r) for r in rows})
    lines = []
    for (work, contestant), line in groups(by_work(rows), "work", "contestant").items():
        at = {axis(r): r for r in line}
        cells = [
            in_style(at[x]["seconds"], "#.3g") if x in at and at[x]["status"] == "ok" else status(at.get(x))
            for x in sizes
        ]
        slope = log_slope([(axis(r), r["seconds"]) for r in line if r["status"] == "ok"])
        lines.append([work, contestant, *cells, "–" if slope is None else f"{slope:.2f}"])
    return markdown(["gradients", "contestant", *(f"{x:g}" for x in sizes), "slope"], lines)


def status(row: Row | None) -> str:
    return "–" if row is None else row["status"]


def log_slope(points: list[tuple[float, float]]) -> float | None:
    """Exponent of the power law through the points, by least squares of the logarithms."""
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def memory_table(rows: list[Row]) -> list[str]:
    """Extra memory against N: a straight line through the measurements, beside that of docs/algorithm.md's formula."""
    lines = []
    for (work, contestant), line in groups(by_work(rows), "work", "contestant").items():
        right = sorted((r for r in line if r["status"] == "ok"), key=lambda r: r["N"])
        if len({r["N"] for r in right}) < 2:
            continue
        formula = [documented_bytes(r) for r in right]
        measured = [float(r["extra_bytes"]) for r in right]
        cells = [f"{measured[0] / MIB:.0f}", f"{measured[-1] / MIB:.0f}", linear_fit(right, measured)]
        known = [x for x in formula if x is not None]
        if len(known) == len(right):
            cells += [f"{known[0] / MIB:.0f}", f"{known[-1] / MIB:.0f}", linear_fit(right, known)]
        else:
            cells += ["–"] * 3
        lines.append([work, contestant, *cells])
    first, last = min(r["N"] for r in rows), max(r["N"] for r in rows)
    ends = [f"MiB at N = {first}", f"at {last}", "fitted line"]
    return markdown(["gradients", "contestant", *ends, *(f"formula: {name}" for name in ends)], lines)


def linear_fit(rows: list[Row], values: list[float]) -> str:
    slope, at_zero = np.polyfit([r["N"] for r in rows], values, 1)
    return f"{at_zero / MIB:.0f} MiB + {slope / 1024:.1f} KiB · N"


def documented_bytes(row: Row) -> float | None:
    """What docs/algorithm.md says of the torch backend on a CPU, gradients included; None for other contestants."""
    cache = {f"{OURS} torch": DEFAULT_CACHE_BYTES, f"{OURS} torch, cache_bytes=0": 0}.get(row["contestant"])
    if cache is None or row["device"] != "cpu":
        return None
    N, D, V = row["N"], row["D"], row["V"]
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[row["dtype"]]
    chunk = min(default_chunk(N, D, exp_bytes=4, device_type="cpu"), V)
    total = 16 * N * D + 2 * 4 * N * chunk + (0 if itemsize == 4 else 16 * MIB)
    if row["work"] != "no gradient":
        total += row["M"] * D * itemsize
    if row["work"] == "trainable head":
        total += V * D * itemsize + min(4 * N * V, cache)
    return total


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_table(rows: list[Row]) -> list[str]:
    """Relative errors against float64 as the number of pairs grows, one inputs and dtype; the best is bold."""
    pairs = sorted({r["pairs"] for r in rows})
    lines = []
    for name, field, floor in (
        ("loss", "err_loss", None),
        ("dH", "err_dh", "rounding_dh"),
        ("dW", "err_dw", "rounding_dw"),
    ):
        tops = {n: best([r for r in rows if r["pairs"] == n], lambda r: r[field], ".2e") for n in pairs}  # noqa: B023
        if floor:
            once = {r["pairs"]: r[floor] for r in rows if r[floor] is not None}
            lines.append(
                [name, "*the exact gradient, rounded once*", *(f"{once[n]:.2e}" if n in once else "–" for n in pairs)]
            )
        for (contestant,), line in groups(rows, "contestant").items():
            if contestant == BARE:
                continue
            at = {r["pairs"]: r for r in line}
            cells = []
            for n in pairs:
                r = at.get(n)
                text = "–" if r is None or r[field] is None else f"{r[field]:.2e}"
                text = f"**{text}**" if text == tops[n] else text
                cells.append(text if r is None or r["status"] == "ok" else f"{text} {r['status']}")
            lines.append([name, contestant, *cells])
    return markdown(["error of", "contestant", *(f"{n} pair{'s' if n > 1 else ''}" for n in pairs)], lines)
