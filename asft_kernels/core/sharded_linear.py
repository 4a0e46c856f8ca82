"""A linear head whose rows are sharded over data-parallel ranks: gathered for a call, or streamed through it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asft_kernels.core.checks import PLAIN_TENSORS

# The rule where nobody says: a head that is gathered stands on every rank from forward to backward, and its gradient
# with it. Of 2 GiB both take 4 GiB at most, a twentieth of a GPU of 80 GB; that is Llama-3-70B's in bf16.
GATHERED_BYTES = 2 * 2**30


class ShardedLinear(nn.Linear):
    """An nn.Linear with a weight (V, D) that is a DTensor: a shard of its rows on each data-parallel rank.

    As an lm_head it is streamed or gathered; called as a module it is gathered for that call. The gradient is the mean
    over the ranks, as FSDP2's. `asft_kernels.models.shard_head` makes one of a model's head.

    Args:
        weight: (V, D) DTensor on a mesh of one dimension, Shard(0).
        bias: (V,) tensor or None.
        stream: True: read chunk by chunk, never whole on a rank; False: gathered; None (default): gathered up to
            GATHERED_BYTES in the dtype of the product, else streamed.
        param_dtype: what the rows go into the product in, as FSDP2's MixedPrecisionPolicy has it; None (default): as
            they are, or autocast's.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, stream: bool | None = None,
        param_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        as_parameter = nn.Parameter if weight.requires_grad else lambda x: nn.Parameter(x, requires_grad=False)
        self.weight = weight if isinstance(weight, nn.Parameter) else as_parameter(weight)
        bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
        self.bias = bias  # pyright: ignore[reportAttributeAccessIssue]
        self.stream, self.param_dtype = stream, param_dtype

    def cast_weight(self) -> Tensor:
        """The DTensor in param_dtype."""
        return self.weight if self.param_dtype is None else self.weight.to(self.param_dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight = gathered(self.cast_weight())
        return F.linear(input, weight, None if self.bias is None else self.bias.to(weight.dtype))


def is_dtensor(tensor: Any) -> bool:
    if type(tensor) in PLAIN_TENSORS or not torch.distributed.is_available():  # in this order, for Dynamo
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensor: Any) -> Tensor:
    """A DTensor whole on each rank, its gradient averaged over the ranks as FSDP2 does; any other tensor as it is.

    Without grad_placements each rank would keep its own slice of its own gradient, and the others' would be lost.
    """
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
