"""Figures of a run: sums over some steps, metrics.jsonl, and the change between evaluations."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Columns of the per-pair table that an evaluation yields.
COLUMNS = ("chosen_avg_logp", "rejected_avg_logp", "margin", "loss", "counts")


def counting_pairs(labels: Tensor) -> Tensor:
    """(B,) bool: which pairs of (2B, T) labels count, i.e. have a predicted token on both sides."""
    chosen, rejected = (labels[:, 1:] != -100).any(dim=1).chunk(2)
    return chosen & rejected


class Window:
    """Sums since the last log, kept on the device: nothing is read until `take`."""

    NAMES = ("pairs", "loss", "sft", "align", "chosen_avg_logp", "rejected_avg_logp", "margin", "accuracy")
    TOKENS = ("tokens", "loss_tokens")

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.own: list[str] = []  # the objective's own figures

    def add(self, outputs: dict[str, Any], attention_mask: Tensor) -> None:
        chosen, rejected = outputs["chosen_avg_logps"], outputs["rejected_avg_logps"]
        lengths = outputs["chosen_lengths"], outputs["rejected_lengths"]
        counts = (lengths[0] > 0) & (lengths[1] > 0)
        pairs = outputs["num_pairs"]
        figures = [
            pairs,
            outputs["pair_losses"].sum(),
            outputs["sft_loss"] * pairs,
            outputs["align_loss"] * pairs,
            chosen[counts].sum(),
            rejected[counts].sum(),
            outputs["margins"].sum(),
            outputs["accuracy"] * pairs,
            attention_mask.sum(),
            lengths[0].sum() + lengths[1].sum(),
            *(value * pairs for value in outputs["metrics"].values()),
        ]
        self.own = list(outputs["metrics"])
        new = torch.stack([figure.detach().double() for figure in figures])
        self.sums = new if self.sums is None else self.sums + new

    def take(self, seconds: float, reduce: Any) -> dict[str, float]:
        """Means per pair since the last call; `reduce` sums a tensor over all processes."""
        if self.sums is None:
            return {}
        sums = dict(zip([*self.NAMES, *self.TOKENS, *self.own], reduce(self.sums).tolist(), strict=True))
        self.sums = None
        pairs, tokens = max(sums["pairs"], 1.0), sums["tokens"]
        return {
            **{name: sums[name] / pairs for name in [*self.NAMES[1:], *self.own]},
            "pairs": int(sums["pairs"]),
            "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
            "loss_token_share": sums["loss_tokens"] / max(tokens, 1.0),
        }


class MetricsFile:
    """metrics.jsonl: one JSON object a line, `kind` "train" or "eval", `step`, then figures."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def start(self, resumed_step: int | None, complete: bool = False) -> None:
        """Begin anew, or keep what the run had written up to the checkpoint that it resumes from.

        complete: no step is left, so that the last evaluation is about to be written again.
        """
        if not self.writes:
            return
        kept = [] if resumed_step is None else [r for r in self.rows() if r["step"] <= resumed_step]
        if complete:
            kept = [row for row in kept if row["kind"] != "eval" or row["step"] < resumed_step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)

    def write(self, row: dict[str, Any]) -> None:
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line that a killed process was writing
                continue
        return rows


@dataclass(frozen=True)
class Evaluation:
    """Per-pair figures of one evaluation, (n, len(COLUMNS)); pairs in the same order every time."""

    table: np.ndarray

    def save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.table.tolist()) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        return cls(np.asarray(json.loads(path.read_text()), dtype=float))

    def column(self, name: str) -> np.ndarray:
        """Of the pairs that count."""
        counts = self.table[:, COLUMNS.index("counts")] > 0
        return self.table[counts, COLUMNS.index(name)]

    def figures(self) -> dict[str, float]:
        """Means over pairs; margin is of log-odds, as `out.margins`, avg_logp_margin of logps."""
        chosen, rejected = self.column("chosen_avg_logp"), self.column("rejected_avg_logp")
        if not len(chosen):
            return {"pairs": 0}
        figures = {
            "loss": self.column("loss").mean(),
            "sft": -chosen.mean(),
            "chosen_avg_logp": chosen.mean(),
            "rejected_avg_logp": rejected.mean(),
            "margin": self.column("margin").mean(),
            "avg_logp_margin": (chosen - rejected).mean(),
            "accuracy": (chosen > rejected).mean(),
        }
        return {"pairs": len(chosen), **{name: float(value) for name, value in figures.items()}}


def change(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """For each figure: before, after, change, and the change's paired standard error.

    Both evaluations saw the same pairs, so the error is that of the mean of n differences,
    sd / sqrt(n): far smaller than either mean's own.
    """

    def per_pair(evaluation: Evaluation) -> dict[str, np.ndarray]:
        chosen, rejected = (
            evaluation.column("chosen_avg_logp"),
            evaluation.column("rejected_avg_logp"),
        )
        return {
            "margin": evaluation.column("margin"),
            "avg_logp_margin": chosen - rejected,
            "accuracy": (chosen > rejected).astype(float),
            "chosen_avg_logp": chosen,
            "rejected_avg_logp": rejected,
        }

    old, new = per_pair(before), per_pair(after)
    result = {}
    for name in old:
        moved = new[name] - old[name]
        error = float(moved.std(ddof=1) / len(moved) ** 0.5) if len(moved) > 1 else float("nan")
        result[name] = {
            "before": float(old[name].mean()),
            "after": float(new[name].mean()),
            "change": float(moved.mean()),
            "standard_error": error,
        }
    return result


def change_table(changes: dict[str, dict[str, float]], pairs: int) -> str:
    """The result of `change` as text."""
    labels = {
        "margin": "margin of log-odds",
        "avg_logp_margin": "margin of mean log-probabilities",
        "accuracy": "accuracy (chosen likelier)",
        "chosen_avg_logp": "chosen mean log-probability",
        "rejected_avg_logp": "rejected mean log-probability",
    }
    lines = [f"{f'{pairs} evaluation pairs':<34}{'before':>9}{'after':>9}{'change':>9}  paired s.e."]
    for name, row in changes.items():
        figures = f"{row['before']:>9.3f}{row['after']:>9.3f}{row['change']:>+9.3f}"
        lines.append(f"{labels[name]:<34}{figures}  {row['standard_error']:.3f}")
    return "\n".join(lines)
