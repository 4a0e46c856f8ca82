"""The table and the picture of benchmarks.methods: python -m benchmarks.methods_report"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import require
from benchmarks.methods import FOLDER, METHODS, ROWS
from benchmarks.run import rows_of
from benchmarks.tables import MIB, markdown, sources

HEADER = [
    "objective",
    "accuracy, %",
    "margin, nats",
    "margin moved",
    "chosen moved",
    "rejected moved",
    "tokens/s",
    "memory beyond SFT, MiB",
]
CLAIM = (
    "ASFT's abstract (arXiv 2409.10571) says of DPO that it lowers the likelihood of rejected answers faster than it "
    "raises that of chosen ones, and that ASFT mitigates this. On these held-out pairs, in this short run:"
)
CHOSEN, REJECTED = "#1b7837", "#b2182b"


def moved(before: list[float], after: list[float]) -> str:
    """Mean of the differences and its paired standard error."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


def line(row: dict[str, Any], sft_peak: int | None) -> list[str]:
    chosen, rejected, new_chosen, new_rejected = (list(column) for column in zip(*row["answers"], strict=True))
    old = [c - r for c, r in zip(chosen, rejected, strict=True)]
    new = [c - r for c, r in zip(new_chosen, new_rejected, strict=True)]
    return [
        row["method"],
        f"{statistics.fmean(m > 0 for m in new) * 100:.1f}",
        f"{statistics.fmean(new):+.3f}",
        moved(old, new),
        moved(chosen, new_chosen),
        moved(rejected, new_rejected),
        f"{row['tokens_per_second']:.0f}",
        "–" if sft_peak is None else f"{(row['peak_bytes'] - sft_peak) / MIB:+.0f}",
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Before and after, on the same held-out pairs, and what a step costs."""
    order = [method.name for method in METHODS]
    rows = sorted(rows, key=lambda row: order.index(row["method"]))
    peaks = {row["method"]: row["peak_bytes"] for row in rows}
    chosen, rejected, *_ = (list(column) for column in zip(*rows[0]["answers"], strict=True))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    before = [
        "*before*",
        f"{statistics.fmean(m > 0 for m in margins) * 100:.1f}",
        f"{statistics.fmean(margins):+.3f}",
        "",
        f"from {statistics.fmean(chosen):.3f}",
        f"from {statistics.fmean(rejected):.3f}",
        "",
        "",
    ]
    return markdown(HEADER, [before, *(line(row, peaks.get("sft")) for row in rows)], words=1)


def verdict(row: dict[str, Any]) -> str:
    """How far the mean log-probabilities of the held-out answers went in the whole run."""
    (_, *first), (_, *last) = row["held_out"][0], row["held_out"][-1]
    chosen, rejected = (b - a for a, b in zip(first, last, strict=True))
    faster = "chosen" if abs(chosen) > abs(rejected) else "rejected"
    return (
        f"- {row['method']}: chosen {'rose' if chosen > 0 else 'fell'} by {abs(chosen):.3f} nats a token, rejected "
        f"{'rose' if rejected > 0 else 'fell'} by {abs(rejected):.3f}; {faster} moved faster."
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """How far the mean log-probabilities of held-out answers moved, step by step; a panel an objective."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["held_out"]]
    if not rows:
        return
    figure = Figure(figsize=(3.6 * len(rows), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows, strict=True):
        steps, chosen, rejected = zip(*row["held_out"], strict=True)
        for values, colour, name in ((chosen, CHOSEN, "chosen"), (rejected, REJECTED, "rejected")):
            axes.plot(steps, [v - values[0] for v in values], color=colour, marker="o", markersize=3, label=name)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(row["method"].upper())
        axes.set_xlabel("optimiser step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean log-probability a token,\nchange in nats")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def text(rows: list[dict[str, Any]]) -> str:
    settings = rows[0]["settings"]
    shown = [{**row, "file": ROWS.name} for row in rows]
    missing = [method.name for method in METHODS if method.name not in {row["method"] for row in rows}]
    made = [method.name for method in METHODS if method.data and method.name not in missing]
    parts = [
        "# Every objective on the same real pairs",
        "",
        f"{settings['model']}, the first pairs of {settings['data']} (sha256 {settings['data_sha256'][:12]}…), "
        f"{rows[0]['steps']} steps of {settings['pairs_per_step']} pairs, one learning rate and one seed for all; "
        "the paper's parameters unless `benchmarks/methods.py` names others. "
        f"{len(rows[0]['answers'])} held-out pairs, scored before and after; ± is the paired standard error of the "
        "change. Accuracy: share of pairs whose chosen answer is likelier a token. Margin: difference of the mean "
        "log-probabilities a token. Memory: peak of the process, compared with that of sft. "
        "Each method ran once, on a machine that did other work meanwhile: tokens/s and memory are rough. dnpo takes "
        "the same pairs in another order; rso-hinge_norm and bridged-bmc were trained by TRL's trainer, with prompts "
        "of more than 256 tokens too, and on another processor, the others by this package's own trainer before it; "
        "fpo's autoencoder is trained on the training pairs first, which is in none "
        "of the figures. Of pairs that `asft data` made of the same lines, with the model itself as scorer, writer or "
        f"editor (`benchmarks/method_data.py`): {', '.join(made) or 'none'}; that shows that the commands run on real "
        "texts, not what the methods are worth.",
        "",
        *table(rows),
        "",
        sources(shown),
        "",
    ]
    if missing:
        parts += [f"Not measured yet: {', '.join(missing)}.", ""]
    pictured = [row for row in rows if row["held_out"]]
    if pictured:
        parts += ["## How chosen and rejected likelihoods move", "", CLAIM, "", *(verdict(row) for row in pictured), ""]
        parts += ["![Movement of held-out log-probabilities](likelihoods.png)", ""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder for README.md and picture; default: %(default)s"
    )
    args = parser.parse_args()
    require("matplotlib")
    rows = rows_of(args.rows)
    if not rows:
        sys.exit(f"{args.rows}: no rows; measure first: python -m benchmarks.methods")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "README.md").write_text(text(rows))
    draw(rows, args.out / "likelihoods.png")
    print(f"{args.out / 'README.md'} is written")


if __name__ == "__main__":
    main()
