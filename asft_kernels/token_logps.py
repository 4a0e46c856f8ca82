"""Hidden states, head and labels as the caller has them -> log-probabilities of the valid tokens, compacted.

Checks, autocast's dtype, choice of backend, packing, and the primitive: what all public calls begin with.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from asft_kernels import checks
from asft_kernels.backends import Logits, choose_backend
from asft_kernels.backends.plan import default_cache_bytes
from asft_kernels.backends.token_stats import Wanted
from asft_kernels.batch import TokenBatch, pack
from asft_kernels.linear_logps import linear_logps

Head = nn.Linear | Tensor | tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Options:
    """How hidden states become log-probabilities; the keywords that all public calls share.

    cu_seqlens: (R+1,) int32 or int64 borders of packed sequences, None (default) for padded rows.
    shift: position t predicts label t+1 (Hugging Face's convention, default); False if labels are shifted.
    ignore_index: label of places that carry no loss, default -100.
    logit_scale, softcap: z = softcap * tanh(logit_scale * (h.W + b) / softcap); defaults 1.0, None (no cap).
    backend: "torch", "triton" or None (default): triton on CUDA and ROCm, torch elsewhere and for float64.
    cache_bytes: exponentials kept for the head's gradient, in bytes; None (default) is 1 GiB on a CPU and 2.5 GiB
        on a GPU; 0 keeps none and pays one more matrix product.
    chunk_size: rows of the vocabulary held at a time, None (default) chooses.
    num_valid: a bound on the number of valid labels (those of nll_labels included), if you know one: spares
        the call's one read of the device. Under torch.compile without it every position is computed, masked
        ones included. What the read would check is then asserted on the device, as a RuntimeError.
    """

    cu_seqlens: Tensor | None = None
    shift: bool = True
    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    backend: str | None = None
    cache_bytes: int | None = None
    chunk_size: int | None = None
    num_valid: int | None = None


class Keywords(TypedDict, total=False):
    """The same for type checkers."""

    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    logit_scale: float
    softcap: float | None
    backend: str | None
    cache_bytes: int | None
    chunk_size: int | None
    num_valid: int | None


def token_logps(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    options: Options,
    *,
    reduction: str = "mean",
    paired: bool = False,
    nll_labels: Tensor | None = None,
) -> tuple[Tensor, TokenBatch, str]:
    """All checks, then the primitive: logps (N,) of the compacted tokens, where they stand, the backend."""
    logps, _, batch, backend = token_stats(
        hidden, lm_head, labels, options, None, reduction=reduction, paired=paired, nll_labels=nll_labels
    )
    return logps, batch, backend


def token_stats(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    options: Options,
    wanted: Wanted | None,
    *,
    reduction: str = "mean",
    paired: bool = False,
    nll_labels: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], TokenBatch, str]:
    """The same with the wanted figures of each token by name, (N,) as logps."""
    o = options
    checks.options(
        reduction=reduction, shift=o.shift, logit_scale=o.logit_scale, softcap=o.softcap, cache_bytes=o.cache_bytes,
        chunk_size=o.chunk_size, num_valid=o.num_valid, ignore_index=o.ignore_index,
    )  # fmt: skip
    weight, bias = checks.head_tensors(lm_head)
    checks.hidden_layout(hidden)
    checks.hidden_size(hidden, weight)
    checks.label_layout(hidden, labels, o.cu_seqlens)
    checks.same_place(
        hidden=hidden, **{"lm_head weight": weight, "lm_head bias": bias}, labels=labels, cu_seqlens=o.cu_seqlens
    )  # fmt: skip
    if paired:
        checks.even_rows(hidden, o.cu_seqlens)
    hidden, weight = as_autocast(hidden), as_autocast(weight)
    bias = None if bias is None else as_autocast(bias)
    checks.same_dtype(hidden, weight, bias)
    backend = choose_backend(o.backend, hidden.device, hidden.dtype)

    batch = pack(
        labels, vocab=weight.shape[0], cu_seqlens=o.cu_seqlens, shift=o.shift, ignore_index=o.ignore_index,
        num_valid=o.num_valid, extra_labels=nll_labels,
    )  # fmt: skip
    logps, stats = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, batch.rows, batch.labels, backend=backend,
        logits=Logits(float(o.logit_scale), None if o.softcap is None else float(o.softcap)),
        chunk_size=o.chunk_size, padded=batch.padded,
        cache_bytes=default_cache_bytes(hidden.device.type) if o.cache_bytes is None else o.cache_bytes,
        wanted=wanted,
    )  # fmt: skip
    return logps, stats, batch, backend


def as_autocast(tensor: Tensor) -> Tensor:
    """What autocast would hand to a matrix product: its dtype, but float64 as it is."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))
