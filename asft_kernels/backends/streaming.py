"""A head whose rows are sharded over data-parallel ranks, read chunk by chunk so that it never stands whole on one.

    what        how, of R ranks                                       bytes that a rank sends or receives
    rows        chunk k broadcast by the ranks that have its rows     V D (R - 1) / R, in the head's dtype, in each
                                                                      phase that makes logits
    labels      all_to_all of indices, then of rows                   N (R - 1) / R (8 + D, in the head's dtype), in
                                                                      each phase, and once more for dH under a softcap
    dW          chunk k reduced to the ranks that have its rows       V D (R - 1) / R, in fp32
    agreement   all_gather of the number of tokens and a digest       16 R

The rows of the next chunk come while this one's are multiplied: two buffers of a chunk. A chunk of dW leaves while the
next one's product runs: two more, in fp32 (fp64). It is summed over the ranks, divided by R as FSDP2 divides, and
rounded once where it is kept.

Shards are those of a DTensor's Shard(0) and of torch.chunk: rank r has rows r c to (r + 1) c of V, c = ceil(V / R).
Collectives wait for every rank, so what decides how many there are is the same on all: chunks do not depend on the
number of tokens, cached chunks on the largest one, and a rank without a token takes part.
"""

import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from asft_kernels.backends.head_rows import HeadRows

Slices = list[tuple[int, int]]


