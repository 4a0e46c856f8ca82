"""Liger-Kernel's class names, constructors and order of arguments on this package's calls: docs/liger.md.

A script moves by its import line: `from asft_kernels.liger import LigerFusedLinearDPOLoss`. Written after Liger 0.8.5.
"""

from asft_kernels.liger.cross_entropy import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss
from asft_kernels.liger.dpo import LigerFusedLinearDPOLoss
from asft_kernels.liger.kto import LigerFusedLinearKTOLoss
from asft_kernels.liger.reference_free import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
