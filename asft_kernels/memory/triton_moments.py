"""What backends/triton_fused.py has allocated at each moment."""

from contextlib import nullcontext

import torch

from asft_kernels.backends import exp_columns
from asft_kernels.backends.plan import weight_slice
from asft_kernels.kernels.configs import STRIPS, WHOLE, Strips, Tile
from asft_kernels.memory.common import gradient_terms, saved_terms, stream_terms
from asft_kernels.memory.sizes import Sizes
from asft_kernels.memory.terms import (
    ACC,
    EXPS,
    GRAD_HIDDEN,
    LABELS,
    OPERANDS,
    ROUNDING,
    ROWS,
    SCALED,
    STRIP,
    TILES,
    UPCAST,
    VECTORS,
    WORKSPACE,
    Terms,
)


def triton_moments(s: Sizes) -> dict[str, Terms]:
    N, D, chunk, chunks = s.tokens, s.width, s.plan.chunk, len(s.plan.slices)
    low = s.dtype.itemsize if s.dtype.itemsize < 4 else 0
    saved, grads = saved_terms(s, 4), gradient_terms(s)
    tile, whole = tile_and_form(s)
    whole = whole and not s.is_streamed
    again_read = chunks - s.plan.cached if s.needs_exps else 0
    of_others = stream_terms(s, 4, read=again_read)
    weighed_acc = 4 * N * D * (s.weighs and s.needs_hidden)
    gathered, buffer, assembling, taking = 0, 0, 0, 0
    if not s.is_plain:
        gathered, buffer = s.dtype.itemsize * N * D, s.dtype.itemsize * chunk * D
        assembling, taking = s.dequantising(chunk, taken=False), s.dequantising(N, taken=True)

    elif not s.row_major:
        buffer = s.dtype.itemsize * chunk * D

    summed = s.wanted.names - {"lse"}
    made = STRIPS[0] if summed else tile
    of_figures = s.wanted.differentiable if s.needs_hidden else frozenset()
    figures = ("entropy" in of_figures) + (s.softcap and "mean_logits" in of_figures)
    on_gpu, same = s.device.type == "cuda", s.exp_bytes == s.dtype.itemsize
    upcast = 4 * chunk * D * bool(low) + 4 * N * chunk * (s.exp_bytes < 4)
    by_library = 4 * D * (N + made.rows(N, chunk)) * bool(low) if isinstance(made, Strips) else 0
    operands = upcast * s.needs_hidden * (not (on_gpu and same)), by_library * (not on_gpu)
    found = {
        "forward, labels": {**saved, **stream_terms(s, 4, read=chunks), EXPS: 0, LABELS: gathered + taking},
        "forward, chunks": {
            **saved,
            **stream_terms(s, 4, read=chunks),
            **_strip(s, made),
            LABELS: gathered,
            WORKSPACE: s.exps([chunk]) * ((s.needs_hidden and s.cached < s.vocab) + figures),
            UPCAST: buffer + assembling,
            TILES: _sums_of_tiles(s, made, planes=6 if summed else 2),
            OPERANDS: max(operands[1], operands[0] - _strip(s, made).get(STRIP, 0)),  # a strip is gone by then
            VECTORS: saved[VECTORS] + N * 16,  # references and sums
        },
    }
    if not s.is_plain and (s.needs_hidden or s.needs_exps):
        found["backward, labels"] = {**saved, **of_others, LABELS: gathered + taking}
    if s.needs_hidden:
        found["backward, hidden"] = {
            **saved,
            **of_others,
            LABELS: gathered,
            ACC: saved[ACC] + weighed_acc,
            GRAD_HIDDEN: grads[GRAD_HIDDEN],
        }
    if s.needs_exps:
        recomputes = again_read > 0
        step = weight_slice(chunk, s.columns)
        columns = s.exp_bytes * N * exp_columns("triton", min(N, s.vocab)) * whole
        slices = 4 * step * s.columns * (s.weight_bytes != 4 and not whole and not s.is_streamed)
        factors = N * (D * (s.needs_weight or s.needs_low_rank) + s.low_rank * s.needs_low_rank)
        width = chunk if whole or s.is_streamed else step
        upcast = 4 * (N * width + N * s.columns + whole * width * s.columns)
        again = _strip(s, STRIPS[0] if s.weighs else tile) if recomputes else {}
        found["backward, head"] = {
            **saved,
            **stream_terms(s, 4, read=again_read, sent=s.needs_weight),
            **again,
            **grads,
            LABELS: gathered,
            ACC: saved[ACC] + weighed_acc,
            SCALED: s.exp_bytes * factors,
            ROUNDING: (columns + slices) * s.needs_weight,
            WORKSPACE: s.exps([chunk]) * (recomputes or s.weighs),
            UPCAST: buffer + assembling * recomputes,
            OPERANDS: max(0, upcast - again.get(STRIP, 0)) * (factors > 0 and s.exp_bytes < 4 and not on_gpu),
            VECTORS: saved[VECTORS] + N * 40,  # factors; labels in order
        }
    return found


def _sums_of_tiles(s: Sizes, made: Tile | Strips, planes: int) -> int:
    """A chunk's, and with them the two planes of the chunk before, which are held until the new ones are there."""
    tiles = [-(-width // made.BLOCK_V) for width in s.plan.widths]
    return 4 * s.tokens * max(planes * here + 2 * before for before, here in zip([0, *tiles], tiles, strict=False))


def tile_and_form(s: Sizes) -> tuple[Tile | Strips, bool]:
    """What makes a chunk's exponentials, and whether dW is rounded whole. Without a GPU as on an H100."""
    from asft_kernels.kernels.tile_choice import Problem, assume_architecture, best_form, best_tile

    problem = Problem(s.dtype, s.width, s.tokens, s.softcap)
    aligned = s.width % 16 == 0
    there = s.device.type != "cuda" or torch.cuda.is_available()
    with nullcontext() if there else assume_architecture("sm_90"):
        tile = best_tile(s.device, problem, aligned=aligned)
        return tile, best_form(s.device, problem, aligned=aligned) == WHOLE


def _strip(s: Sizes, made: Tile | Strips) -> Terms:
    """Logits that the library makes, and what a library or a descriptor reads: tokens' rows side by side."""
    if isinstance(made, Tile):
        return {ROWS: s.dtype.itemsize * s.tokens * s.width * made.descriptors}
    strip = 4 * s.tokens * exp_columns("triton", made.rows(s.tokens, s.plan.chunk))
    return {ROWS: s.dtype.itemsize * s.tokens * s.width, STRIP: strip}
