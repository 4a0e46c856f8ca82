"""A head whose rows are sharded over data-parallel ranks, read chunk by chunk so that it never stands whole on one.

    what        how, of R ranks with S = ceil(V / R) rows                 bytes that a rank sends or receives
    rows        one all-gather a chunk, of c rows of every rank           S D (R - 1), in the head's dtype, in each
                                                                          phase that makes logits
    labels      all_to_all of indices, then of rows                       N (R - 1) / R (8 + D, in the head's dtype),
                                                                          in each phase, and once more for dH under a
                                                                          softcap
    dW          one reduce-scatter a chunk, to c rows of every rank       S D (R - 1), in fp32
    agreement   all_gather of the number of tokens and a digest           16 R

Backends see the head in another order, that of streamed_order.py. Labels and bias are put in that order at the entry of
a phase, gradients back in the head's own at its end.

The rows of the next chunk come while this one's are multiplied: two buffers of a chunk. A chunk of dW leaves while the
next one's product runs: two more, in fp32 (fp64). It is summed over the ranks, divided by R as FSDP2 divides, and
rounded once where it is kept.

Ranks whose shards are shorter, as torch.chunk makes the last ones, send rows of zeros behind their own: S R - V in all.
Collectives wait for every rank, so what decides how many there are is the same on all: chunks do not depend on the
number of tokens, cached chunks on the largest one, and a rank without a token takes part.
"""

import hashlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan
from asft_kernels.backends.streamed_order import StreamedOrder

REFUSED = -1  # in place of a number of tokens


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


def order_of(head: HeadRows, chunk: int) -> StreamedOrder | None:
    """The order of a streamed head in chunks of about so many rows; None for another head."""
    return StreamedOrder.of(head.size[0], Shards.of(head).ranks, chunk) if head.is_streamed else None


def ranks_of(head: HeadRows) -> int:
    """Over which a streamed head's rows are sharded; 1 of another head."""
    return Shards.of(head).ranks if head.is_streamed else 1


