"""How the vocabulary is cut into chunks, and how many of them keep their exponentials. Integers only."""

from dataclasses import dataclass

GIB = 2**30
DEFAULT_CACHE_BYTES = GIB  # a constant, never "what happens to be free": results must repeat
CHUNK_BYTES = {"cpu": 8 * 2**20}  # measured: larger fresh buffers cost page faults, smaller ones GEMM speed
CHUNK_BYTES_GPU = 256 * 2**20
MIN_CHUNK = 64


@dataclass(frozen=True)
class Plan:
    """Vocabulary rows per chunk, and the number of leading chunks whose exponentials are kept.

    vocab: V. chunk: rows of the head per chunk. cached: chunks 0..cached-1 keep E for phase 2,
    the rest is recomputed there (only looked at when a gradient to the head is needed).
    """

    vocab: int
    chunk: int
    cached: int

    @property
    def slices(self) -> list[tuple[int, int]]:
        """[start, stop) of every chunk, in order."""
        return [(k, min(k + self.chunk, self.vocab)) for k in range(0, self.vocab, self.chunk)]


def make_plan(
    n_tokens: int,
    vocab: int,
    hidden_size: int,
    *,
    exp_bytes: int,
    chunk_size: int | None,
    cache_bytes: int,
    device_type: str,
) -> Plan:
    """The plan for one call: a function of these integers alone, so that results repeat.

    exp_bytes: bytes of one stored exponential. chunk_size: the caller's, None chooses one for which
    E of a chunk and the chunk's own (rows, D) scratch both stay within CHUNK_BYTES (the scratch
    within four times that, as it is touched once per GEMM and not once per elementwise pass).
    cache_bytes: at most this much E is kept, in whole chunks.
    """
    if chunk_size is None:
        budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES_GPU)
        fit = min(budget // (exp_bytes * max(n_tokens, 1)), 4 * budget // (4 * hidden_size))
        chunk_size = max(fit // MIN_CHUNK * MIN_CHUNK, MIN_CHUNK)
    chunk = min(chunk_size, vocab)
    per_chunk = exp_bytes * max(n_tokens, 1) * chunk
    return Plan(vocab, chunk, min(cache_bytes // per_chunk, -(-vocab // chunk)))
