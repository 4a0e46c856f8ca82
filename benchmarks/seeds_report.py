"""Tables and picture of what benchmarks.methods measured with several seeds.

    python -m benchmarks.seeds_report --rows FOLDER/rows.jsonl

README.md and likelihoods.png go beside the rows. Rows of benchmarks.trl_real in speed.jsonl there: a table of speed.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import require
from benchmarks.methods import METHODS
from benchmarks.methods_report import CHOSEN, CLAIM, REJECTED
from benchmarks.run import rows_of
from benchmarks.tables import MIB, groups, markdown, sources

Row = dict[str, Any]
SPEED = "speed.jsonl"
HEADER = ["objective", "seeds", "accuracy, %", "moved, %", "margin", "moved", "chosen moved", "rejected moved"]
FULL = "TRL DPO, full logits"
OF_A_PAIR = {  # of log-probabilities a token of chosen and rejected
    "chosen": lambda c, r: c,
    "rejected": lambda c, r: r,
    "margin": lambda c, r: c - r,
    "accuracy": lambda c, r: 100.0 * (c > r),
}


def before_and_after(rows: list[Row], figure: str) -> tuple[list[float], list[list[float]]]:
    """Of each held-out pair: before training, and after it by seed."""
    of = OF_A_PAIR[figure]
    return [of(c, r) for c, r, *_ in rows[0]["answers"]], [[of(c, r) for *_, c, r in row["answers"]] for row in rows]


def moved(rows: list[Row], figure: str) -> tuple[float, float, list[float]]:
    """Mean change over pairs and seeds, its paired standard error over pairs, and the mean change by seed.

    The error is that of the mean over pairs, of each its mean over seeds: it says nothing of other seeds.
    """
    before, after = before_and_after(rows, figure)
    differences = [statistics.fmean(of_pair) - b for b, of_pair in zip(before, zip(*after, strict=True), strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return (
        statistics.fmean(differences),
        error,
        [statistics.fmean(of_seed) - statistics.fmean(before) for of_seed in after],
    )


def cell(rows: list[Row], figure: str, digits: int = 3) -> str:
    """Change ± paired standard error (standard deviation over seeds)."""
    mean, error, by_seed = moved(rows, figure)
    spread = f" ({statistics.stdev(by_seed):.{digits}f})" if len(by_seed) > 1 else ""
    return f"{mean:+.{digits}f} ± {error:.{digits}f}{spread}"


def table(methods: dict[str, list[Row]]) -> list[str]:
    first = next(iter(methods.values()))
    start = {figure: statistics.fmean(before_and_after(first, figure)[0]) for figure in OF_A_PAIR}
    lines = [
        ["*before*", "", f"{start['accuracy']:.1f}", "", f"{start['margin']:+.3f}", "", f"from {start['chosen']:.3f}",
         f"from {start['rejected']:.3f}"]
    ]  # fmt: skip
    for name, rows in methods.items():
        end = {figure: start[figure] + moved(rows, figure)[0] for figure in OF_A_PAIR}
        lines.append(
            [name, str(len(rows)), f"{end['accuracy']:.1f}", cell(rows, "accuracy", 1), f"{end['margin']:+.3f}",
             *(cell(rows, figure) for figure in ("margin", "chosen", "rejected"))]
        )  # fmt: skip
    return markdown(HEADER, lines, words=1)


def claim(methods: dict[str, list[Row]]) -> list[str]:
    """Where chosen and rejected went under DPO and under ASFT, and in how many seeds the abstract's words hold."""
    lines = []
    for name in ("dpo", "asft"):
        if name not in methods:
            continue
        rows = methods[name]
        (chosen, chosen_error, of_chosen), (rejected, rejected_error, of_rejected) = (
            moved(rows, figure) for figure in ("chosen", "rejected")
        )
        rates = [abs(r) / abs(c) if c else float("inf") for c, r in zip(of_chosen, of_rejected, strict=True)]
        holds = sum(r < 0 and abs(r) > abs(c) for c, r in zip(of_chosen, of_rejected, strict=True))
        lines.append(
            f"- {name}: chosen {chosen:+.3f} ± {chosen_error:.3f}, rejected {rejected:+.3f} ± {rejected_error:.3f} "
            f"nats a token; rejected moved {', '.join(f'{rate:.2f}' for rate in rates)} times as far, seed by seed. "
            f"Rejected fell, and faster than chosen moved: in {holds} of {len(rows)} seeds."
        )
    return lines


