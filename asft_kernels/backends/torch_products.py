"""The product that the torch backend's accumulators take from each chunk."""

import torch
from torch import Tensor

FEW = 16  # tokens: for fewer, BLAS may add a chunk's entries to O one by one, and O loses a digit over many chunks


def accumulate(acc: Tensor, E: Tensor, weight_k: Tensor, k: int) -> None:
    """acc (n, D) += E (n, rows) W_k (rows, D), and = for the first chunk."""
    if k and len(E) < FEW:
        acc.add_(E @ weight_k)
    else:
        torch.addmm(acc, E, weight_k, beta=min(k, 1), out=acc)  # beta 0 does not read acc
