"""What each objective needs beside log-probabilities, made up at random for any batch."""

from typing import Any

import torch
from torch import Tensor

from asft_kernels.objectives import get_objective

# Objects whose defaults cannot run, or that have more than one form: name of the test -> objective.
FORMS: dict[str, Any] = {}


def objective_of(name: str) -> Any:
    return FORMS[name]() if name in FORMS else get_objective(name)


def sums_like(lengths: Tensor, generator: torch.Generator, *lead: int) -> Tensor:
    """Sums of log-probabilities of -0.5 to -3 a token, for rows of these lengths, float64."""
    each = -0.5 - 2.5 * torch.rand(*lead, len(lengths), generator=generator, dtype=torch.float64)
    return each * lengths


INPUTS = {  # by the names of Objective.inputs and .optional_inputs: rows, generator -> tensor
    "desirable": lambda rows, g: torch.rand(rows, generator=g) < 0.5,
    "feature_distance": lambda rows, g: torch.rand(rows, generator=g, dtype=torch.float64),
}


def direct_inputs(objective: Any, lengths: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keywords for objective(policy, **...)."""
    g = torch.Generator().manual_seed(seed)
    keywords = {name: INPUTS[name](len(lengths), g) for name in objective.inputs}
    if objective.needs_reference:
        lead = (3,) if type(objective).__name__ == "MRPO" else ()
        keywords["ref_logps"] = sums_like(lengths, g, *lead)
    return keywords


def call_inputs(objective: Any, labels: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keywords for fused_preference_loss(hidden, head, labels, objective, **...), labels (R, T)."""
    g = torch.Generator().manual_seed(seed + 1)
    keywords = direct_inputs(objective, (labels != -100).sum(dim=1), seed)
    ref = keywords.pop("ref_logps", None)
    call: dict[str, Any] = {"objective_inputs": keywords} if keywords else {}
    if ref is not None:
        per_token = -3 * torch.rand(labels.shape, generator=g, dtype=torch.float64)
        call["ref_logps"] = per_token if objective.ref_per_token else ref
    if hasattr(objective, "weigh_tokens"):
        call["token_weights"] = (torch.rand(labels.shape, generator=g) < 0.5).float()
    return call
