"""report.md, report.json and pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from asft_kernels.evaluation.figures import MEANINGS
from asft_kernels.files import replacing, write_json


def write_report(
    folder: Path,
    about: dict[str, Any],
    models: dict[str, dict[str, dict[str, float]]],
    comparisons: list[dict[str, Any]],
    numbers: dict[str, dict[str, np.ndarray]],
    remarks: list[str],
) -> list[str]:
    """Writes the report of a run.

    Args:
        folder: where to.
        about: what was given.
        models: name -> summary of `figures.summary`.
        comparisons: "models": both names, "difference": of `figures.comparison`.
        numbers: name -> numbers of each pair, for the pictures.
        remarks: lines of what is missing, behind the table.

    Returns:
        The lines of its tables.
    """
    content = {"about": about, "meanings": MEANINGS, "models": models, "comparisons": comparisons}
    write_json(folder / "report.json", _without_nan(content))
    text = ["# Evaluation", "", *(f"- {name}: {_cell(value)}" for name, value in about.items()), ""]
    tables = ["Value ± standard error over pairs.", "", *_table(models), ""]
    for remark in remarks:
        tables += [remark, ""]
    if comparisons:
        tables += ["## Differences, pair by pair", ""]
        tables += [
            "The later model's minus the earlier one's on the same pairs, so that what rose is positive; "
            "* at more than 2 standard errors.",
            "",
        ]
        named = {f"{c['models'][0]} − {c['models'][1]}": c["difference"] for c in comparisons}
        tables += [*_table(named, marked=True), ""]
    text += tables
    text += ["## What the figures are", "", *(f"- {name}: {meaning}" for name, meaning in MEANINGS.items()), ""]
    _pictures(folder, numbers)
    text += ["![margins](margins.png)", "", "![lengths](lengths.png)"]
    with replacing(folder / "report.md") as partial:
        partial.write_text("\n".join(text) + "\n", encoding="utf-8")
    return tables


def _table(columns: dict[str, dict[str, dict[str, float]]], *, marked: bool = False) -> list[str]:
    names = [name for name in MEANINGS if any(name in column for column in columns.values())]
    lines = [f"| | {' | '.join(_cell(name) for name in columns)} | pairs |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for name in names:
        found = [column[name] for column in columns.values() if name in column]
        cells = [_shown(column.get(name), marked) for column in columns.values()]
        pairs = " / ".join(dict.fromkeys(str(entry["pairs"]) for entry in found))
        lines.append(f"| {name} | {' | '.join(cells)} | {pairs} |")
    return lines


def _shown(entry: dict[str, float] | None, marked: bool) -> str:
    if entry is None:
        return ""
    value, error = entry["value"], entry["standard_error"]
    star = " *" if marked and abs(value) > 2 * error else ""
    return f"{value:.4g} ± {'?' if math.isnan(error) else f'{error:.2g}'}{star}"


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", "; ")


def _without_nan(content: Any) -> Any:
    """null for NaN, which JSON lacks."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _pictures(folder: Path, numbers: dict[str, dict[str, np.ndarray]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def save(figure: Any, name: str) -> None:
        FigureCanvasAgg(figure)
        with replacing(folder / name) as partial:
            figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    bins = np.histogram_bin_edges(np.concatenate([of_model["margin_mean"] for of_model in numbers.values()]), bins=30)
    for model, of_model in numbers.items():
        axes.hist(of_model["margin_mean"], bins=list(bins), histtype="step", label=model)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="margin of the mean log-probability of a token, nats", ylabel="pairs")
    axes.legend()
    save(figure, "margins.png")

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    first = next(iter(numbers.values()))
    boxes = {"chosen": first["chosen_length"], "rejected": first["rejected_length"]}
    for model, of_model in numbers.items():
        if "generated_length" in of_model:
            lengths = of_model["generated_length"]
            boxes[model] = lengths[~np.isnan(lengths)]
    axes.boxplot(list(boxes.values()), tick_labels=list(boxes), orientation="horizontal", showmeans=True)
    axes.set(xlabel="tokens")
    save(figure, "lengths.png")
