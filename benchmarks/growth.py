"""How cost grows with N, V, pairs and the share of valid tokens: tables and fitted slopes."""

from collections.abc import Callable

import numpy as np
import torch

from asft_kernels import estimate
from asft_kernels.backends.plan import default_chunk
from benchmarks.tables import MIB, OURS, Row, by_work, groups, in_style, markdown, once

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
# Fields that change along a growth set's axis.
GROWING = {
    "growth-n": ("N", "M"),
    "growth-v": ("V",),
    "growth-pairs": ("pairs",),
    "valid-share": ("N",),
}


def fixed_sizes(row: Row, set_name: str) -> str:
    sizes = [f"{field} = {row[field]}" for field in ("N", "M", "D", "V") if field not in GROWING[set_name]]
    return ", ".join([*filter(None, [row["model"]]), *sizes, row["dtype"], f"loss {row['loss']}"])


def growth_table(rows: list[Row], set_name: str) -> list[str]:
    """Seconds at each size, and the log-log slope of time: 1 is linear, 0 does not depend on it."""
    axis, rows = AXES[set_name], once(rows)
    sizes = sorted({axis(r) for r in rows})
    lines = []
    for (work, contestant), line in groups(by_work(rows), "work", "contestant").items():
        at = {axis(r): r for r in line}
        cells = [
            in_style(at[x]["seconds"], "#.3g") if x in at and at[x]["status"] == "ok" else status(at.get(x))
            for x in sizes
        ]
        timed = [axis(r) for r in line if r["status"] == "ok"]
        slope = log_slope([(axis(r), r["seconds"]) for r in line if r["status"] == "ok"])
        cells.append("–" if slope is None else f"{slope:.2f} ({min(timed):g} to {max(timed):g})")
        lines.append([work, contestant, *cells])
    return markdown(["gradients", "contestant", *(f"{x:g}" for x in sizes), "slope (fitted from, to)"], lines)


def status(row: Row | None) -> str:
    return "–" if row is None else row["status"]


def log_slope(points: list[tuple[float, float]]) -> float | None:
    """Exponent of the power law through the points, by least squares of the logarithms."""
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def memory_table(rows: list[Row]) -> list[str]:
    """Extra memory against N: a straight line through the measurements, beside that of `estimate`."""
    lines = []
    for (work, contestant), line in groups(by_work(once(rows)), "work", "contestant").items():
        right = sorted((r for r in line if r["status"] == "ok" and r["extra_bytes"] is not None), key=lambda r: r["N"])
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
    """What `estimate` says of the torch backend on a CPU, gradients included; None for other contestants."""
    cache = {f"{OURS} torch": None, f"{OURS} torch, cache_bytes=0": 0}
    if row["contestant"] not in cache or row["device"] != "cpu":
        return None
    N, D = row["N"], row["D"]
    intel = "Intel" in row["about"]["machine"]  # the chunk of the machine that measured, not of this one
    said = estimate(
        N, D, row["V"], positions=row["M"], dtype=getattr(torch, row["dtype"]), backend="torch",
        hidden_grad=row["work"] != "no gradient", head_grad=row["work"] == "trainable head",
        chunk_size=default_chunk(N, D, exp_bytes=4, device_type="cpu", intel=intel),
        cache_bytes=cache[row["contestant"]],
    )  # fmt: skip
    return said.peak
