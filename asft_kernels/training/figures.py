"""Figures of a run: sums since the last log, and an evaluation's figures pair by pair."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asft_kernels.files import replacing
from asft_kernels.outputs import PreferenceOutputs

BEFORE = "eval_before.json"  # in the output folder: a resumed run compares with it
COLUMNS = ("chosen_avg_logp", "rejected_avg_logp", "margin", "loss", "counts")  # of a pair in an evaluation
REWARDS = {  # an objective's names -> TRL's
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies",
}


class Window:
    """Sums since the last log, kept on the device: nothing is read until `take`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None

    def add(self, figures: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Adds (sum, count) by name; the names are the same at every call between two `take`."""
        self.names = list(figures)
        new = torch.stack([torch.stack([x.detach().double(), n.detach().double()]) for x, n in figures.values()])
        self.sums = new if self.sums is None else self.sums + new

    def sum_of(self, name: str) -> float:
        """Returns a sum since the last call of `take` on this process, 0 for none; waits for the device."""
        return 0.0 if self.sums is None else self.sums[self.names.index(name), 0].item()

    def take(self, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """Returns sum / count by name since the last call, and "pairs". reduce: sums a tensor over all processes."""
        if self.sums is None:
            return {}
        sums, self.sums = reduce(self.sums).tolist(), None
        return {name: total / max(count, 1.0) for name, (total, count) in zip(self.names, sums, strict=True)}


def pair_figures(out: PreferenceOutputs, losses: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over the pairs that count, by TRL's names where it has one.

    Args:
        losses: (B,), 0 for pairs that do not count.
    """
    pairs = out.num_pairs
    counts = (out.chosen_lengths > 0) & (out.rejected_lengths > 0)

    def over(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.where(counts, 0).sum(), pairs

    return {
        "loss": (losses.sum(), pairs),
        "logps/chosen": over(out.chosen_logps),
        "logps/rejected": over(out.rejected_logps),
        "avg_logps/chosen": over(out.chosen_avg_logps),
        "avg_logps/rejected": over(out.rejected_avg_logps),
        "log_odds/chosen": over(out.chosen_log_odds),
        "log_odds/rejected": over(out.rejected_log_odds),
        "log_odds/margins": over(out.margins),
        "accuracy": (out.accuracy * pairs, pairs),
        "sft_loss": (out.sft_loss * pairs, pairs),
        "align_loss": (out.align_loss * pairs, pairs),
        **{REWARDS.get(name, name): (value * pairs, pairs) for name, value in out.metrics.items()},
    }


def token_figures(outputs: Any, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over tokens of TRL's figures. mask: (2B, T - 1) bool, where answers' tokens are predicted."""
    figures = {}
    chosen, rejected = mask.chunk(2)
    if outputs.entropy is not None:
        figures["entropy"] = (outputs.entropy[:, -mask.shape[1] :].where(mask, 0).sum(), mask.sum())
    if outputs.mean_logits is not None:
        halves = outputs.mean_logits[:, -mask.shape[1] :].where(mask, 0).chunk(2)
        figures["logits/chosen"] = (halves[0].sum(), chosen.sum())
        figures["logits/rejected"] = (halves[1].sum(), rejected.sum())
    if outputs.is_top1 is not None:
        top1 = outputs.is_top1[:, -mask.shape[1] :].chunk(2)[0]
        figures["mean_token_accuracy"] = ((top1 & chosen).sum(), chosen.sum())
    return figures


def pair_table(out: PreferenceOutputs, losses: Tensor) -> tuple[Tensor, Tensor]:
    """(B, len(COLUMNS)) float64, and (B,) bool: which pairs count."""
    counts = (out.chosen_lengths > 0) & (out.rejected_lengths > 0)
    columns = (out.chosen_avg_logps, out.rejected_avg_logps, out.margins, losses, counts)
    return torch.stack([column.double() for column in columns], dim=1), counts


@dataclass(frozen=True)
class Evaluation:
    """Figures of each pair in one evaluation, (n, len(COLUMNS)); the same order every time."""

    table: np.ndarray

    def save(self, path: Path) -> None:
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.table.tolist()) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        return cls(np.asarray(json.loads(path.read_text()), dtype=float))

    def column(self, name: str) -> np.ndarray:
        """Of the pairs that count."""
        counts = self.table[:, COLUMNS.index("counts")] > 0
        return self.table[counts, COLUMNS.index(name)]

    def mean_loss(self) -> dict[str, float]:
        losses = self.column("loss")
        return {"loss": float(losses.mean()), "pairs": len(losses)} if len(losses) else {"pairs": 0}


def change(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float]]:
    """For each figure: before, after, change, and the change's paired standard error.

    Both evaluations saw the same pairs, so the error is that of the mean of n differences, sd / sqrt(n): far smaller
    than either mean's own.
    """

    def per_pair(evaluation: Evaluation) -> dict[str, np.ndarray]:
        chosen, rejected = evaluation.column("chosen_avg_logp"), evaluation.column("rejected_avg_logp")
        return {
            "log_odds/margins": evaluation.column("margin"),
            "avg_logps/margins": chosen - rejected,
            "accuracy": (chosen > rejected).astype(float),
            "avg_logps/chosen": chosen,
            "avg_logps/rejected": rejected,
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
        "log_odds/margins": "margin of log-odds",
        "avg_logps/margins": "margin of mean log-probabilities",
        "accuracy": "accuracy (chosen likelier)",
        "avg_logps/chosen": "chosen mean log-probability",
        "avg_logps/rejected": "rejected mean log-probability",
    }
    lines = [f"{f'{pairs} evaluation pairs':<34}{'before':>9}{'after':>9}{'change':>9}  paired s.e."]
    for name, row in changes.items():
        figures = f"{row['before']:>9.3f}{row['after']:>9.3f}{row['change']:>+9.3f}"
        lines.append(f"{labels[name]:<34}{figures}  {row['standard_error']:.3f}")
    return "\n".join(lines)
