"""The order in which a streamed head's rows are read: chunk k has rows k c to (k + 1) c of every rank's shard.

Each chunk is then one all-gather of c rows a rank. A softmax does not care about the order of its vocabulary, so to a
backend the streamed head is one in another order, whose labels, bias and gradients are put in order around it.

Shards are those of a DTensor's Shard(0) and of torch.chunk: rank r has rows r S to (r + 1) S of V, S = ceil(V / R). So
the first V // S ranks have S rows, the next has what is left, and the others none: of what a chunk gathers, the rows
that exist come first.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class StreamedOrder(NamedTuple):
    vocab: int  # V
    ranks: int  # R
    rows: int  # c, of each rank's shard in a chunk

    @classmethod
    def of(cls, vocab: int, ranks: int, chunk: int) -> "StreamedOrder":
        """Chunks of at most so many rows, or of one row of each rank where that is more."""
        return cls(vocab, ranks, max(1, chunk // ranks) if chunk < vocab else -(-vocab // ranks))

    @property
    def shard(self) -> int:
        """S."""
        return -(-self.vocab // self.ranks)

    @property
    def chunk(self) -> int:
        """Rows of the widest chunk, which is the first."""
        return self.slices[0][1]

    @property
    def slices(self) -> list[tuple[int, int]]:
        """[start, stop) of every chunk, in order; none is wider than those before it."""
        whole, rest = divmod(self.vocab, self.shard)
        starts = [whole * first + min(first, rest) for first in range(0, self.shard, self.rows)]
        return list(pairwise([*starts, self.vocab]))

    def of_shard(self, k: int) -> tuple[int, int]:
        """[first, last) of chunk k in a whole shard."""
        return k * self.rows, min((k + 1) * self.rows, self.shard)

    def places(self, rows: Tensor) -> Tensor:
        """Where rows of the head stand in this order. int64 of any shape, in [0, V)."""
        whole, rest = divmod(self.vocab, self.shard)
        owner, row = rows // self.shard, rows % self.shard
        first = row // self.rows * self.rows
        width = (self.shard - first).clamp(max=self.rows)  # of the ranks before the owner, whose shards are whole
        return whole * first + first.clamp(max=rest) + owner * width + row - first

    def all_places(self, device: torch.device) -> Tensor:
        """(V,): where each row stands."""
        return self.places(torch.arange(self.vocab, device=device))

    def all_rows(self, device: torch.device) -> Tensor:
        """(V,): which row stands in each place."""
        places = self.all_places(device)
        return torch.empty_like(places).index_copy_(0, places, torch.arange(self.vocab, device=device))
