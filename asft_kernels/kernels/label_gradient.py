"""The rows of dW that are labels, whole: softmax and label part in fp32 sums, rounded once.

    columns[t, i] = E'[t, v_i]                                      for each distinct label v_i, gathered chunk by chunk
    dW[v_i] = sum over t of columns[t, i] * Hs[t]  +  sum over tokens t with y_t = v_i of pull[t] * H[rows[t]]

The library multiplies and rounds E'^T Hs for all of the vocabulary in one launch a chunk; only these rows have a label
part, which cancels the softmax part on a calibrated model, so that a rounding between the two would cost several. They
are computed here and written over the library's. How many labels differ is known on the device alone: programs past the
last one return. pull is split into three bf16 numbers that sum to it, so that its products with h are exact.

Tokens of one label stand side by side in a stable sort: sums have a fixed order and need no atomics.
The gather reads a sector for each element, at most all of E'; the product takes L / V of a third product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asft_kernels.kernels.device_math import dot, narrow
from asft_kernels.kernels.exp_epilogue import empty_exps
from asft_kernels.kernels.tile_choice import label_tile


class DistinctLabels:
    """Which labels occur and where their tokens stand, computed on the device without a number to the host."""

    def __init__(self, labels: Tensor, vocab: int, chunk: int) -> None:
        (N,), device = labels.shape, labels.device
        self.sorted, self.order = torch.sort(labels, stable=True)
        begins = torch.ones(N, dtype=torch.bool, device=device)
        torch.ne(self.sorted[1:], self.sorted[:-1], out=begins[1:])
        self.index = torch.cumsum(begins, 0) - 1  # (N,): sorted[i] is distinct label number index[i]
        # (N + 1,): the distinct labels, ascending, then vocab.
        self.values = torch.full((N + 1,), vocab, dtype=torch.int64, device=device).scatter_(0, self.index, self.sorted)
        self.starts = torch.searchsorted(self.sorted, self.values)  # (N + 1,): where their tokens begin in the order
        chunks = torch.arange(triton.cdiv(vocab, chunk) + 1, device=device) * chunk
        self.bounds = torch.searchsorted(self.values, chunks.clamp(max=vocab))  # (chunks + 1,); the last is their count


@triton.jit(do_not_specialize=["N", "first"])
def label_columns_kernel(
    out_ptr,  # (N, at least the labels' count) rows stride_om elements apart: columns[t, i]
    exps_ptr,  # (N, width) rows stride_em elements apart: a chunk's E'
    values_ptr,  # (N + 1,) int64: distinct labels, ascending
    bounds_ptr,  # (2,) int64: the chunk's are values[bounds[0] : bounds[1]]
    N,
    first,  # the vocabulary row that the chunk starts with
    stride_om,
    stride_em,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Program (i, j): BLOCK_M tokens, the chunk's j-th BLOCK_L labels."""
    end = tl.load(bounds_ptr + 1)
    begin = tl.load(bounds_ptr) + tl.program_id(1) * BLOCK_L
    if begin >= end:
        return
    slot = begin + tl.arange(0, BLOCK_L)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    there = (m < N)[:, None] & (slot < end)[None, :]
    v = tl.load(values_ptr + slot, mask=slot < end, other=first) - first
    e = tl.load(exps_ptr + (m * stride_em)[:, None] + v[None, :], mask=there, other=0.0)
    tl.store(out_ptr + (m * stride_om)[:, None] + slot[None, :], e, mask=there)


