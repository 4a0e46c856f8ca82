"""TRL's trainers on fused heads.

`patch_trl` puts them into the trainers that TRL has.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asft_kernels.training.patch import patch_trl, unpatch_trl

__all__ = ["patch_trl", "unpatch_trl"]

_MODULES = {"patch_trl": "patch", "unpatch_trl": "patch"}


def __getattr__(name: str) -> Any:
    # On demand: they need transformers.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
