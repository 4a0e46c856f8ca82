"""Hugging Face models: exact log-probabilities and preference losses from their own forward, without logits.

`fuse` gives a model a fused output head, `PreferenceModel` a preference loss for its forward; `shard_head` shards the
head over data-parallel ranks so that it can be streamed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asft_kernels.models.fused import fuse, unfuse
    from asft_kernels.models.output import FusedOutput
    from asft_kernels.models.preference import PreferenceModel
    from asft_kernels.models.seam import UnsupportedHead
    from asft_kernels.models.shard import shard_head

__all__ = ["FusedOutput", "PreferenceModel", "UnsupportedHead", "fuse", "shard_head", "unfuse"]

_MODULES = {"FusedOutput": "output", "PreferenceModel": "preference", "UnsupportedHead": "seam", "shard_head": "shard"}


def __getattr__(name: str) -> Any:
    # On demand: they need transformers, which loading and smollm2 do without until they load something.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'fused')}"), name)
