"""Fused preference losses straight from hidden states, without the logits.

First of all ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood, arXiv 2409.10571.
(Not Anchored SFT, arXiv 2509.23753, which other projects call by the same four letters.)
"""

from asft_kernels.functional import fused_asft_loss, fused_linear_logps, fused_preference_loss
from asft_kernels.nn import FusedASFTLoss
from asft_kernels.objectives import get_objective
from asft_kernels.outputs import PreferenceOutputs, SequenceOutputs, TokenStats
from asft_kernels.token_loss import preference_loss_from_logps

__version__ = "0.1.0"
__all__ = [
    "FusedASFTLoss",
    "PreferenceOutputs",
    "SequenceOutputs",
    "TokenStats",
    "fused_asft_loss",
    "fused_linear_logps",
    "fused_preference_loss",
    "get_objective",
    "preference_loss_from_logps",
]
