"""How vocabulary and tokens are cut, and how many chunks keep their exponentials. From integers alone."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from asft_kernels.backends import processor
from asft_kernels.backends.streamed_order import StreamedOrder

MIB = 2**20
INTEL = "Intel cpu"  # stands for "cpu" below, where the processor is one of Intel's
# Bytes of E that are kept unless the caller says otherwise. Constants, never "what happens to be free": results must
# repeat. On a GPU 8192 tokens of a vocabulary of 151,936 fit in bf16.
CACHE_BYTES, CACHE_BYTES_GPU = {"cpu": 1024 * MIB}, 2560 * MIB
# Bytes of a chunk of E, and of its rows of W in fp32 (on a GPU only where those are copied). On a CPU what its cores'
# own caches hold, but on Intel's, where the products themselves are faster in wider chunks, whatever the caches
# (docs/algorithm.md). On a GPU few chunks: each costs the host some launches, which a few hundred tokens wait for.
CHUNK_BYTES, CHUNK_BYTES_GPU = {"cpu": MIB, INTEL: 4 * MIB}, 256 * MIB
WEIGHT_BYTES, WEIGHT_BYTES_GPU = {"cpu": 2 * MIB, INTEL: 8 * MIB}, 512 * MIB
# Below this many vocabulary rows a chunk costs more in passes over the (N, D) accumulator than it saves.
MIN_CHUNK, MIN_CHUNK_GPU = {"cpu": 512, INTEL: 1024}, 4096
TYPICAL_TOKENS, TYPICAL_TOKENS_GPU = {"cpu": 1024}, 8192  # stand for N where a trace must not depend on it
TOKEN_BLOCK = {"cpu": 1024}  # tokens that walk over the vocabulary together: their E and O stay in the caches
SLICE_BYTES = 32 * MIB  # of dW in fp32, before it is rounded
MULTIPLE = 64
FULL_TILE = (128, 256)  # tokens x vocabulary rows: the tile that Hopper's and Blackwell's bf16 tables begin with


@dataclass(frozen=True)
class Plan:
    """Vocabulary rows per chunk, and the number of leading chunks whose exponentials are kept.

    vocab: V. chunk: rows of the head per chunk. cached: chunks 0..cached-1 keep E for phase 2,
    the rest is recomputed there (only looked at when a gradient to the head is needed).
    order: a streamed head's, whose last chunks are narrower; None elsewhere, where only the last one is.
    """

    vocab: int
    chunk: int
    cached: int
    order: StreamedOrder | None = None

    @property
    def slices(self) -> list[tuple[int, int]]:
        """[start, stop) of every chunk, in order."""
        if self.order is not None:
            return self.order.slices
        return [(k, min(k + self.chunk, self.vocab)) for k in range(0, self.vocab, self.chunk)]

    @property
    def widths(self) -> list[int]:
        """Rows of every chunk."""
        return [stop - start for start, stop in self.slices]

    def borders(self, device: torch.device) -> Tensor:
        """(chunks + 1,) int64: where every chunk starts, and V."""
        if self.order is not None:
            return torch.tensor([0, *(stop for _, stop in self.slices)], device=device)
        return torch.arange(len(self.slices) + 1, device=device).mul_(self.chunk).clamp_(max=self.vocab)


def make_plan(
    n_tokens: int,
    vocab: int,
    hidden_size: int,
    *,
    exp_bytes: int,
    chunk_size: int | None,
    cache_bytes: int,
    device_type: str,
    multiprocessors: int = 0,
    copies: bool = False,
    order: StreamedOrder | None = None,
) -> Plan:
    """The plan for one call: a function of these integers alone, so that results repeat.

    exp_bytes: bytes of one stored exponential. chunk_size: the caller's, None chooses one. cache_bytes:
    at most this much E is kept, in whole chunks. multiprocessors: the GPU's, 0 elsewhere. copies: as in default_chunk.
    order: a streamed head's, which says how wide chunks are; None elsewhere.
    """
    if order is not None:
        chunk_size = order.chunk
    elif chunk_size is None:
        chunk_size = default_chunk(n_tokens, hidden_size, exp_bytes=exp_bytes, device_type=device_type, copies=copies)
        if multiprocessors:
            chunk_size = filled_chunk(chunk_size, n_tokens, vocab, multiprocessors)
    chunk = min(chunk_size, vocab)
    slices = Plan(vocab, chunk, 0, order).slices
    per_row = exp_bytes * max(n_tokens, 1)
    # By comparisons, not by a division: torch.compile then guards on an inequality and not on n_tokens itself.
    if vocab * per_row <= cache_bytes:
        cached = len(slices)
    else:
        cached = sum(stop * per_row <= cache_bytes for _, stop in slices[:-1])
    return Plan(vocab, chunk, cached, order)


def default_cache_bytes(device_type: str) -> int:
    """What cache_bytes=None stands for."""
    return CACHE_BYTES.get(device_type, CACHE_BYTES_GPU)


def default_chunk(
    n_tokens: int,
    hidden_size: int,
    *,
    exp_bytes: int,
    device_type: str,
    copies: bool = False,
    intel: bool | None = None,
) -> int:
    """Vocabulary rows for which a chunk's E stays within CHUNK_BYTES and its rows of W in fp32 within WEIGHT_BYTES.

    Never below MIN_CHUNK, which on a CPU fp32 reaches at N = 512 or D = 1024 (on Intel's at 1024 or 2048).
    copies: whether a GPU makes a chunk's rows of W anew, in another dtype or of what the head consists of; where it
    reads them as they are, E alone says how wide a chunk is. intel: whether a CPU is one of Intel's, None for the one
    that is here.
    """
    intel = processor.INTEL if intel is None else intel
    kind = INTEL if device_type == "cpu" and intel else device_type
    by_exps = CHUNK_BYTES.get(kind, CHUNK_BYTES_GPU) // (exp_bytes * max(n_tokens, 1))
    fit = by_exps
    if copies or device_type == "cpu":
        fit = min(fit, WEIGHT_BYTES.get(kind, WEIGHT_BYTES_GPU) // (4 * hidden_size))
    return max(fit // MULTIPLE * MULTIPLE, MIN_CHUNK.get(kind, MIN_CHUNK_GPU))


@lru_cache
def filled_chunk(rows: int, n_tokens: int, vocab: int, multiprocessors: int) -> int:
    """Rows near the given number, from 3/4 to 17/16 of it, that keep a GPU's multiprocessors busiest.

    A chunk's tiles are taken in turns of one a multiprocessor, and a last turn that is not full takes as long as one
    that is. Each chunk costs about one turn more: its other launches, and a pass over O.
    """
    if vocab <= rows:
        return rows
    tokens, width = FULL_TILE
    tiles_m, tiles, fit = -(-n_tokens // tokens), -(-vocab // width), rows // width

    def turns(tiles_v: int) -> int:
        full, rest = divmod(tiles, tiles_v)
        chunks = full + (rest > 0)
        return chunks + full * -(-tiles_m * tiles_v // multiprocessors) + -(-tiles_m * rest // multiprocessors)

    least = max(fit * 3 // 4, MIN_CHUNK_GPU // width)
    return width * min(range(least, fit * 17 // 16 + 1), key=lambda tiles_v: (turns(tiles_v), -tiles_v))


def token_blocks(n_tokens: int, device_type: str) -> list[slice]:
    """The tokens in runs of nearly one length, at most TOKEN_BLOCK; one run on a device without such a limit."""
    blocks = max(1, -(-n_tokens // TOKEN_BLOCK.get(device_type, max(n_tokens, 1))))
    ends = [n_tokens * block // blocks for block in range(blocks + 1)]
    return [slice(*ends[block : block + 2]) for block in range(blocks)]


def weight_slice(chunk: int, hidden_size: int) -> int:
    """Rows of dW that are summed in fp32 at a time, SLICE_BYTES of them: a multiple, so that the columns of E that
    they are multiplied from begin where the fast products want them to."""
    fit = SLICE_BYTES // (4 * hidden_size) // MULTIPLE * MULTIPLE
    return min(max(fit, MULTIPLE), chunk)


def traced_chunk(hidden_size: int, *, exp_bytes: int, device_type: str) -> int:
    """A chunk that does not depend on the number of tokens, which torch.compile may hold open."""
    typical = TYPICAL_TOKENS.get(device_type, TYPICAL_TOKENS_GPU)
    return default_chunk(typical, hidden_size, exp_bytes=exp_bytes, device_type=device_type, copies=True)
