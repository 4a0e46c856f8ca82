"""The two models beside the policy: its exponential moving average, which writes, and the reference."""

import copy
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

MODES = ("ema", "policy", "fixed")


class MovingModels:
    """θ_ema ← (1 − β)·θ + β·θ_ema before every step; the reference is copied from it now and then.

    policy: the module that is trained; both others begin as copies of it.
    ema_beta: β in [0, 1), 0.5 in the authors' runs. 0: the policy itself writes.
    ref_sync_steps: steps between copies into the reference, the first at step 0. 108 in the authors' code, one
        epoch of their data.
    ref_update_mode: what is copied: "ema", "policy", or nothing ("fixed": the policy as it came).
    needs_reference: without it `reference` is None, and no third copy is kept.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        ema_beta: float = 0.5,
        ref_update_mode: str = "ema",
        ref_sync_steps: int = 108,
        needs_reference: bool = True,
    ):
        if not 0 <= ema_beta < 1:
            raise ValueError(f"ema_beta: got {ema_beta}, need a number from 0 to below 1")
        if ref_update_mode not in MODES:
            raise ValueError(f"ref_update_mode: got {ref_update_mode!r}, need one of {', '.join(map(repr, MODES))}")
        if ref_sync_steps < 1:
            raise ValueError(f"ref_sync_steps: got {ref_sync_steps}, need at least 1 step")
        self.ref_update_mode, self.ref_sync_steps = ref_update_mode, ref_sync_steps
        self.average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(ema_beta))
        self.average.eval().requires_grad_(False)
        self.reference: Any = copy.deepcopy(self.average.module) if needs_reference else None

    @property
    def ema(self) -> Any:
        return self.average.module

    def update(self, policy: nn.Module, step: int) -> None:
        """Before optimiser step `step`, counted from 0."""
        self.average.update_parameters(policy)
        if self.reference is None or self.ref_update_mode == "fixed" or step % self.ref_sync_steps:
            return
        source = self.ema if self.ref_update_mode == "ema" else policy
        self.reference.load_state_dict(source.state_dict())

    def state_dict(self) -> dict[str, Any]:
        reference = None if self.reference is None else self.reference.state_dict()
        return {"average": self.average.state_dict(), "reference": reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