class Shards(NamedTuple):
    """Which rank has which rows."""

    group: "dist.ProcessGroup"
    rank: int
    ranks: int
    rows: int  # of a rank, but for the last ones

    @classmethod
    def of(cls, head: HeadRows) -> "Shards":
        group = dist.distributed_c10d._resolve_process_group(head.placement.split("/")[1])  # pyright: ignore
        ranks = group.size()
        return cls(group, group.rank(), ranks, -(-head.size[0] // ranks))

    @property
    def first(self) -> int:
        """The first row that is here; V or more where there is none."""
        return self.rank * self.rows

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(rank, first, last row) of what each rank has of rows start to stop."""
        owners = range(start // self.rows, -(-stop // self.rows))
        return [(rank, max(start, rank * self.rows), min(stop, (rank + 1) * self.rows)) for rank in owners]


def agreed_tokens(head: HeadRows, n_tokens: int, same: tuple[object, ...]) -> int:
    """The largest n_tokens of the head's ranks; ValueError on all of them where one has another `same`."""
    shards = Shards.of(head)
    digest = int.from_bytes(hashlib.sha256(repr(same).encode()).digest()[:7], "big")
    own = torch.tensor([n_tokens, digest], device=head.weight.device)
    every = own.new_empty(shards.ranks, 2)
    dist.all_gather(list(every), own, group=shards.group)
    tokens, digests = every.T.tolist()
    if len(set(digests)) > 1:
        here = ", ".join(map(str, same))
        raise ValueError(
            f"lm_head: got a head streamed over {shards.ranks} ranks with other options on some (here: {here}), need "
            "the same dtype, chunk_size, cache_bytes, figures and gradients on all; a chunk is read by all at once"
        )
    return max(tokens)


def _wait(works: list[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


class StreamedRows:
    """A streamed head in one phase, read as `HeadRows` is. Every rank reads the same slices, each once and in order."""

    is_plain = False

    def __init__(self, head: HeadRows, slices: Slices) -> None:
        self.weight, self.low_rank, self.columns, self.size = head.weight, head.low_rank, head.columns, head.size
        self.shards, self.slices, self.next = Shards.of(head), slices, 0
        width = max((stop - start for start, stop in slices), default=0)
        self.buffers = head.weight.new_empty(min(2, len(slices)), width, head.columns)
        self._ask()

    def _ask(self) -> None:
        """Starts the broadcasts of the next chunk."""
        self.works: list[dist.Work | None] = []
        if self.next == len(self.slices):
            return
        start, stop = self.slices[self.next]
        buffer, first = self.buffers[self.next % 2], self.shards.first
        for rank, low, high in self.shards.pieces(start, stop):
            piece = buffer[low - start : high - start]
            if rank == self.shards.rank:
                piece.copy_(self.weight[low - first : high - first])
            self.works.append(dist.broadcast(piece, group=self.shards.group, group_src=rank, async_op=True))

    def chunk(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows start to stop in out's dtype: in out (of D + r columns), or in a buffer that the second call from now
        writes to."""
        assert self.slices[self.next] == (start, stop), "backend bug: chunks are read in order"
        rows = self.buffers[self.next % 2, : stop - start]
        self.skip()
        if self.low_rank is None and rows.dtype == out.dtype:
            return rows
        return self._write(out[: stop - start], rows, slice(start, stop))

    def skip(self) -> None:
        """Takes part in the next chunk's broadcasts."""
        _wait(self.works)
        self.next += 1
        self._ask()

    def take(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, D + r): a row for each label."""
        group, ranks = self.shards.group, self.shards.ranks
        owners = labels // self.shards.rows
        order = owners.argsort()
        asked = owners.bincount(minlength=ranks)
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked, group=group)
        to, of = asked.tolist(), wanted.tolist()
        indices = labels.new_empty(sum(of))
        dist.all_to_all_single(indices, labels[order], of, to, group=group)
        rows = self.weight.new_empty(len(labels), self.columns)
        dist.all_to_all_single(rows, self.weight[indices - self.shards.first].contiguous(), to, of, group=group)
        out = torch.empty(len(labels), self.size[1], dtype=dtype, device=labels.device)
        return self._write(out, rows[order.argsort()], labels)

    def _write(self, out: Tensor, rows: Tensor, places: slice | Tensor) -> Tensor:
        out[:, : self.columns] = rows
        if self.low_rank is not None:
            out[:, self.columns :] = self.low_rank[places]
        return out


def reading(head: HeadRows, slices: Slices) -> HeadRows | StreamedRows:
    """What a phase reads rows from: a streamed head's are asked for from here on, those of slices in order."""
    return StreamedRows(head, slices) if head.is_streamed else head


class StreamedGradient:
    """dW of a streamed head: the mean over the ranks, (V_r, D) in the weight's dtype."""

    def __init__(self, head: HeadRows | StreamedRows, shards: Shards, slices: Slices, dtype: torch.dtype) -> None:
        self.shards, self.slices = shards, slices
        self.out = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
        width = max(stop - start for start, stop in slices)
        self.buffers = head.weight.new_empty(min(2, len(slices)), width, head.columns, dtype=dtype)
        self.works: dict[int, list[dist.Work | None]] = {}

    def room(self, k: int) -> Tensor:
        """(rows, D): where this rank's dW of chunk k goes."""
        self._settle(k - 2)
        start, stop = self.slices[k]
        return self.buffers[k % 2, : stop - start]

    def send(self, k: int) -> None:
        """Starts the sums of what `room` returned."""
        start, stop = self.slices[k]
        self.works[k] = [
            dist.reduce(
                self.buffers[k % 2, low - start : high - start], group=self.shards.group, group_dst=rank, async_op=True
            )
            for rank, low, high in self.shards.pieces(start, stop)
        ]

    def _settle(self, k: int) -> None:
        if k not in self.works:
            return
        _wait(self.works.pop(k))
        start, stop = self.slices[k]
        for rank, low, high in self.shards.pieces(start, stop):
            if rank == self.shards.rank:
                sums, first = self.buffers[k % 2, low - start : high - start], self.shards.first
                self.out[low - first : high - first] = sums.div_(self.shards.ranks)  # the one rounding

    def finish(self) -> Tensor:
        for k in sorted(self.works):
            self._settle(k)
        return self.out


def take_part(
    head: HeadRows, labels: Tensor, plan_slices: Slices, first: int, gradient: torch.dtype | None = None
) -> Tensor | None:
    """What a rank without a token does in a phase of the others, who read the chunks from first on; and its dW.

    For backends that launch nothing then. labels: (0,). gradient: the dtype that dW is summed in, None where it is not
    wanted.
    """
    rows = StreamedRows(head, plan_slices[first:])
    rows.take(labels, head.weight.dtype)
    sink = None if gradient is None else StreamedGradient(head, Shards.of(head), plan_slices, gradient)
    for k in range(first if sink is None else 0, len(plan_slices)):
        if k >= first:
            rows.skip()
        if sink is not None:
            sink.room(k).zero_()
            sink.send(k)
    return None if sink is None else sink.finish()
