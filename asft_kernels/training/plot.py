"""The curves of a run as one PNG, drawn from the rows of metrics.jsonl."""

from pathlib import Path
from typing import Any

from asft_kernels.files import replacing

CHOSEN, REJECTED, TOTAL, ALIGN = "#1b7837", "#b2182b", "#222222", "#5e3c99"
EVAL_LABEL = "held-out pairs (bar: paired standard error of the change)"
SMOOTHED = 8  # steps in the running mean; single steps are drawn behind it, faint


def plot_curves(
    rows: list[dict[str, Any]],
    path: Path,
    title: str = "",
    errors: dict[str, float] | None = None,
) -> Path:
    """Loss, log-probabilities, margin and accuracy over steps; evaluations as points.

    The loss has its parts beside it where it is their sum. Margin and accuracy are the rewards' where there are some,
    else those of the log-odds.

    errors: figure -> paired standard error of its change, drawn on the last evaluation's point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval" and "log_odds/margins" in row]
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, logps), (margin, accuracy) = figure.subplots(2, 2, sharex=True)
    if title:
        figure.suptitle(title, fontsize=12)

    _curve(loss, train, evals, "loss", TOTAL, "loss")
    if all(_is_sum(row) for row in train):
        _curve(loss, train, evals, "sft_loss", CHOSEN, "SFT part: $-$avg log p (chosen)")
        _curve(loss, train, evals, "align_loss", ALIGN, "alignment part", style="--")
    _finish(loss, "Loss", "nats per pair")

    _curve(logps, train, evals, "avg_logps/chosen", CHOSEN, "chosen", errors)
    _curve(logps, train, evals, "avg_logps/rejected", REJECTED, "rejected", errors)
    _finish(logps, "Mean log-probability per token", "nats")

    rewards = any("rewards/margins" in row for row in train)
    _curve(
        margin, train, evals, "rewards/margins" if rewards else "log_odds/margins", TOTAL, "chosen $-$ rejected", errors
    )  # fmt: skip
    margin.axhline(0, color="0.6", linewidth=0.8)
    _finish(margin, "Margin of rewards" if rewards else "Margin of log-odds", "nats")

    if rewards:
        _curve(accuracy, train, evals, "rewards/accuracies", ALIGN, "chosen has the larger reward", errors)
    _curve(accuracy, train, evals, "accuracy", TOTAL, "chosen likelier", errors)
    accuracy.axhline(0.5, color="0.6", linewidth=0.8)
    accuracy.set_ylim(-0.05, 1.05)
    _finish(accuracy, "Accuracy", "share of pairs")
    for axes in (margin, accuracy):
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    path = Path(path)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    return path


def _curve(
    axes: Any,
    train: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    name: str,
    color: str,
    label: str,
    errors: dict[str, float] | None = None,
    style: str = "-",
) -> None:
    """Single steps faint, their running mean in front, evaluations as points joined by dots."""
    steps = [row["step"] for row in train if name in row]
    values = [row[name] for row in train if name in row]
    if steps:
        if len(steps) > 2 * SMOOTHED:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1.0)
            values = _running_mean(values)
        axes.plot(steps, values, color=color, linewidth=1.8, label=label, linestyle=style)
    points = [(row["step"], row[name]) for row in evals if name in row]
    if points:
        x, y = zip(*points, strict=True)
        error = [0.0] * (len(x) - 1) + [(errors or {}).get(name, 0.0)]
        bars = error if any(error) else None
        points_style: dict[str, Any] = dict(
            marker="o", markersize=6, markeredgecolor="white", linestyle=":", linewidth=1.2
        )
        axes.errorbar(x, y, yerr=bars, color=color, capsize=4, zorder=3, **points_style)
        axes.plot([], [], color="0.3", marker="o", linestyle=":", label=EVAL_LABEL)


def _is_sum(row: dict[str, Any]) -> bool:
    """Whether a row's loss is that of its two parts, each counted once."""
    loss, parts = row.get("loss", 0.0), row.get("sft_loss", 0.0) + row.get("align_loss", 0.0)
    return abs(loss - parts) <= 1e-4 * (1 + abs(loss))


def _running_mean(values: list[float]) -> list[float]:
    return [sum(values[max(i - SMOOTHED + 1, 0) : i + 1]) / min(i + 1, SMOOTHED) for i in range(len(values))]


def _finish(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if EVAL_LABEL in handles:  # one entry, the last, for the points of all curves
        handles[EVAL_LABEL] = handles.pop(EVAL_LABEL)
    if handles:
        axes.legend(handles.values(), handles.keys(), fontsize=8, frameon=False)
