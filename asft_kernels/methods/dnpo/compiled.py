"""The launches of the noisy kernels that the report on compiled code asks for."""

import torch

from asft_kernels.backends import Logits
from asft_kernels.backends.plan import Plan
from asft_kernels.methods.dnpo import noisy_triton

PLAIN, SOFTCAPPED = Logits(), Logits(0.5, 30.0)


def launch(dtype: torch.dtype, *, every: bool) -> None:
    alone = [(True, PLAIN), (False, SOFTCAPPED)] if every else []
    _both_phases(2048, 2048, 32768, 16384, dtype, (True, SOFTCAPPED), (False, PLAIN), *alone)
    if every or dtype == torch.bfloat16:
        _both_phases(2047, 251, 30040, 15021, dtype, (True, SOFTCAPPED))  # the last chunk begins at no multiple


def _both_phases(N: int, D: int, V: int, chunk: int, dtype: torch.dtype, *cases: tuple[bool, Logits]) -> None:
    """cases: whether there are biases, and what makes logits. The noise head is in fp32, as trainers have it."""
    plan, seed = Plan(V, chunk=chunk, cached=0), 2**40  # of 64 bits, as nearly all are
    per_token, labels = torch.empty(N), torch.empty(N, dtype=torch.int64)
    for biased, logits in cases:
        heads = [(torch.empty((V, D), dtype=d), torch.empty(V, dtype=d) if biased else None) for d in (dtype, None)]
        inputs = (torch.empty((N, D), dtype=dtype), *heads[0], *heads[1], labels)
        noisy_triton.forward(*inputs, seed, logits, plan)
        noisy_triton.backward(per_token, per_token, *inputs, per_token, per_token, seed, logits, plan)
