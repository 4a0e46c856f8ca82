"""Fused preference losses straight from hidden states, without the logits.

First of all ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood, arXiv 2409.10571.
(Not Anchored SFT, arXiv 2509.23753, which other projects call by the same four letters.)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asft_kernels.core.distributed import VocabParallelHead
    from asft_kernels.cost import Estimate, estimate
    from asft_kernels.functional import fused_asft_loss, fused_linear_logps, fused_preference_loss
    from asft_kernels.nn import FusedASFTLoss
    from asft_kernels.objectives import get_objective
    from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, TokenStats
    from asft_kernels.token_loss import preference_loss_from_logps

__version__ = "0.2.0.dev0"
__all__ = [
    "Estimate",
    "FusedASFTLoss",
    "PreferenceOutputs",
    "SequenceOutputs",
    "TokenStats",
    "VocabParallelHead",
    "estimate",
    "fused_asft_loss",
    "fused_linear_logps",
    "fused_preference_loss",
    "get_objective",
    "preference_loss_from_logps",
]

_MODULES = {
    "Estimate": "cost",
    "FusedASFTLoss": "nn",
    "PreferenceOutputs": "outputs",
    "SequenceOutputs": "outputs",
    "TokenStats": "outputs",
    "VocabParallelHead": "core.distributed",
    "estimate": "cost",
    "get_objective": "objectives",
    "preference_loss_from_logps": "token_loss",
}


def __getattr__(name: str) -> Any:
    # On demand: `asft --help` answers without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'functional')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
