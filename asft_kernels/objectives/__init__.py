"""The losses, by name: one family, one file; one paper's loss, one frozen dataclass of its constants."""

import inspect
import re
from collections.abc import Callable

from asft_kernels.objectives.asft import ASFT
from asft_kernels.objectives.base import LossTerms, Objective, WeightedSum
from asft_kernels.objectives.sft import SFT

OBJECTIVES: dict[str, Callable[..., Objective]] = {"asft": ASFT, "sft": SFT}


def get_objective(name: str, **parameters) -> Objective:
    """The objective called `name`, with its paper's defaults where a parameter is not given.

    A weighted sum of names with their defaults is one too: "dpo + 0.005 sft" (then without parameters;
    `WeightedSum` takes objects).
    """
    if "+" in name and not parameters:
        return WeightedSum(tuple(_term(term) for term in name.split("+")))
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective: got {name!r}, need one of {', '.join(map(repr, OBJECTIVES))}, a sum such as "
            "'asft + 0.1 sft', or an objective object"
        )
    known = list(inspect.signature(OBJECTIVES[name]).parameters)
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise ValueError(
            f"{name}: got the parameter {unknown[0]!r}, need one of {', '.join(known)}" if known
            else f"{name}: got the parameter {unknown[0]!r}, it takes none"
        )  # fmt: skip
    return OBJECTIVES[name](**parameters)


def _term(term: str) -> tuple[float, Objective]:
    match = re.fullmatch(r"\s*(?:([0-9.]+(?:e-?[0-9]+)?)\s*\*?\s*)?([a-z_]+)\s*", term)
    if match is None:
        raise ValueError(f"objective: got the term {term.strip()!r} in a sum, need 'name' or 'weight name'")
    return float(match[1] or 1), get_objective(match[2])


__all__ = ["ASFT", "OBJECTIVES", "SFT", "LossTerms", "Objective", "WeightedSum", "get_objective"]
