"""How the head of one model is computed: the same in check, training and scoring."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from asft_kernels.models.check import LogitMap, check_head
from asft_kernels.models.config import logit_options
from asft_kernels.models.seam import ComputeAtHead, run_to_head

# The check puts modules into evaluation for a moment: threads wait for it and then use its result. One for all models,
# as a model is copied and pickled with its FusedHead.
_checking = RLock()


class FusedHead:
    """How the head of one model is computed: options, and what its first batch showed.

    logits: its scale and cap, None before the first batch. difference: the largest one that the check saw. checked:
    whether there is nothing left to check.
    """

    def __init__(
        self,
        inner: Any,
        *,
        statistics: tuple[str, ...],
        temperature: float,
        given: tuple[float | None, float | None],
        check: bool,
        options: Mapping[str, Any],
        differentiable: tuple[str, ...] = (),
        autocasts: bool = True,
    ):
        self.statistics, self.differentiable = statistics, differentiable
        self.temperature, self.given, self.options = temperature, given, options
        self.guess = logit_options(inner.config).but(*given)
        self.autocasts = autocasts
        self.logits: LogitMap | None = None if check else self.guess
        self.difference: float | None = None
        self.checked = not check
        takes = inspect.signature(type(inner).forward).parameters
        self.takes_use_cache = "use_cache" in takes or any(x.kind == x.VAR_KEYWORD for x in takes.values())

    @property
    def keywords(self) -> dict[str, Any]:
        """logit_scale, softcap (with the temperature in them) and options, for the fused calls."""
        if self.logits is None:
            raise RuntimeError("logit_scale: not known before the first batch; call the model first")
        return {**self.logits.at(self.temperature)._asdict(), **self.options}

    def precision(self, hidden: Tensor) -> AbstractContextManager[Any]:
        """Where the head is computed: under the caller's autocast, or without it."""
        return nullcontext() if self.autocasts else torch.autocast(hidden.device.type, enabled=False)

    # Frames below it are compiled: the model's own up to its head.
    @torch.compiler.disable(recursive=False)
    def run(
        self, model: Any, call: Callable[..., Any], compute: ComputeAtHead, labels: Tensor, inputs: dict[str, Any], *,
        shift: bool = True,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """`run_to_head`, after the check where there was none yet. labels: (R, T), by which tokens are chosen."""
        if self.takes_use_cache:
            inputs = {**inputs, "use_cache": False}
        if "return_dict" in inputs:  # a tuple has its aux_loss under no name
            inputs = {**inputs, "return_dict": True}
        if not self.checked:
            with _checking:
                if not self.checked:
                    self.logits, self.difference = check_head(
                        model, call, labels, inputs, shift=shift, guess=self.guess, given=self.given,
                        temperature=self.temperature, options=self.options,
                    )  # fmt: skip
                    self.checked = self.difference is not None
        return run_to_head(model, call, compute, inputs)