def speed_table(rows: list[Row]) -> list[str]:
    """Milliseconds of a step in each turn, tokens a second (their mean over turns) and peak memory."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["contestant"], []).append(row)
    rates = {
        name: statistics.fmean(row["tokens_per_second"] for row in turns)
        for name, turns in by_name.items()
        if not any("failed" in row or row["tokens_per_second"] is None for row in turns)
    }
    lines = []
    for name, turns in by_name.items():
        row = next((row for row in turns if "failed" in row), turns[-1])
        if "failed" in row:
            lines.append([name, row["note"], f"failed: {row['failed']}", "", "", "", ""])
            continue
        faster = f"{rates[name] / rates[FULL]:.2f}" if {name, FULL} <= rates.keys() else "–"
        losses = f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}"
        memory = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}"
        steps = ", ".join(f"{turn['seconds'] * 1000:.0f}" for turn in turns)
        rate = f"{rates[name]:.0f}" if name in rates else "–"
        lines.append([name, row["note"], losses, steps, rate, faster, memory])
    header = ["", "what", "loss, first to last step", "ms a step, by turn", "tokens/s", "× full logits", "peak MiB"]
    return markdown(header, lines)


def speed_text(rows: list[Row]) -> list[str]:
    row = next((row for row in rows if "failed" not in row), None)
    if row is None:
        return []
    share = row["V"] * row["D"] / row["parameters"]
    return [
        "## Speed and memory of a step",
        "",
        f"In turns on the same machine, nothing beside it: {row['steps']} steps of {row['pairs']} pairs, "
        f"rows cut at {row['length']} tokens, {row['dtype']}, the weights float32, the same pairs in the same order. "
        "Medians of the steps after the first quarter, forward to optimizer; peak memory is the allocator's, weights "
        f"and optimizer included. The head has V = {row['V']:,} and D = {row['D']}, {share:.0%} of the parameters; "
        "only the answers' tokens need it, and its vocabulary is small: 128,000 entries and more are common in larger "
        "models, where the logits' share of the memory is another one. Where turns differ more than contestants do, "
        "the host is what was measured: a step of so small a model launches thousands of kernels.",
        "",
        *speed_table(rows),
        "",
        sources([{**row, "file": SPEED} for row in rows]),
        "",
    ]


def draw(methods: dict[str, list[Row]], path: Path) -> None:
    """Movement of held-out log-probabilities by step: mean over seeds, and the band between the furthest seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(methods), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, rows) in zip(
        figure.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods.items(), strict=True
    ):
        steps = [step for step, *_ in rows[0]["held_out"]]
        for column, colour, label in ((1, CHOSEN, "chosen"), (2, REJECTED, "rejected")):
            seeds = [[point[column] - row["held_out"][0][column] for point in row["held_out"]] for row in rows]
            at_step = list(zip(*seeds, strict=True))
            axes.fill_between(
                steps, list(map(min, at_step)), list(map(max, at_step)), color=colour, alpha=0.25, linewidth=0
            )
            axes.plot(steps, list(map(statistics.fmean, at_step)), color=colour, marker="o", markersize=3, label=label)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(f"{name.upper()}, {len(rows)} seeds")
        axes.set_xlabel("optimiser step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean log-probability a token,\nchange in nats")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """In the order of METHODS, seeds in order."""
    found = groups(sorted(rows, key=lambda row: row["seed"]), "method")
    return {method.name: found[method.name,] for method in METHODS if (method.name,) in found}


def text(rows: list[Row], speed: list[Row]) -> str:
    methods, settings = by_method(rows), rows[0]["settings"]
    budget = f"{settings['epochs']} pass" if "epochs" in settings else f"{settings['steps']} steps"
    precision = "bf16 autocast on float32 weights" if settings.get("bf16") else "float32"
    held_out = f"every {settings['every_nth']}th line" if "every_nth" in settings else "the lines after them"
    together = max(row["jobs"] for row in rows)
    parts = [
        "# Several seeds on the same real pairs",
        "",
        f"{settings['model']} on {settings['data']} (sha256 {settings['data_sha256'][:12]}…): {budget} over the "
        f"training pairs, {settings['pairs_per_step']} pairs a step, {rows[0]['steps']} steps, {precision}, one "
        "learning rate for all, the paper's parameters unless `benchmarks/methods.py` names others. "
        f"Held out: {held_out}, {len(rows[0]['answers'])} pairs, scored in float32 before and after. Means over seeds; "
        "± is the paired standard error over held-out pairs (of each pair the mean over seeds), in brackets the "
        "standard deviation over seeds, which draw the order of the pairs. Accuracy: share of pairs whose chosen "
        "answer is likelier a token. Margin: difference of the mean log-probabilities a token, in nats. "
        f"{together} trainings shared the machine.",
        "",
        *table(methods),
        "",
        sources([{**row, "file": "rows.jsonl"} for row in rows]),
        "",
        "## The abstract's claim",
        "",
        CLAIM,
        "",
        *claim(methods),
        "",
        "![Movement of held-out log-probabilities](likelihoods.png)",
        "",
        *speed_text(speed),
    ]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="of benchmarks.methods; README.md goes beside it")
    args = parser.parse_args()
    require("matplotlib")
    rows = rows_of(args.rows)
    if not rows:
        sys.exit(f"{args.rows}: no rows; measure first: python -m benchmarks.methods")
    folder = args.rows.parent
    (folder / "README.md").write_text(text(rows, rows_of(folder / SPEED)))
    pictured = {name: found for name, found in by_method(rows).items() if found[0]["held_out"]}
    if pictured:
        draw(pictured, folder / "likelihoods.png")
    print(f"{folder / 'README.md'} is written")


if __name__ == "__main__":
    main()
