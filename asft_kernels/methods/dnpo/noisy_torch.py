"""Noisy log-probabilities in ATen calls, chunk by chunk, on any device: the default on a CPU, the path for float64.

What is computed: noisy_logps.py. fp32 between inputs and results (fp64 for fp64 hidden), eps fp32 always.
"""

import torch
from torch import Tensor

from asft_kernels.backends import Logits
from asft_kernels.backends.plan import Plan
from asft_kernels.methods.dnpo.philox import normals

ENTRY_BYTES = 24  # of one (token, vocabulary entry) of a chunk: z, std, eps in fp32, and Philox's words


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
    chunks = _Chunks(hidden, (weight, bias), (noise_weight, noise_bias), seed, logits)
    z_y, others, power = (chunks.H.new_zeros(len(labels)) for _ in range(3))
    highest = torch.full_like(z_y, torch.finfo(z_y.dtype).min)
    for start, stop in plan.slices:
        z, std, _ = chunks.noisy(start, stop)
        column, inside = _in_chunk(labels, start, stop)
        own = z.gather(1, column)[:, 0]
        z_y = torch.where(inside, own, z_y)
        z.scatter_(1, column, torch.where(inside, -torch.inf, own)[:, None])
        before, highest = highest, torch.maximum(highest, z.amax(dim=1))
        others = others * torch.exp(before - highest) + z.sub_(highest[:, None]).exp_().sum(dim=1)
        power += torch.linalg.vector_norm(std, dim=1).square()
    return z_y, highest + others.log(), power


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
    chunks = _Chunks(hidden, (weight, bias), (noise_weight, noise_bias), seed, logits)
    grad_weight = torch.empty_like(noise_weight, memory_format=torch.contiguous_format)
    grad_bias = None if noise_bias is None else torch.empty_like(noise_bias)
    pull = -grad_logps.to(log_total.dtype)[:, None]
    shrink = (2 / plan.vocab) * grad_power.to(log_total.dtype)[:, None]
    for start, stop in plan.slices:
        z, std, eps = chunks.noisy(start, stop)
        C = z.sub_(log_total[:, None]).exp_()
        column, inside = _in_chunk(labels, start, stop)
        own = torch.where(inside, torch.expm1(logps), C.gather(1, column)[:, 0])  # p - 1 keeps its digits
        C.scatter_(1, column, own[:, None]).mul_(eps).mul_(pull).addcmul_(std, shrink)
        grad_weight[start:stop] = C.T @ chunks.H
        if grad_bias is not None:
            grad_bias[start:stop] = C.sum(dim=0)
    return grad_weight, grad_bias


class _Chunks:
    """Noisy logits of one vocabulary chunk after another."""

    def __init__(
        self,
        hidden: Tensor,
        head: tuple[Tensor, Tensor | None],
        noise_head: tuple[Tensor, Tensor | None],
        seed: int,
        logits: Logits,
    ) -> None:
        self.H = hidden if hidden.dtype == torch.float64 else hidden.float()
        self.head, self.noise_head = head, noise_head
        self.seed, self.transform = seed, logits
        self.tokens = torch.arange(len(hidden), device=hidden.device)

    def noisy(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """(z~, std, eps) of vocabulary rows start to stop, (N, stop - start) each; z~ may be overwritten."""
        z = self._product(*self.head, start, stop).mul_(self.transform.scale)
        if self.transform.softcap is not None:
            z.div_(self.transform.softcap).tanh_().mul_(self.transform.softcap)
        std = self._product(*self.noise_head, start, stop)
        eps = normals(self.seed, self.tokens, start, stop).to(z.dtype)
        return z.addcmul_(std, eps), std, eps

    def _product(self, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
        product = self.H @ weight[start:stop].to(self.H.dtype).T
        return product if bias is None else product.add_(bias[start:stop].to(self.H.dtype))


def _in_chunk(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(a column of the chunk for each token (N, 1), whether it is its label's (N,))."""
    column = (labels - start).clamp(0, stop - start - 1)[:, None]
    return column, (labels >= start) & (labels < stop)
