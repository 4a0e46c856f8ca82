"""The library's products as both phases ask for them: fp32 sums, rounded never or once."""

import torch
from torch import Tensor


def add_product(a: Tensor, b: Tensor, *, out: Tensor, fresh: bool) -> None:
    """out += a b in fp32, or = if fresh, from operands in fp32 or bf16 that are never rounded further."""
    beta = 0 if fresh else 1  # with 0 out is not read
    if a.dtype == b.dtype and a.dtype != out.dtype and a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def rounded_product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a b, all three bf16, summed in fp32 and rounded once."""
    if a.is_cuda:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())  # a CPU's bf16 product may round in between
