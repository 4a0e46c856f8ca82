"""How the vocabulary is cut into chunks, and how many of them keep their exponentials. Integers only."""

from dataclasses import dataclass

GIB = 2**30
DEFAULT_CACHE_BYTES = GIB  # a constant, never "what happens to be free": results must repeat
CHUNK_BYTES = {"cpu": 8 * 2**20}  # measured: larger fresh buffers cost page faults, smaller ones GEMM speed
CHUNK_BYTES_GPU = 256 * 2**20
MIN_CHUNK = 64
TYPICAL_TOKENS = {"cpu": 1024}  # stands for N where a trace must not depend on it
TYPICAL_TOKENS_GPU = 8192


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

    exp_bytes: bytes of one stored exponential. chunk_size: the caller's, None chooses one. cache_bytes:
    at most this much E is kept, in whole chunks.
    """
    if chunk_size is None:
        chunk_size = default_chunk(n_tokens, hidden_size, exp_bytes=exp_bytes, device_type=device_type)
    chunk = min(chunk_size, vocab)
    per_chunk = exp_bytes * max(n_tokens, 1) * chunk
    # By comparisons, not by a division: torch.compile then guards on an inequality and not on n_tokens itself.
    cached = sum(kept * per_chunk <= cache_bytes for kept in range(1, -(-vocab // chunk) + 1))
    return Plan(vocab, chunk, cached)


def default_chunk(n_tokens: int, hidden_size: int, *, exp_bytes: int, device_type: str) -> int:
    """Vocabulary rows for which a chunk's E stays within CHUNK_BYTES and its fp32 (rows, D) scratch within twice that.

    Never below MIN_CHUNK: from N = CHUNK_BYTES / (4 * MIN_CHUNK) on (32,768 on a CPU) a chunk grows with N.
    """
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES_GPU)
    fit = min(budget // (exp_bytes * max(n_tokens, 1)), 2 * budget // (4 * hidden_size))
    return max(fit // MIN_CHUNK * MIN_CHUNK, MIN_CHUNK)


def traced_chunk(hidden_size: int, *, exp_bytes: int, device_type: str) -> int:
    """A chunk that does not depend on the number of tokens, which torch.compile may hold open."""
    typical = TYPICAL_TOKENS.get(device_type, TYPICAL_TOKENS_GPU)
    return default_chunk(typical, hidden_size, exp_bytes=exp_bytes, device_type=device_type)