def in_read_order(plan: Plan, bias: Tensor | None, labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """bias (V,) and labels (N,) in the order in which a backend reads the head."""
    if plan.order is None:
        return bias, labels
    return None if bias is None else bias[plan.order.all_rows(bias.device)], plan.order.places(labels)


def in_natural_order(plan: Plan, grad: Tensor | None) -> Tensor | None:
    """A gradient (V, ...) in the order of the head's rows, from the one in which a backend reads them."""
    return grad if plan.order is None or grad is None else grad[plan.order.all_places(grad.device)]


def agreed_tokens(head: HeadRows, n_tokens: int, same: tuple[object, ...]) -> int:
    """The largest n_tokens of the head's ranks; ValueError on all of them where one has another `same`, or refuses."""
    shards = Shards.of(head)
    digest = int.from_bytes(hashlib.sha256(repr(same).encode()).digest()[:7], "big")
    own = torch.tensor([n_tokens, digest], device=head.weight.device)
    every = own.new_empty(shards.ranks, 2)
    dist.all_gather(list(every), own, group=shards.group)
    tokens, digests = every.T.tolist()
    if REFUSED in tokens:
        rank = tokens.index(REFUSED)
        raise ValueError(
            f"lm_head: rank {rank} of the {shards.ranks} that a streamed head stands on refuses its arguments, need a "
            "call of all; that rank says why"
        )
    if len(set(digests)) > 1:
        here = ", ".join(map(str, same))
        raise ValueError(
            f"lm_head: got a head streamed over {shards.ranks} ranks with other options on some (here: {here}), need "
            "the same dtype, chunk_size, cache_bytes, figures and gradients on all; a chunk is read by all at once"
        )
    return max(tokens)


def refuse(head: HeadRows) -> None:
    """Tells the other ranks of a streamed head, which are about to agree, that this one raises an error."""
    shards = Shards.of(head)
    own = torch.tensor([REFUSED, 0], device=head.weight.device)
    dist.all_gather(list(own.new_empty(shards.ranks, 2)), own, group=shards.group)


def _collective(name: str, earlier: str) -> Any:
    """A collective by its name since torch 2.13, where the one that it had before warns."""
    return getattr(dist, name, None) or getattr(dist, earlier)


class StreamedRows:
    """A streamed head in one phase, read as `HeadRows` is: every rank reads the same chunks in order, from first on."""

    is_plain = False

    def __init__(self, head: HeadRows, order: StreamedOrder, first: int) -> None:
        self.weight, self.low_rank, self.columns, self.size = head.weight, head.low_rank, head.columns, head.size
        self.shards, self.order, self.slices, self.next = Shards.of(head), order, order.slices, first
        self.rows = order.all_rows(head.weight.device)  # of the head, by place
        chunks = min(2, len(self.slices) - first)
        self.buffers = head.weight.new_empty(chunks, self.shards.ranks * order.rows, head.columns)
        self._ask()

    def _ask(self) -> None:
        """Starts the gather of the next chunk."""
        self.work: dist.Work | None = None
        if self.next == len(self.slices):
            return
        first, last = self.order.of_shard(self.next)
        piece = self.weight[first:last].contiguous()
        if len(piece) < last - first:
            piece = F.pad(piece, (0, 0, 0, last - first - len(piece)))
        gathered = self._buffer()[: self.shards.ranks * (last - first)]
        all_gather = _collective("all_gather_single", "all_gather_into_tensor")
        self.work = all_gather(gathered, piece, group=self.shards.group, async_op=True)

    def _buffer(self) -> Tensor:
        return self.buffers[self.next % len(self.buffers)]

    def chunk(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows start to stop in out's dtype: in out (of D + r columns), or in a buffer that the second call from now
        writes to."""
        assert self.slices[self.next] == (start, stop), "backend bug: chunks are read in order"
        rows = self._buffer()[: stop - start]
        self.skip()
        if self.low_rank is None and rows.dtype == out.dtype:
            return rows
        return self._write(out[: stop - start], rows, self.rows[start:stop])

    def skip(self) -> None:
        """Takes part in the next chunk's gather."""
        if self.work is not None:
            self.work.wait()
        self.next += 1
        self._ask()

    def take(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, D + r): a row for each label, which is a place in the plan's order."""
        group, ranks, labels = self.shards.group, self.shards.ranks, self.rows[labels]
        owners = labels // self.shards.rows
        order = owners.argsort()
        asked = owners.bincount(minlength=ranks)
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked, group=group)
        to, of = asked.tolist(), wanted.tolist()
        indices = labels.new_empty(sum(of))
        dist.all_to_all_single(indices, labels[order], of, to, group=group)
        rows = self.weight.new_empty(len(labels), self.columns)
        sent = self.weight[indices - self.shards.rank * self.shards.rows].contiguous()
        dist.all_to_all_single(rows, sent, to, of, group=group)
        out = torch.empty(len(labels), self.size[1], dtype=dtype, device=labels.device)
        return self._write(out, rows[order.argsort()], labels)

    def _write(self, out: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        out[:, : self.columns] = rows
        if self.low_rank is not None:
            out[:, self.columns :] = self.low_rank[which]
        return out


def reading(head: HeadRows, plan: Plan, first: int = 0) -> HeadRows | StreamedRows:
    """What a phase reads rows from: a streamed head's are asked for from here on, those of chunks from first on."""
    return head if plan.order is None else StreamedRows(head, plan.order, first)


class StreamedGradient:
    """dW of a streamed head: the mean over the ranks, (V_r, D) in the weight's dtype."""

    def __init__(self, head: HeadRows, order: StreamedOrder, dtype: torch.dtype) -> None:
        self.shards, self.order, self.widths = Shards.of(head), order, [stop - start for start, stop in order.slices]
        self.out = torch.empty_like(head.weight, memory_format=torch.contiguous_format)
        chunks, rows = min(2, len(self.widths)), self.shards.ranks * order.rows
        # Zeros at first: what stands behind a chunk's rows goes to ranks that have fewer, which drop it.
        self.buffers = head.weight.new_zeros(chunks, rows, head.columns, dtype=dtype)
        self.sums = head.weight.new_empty(chunks, order.rows, head.columns, dtype=dtype)
        self.works: dict[int, dist.Work] = {}

    def room(self, k: int) -> Tensor:
        """(rows, D): where this rank's dW of chunk k goes."""
        self._settle(k - 2)
        return self.buffers[k % 2, : self.widths[k]]

    def send(self, k: int) -> None:
        """Starts the sum of what `room` returned."""
        first, last = self.order.of_shard(k)
        sums, parts = self.sums[k % 2, : last - first], self.buffers[k % 2, : self.shards.ranks * (last - first)]
        reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
        self.works[k] = reduce_scatter(sums, parts, group=self.shards.group, async_op=True)

    def _settle(self, k: int) -> None:
        if k not in self.works:
            return
        self.works.pop(k).wait()
        own = self.out[slice(*self.order.of_shard(k))]
        own.copy_(self.sums[k % 2, : len(own)].div_(self.shards.ranks))  # the one rounding

    def finish(self) -> Tensor:
        for k in sorted(self.works):
            self._settle(k)
        return self.out


def take_part(
    head: HeadRows, labels: Tensor, order: StreamedOrder, first: int, gradient: torch.dtype | None = None
) -> Tensor | None:
    """What a rank without a token does in a phase of the others, who read the chunks from first on; and its dW.

    For backends that launch nothing then. labels: (0,). gradient: the dtype that dW is summed in, None where it is not
    wanted.
    """
    rows = StreamedRows(head, order, first)
    rows.take(labels, head.weight.dtype)
    sink = None if gradient is None else StreamedGradient(head, order, gradient)
    chunks = len(order.slices)
    for k in range(first if sink is None else 0, chunks):
        if k >= first:
            rows.skip()
        if sink is not None:
            sink.room(k).zero_()
            sink.send(k)
    return None if sink is None else sink.finish()
