"""The label part of dW, added in fp32 before dW's only rounding.

    dW[y] += sum over tokens t with y_t = y of pull[t] * H[rows[t]]      for the labels of one slice of dW

Softmax and label parts cancel on a calibrated model, so a rounding between them would cost several.
Tokens are visited in the order of a stable sort by label: the program at the first token of a run of
equal labels walks the run, so sums have a fixed order and need no atomics. Reads each token's row
once. Where the slice's labels begin and end in that order is read on the device: the host never knows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # enough to fill a GPU; a slice of 2048 rows rarely has as many labels


@triton.jit(do_not_specialize=["first", "programs"])
def label_rows_kernel(
    # data
    out_ptr,  # (width, D) fp32 contiguous: rows of labels that occur are added to
    hidden_ptr,  # (M, D) rows stride_hm elements apart
    rows_ptr,  # (N,) int64
    sorted_ptr,  # (N,) int64: labels, ascending
    order_ptr,  # (N,) int64: sorted[i] is the label of token order[i]; equal labels keep their order
    pull_ptr,  # (N,) fp32
    bounds_ptr,  # (2,) int64: the slice's labels are sorted[bounds[0] : bounds[1]]
    # shapes and strides
    D,
    first,  # the vocabulary row that the slice starts with
    programs,  # in the grid's first dimension
    stride_hm,
    # constants
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (p, j): columns j*BLOCK_D onwards, runs that start at bounds[0] + p + a multiple of programs."""
    begin = tl.load(bounds_ptr)
    end = tl.load(bounds_ptr + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    start = begin + tl.program_id(0)
    while start < end:
        label = tl.load(sorted_ptr + start)
        going = label != tl.load(sorted_ptr + start - 1, mask=start > begin, other=-1)
        mine = d < tl.where(going, D, 0)  # in_row & going; Triton 3.9's interpreter makes no mask of these two
        at = (label - first) * D + d  # int64, as labels are
        acc = tl.load(out_ptr + at, mask=mine, other=0.0)
        i = start
        while going:
            k = i + tl.arange(0, BLOCK_T)
            run = tl.load(sorted_ptr + k, mask=k < end, other=-1) == label
            t = tl.load(order_ptr + k, mask=run, other=0)
            pull = tl.load(pull_ptr + t, mask=run, other=0.0)
            row = tl.load(rows_ptr + t, mask=run, other=0)
            there = run[:, None] & in_row[None, :]
            h = tl.load(hidden_ptr + (row * stride_hm)[:, None] + d[None, :], mask=there, other=0.0)
            acc += tl.sum(pull[:, None] * h.to(tl.float32), 0)
            i += BLOCK_T
            going = tl.load(sorted_ptr + i, mask=i < end, other=-1) == label
        tl.store(out_ptr + at, acc, mask=mine)
        start += programs


def label_rows(
    out: Tensor,
    hidden: Tensor,
    rows: Tensor,
    sorted_labels: Tensor,
    order: Tensor,
    pull: Tensor,
    bounds: Tensor,
    *,
    first: int,
) -> None:
    """Adds the label part to out (width, D) fp32, the slice of dW that starts with vocabulary row first.

    bounds (2,) int64, on the device: sorted_labels[bounds[0] : bounds[1]] are those in [first, first + width).
    """
    (N,), D = rows.shape, out.shape[1]
    assert out.is_contiguous(), "backend bug: needs a contiguous slice of dW"
    assert out.dtype == torch.float32, "backend bug: the label part is added before dW's rounding"
    BLOCK_D = min(triton.next_power_of_2(D), 1024)
    programs = min(N, PROGRAMS)
    label_rows_kernel[(programs, triton.cdiv(D, BLOCK_D))](
        out, hidden, rows, sorted_labels, order, pull, bounds,
        D, first, programs, hidden.stride(0), BLOCK_T=4, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
