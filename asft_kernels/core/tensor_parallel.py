"""Which heads made of DTensors are tensor parallel, and how they become a `Shard` of this rank.

weight Shard(0) over a mesh dimension ...                             is
whose mesh hidden is replicated on, as a DTensor                      tensor parallel
called "tp" or "tensor_parallel"                                      tensor parallel
of a module that torch's or transformers' ColwiseParallel has made    tensor parallel
without a name, or named for data parallelism ("fsdp", "dp_shard")    data parallel: gathered (heads.py)
of any other name                                                     refused

Over other dimensions of its mesh a tensor-parallel head is gathered, and its gradient averaged.
"""

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from asft_kernels.core import checks
from asft_kernels.core.distributed import Shard

TENSOR_PARALLEL = ("tp", "tensor_parallel")
DATA_PARALLEL = ("dp", "fsdp", "data", "shard", "replicate", "cp", "batch")  # parts of names


def localised(hidden: Any, lm_head: Any) -> tuple[Any, Any]:
    """(hidden as a plain tensor, a `Shard` for a tensor-parallel head or lm_head itself)."""
    if not dist.is_available():
        return hidden, lm_head
    weight, bias = _parameters(lm_head)
    if type(hidden) in checks.PLAIN_TENSORS and (weight is None or type(weight) in checks.PLAIN_TENSORS):
        return hidden, lm_head
    from torch.distributed.tensor import DTensor

    mesh = None
    if isinstance(hidden, DTensor):
        mesh = hidden.device_mesh
        if not all(x.is_replicate() for x in hidden.placements):
            need = "it replicated on its mesh: hidden.redistribute(placements=[Replicate()] * mesh.ndim)"
            checks.refuse("hidden", f"a DTensor placed {tuple(hidden.placements)}", need)
        hidden = hidden.to_local()
    if not isinstance(weight, DTensor):
        return hidden, lm_head
    of_module = isinstance(lm_head, nn.Module) and is_colwise(lm_head)
    sharded = [i for i, x in enumerate(weight.placements) if x.is_shard(0)]
    dims = [i for i in sharded if of_module or _is_tensor_parallel(weight.device_mesh, i, mesh)]
    if not dims:
        return hidden, lm_head
    if isinstance(lm_head, nn.Module) and not of_module:
        checks.plain_module(lm_head, "lm_head")
    # The last: fully_shard adds the dimensions of data parallelism in front.
    return hidden, _shard(weight, bias, dims[-1])


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether a linear layer's weight is a DTensor whose rows tensor-parallel ranks have, by its hooks or its mesh."""
    weight: Any = getattr(module, "weight", None)
    if weight is None or type(weight) in checks.PLAIN_TENSORS or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor):
        return False
    return is_colwise(module) or any(
        _is_tensor_parallel(weight.device_mesh, i, None) for i, x in enumerate(weight.placements) if x.is_shard(0)
    )


def _parameters(lm_head: Any) -> tuple[Any, Any]:
    """(weight, bias) of a plain module, pair or tensor; (None, None) of anything else."""
    if isinstance(lm_head, nn.Module):
        plain = isinstance(lm_head, (nn.Linear, nn.Embedding))
        return (lm_head.weight, getattr(lm_head, "bias", None)) if plain else (None, None)
    if isinstance(lm_head, (tuple, list)) and len(lm_head) == 2:
        return lm_head[0], lm_head[1]
    return (lm_head, None) if isinstance(lm_head, Tensor) else (None, None)


def is_colwise(module: nn.Module) -> bool:
    """Whether the layouts of torch's or transformers' ColwiseParallel stand around a module's forward, and nothing else
    but what fully_shard adds.
    """
    forward = vars(module).get("forward")
    forward = forward.own if getattr(forward, "is_seam", False) and forward is not None else forward
    around = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    around += [] if forward is None else [forward]
    layouts = [is_layout(x) for x in around]
    known = ("torch.distributed", "transformers.distributed", "asft_kernels.models.seam")
    return any(layouts) and all(_place(x).startswith(known) for x in around)


def is_layout(function: Any) -> bool:
    """Whether a hook or forward is one of theirs, also while models/seam.py has taken its place."""
    return _place(function).startswith(("torch.distributed.tensor", "transformers.distributed"))


def _place(function: Any) -> str:
    function = getattr(function, "own", function) if getattr(function, "is_seam", False) else function
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", ""))


def _is_tensor_parallel(mesh: Any, dim: int, of_hidden: Any) -> bool:
    name = (mesh.mesh_dim_names or [None] * mesh.ndim)[dim]
    if of_hidden is not None and (of_hidden == mesh or name in (of_hidden.mesh_dim_names or ())):
        return True
    if name in TENSOR_PARALLEL:
        return True
    if name is None or any(part in name for part in DATA_PARALLEL):
        return False
    need = (
        "a name that says what its ranks share: 'tp' for the same hidden states, 'dp' or 'fsdp' for batches of their "
        "own; rename it, or pass asft_kernels.VocabParallelHead(weight.to_local(), group=mesh.get_group())"
    )
    return checks.refuse("lm_head", f"a DTensor sharded over the mesh dimension {name!r}", need)


def _shard(weight: Any, bias: Any, dim: int) -> Shard:
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor import Shard as Sharded
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = weight.device_mesh
    placements: list[Any] = [Replicate()] * mesh.ndim
    gradients: list[Any] = [Partial("avg")] * mesh.ndim
    placements[dim] = gradients[dim] = Sharded(0)

    def local(tensor: Any) -> Tensor:
        if tuple(tensor.placements) != tuple(placements):
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local(grad_placements=gradients)

    vocab = weight.shape[0]
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    rows = local(weight)
    first = min(offset[0], vocab)
    if bias is not None and not isinstance(bias, DTensor):
        bias = DTensor.from_local(bias, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if isinstance(bias, DTensor):
        bias = local(bias)
    elif bias is not None:
        bias = bias[first : first + len(rows)]
    return Shard(rows if bias is None else (rows, bias), mesh.get_group(dim), first, len(rows), vocab)
