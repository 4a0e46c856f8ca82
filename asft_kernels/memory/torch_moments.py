"""What backends/torch_chunked.py has allocated at each moment."""

from asft_kernels.backends.plan import token_blocks
from asft_kernels.memory.common import gradient_terms, saved_terms, stream_terms
from asft_kernels.memory.sizes import Sizes
from asft_kernels.memory.terms import GRAD_HIDDEN, LABELS, ROWS, SCALED, UPCAST, VECTORS, WORKSPACE, Terms


def torch_moments(s: Sizes) -> dict[str, Terms]:
    element, N, D, chunk = s.exp_bytes, s.tokens, s.width, s.plan.chunk
    block = max(b.stop - b.start for b in token_blocks(N, s.device.type))
    as_it_is = s.is_plain and s.weight_bytes == element
    all_kept = s.needs_exps and s.plan.cached == len(s.plan.slices)
    saved = saved_terms(s, element)
    rows, upcast = element * N * D, 0 if as_it_is else element * chunk * D
    of_block = element * block * chunk
    scratch = not s.wanted.names.isdisjoint(("entropy", "log_sum_sq_probs"))

    def labels(n: int) -> Terms:
        """The rows, and what makes them."""
        converting = 0 if as_it_is else s.dequantising(n, taken=True)
        return {LABELS: element * n * D + converting}

    chunks, kept = len(s.plan.slices), 0 if s.weighs else s.plan.cached
    again = chunks - kept if s.needs_exps else 0
    logits = {  # buffers of phase 1
        **saved,
        **stream_terms(s, element, read=chunks),
        ROWS: rows,
        WORKSPACE: of_block * ((not all_kept) + s.softcap + scratch),
        UPCAST: upcast,
    }
    dot = element * block * D
    found = {
        "forward, labels": logits | {LABELS: max(labels(block)[LABELS], 2 * dot)},
        "forward, chunks": logits
        | {
            UPCAST: upcast + (s.dequantising(chunk, taken=False) if s.codes else 0),
            # Sums of some chunks at a time, and places of labels.
            VECTORS: saved[VECTORS] + block * (element * min(len(s.plan.slices), 16) + 16),
        },
    }
    grads = gradient_terms(s)
    if s.softcap or not s.is_plain:  # slopes of the labels' logits; rows that are assembled
        taken = max(labels(N)[LABELS] * s.needs_hidden, 2 * element * N * D * s.softcap)
        found["backward, labels"] = (
            {**saved, **stream_terms(s, element, read=again), ROWS: rows, LABELS: taken}
            if s.needs_hidden or s.needs_exps
            else {}
        )
    if s.needs_hidden:
        rounded = N * D * s.dtype.itemsize * (s.dtype.itemsize != element)
        found["backward, hidden"] = {
            **saved,
            **stream_terms(s, element, read=again),
            ROWS: rows,
            LABELS: element * N * D + rounded,
            GRAD_HIDDEN: grads[GRAD_HIDDEN],
        }
    if s.needs_exps:
        scaled = (s.needs_weight or s.needs_low_rank) and not s.weighs
        recomputed = element * N * chunk * (again > 0)
        passes = s.softcap + (s.weighs and "entropy" in s.wanted.differentiable)  # chunks of a block of tokens
        passes += s.needs_bias and not s.weighs
        found["backward, head"] = {
            **saved,
            **stream_terms(s, element, read=again, sent=s.needs_weight),
            ROWS: rows,
            **grads,
            SCALED: rows * scaled,
            WORKSPACE: recomputed + of_block * passes + element * chunk * s.low_rank * s.needs_low_rank,
            UPCAST: upcast + (s.dequantising(chunk, taken=False) if s.codes and again else 0),
            VECTORS: saved[VECTORS] + N * (40 + 6 * element),  # places of labels, factors
        }
    return found
