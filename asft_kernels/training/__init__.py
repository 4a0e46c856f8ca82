"""Training on TRL: `PreferenceTrainer` for every objective, and TRL's own trainers on fused heads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asft_kernels.training.config import PreferenceConfig
    from asft_kernels.training.hooks import Method
    from asft_kernels.training.patch import patch_trl, unpatch_trl
    from asft_kernels.training.trainer import PreferenceTrainer

__all__ = ["Method", "PreferenceConfig", "PreferenceTrainer", "patch_trl", "unpatch_trl"]

_MODULES = {
    "Method": "hooks",
    "PreferenceConfig": "config",
    "PreferenceTrainer": "trainer",
    "patch_trl": "patch",
    "unpatch_trl": "patch",
}


def __getattr__(name: str) -> Any:
    # On demand: they need TRL.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
