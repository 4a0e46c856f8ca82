"""One call of the primitive, in sizes."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from asft_kernels.backends import exp_columns, exp_dtype
from asft_kernels.backends.head_rows import FOUR_BITS
from asft_kernels.backends.plan import Plan, make_plan, traced_chunk
from asft_kernels.backends.streamed_order import StreamedOrder
from asft_kernels.backends.token_stats import Wanted
from asft_kernels.kernels.configs import multiprocessors

OF_AN_H100 = 132  # multiprocessors


@dataclass(frozen=True)
class Sizes:
    """One call of the primitive, in sizes: tensors as they go into it (asft_kernels/core/linear_logps.py)."""

    tokens: int  # N
    positions: int  # M: rows of hidden
    vocab: int  # V: rows of the head that are here
    columns: int  # D
    dtype: torch.dtype  # of hidden
    backend: str
    device: torch.device
    cache_bytes: int
    chunk_size: int | None = None
    low_rank: int = 0  # further columns, padded
    weight_dtype: torch.dtype | None = None  # None: that of hidden
    low_rank_dtype: torch.dtype = torch.float32
    codes: str = ""  # as in HeadRows
    bias: bool = False
    softcap: bool = False
    needs_hidden: bool = False
    needs_weight: bool = False
    needs_low_rank: bool = False
    needs_bias: bool = False
    wanted: Wanted = field(default_factory=Wanted)
    ranks: int = 1  # over which a streamed head's rows are sharded
    row_major: bool = True  # whether the entries of a row of the head stand side by side

    @cached_property
    def plan(self) -> Plan:
        recomputes, order = self.wanted.recomputes(1.0 if self.softcap else None), None
        if self.is_streamed:
            fit = traced_chunk(self.width, exp_bytes=self.exp_bytes, device_type=self.device.type)
            order = StreamedOrder.of(self.vocab, self.ranks, self.chunk_size or fit)
        return make_plan(
            self.tokens, self.vocab, self.width, exp_bytes=self.exp_bytes, chunk_size=self.chunk_size,
            cache_bytes=0 if recomputes else self.cache_bytes, device_type=self.device.type,
            multiprocessors=self.multiprocessors if self.chunk_size is None else 0,
            copies=not self.is_plain or not self.row_major or exp_dtype(self.backend, self.dtype) != self.dtype,
            order=order,
        )  # fmt: skip

    @property
    def multiprocessors(self) -> int:
        """The GPU's, without one those of an H100; 0 elsewhere."""
        return multiprocessors(self.device) or OF_AN_H100 * (self.device.type == "cuda")

    @property
    def width(self) -> int:
        """D + r."""
        return self.columns + self.low_rank

    @property
    def exp_bytes(self) -> int:
        return exp_dtype(self.backend, self.dtype).itemsize

    @property
    def is_plain(self) -> bool:
        return not self.low_rank and not self.codes and not self.is_streamed

    @property
    def is_streamed(self) -> bool:
        return self.ranks > 1

    def on_the_way(self, chunks: int) -> int:
        """Rows of a streamed head in buffers, when so many chunks are read or sent: two chunks of all ranks."""
        order = self.plan.order
        return 0 if order is None else min(2, chunks) * self.ranks * order.rows

    @property
    def weight_bytes(self) -> int:
        """Of an entry of the head as it is stored."""
        if self.codes:
            return 1
        return (self.weight_dtype or self.dtype).itemsize

    @property
    def needs_exps(self) -> bool:
        return self.needs_weight or self.needs_low_rank or self.needs_bias

    @property
    def cached(self) -> int:
        """Vocabulary rows whose exponentials are kept."""
        return sum(stop - start for start, stop in self.plan.slices[: self.plan.cached]) if self.needs_exps else 0

    @property
    def weighs(self) -> bool:
        """Whether phase 2 gives exponentials further factors, in a chunk of their own."""
        return bool(self.wanted.differentiable)

    def exps(self, widths: list[int]) -> int:
        """Bytes of exponentials of all tokens, chunk by chunk."""
        return self.exp_bytes * self.tokens * sum(exp_columns(self.backend, width) for width in widths)

    @property
    def scales(self) -> int:
        """Bytes of the scales, in fp32: bitsandbytes' own stand in 8 bits (4 bits), or for another range."""
        if not self.codes:
            return 0
        kind, block, _ = self.codes.split("/")
        return 4 * self.vocab * (self.columns // int(block) if kind == FOUR_BITS else 1)

    def dequantising(self, rows: int, *, taken: bool) -> int:
        """Bytes on the way from codes to rows of W; taken: rows here and there, which are copied first, and of other
        ranks: what is sent for theirs, what comes, and that in order."""
        if self.is_streamed:
            return 3 * rows * self.columns * self.weight_bytes * taken
        if not self.codes:
            return rows * self.columns * self.weight_bytes * taken
        kind, block, dtype = self.codes.split("/")
        entries, read = rows * self.columns, getattr(torch, dtype).itemsize
        rounded = read if read < 4 else 0
        if kind != FOUR_BITS:  # a CPU's product casts the codes first
            return entries * (4 + (4 if self.device.type == "cpu" else rounded) + taken)
        if self.columns % int(block):  # a place for each entry, twice
            return entries * (4 + 16) + entries // 2 * taken
        return entries * (4 + 4 + rounded) + entries // 2 * taken
