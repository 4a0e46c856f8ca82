"""Whether a run under accelerate's FSDP2 streams its output head."""

import re
from typing import Any

import torch
from torch import nn

from asft_kernels.errors import InputError
from asft_kernels.models.seam import causal_lm, output_head
from asft_kernels.models.shard import shard_head
from asft_kernels.sharded_linear import GATHERED_BYTES

GATHER, STREAM = "gather", "stream"


def stream_head(trainer: Any) -> bool:
    """Takes the policy's head out of what FSDP2 is going to shard, where the arguments or the head's size say so.

    Args:
        trainer: a PreferenceTrainer, before accelerate has prepared its model.

    Returns:
        Whether the head will be streamed.

    Raises:
        InputError: where args.sharded_head asks for what cannot be.
    """
    asked, accelerator = trainer.args.sharded_head, trainer.accelerator
    if asked == GATHER or not (asked or accelerator.is_fsdp2):
        return False
    if not accelerator.is_fsdp2:
        raise InputError(
            f"sharded_head: got {asked!r} without FSDP2, need it (fsdp: true, fsdp_config: version 2) on GPUs; or "
            "leave it out"
        )
    plugin = accelerator.state.fsdp_plugin
    param_dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    if asked is None and not _is_large(trainer.model, param_dtype):
        return False
    for name, given in ("parallelism_config", accelerator.parallelism_config), (
        "cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading,
    ):  # fmt: skip
        if given and asked:
            raise InputError(f"sharded_head: got {asked!r} with {name}, need it without; leave one of them out")
        if given:
            return False
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    if accelerator.mixed_precision != "no":  # accelerate makes FSDP2's parameters fp32 later on, and means no DTensor
        head = output_head(trainer.model)
        weight = getattr(head, "base_layer", head).weight
        if weight.requires_grad:
            weight.data = weight.data.float()
    shard_head(trainer.model, mesh, stream=True, param_dtype=param_dtype)
    head: Any = output_head(trainer.model)
    ignored = plugin.ignored_modules or []
    if isinstance(ignored, str):
        ignored = [module for name, module in trainer.model.named_modules() if re.fullmatch(ignored, name)]
    plugin.ignored_modules = [*ignored, getattr(head, "base_layer", head)]
    return True


def _is_large(model: Any, param_dtype: torch.dtype | None) -> bool:
    """Whether a head of its own takes more than GATHERED_BYTES in the dtype of the product."""
    head: Any = output_head(model)
    linear = getattr(head, "base_layer", head)
    embedding = causal_lm(model).get_input_embeddings()
    if type(linear) is not nn.Linear or getattr(embedding, "weight", None) is linear.weight:
        return False
    return linear.weight.numel() * (param_dtype or linear.weight.dtype).itemsize > GATHERED_BYTES
