"""Pictures of benchmark rows, as PNG: growth of time and memory, and the share of the GEMM rate achieved."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import WORKS
from benchmarks.growth import AXES, AXIS_NAMES
from benchmarks.tables import BARE, MIB, OURS, Row, groups, once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; markers tell them apart in grey, too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
GLANCE = "glance.png"
DRAWN = [name for name in AXES if name != "growth-pairs"]  # the panels, left to right


def names(rows: list[Row], device: str) -> list[str]:
    """The pictures that these rows give, each named after the device."""
    works = [work for work in WORKS if any(r["set"] in DRAWN and r["work"] == work for r in timed(rows))]
    growth = [f"{device}-growth-{work.replace(' ', '-')}.png" for work in works]
    return growth + ([f"{device}-gemm-share.png"] if roofs(rows) else [])


def draw(rows: list[Row], device: str, folder: Path) -> list[Path]:
    """Writes the pictures and returns their paths; equal rows give equal bytes."""
    paths = [folder / name for name in names(rows, device)]
    for path in paths:
        work = next((w for w in WORKS if path.stem.endswith(w.replace(" ", "-"))), None)
        figure = growth(rows, work) if work else gemm_share(rows)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    return paths


def timed(rows: list[Row]) -> list[Row]:
    return [r for r in once(rows) if r["kind"] == "cost" and r["status"] == "ok"]


def roofs(rows: list[Row]) -> list[Row]:
    return [r for r in timed(rows) if r["set"] not in AXES and r["gemm_share"] is not None]


def style_of(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each contestant, ours first, the bare products grey."""
    found = dict.fromkeys(r["contestant"] for r in sorted(rows, key=lambda r: r["package"] != OURS))
    contestants = [name for name in found if name != BARE]
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(contestants)
    }
    return styles | {BARE: {"color": "0.55", "marker": "|"}}


def growth(rows: list[Row], work: str) -> "Figure":
    """Time above memory, against N, V and the share of valid tokens; logarithmic, so that linear is a slope of 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = [r for r in timed(rows) if r["work"] == work and r["set"] in DRAWN]
    sets = [name for name in DRAWN if any(r["set"] == name for r in rows)]
    styles = style_of(rows)
    figure = Figure(figsize=(3.6 * len(sets) + 0.6, 6.6), layout="constrained")
    axes = figure.subplots(2, len(sets), squeeze=False, sharex="col", sharey="row")
    for column, name in enumerate(sets):
        for (contestant,), line in groups([r for r in rows if r["set"] == name], "contestant").items():
            line = sorted(line, key=AXES[name])
            x = [AXES[name](r) for r in line]
            look = {"label": contestant, "markersize": 5, "linewidth": 1.4, **styles[contestant]}
            axes[0, column].plot(x, [r["seconds"] for r in line], **look)
            known = [(AXES[name](r), r["extra_bytes"] / MIB) for r in line if r["extra_bytes"] is not None]
            if known:
                axes[1, column].plot(*zip(*known, strict=True), **look)
        for panel in axes[:, column]:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # an axis often spans less than a decade
            panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if name != "valid-share":
                panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({AXES[name](r) for r in rows if r["set"] == name}))
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.minorticks_off()
            plain(panel)
        axes[1, column].set_xlabel(AXIS_NAMES[name])
        axes[1, column].tick_params(axis="x", rotation=45)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("extra memory, MiB")
    figure.suptitle(f"{rows[0]['about']['machine']}: {work}", fontsize=10)
    handles = {h.get_label(): h for panel in axes[0] for h in panel.get_lines()}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def gemm_share(rows: list[Row]) -> "Figure":
    """The roof is the rate of a bare GEMM in the same run; a contestant's share counts only useful products."""
    from matplotlib.figure import Figure

    rows = roofs(rows)
    works = [work for work in WORKS if any(r["work"] == work for r in rows)]
    styles = style_of(rows)
    contestants = [name for name in styles if any(r["contestant"] == name for r in rows)]
    height = 1.4 + 0.3 * len(contestants)
    figure = Figure(figsize=(3.2 * len(works) + 2.4, height), layout="constrained")
    for panel, work in zip(figure.subplots(1, len(works), squeeze=False, sharey=True)[0], works, strict=True):
        for r in rows:
            if r["work"] == work:
                look = styles[r["contestant"]]
                panel.plot(r["gemm_share"], contestants.index(r["contestant"]), markersize=6, alpha=0.8, **look)
        panel.axvline(1.0, color="0.3", linewidth=1.0)
        panel.set_xlim(0, 1.15)
        panel.set_yticks(range(len(contestants)), contestants, fontsize=8)
        panel.set_title(work, fontsize=9)
        panel.set_xlabel("share of the GEMM rate")
        plain(panel)
    figure.axes[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['about']['machine']}: one mark a shape; the line is the roof", fontsize=10)
    return figure


def draw_glance(cases: list[list[Row]], contestants: dict[str, tuple[str, ...]], folder: Path) -> None:
    """Writes GLANCE: a case's time above its memory, a bar a contestant, ours coloured; shorter is better.

    cases: each of one machine and of the gradients wanted; the one of the first work is drawn. contestants: by device.
    """
    from matplotlib.figure import Figure

    if not cases:
        return
    with_gradients = [case for case in cases if case[0]["work"] != "no gradient"] or cases
    case = next((case for case in with_gradients if case[0]["device"] == "cuda"), with_gradients[0])
    order = contestants[case[0]["device"]]
    at = {row["contestant"]: row for row in case}
    figure = Figure(figsize=(7.6, 1.9), layout="constrained")
    longest = max(at[name]["seconds"] or 0.0 for name in order)
    unit_of_time, second = ("milliseconds", 1e-3) if longest < 0.1 else ("seconds", 1)
    for panel, field, unit, scale in zip(
        figure.subplots(1, 2, sharey=True), ("seconds", "extra_bytes"), (unit_of_time, "MiB beyond the inputs"),
        (second, MIB), strict=True,
    ):  # fmt: skip
        values = [(at[name][field] or 0.0) / scale if at[name]["status"] == "ok" else 0.0 for name in order]
        colours = [COLOURS[0] if at[name]["package"] == OURS else "0.6" for name in order]
        bars = panel.barh(range(len(order)), values, color=colours)
        texts = [
            f"{value:.0f}" if value >= 100 else f"{value:.3g}" if at[name]["status"] == "ok" else at[name]["status"]
            for name, value in zip(order, values, strict=True)
        ]
        panel.bar_label(bars, texts, padding=3, fontsize=8)
        panel.set_yticks(range(len(order)), order, fontsize=8)
        panel.set_xlabel(unit, fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
        panel.margins(x=0.15)
        plain(panel)
    figure.axes[0].invert_yaxis()
    figure.suptitle(f"{case[0]['work']}, {case[0]['machine']}", fontsize=9)
    figure.savefig(folder / GLANCE, dpi=130, metadata={"Software": None})


def plain(panel: Any) -> None:
    panel.grid(alpha=0.25)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
