"""Noisy log-probabilities from plain products and Triton kernels, chunk by chunk, as backends/noisy_torch.py.

    stage (one vocabulary chunk of rows k)   kernel or product                      tensor
    products                                 torch: x = H W_k^T, s = H Wn_k^T       (N, k) fp32, two
    forward                                  noisy_statistics, settle               r, s, power, z~_y (N,)
    backward                                 noisy_gradient: C in the place of s    (N, k) fp32
    dWn_k, dbn_k                             torch: C^T H, column sums of C         (k, D), (k,)

Products have fp32 results: of bf16 or fp16 operands where both have that dtype (on a GPU; a CPU upcasts them), else
of fp32 ones. C^T H is in fp32. No host reads, no atomics, nothing kept between calls.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from asft_kernels.backends import Logits
from asft_kernels.backends.plan import Plan
from asft_kernels.kernels.products import add_product
from asft_kernels.kernels.settle import settle
from asft_kernels.methods.dnpo.noisy_logits import noisy_gradient, noisy_statistics

ENTRY_BYTES = 8  # of one (token, vocabulary entry) of a chunk: x and s in fp32


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise_weight: Tensor,
    noise_bias: Tensor | None,
    labels: Tensor,
    seed: int,
    logits: Logits,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    z_y, others, power = (hidden.new_zeros(len(labels), dtype=torch.float32) for _ in range(3))
    ref = torch.full_like(z_y, -torch.inf)
    if not len(labels):
        return z_y, ref, power
    with torch.cuda.device_of(hidden):
        products = _Products(hidden, (weight, bias), (noise_weight, noise_bias), plan)
        for start, inputs in products:
            tiles = noisy_statistics(
                z_y, *inputs, labels, first=start, seed=seed, scale=logits.scale, softcap=logits.softcap
            )
            ref = settle(tiles.sums, tiles.refs, ref, others)
            power += tiles.powers.sum(dim=0)
    return z_y, ref + others.log(), power


def backward(
    grad_logps: Tensor,
    grad_power: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise_weight: Tensor,
    noise_bias: Tensor | None,
    labels: Tensor,
    logps: Tensor,
    log_total: Tensor,
    seed: int,
    logits: Logits,
    plan: Plan,
) -> tuple[Tensor, Tensor | None]:
    grad_weight = torch.empty_like(noise_weight, memory_format=torch.contiguous_format)
    grad_bias = None if noise_bias is None else torch.empty_like(noise_bias)
    if not len(labels):
        return grad_weight.zero_(), None if grad_bias is None else grad_bias.zero_()
    with torch.cuda.device_of(hidden):
        products = _Products(hidden, (weight, bias), (noise_weight, noise_bias), plan)
        per_token = [x.float().contiguous() for x in (logps, log_total, grad_logps, grad_power)]
        for start, (x, C, b, bn) in products:
            noisy_gradient(
                C, x, b, bn, labels, *per_token,
                first=start, vocab=plan.vocab, seed=seed, scale=logits.scale, softcap=logits.softcap,
            )  # fmt: skip
            rows = slice(start, start + C.shape[1])
            if grad_weight.dtype == torch.float32:
                add_product(C.t(), products.hidden, out=grad_weight[rows], fresh=True)
            else:
                grad_weight[rows] = C.t() @ products.hidden
            if grad_bias is not None:
                grad_bias[rows] = C.sum(dim=0)
    return grad_weight, grad_bias


class _Products:
    """Iterates over (first vocabulary row, (x, s, b, bn)) of the chunks; x and s (N, k) live until the next one."""

    def __init__(
        self,
        hidden: Tensor,
        head: tuple[Tensor, Tensor | None],
        noise_head: tuple[Tensor, Tensor | None],
        plan: Plan,
    ) -> None:
        self.low, self.hidden = hidden, hidden.float()
        self.heads, self.plan = (head, noise_head), plan
        self.room = hidden.new_empty((2, len(hidden) * plan.chunk), dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None]]]:
        for start, stop in self.plan.slices:
            x, s = (room[: len(self.hidden) * (stop - start)].view(-1, stop - start) for room in self.room)
            for (weight, _), out in zip(self.heads, (x, s), strict=True):
                rows = weight[start:stop]
                add_product(self.low if rows.dtype == self.low.dtype else self.hidden, rows.t(), out=out, fresh=True)
            b, bn = (None if bias is None else bias[start:stop].contiguous() for _, bias in self.heads)
            yield start, (x, s, b, bn)
