"""The losses, by name: one paper, one file, one frozen dataclass."""

from collections.abc import Callable

from asft_kernels.objectives.asft import ASFT
from asft_kernels.objectives.base import LossTerms, Objective
from asft_kernels.objectives.sft import SFT

OBJECTIVES: dict[str, Callable[..., Objective]] = {"asft": ASFT, "sft": SFT}


def get_objective(name: str, **parameters) -> Objective:
    """The objective called `name`, with its paper's defaults where a parameter is not given."""
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective: got {name!r}, need one of {', '.join(map(repr, OBJECTIVES))} or an objective object"
        )
    return OBJECTIVES[name](**parameters)


__all__ = ["ASFT", "OBJECTIVES", "SFT", "LossTerms", "Objective", "get_objective"]
