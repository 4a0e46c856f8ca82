"""Hidden states, head and labels as the caller has them -> log-probabilities of the valid tokens, compacted.

Checks, autocast's dtype, choice of backend, packing, and the primitive: what all public calls begin with.
"""

from contextlib import suppress

import torch
from torch import Tensor

from asft_kernels.backends import choose_backend, streaming
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import default_cache_bytes
from asft_kernels.backends.sharding import global_vocab
from asft_kernels.backends.token_stats import Wanted
from asft_kernels.core import checks
from asft_kernels.core.batch import TokenBatch, pack
from asft_kernels.core.distributed import Agreement
from asft_kernels.core.heads import Head, ResolvedHead, resolve_head
from asft_kernels.core.linear_logps import linear_logps
from asft_kernels.core.options import Options


class TellingStreams:
    """Around checks: an error of one rank is told to the others of a streamed head, which wait to agree with it.

    To read a head of DTensors is a collective: each rank does it once, one that raises an error before it as well.
    """

    def __init__(self, lm_head: Head) -> None:
        self.lm_head = lm_head
        self.rows: HeadRows | None = None
        self.has_read = False

    def __enter__(self) -> "TellingStreams":
        return self

    def resolve_head(self) -> ResolvedHead:
        self.has_read = True
        head = resolve_head(self.lm_head)
        self.rows = head.rows
        return head

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or torch.compiler.is_compiling():
            return
        if not self.has_read:
            with suppress(Exception):  # one more, of a head that is none
                self.resolve_head()
        if self.rows is not None and self.rows.is_streamed:
            streaming.refuse(self.rows)


def token_logps(
    hidden: Tensor,
    lm_head: Head,
    labels: Tensor,
    options: Options,
    *,
    ranks: Agreement,
    wanted: Wanted | None = None,
    paired: bool = False,
    nll_labels: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], TokenBatch, str]:
    """All checks, then the primitive: logps (N,) of the compacted tokens, wanted figures, where they stand, backend."""
    o = options
    with TellingStreams(lm_head) as telling:
        checks.no_transform()
        head = telling.resolve_head()
        checks.hidden_layout(hidden)
        vocab = global_vocab(head.rows)
        checks.hidden_size(hidden, vocab, head.rows.columns)
        checks.label_layout(hidden, labels, o.cu_seqlens)
        checks.same_place(hidden=hidden, **head.tensors(), labels=labels, cu_seqlens=o.cu_seqlens)
        if paired:
            checks.even_rows(hidden, o.cu_seqlens)
        hidden, rows, bias = head.for_product(hidden)
        backend = choose_backend(o.backend, hidden.device, hidden.dtype)

        if ranks.shard is not None:
            figures = [sorted(x) for x in (wanted.names, wanted.differentiable)] if wanted else []
            grad = torch.is_grad_enabled() and hidden.requires_grad
            compared = (figures, o.logits, o.ignore_index, o.shift, backend, hidden.dtype, grad)
            ranks.compare(hidden, labels, (o.cu_seqlens, nll_labels), compared)
        batch = pack(
            labels, vocab=vocab, cu_seqlens=o.cu_seqlens, shift=o.shift, ignore_index=o.ignore_index,
            num_valid=o.num_valid, extra_labels=nll_labels, read=None if ranks.shard is None else ranks.read,
            backend=backend,
        )  # fmt: skip
    logps, stats = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]), rows, bias, batch.rows, batch.labels, backend=backend,
        logits=o.logits, chunk_size=o.chunk_size, padded=batch.padded,
        cache_bytes=default_cache_bytes(hidden.device.type) if o.cache_bytes is None else o.cache_bytes,
        wanted=wanted,
    )  # fmt: skip
    return logps, stats, batch, backend
