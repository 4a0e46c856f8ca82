"""The output of a head in float64, from its own numbers."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from asft_kernels.backends.plan import Plan
from asft_kernels.backends.streaming import order_of, reading
from asft_kernels.core.checks import own_class
from asft_kernels.core.distributed import Shard
from asft_kernels.core.heads import resolve_head
from asft_kernels.core.tensor_parallel import localised

ROWS = 1024  # of the head at a time: 33 MB in float64 at D = 4096


class ExactOutput(NamedTuple):
    """values: (N, V) float64. sizes: (N,), |h| times the longest row of the weight. is_adapted: a head of PEFT's.
    is_sharded: one whose rows stand on several ranks.

    product_rounding: (N,), how far a product in fp32 may lie from them.
    """

    values: Tensor
    sizes: Tensor
    product_rounding: Tensor
    quantised: bool
    is_adapted: bool
    is_sharded: bool


def exact_output(head: Any, hidden: Tensor) -> ExactOutput:
    """Multiplies hidden (N, D) with a head in float64, after the casts that the fused calls make.

    A product in fp32 rounds sqrt(D) accumulated terms (TF32 inputs where the user allows it), of size |h| |w|. Rows
    that are assembled from codes or adapters are rounded into hidden's dtype on a GPU: once more |h| |w|.
    """
    is_adapted = own_class(head).__module__.partition(".")[0] == "peft"
    hidden, head = localised(hidden, head)
    wide, rows, bias = resolve_head(head).for_product(hidden)
    V, columns = rows.size
    assembled = 0.0 if rows.is_plain else torch.finfo(wide.dtype).eps / 2
    wide = wide.double()
    order = order_of(rows, ROWS)
    plan = Plan(V, min(V, ROWS) if order is None else order.chunk, 0, order)
    buffer = wide.new_empty(plan.chunk, columns)
    values, longest = wide.new_empty(len(wide), V), wide.new_zeros(())
    source = reading(rows, plan)
    for start, stop in plan.slices:
        weight = source.chunk(start, stop, buffer)
        values[:, start:stop] = wide @ weight.T
        longest = torch.maximum(longest, torch.linalg.vector_norm(weight, dim=-1).nan_to_num(0).max())
    if order is not None:
        values = values[:, order.all_places(values.device)]
    sizes = torch.linalg.vector_norm(wide, dim=-1) * longest
    if bias is not None:
        values += bias.double()
    rounding = (product_unit(wide.is_cuda) * columns**0.5 + assembled) * sizes
    is_sharded = isinstance(head, Shard)
    if is_sharded:
        # A few tokens' values from all ranks: the one time that logits of a sharded head meet.
        whole = values.new_zeros(len(wide), head.vocab)
        whole[:, head.first : head.first + head.rows] = values[:, : head.rows]
        dist.all_reduce(whole, group=head.group)
        of_ranks = torch.stack([sizes, rounding])
        dist.all_reduce(of_ranks, op=dist.ReduceOp.MAX, group=head.group)
        values, (sizes, rounding) = whole, of_ranks
    return ExactOutput(values, sizes, rounding, bool(rows.codes), is_adapted, is_sharded)


def product_unit(on_gpu: bool) -> float:
    """Rounding unit of a matrix product's fp32 inputs: TF32's where the user allows it.

    Not `allow_tf32`: reading that raises once anyone (transformers' --tf32) has set fp32_precision.
    """
    if on_gpu and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2.0**-11
    return torch.finfo(torch.float32).eps / 2
