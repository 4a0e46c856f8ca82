"""The two sets of weights beside the policy's: their exponential moving average, which writes, and the reference's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels.models.check import evaluating

MODES = ("ema", "policy", "fixed")

Weights = dict[str, Tensor]


class MovingWeights:
    """Holds θ_ema ← (1 − β)·θ + β·θ_ema, updated before every step, and a reference copied from it now and then.

    θ are the parameters that are trained, adapters alone where these are. Both sets begin as copies of them.

    Args:
        policy: the model that is trained; it computes with either set while that is `used`.
        ema_beta: β in [0, 1). 0: the policy's own weights write.
        ref_update_mode: what is copied: "ema", "policy", or nothing ("fixed": the policy as it came).
        ref_sync_steps: steps between copies into the reference, the first at step 0.
        needs_reference: without it `reference` is None.
    """

    def __init__(
        self, policy: nn.Module, *, ema_beta: float, ref_update_mode: str, ref_sync_steps: int, needs_reference: bool
    ):
        self.policy, self.ema_beta = policy, ema_beta
        self.ref_update_mode, self.ref_sync_steps = ref_update_mode, ref_sync_steps
        self.average = self._copies()
        self.reference = self._copies() if needs_reference else None

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.policy.named_parameters() if parameter.requires_grad}

    def _copies(self) -> Weights:
        return {name: parameter.detach().clone() for name, parameter in self._trained().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves both before optimiser step `step`, counted from 0."""
        policy = self._trained()
        torch._foreach_lerp_([*self.average.values()], [*policy.values()], 1 - self.ema_beta)
        if self.reference is None or self.ref_update_mode == "fixed" or step % self.ref_sync_steps:
            return
        _copy(self.reference, self.average if self.ref_update_mode == "ema" else policy)

    @contextmanager
    def used(self, weights: Weights) -> Iterator[None]:
        """Gives the policy other weights, by exchanging pointers, and puts it into evaluation.

        Autocast keeps a parameter's cast by the parameter, not its content: what it kept is dropped on both sides.
        """
        with evaluating(self.policy):
            self._exchange(weights)
            try:
                yield
            finally:
                self._exchange(weights)

    def _exchange(self, weights: Weights) -> None:
        for name, parameter in self._trained().items():
            parameter.data, weights[name] = weights[name], parameter.data
        torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "reference": self.reference}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _copy(self.average, state["average"])
        if self.reference is not None:
            _copy(self.reference, state["reference"])


def _copy(into: Weights, source: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(source[name])