@triton.jit(do_not_specialize=["N"])
def label_gradient_kernel(
    # data
    out_ptr,  # (V, D) bf16 contiguous: rows of labels are written, whole
    columns_ptr,  # (N, stride_cm) contiguous: columns of E', past the labels' count anything
    scaled_ptr,  # (N, D) bf16 contiguous: Hs
    hidden_ptr,  # (M, D) bf16, rows stride_hm elements apart
    rows_ptr,  # (N,) int64
    order_ptr,  # (N,) int64: tokens in a stable sort by label
    index_ptr,  # (N,) int64: the number of the label that stands there
    values_ptr,  # (N + 1,) int64: the distinct labels
    starts_ptr,  # (N + 1,) int64: where each one's tokens begin in the order
    count_ptr,  # (1,) int64: how many there are
    pull_ptr,  # (N,) fp32
    # shapes and strides
    N,
    D,
    stride_cm,
    stride_sm,
    stride_hm,
    # constants
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program i writes BLOCK_L labels' rows x BLOCK_D columns; neighbours share the labels, so L2 has their columns."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    begin = tl.program_id(0) // tiles_d * BLOCK_L
    count = tl.load(count_ptr)
    if begin >= count:
        return
    slot = begin + tl.arange(0, BLOCK_L)
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row, has_room = d < D, slot < stride_cm
    acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        is_token = t < N
        at = columns_ptr + (t * stride_cm)[None, :] + slot[:, None]
        e = tl.load(at, mask=is_token[None, :] & has_room[:, None], other=0.0)
        at = scaled_ptr + (t * stride_sm)[:, None] + d[None, :]
        hs = tl.load(at, mask=is_token[:, None] & in_row[None, :], other=0.0)
        acc = dot(e, hs, acc)

    start = tl.load(starts_ptr + begin)
    last = tl.load(starts_ptr + tl.minimum(begin + BLOCK_L, count))
    while start < last:
        i = start + tl.arange(0, BLOCK_T)
        mine = i < last
        t = tl.load(order_ptr + i, mask=mine, other=0)
        own = tl.load(index_ptr + i, mask=mine, other=-1)
        pull = tl.load(pull_ptr + t, mask=mine, other=0.0)
        row = tl.load(rows_ptr + t, mask=mine, other=0)
        at = hidden_ptr + (row * stride_hm)[:, None] + d[None, :]
        h = tl.load(at, mask=mine[:, None] & in_row[None, :], other=0.0)
        left = tl.where(own[None, :] == slot[:, None], pull[None, :], 0.0)
        for _ in tl.static_range(3):
            part = left.to(tl.bfloat16)
            acc = dot(part, h, acc)
            left -= part.to(tl.float32)
        start += BLOCK_T
    is_label = slot < count
    v = tl.load(values_ptr + slot, mask=is_label, other=0)
    at = out_ptr + (v * D)[:, None] + d[None, :]
    tl.store(at, narrow(acc, out_ptr.dtype.element_ty), mask=is_label[:, None] & in_row[None, :])


class LabelGradient:
    """Gathers the labels' columns of E', chunk by chunk, then writes their rows of dW."""

    def __init__(self, labels: Tensor, vocab: int, chunk: int) -> None:
        self.distinct = DistinctLabels(labels, vocab, chunk)
        N = len(labels)
        self.most = min(N, vocab)  # labels that may differ
        self.columns = empty_exps(N, self.most, torch.bfloat16, labels.device)

    def gather(self, k: int, exps: Tensor, first: int) -> None:
        """Takes the labels' columns of chunk k, whose vocabulary begins with row first."""
        N, width = exps.shape
        grid = (triton.cdiv(N, 64), triton.cdiv(min(self.most, width), 64))
        label_columns_kernel[grid](
            self.columns, exps, self.distinct.values, self.distinct.bounds[k : k + 2],
            N, first, self.columns.stride(0), exps.stride(0), BLOCK_M=64, BLOCK_L=64, num_warps=4,
        )  # fmt: skip

    def write(self, out: Tensor, scaled: Tensor, hidden: Tensor, rows: Tensor, pull: Tensor) -> None:
        """Overwrites the labels' rows of out (V, D) bf16; scaled (N, D) bf16 is Hs."""
        (N, D), distinct = scaled.shape, self.distinct
        assert out.is_contiguous(), "backend bug: needs a contiguous dW"
        assert out.dtype == torch.bfloat16, "backend bug: needs a bf16 dW"
        BLOCK_L, BLOCK_D, BLOCK_T, warps, stages = label_tile(out.device)
        label_gradient_kernel[(triton.cdiv(self.most, BLOCK_L) * triton.cdiv(D, BLOCK_D),)](
            out, self.columns, scaled, hidden, rows, distinct.order, distinct.index, distinct.values, distinct.starts,
            distinct.bounds[-1:], pull, N, D, self.columns.stride(0), scaled.stride(0),
            hidden.stride(0), BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, BLOCK_T=BLOCK_T, num_warps=warps, num_stages=stages,
        )  # fmt: skip
