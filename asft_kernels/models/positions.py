"""Labels beside positions: what a caller passed must agree before the head's input is taken by position."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from asft_kernels.models.seam import UnsupportedHead


def check_labels(labels: Any, inputs: Mapping[str, Any], name: str) -> Tensor:
    """Returns `labels`, whose shape is that of the caller's input_ids or inputs_embeds without the last dimension.

    Args:
        labels: what was given under `name`.
        inputs: keywords of the model's forward.

    Raises:
        ValueError: for labels that are no (R, T) integers, or of another shape than the inputs.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point() or labels.dtype == torch.bool:
        got = f"{labels.dtype} of {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        got = "None" if labels is None else got
        raise ValueError(f"{name}: got {got}, need (R, T) integers, -100 where there is no loss; give them")
    for given in ("input_ids", "inputs_embeds"):
        of = inputs.get(given)
        if isinstance(of, Tensor) and of.shape[:2] != labels.shape:
            # PEFT's prompt tuning lengthens inputs_embeds and labels, and passes shift_labels on as they are.
            hint = "; under prompt tuning give labels instead" if name == "shift_labels" else ""
            raise ValueError(
                f"{name}: got shape {tuple(labels.shape)}, need {tuple(of.shape[:2])}, a label for each position of "
                f"{given}; pad or cut them alike{hint}"
            )
    return labels


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(signature.parameters, args, strict=False)), **kwargs}


def last_positions(hidden: Any, labels: Tensor, name: str) -> Tensor:
    """Returns the head's input at the positions of the labels (R, T): the last T, as prompt tuning prepends its own.

    `check_labels` has held the labels against what the caller passed: further positions are the model's own.
    """
    fits = isinstance(hidden, Tensor) and hidden.dim() == 3 and len(hidden) == len(labels)
    if not fits or hidden.shape[1] < labels.shape[1]:
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UnsupportedHead(
            f"{name}: its output head is called with {got}, need ({labels.shape[0]}, {labels.shape[1]}, D), a position "
            "each label; leave out logits_to_keep and what else makes its forward drop positions"
        )
    return hidden[:, hidden.shape[1] - labels.shape[1] :]
