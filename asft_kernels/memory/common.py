"""Terms that both backends share."""

from asft_kernels.memory.sizes import Sizes
from asft_kernels.memory.terms import (
    ACC,
    EXPS,
    FIGURES,
    GRAD_HEAD,
    GRAD_HIDDEN,
    GRAD_LOW_RANK,
    GRAD_STREAM,
    SCALES,
    STREAM,
    VECTORS,
    Terms,
)


def saved_terms(s: Sizes, element: int) -> Terms:
    """What phase 1 keeps for phase 2, in numbers of so many bytes."""
    widths = [stop - start for start, stop in s.plan.slices[: s.plan.cached]] if s.needs_exps else []
    logs = s.needs_hidden and "entropy" in s.wanted.differentiable
    slopes = s.needs_hidden and "mean_logits" in s.wanted.differentiable
    return {
        ACC: element * s.tokens * s.width * s.needs_hidden,
        FIGURES: element * s.width * (s.tokens * logs + (s.tokens if s.softcap else 1) * slopes),
        EXPS: s.exps(widths),
        SCALES: s.scales,
        # Rows and labels as int64; four numbers for phase 2, and figures.
        VECTORS: s.tokens * (16 + element * (4 + len(s.wanted.names))),
    }


def gradient_terms(s: Sizes) -> Terms:
    hidden = s.positions * s.width * s.dtype.itemsize * s.needs_hidden
    own = -(-s.vocab // s.ranks)
    weight = own * s.columns * s.weight_bytes * s.needs_weight + s.vocab * s.dtype.itemsize * s.needs_bias
    low_rank = s.vocab * s.low_rank * s.low_rank_dtype.itemsize * s.needs_low_rank
    return {GRAD_HIDDEN: hidden, GRAD_HEAD: weight, GRAD_LOW_RANK: low_rank}


def stream_terms(s: Sizes, element: int, *, read: int, sent: bool = False) -> Terms:
    """Of a streamed head where so many chunks are read and, if sent, all of dW in numbers of so many bytes."""
    chunks = len(s.plan.slices)
    sums = s.on_the_way(chunks) * (s.ranks + 1) // s.ranks
    return {
        STREAM: (s.on_the_way(read) * s.columns * s.weight_bytes + 8 * s.vocab) * s.is_streamed,  # and their order
        GRAD_STREAM: sums * s.columns * element * sent,
    }
