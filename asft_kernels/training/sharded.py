"""How a run under accelerate's FSDP2 takes its output head: gathered or streamed."""

import re
from typing import Any

import torch
from torch import nn

from asft_kernels.core.sharded_linear import GATHERED_BYTES
from asft_kernels.errors import InputError
from asft_kernels.models.seam import causal_lm, output_head
from asft_kernels.models.shard import shard_head

GATHER, STREAM = "gather", "stream"


def place_head(trainer: Any) -> str | None:
    """Takes the policy's head out of what FSDP2 is going to shard, where the arguments or the head's size say so.

    Args:
        trainer: a PreferenceTrainer, before accelerate has prepared its model.

    Returns:
        How the head goes, in words: "streamed", or "gathered" and why; None without FSDP2.

    Raises:
        InputError: where args.sharded_head asks for what cannot be.
    """
    asked, accelerator = trainer.args.sharded_head, trainer.accelerator
    if not accelerator.is_fsdp2:
        if asked != STREAM:
            return None
        raise InputError(
            f"sharded_head: got {asked!r} without FSDP2, need it (fsdp: true, fsdp_config: version 2) on GPUs; or "
            "leave it out"
        )
    if asked == GATHER:
        return "gathered, as sharded_head says"
    plugin = accelerator.state.fsdp_plugin
    param_dtype = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    why = _why_whole(trainer.model)
    if asked and why:
        raise InputError(f"sharded_head: got {asked!r}, but {why}, need 'gather'; or leave it out")
    if asked is None and (why := why or _why_small(trainer.model, param_dtype)):
        return f"gathered, as {why}"
    for name, given in ("parallelism_config", accelerator.parallelism_config), (
        "cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading,
    ):  # fmt: skip
        if given and asked:
            raise InputError(f"sharded_head: got {asked!r} with {name}, need it without; leave one of them out")
        if given:
            return f"gathered, as {name} is on; it is large: without that it would be streamed"
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
    return "streamed"


def _why_whole(model: Any) -> str | None:
    """What does not let a head be streamed."""
    head: Any = output_head(model)
    linear = getattr(head, "base_layer", head)
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}"
    tied = getattr(causal_lm(model).get_input_embeddings(), "weight", None) is linear.weight
    return "it is tied to the embedding" if tied else None


def _why_small(model: Any, param_dtype: torch.dtype | None) -> str | None:
    """That a head takes no more than GATHERED_BYTES in the product, if so."""
    head: Any = output_head(model)
    weight = getattr(head, "base_layer", head).weight
    size = weight.numel() * (param_dtype or weight.dtype).itemsize
    return None if size > GATHERED_BYTES else f"it takes no more than {GATHERED_BYTES / 2**30:g} GiB"
