"""Objectives of single answers, on pairs: what training makes of sft, poft and kto."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.errors import InputError
from asft_kernels.objectives import LossTerms, Objective, WeightedSum, expression_of
from asft_kernels.objectives.base import chosen_of_pairs


@dataclass(frozen=True)
class OnPairs(Objective):
    """An unpaired objective of the chosen answers alone or, if it tells good from bad (kto), of both.

    The loss of a pair is the chosen row's, or the mean of both rows': batch means are then means over rows.
    """

    single: Any

    def __post_init__(self) -> None:
        for name in ("needs_reference", "reference_kind", "optional_inputs", "stats", "stats_with_grad"):
            object.__setattr__(self, name, getattr(self.single, name))
        object.__setattr__(self, "inputs", {k: v for k, v in self.single.inputs.items() if k != "desirable"})

    def check_references(self, number: int) -> None:
        self.single.check_references(number)

    def per_token(self, logps: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.single.per_token(logps, stats)

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        if "desirable" not in self.single.inputs:
            ref = None if ref_logps is None else ref_logps.chunk(2, dim=-1)[0]
            return self.single(chosen_of_pairs(policy), ref, **inputs)
        desirable = torch.arange(len(policy.sum), device=policy.sum.device) < len(policy.sum) // 2
        terms = self.single(policy, ref_logps, desirable=desirable, **inputs)
        halves = {name: values.chunk(2) for name, values in terms.metrics.items()}
        return LossTerms(
            torch.stack(terms.loss.chunk(2)).mean(dim=0),
            -policy.chosen.avg,
            torch.stack(terms.align.chunk(2)).mean(dim=0),
            {f"{side}_{name}": halves[name][i] for name in halves for i, side in enumerate(("chosen", "rejected"))},
        )


def on_pairs(objective: Any) -> Any:
    """Returns the objective itself if it is paired.

    Raises:
        InputError: for a sum with one that tells good from bad (kto): the others would be of both answers, too.
    """
    if "desirable" in objective.inputs and isinstance(objective, WeightedSum):
        got = expression_of(objective)
        raise InputError(
            f"objective: got {got!r}, need kto by itself, without a weight: "
            "a sum does not tell it which answers are good"
        )
    return objective if objective.paired else OnPairs(objective)
