"""`shard_head`: a model's output head sharded over data-parallel ranks by itself, beside what FSDP2 shards."""

from typing import Any

import torch
from torch import nn

from asft_kernels.core.sharded_linear import ShardedLinear, is_dtensor
from asft_kernels.errors import InputError
from asft_kernels.models.seam import causal_lm, output_head


def shard_head(
    model: Any, mesh: Any, *, stream: bool | None = None, param_dtype: torch.dtype | None = None
) -> set[nn.Parameter]:
    """Shards the output head of a causal LM by rows over data-parallel ranks, so that fused calls may stream it.

    FSDP2 gathers the whole head where its module runs; a head sharded here is left to the fused calls. Call it before
    `fully_shard`, on every rank, and tell that to leave the head alone:

        head = shard_head(model, mesh)
        fully_shard(model, mesh=mesh, ignored_params=head)

    The gradient is the mean over the ranks, at every backward pass: FSDP2's set_requires_gradient_sync(False) saves no
    exchange here. Without `fused_lm_head` the model's forward gathers its head for that call.

    Args:
        model: a Hugging Face model whose head is an nn.Linear, with PEFT's LoRA or not.
        mesh: a DeviceMesh of one dimension: all data-parallel ranks. Replicas outside it would not be summed.
        stream: True: never whole on a rank; False: gathered in forward, kept for backward; None (default): streamed
            where it takes more than 2 GiB in the dtype of the product.
        param_dtype: what the rows go into the product in, as FSDP2's MixedPrecisionPolicy has it; None (default): as
            they are, or autocast's.

    Returns:
        The parameters that `fully_shard` is to ignore.

    Raises:
        InputError: for heads that are tied to the embedding, no nn.Linear, or sharded already; what is no DeviceMesh of
            one dimension; a stream that is none of the three.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    _check(mesh, stream)
    name, head = type(causal_lm(model)).__name__, output_head(model)
    parent, attribute = _place_of(head, model)
    linear = getattr(parent, attribute)
    if is_dtensor(linear.weight) and not isinstance(linear, ShardedLinear):
        raise InputError(f"{name}: got a head whose weight is a DTensor, need a plain one; {_way_out(model)}")
    if type(linear) is not nn.Linear:
        raise InputError(f"{name}: got a head of {type(linear).__name__}, need an nn.Linear; leave it to fully_shard")
    embedding = causal_lm(model).get_input_embeddings()
    if getattr(embedding, "weight", None) is linear.weight:
        raise InputError(
            f"{name}: got a head tied to the embedding, need one of its own: FSDP gathers the embedding for its lookup "
            "anyway; leave both to fully_shard"
        )
    weight = nn.Parameter(
        distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]), requires_grad=linear.weight.requires_grad
    )
    sharded = ShardedLinear(weight, linear.bias, stream=stream, param_dtype=param_dtype)
    setattr(parent, attribute, sharded.train(linear.training))
    return {weight}


def _check(mesh: Any, stream: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    if stream is not None and not isinstance(stream, bool):
        raise InputError(
            f"stream: got {stream!r}, need True (never whole on a rank), False (gathered) or None (by its size); pass "
            "one of these"
        )
    if not isinstance(mesh, DeviceMesh):
        raise InputError(
            f"mesh: got {type(mesh).__name__}, need a DeviceMesh; make one of all data-parallel ranks: "
            'init_device_mesh("cuda", (world_size,))'
        )
    if mesh.ndim != 1:
        raise InputError(
            f"mesh: got {mesh.ndim} dimensions, need one, of all data-parallel ranks; with hybrid sharding leave the "
            "head to fully_shard, for over one dimension alone the replicas' gradients are not summed"
        )


def _way_out(model: Any) -> str:
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "call shard_head before fully_shard"
    return "leave a head that is tensor parallel as it is"


def _place_of(head: nn.Module, model: Any) -> tuple[nn.Module, str]:
    """The module that holds the head's nn.Linear, and by what name."""
    if hasattr(head, "get_base_layer"):
        return head, "base_layer"
    inner = causal_lm(model)
    (path,) = (name for name, module in inner.named_modules() if module is head)
    parent, _, attribute = path.rpartition(".")
    return inner.get_submodule(parent), attribute
