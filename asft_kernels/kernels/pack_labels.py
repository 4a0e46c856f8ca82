"""Labels of a batch -> the tokens that carry loss, in one launch: some forty small operations of torch less.

One program walks over the positions, a block at a time: 5 microseconds for 512 of them and 12 for 8192 on an H100.
Beyond batch.py's BY_KERNEL torch's operations, which take the whole chip, are left to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["M", "length", "R", "ignore_index"])
def pack_labels_kernel(
    # data
    rows_ptr,  # (M,) int64: positions of valid tokens in order, then the masked ones backwards; every one is written
    tokens_ptr,  # (M,) int64: their labels, -1 where masked
    running_ptr,  # (M + 1,) int64: valid tokens before each position
    facts_ptr,  # (6,) int64: count, smallest and largest valid label, borders ordered from 0, their end, labels agree
    labels_ptr,  # (M,) integers
    extra_ptr,  # (M,) integers: a second label set, or None without HAS_EXTRA
    borders_ptr,  # (R + 1,) int64, or None without HAS_BORDERS: sequences are then `length` positions each
    ends_ptr,  # (M,) bool: whether a sequence ends here, or None without HAS_BORDERS or SHIFT
    # shapes
    M,
    length,
    R,
    ignore_index,
    SHIFT: tl.constexpr,  # position t takes label t + 1, the last of a sequence none
    HAS_EXTRA: tl.constexpr,
    HAS_BORDERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MOST: tl.constexpr = 2**63 - 1
    count = tl.zeros((), tl.int64)
    low = tl.zeros((), tl.int64) + MOST
    high = -low - 1
    agree = tl.zeros((), tl.int64) + 1
    for start in range(0, M, BLOCK):
        p = start + tl.arange(0, BLOCK)
        here = p < M
        at, takes = p, here
        if SHIFT:
            ends = tl.load(ends_ptr + p, mask=here, other=1) != 0 if HAS_BORDERS else (p + 1) % length == 0
            at, takes = p + 1, here & (p + 1 < M) & (ends == 0)
        label = tl.load(labels_ptr + at, mask=takes, other=0).to(tl.int64)
        if HAS_EXTRA:
            one = tl.load(labels_ptr + p, mask=here, other=0).to(tl.int64)
            two = tl.load(extra_ptr + p, mask=here, other=0).to(tl.int64)
            apart = here & (one != ignore_index) & (two != ignore_index) & (one != two)
            agree = tl.minimum(agree, 1 - tl.max(apart.to(tl.int64), 0))
            extra = tl.load(extra_ptr + at, mask=takes, other=0).to(tl.int64)
            label = tl.where(label == ignore_index, extra, label)
        valid = takes & (label != ignore_index)  # ignore_index may lie outside the labels' dtype
        one_each = valid.to(tl.int32)
        before = count + tl.cumsum(one_each, 0) - one_each
        tl.store(running_ptr + p, before, mask=here)
        slot = tl.where(valid, before, M - 1 - (p - before))
        tl.store(rows_ptr + slot, p.to(tl.int64), mask=here)
        tl.store(tokens_ptr + slot, tl.where(valid, label, -1), mask=here)
        count += tl.sum(one_each, 0)
        low = tl.minimum(low, tl.min(tl.where(valid, label, MOST), 0))
        high = tl.maximum(high, tl.max(tl.where(valid, label, -MOST - 1), 0))
    tl.store(running_ptr + M, count)
    ordered, end = tl.zeros((), tl.int64) + 1, tl.zeros((), tl.int64) + M
    if HAS_BORDERS:
        ordered = (tl.load(borders_ptr) == 0).to(tl.int64)
        end = tl.load(borders_ptr + R)
        for start in range(0, R, BLOCK):
            i = start + tl.arange(0, BLOCK)
            here = i < R
            down = tl.load(borders_ptr + i + 1, mask=here, other=0) < tl.load(borders_ptr + i, mask=here, other=0)
            ordered = tl.minimum(ordered, 1 - tl.max(down.to(tl.int64), 0))
    tl.store(facts_ptr, count)
    tl.store(facts_ptr + 1, low)
    tl.store(facts_ptr + 2, high)
    tl.store(facts_ptr + 3, ordered)
    tl.store(facts_ptr + 4, end)
    tl.store(facts_ptr + 5, agree)


def pack_labels(
    labels: Tensor, extra: Tensor | None, borders: Tensor | None, ends: Tensor | None, *, length: int, shift: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(rows, tokens, running, facts); arguments and results as in the kernel, length 0 with borders."""
    M, device = labels.numel(), labels.device
    labels, extra, borders = (None if x is None else x.contiguous() for x in (labels, extra, borders))
    rows, tokens, running = (torch.empty(n, dtype=torch.int64, device=device) for n in (M, M, M + 1))
    facts = torch.empty(6, dtype=torch.int64, device=device)
    with torch.cuda.device_of(labels):
        pack_labels_kernel[(1,)](
            rows, tokens, running, facts, labels, extra, borders, ends,
            M, length, 0 if borders is None else len(borders) - 1, int(ignore_index),
            SHIFT=shift, HAS_EXTRA=extra is not None, HAS_BORDERS=borders is not None, BLOCK=4096, num_warps=16,
        )  # fmt: skip
    return rows, tokens, running, facts
