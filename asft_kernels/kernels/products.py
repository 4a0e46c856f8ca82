"""The library's products as both phases ask for them: fp32 sums, rounded never or once."""

import torch
from torch import Tensor

# Terms of a sum that a matrix unit makes by itself at most. It cuts its running sum toward zero with every few of them:
# an H100's were short by 3e-4 of themselves after 151,936 positive ones, by 1e-4 after 33,792 (docs/numerics.md).
TERMS = 2**15


def add_product(a: Tensor, b: Tensor, *, out: Tensor, fresh: bool) -> None:
    """out += a b in fp32, or = if fresh, from operands in fp32 or bf16 that are never rounded further."""
    for start in range(0, max(a.shape[1], 1), TERMS):
        terms = slice(start, start + TERMS)
        beta = 0 if fresh and start == 0 else 1  # with 0 out is not read
        if a.dtype == b.dtype and a.dtype != out.dtype and a.is_cuda:
            torch.addmm(out, a[:, terms], b[terms], out_dtype=out.dtype, beta=beta, out=out)
        else:
            torch.addmm(out, a[:, terms].to(out.dtype), b[terms].to(out.dtype), beta=beta, out=out)


def rounded_product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """out = a b, all three bf16, summed in fp32 and rounded once."""
    if a.is_cuda:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.float() @ b.float())  # a CPU's bf16 product may round in between
