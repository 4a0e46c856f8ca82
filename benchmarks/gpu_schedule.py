"""The schedule of the Triton backend as launches with their operations and bytes, and the memory that it needs.

Chunks and cache are those that the package would choose: plan.py is asked, not copied. A test runs the backend and
compares its launches with these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from asft_kernels.backends.plan import Plan, default_cache_bytes, make_plan, weight_slice
from asft_kernels.kernels.configs import Tile
from asft_kernels.kernels.label_rows import PROGRAMS
from benchmarks.cases import FROZEN, NO_GRADIENT, TRAINABLE

BF16 = 2  # bytes of an element of H, W, E' and the gradients; sums and O are fp32


@dataclass(frozen=True)
class Call:
    """N tokens of as many positions, V x D head, bf16. work: gradients wanted; cache_bytes: as in the public call."""

    N: int
    V: int
    D: int
    work: str
    cache_bytes: int = default_cache_bytes("cuda")

    @property
    def plan(self) -> Plan:
        return make_plan(
            self.N, self.V, self.D, exp_bytes=BF16, chunk_size=None, cache_bytes=self.cache_bytes, device_type="cuda"
        )  # fmt: skip

    @property
    def products(self) -> int:
        """Those that the gradients need: 1, 2 or 3."""
        return (NO_GRADIENT, FROZEN, TRAINABLE).index(self.work) + 1


@dataclass(frozen=True)
class Step:
    """One launch. engine: who multiplies, "triton" or "library". programs: those that read two numbers and return."""

    phase: int
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    programs: int = 0
    engine: str = "library"


def schedule(call: Call, tile: Tile) -> Iterator[Step]:
    """Both phases of asft_kernels/backends/triton_fused.py, launch by launch, for a head without bias or softcap."""
    N, D, V, plan = call.N, call.D, call.V, call.plan
    hidden, acc = BF16 * N * D, 4 * N * D
    groups = ceil(ceil(N / tile.BLOCK_M) / tile.GROUP)  # each reads the chunk of W once
    wants_acc, wants_exps = call.work != NO_GRADIENT, call.work == TRAINABLE  # a trainable head trains with its body

    def exponentials(phase: int, width: int, *, sums: bool) -> Step:
        moved = hidden + groups * BF16 * width * D + wants_acc * BF16 * N * width
        moved += sums * 8 * N * ceil(width / tile.BLOCK_V)
        return Step(phase, "logits_exp", 2 * N * width * D, moved, engine="triton")

    yield Step(1, "label_logits", bytes=2 * hidden)
    for k, (start, stop) in enumerate(plan.slices):
        width = stop - start
        yield exponentials(1, width, sums=True)
        yield Step(1, "merge_statistics", bytes=8 * N * ceil(width / tile.BLOCK_V))
        if wants_acc:
            yield Step(1, "fixup", programs=ceil(N / 32) * ceil(width / 128))
            if k > 0:
                yield Step(1, "fixup", programs=ceil(N / 32) * ceil(D / 128))
            moved = BF16 * N * width + BF16 * width * D + (acc if k == 0 else 2 * acc)
            yield Step(1, "product", 2 * N * width * D, moved)
    if wants_exps:
        for start, stop in plan.slices[: plan.cached]:
            yield Step(1, "fixup", programs=ceil(N / 32) * ceil((stop - start) / 128))
    yield Step(1, "close_statistics", bytes=24 * N)
    if not wants_acc:
        return

    yield Step(2, "row_factors", bytes=20 * N)
    yield Step(2, "grad_hidden", bytes=acc + 3 * hidden)  # zeros first, then rows
    if not wants_exps:
        return
    yield Step(2, "scaled_hidden", bytes=2 * hidden)
    yield Step(2, "sort", bytes=64 * N)
    step = weight_slice(plan.chunk, D)
    for k, (start, stop) in enumerate(plan.slices):
        width = stop - start
        if k >= plan.cached:
            yield exponentials(2, width, sums=False)
        for first in range(0, width, step):
            rows = min(step, width - first)
            yield Step(2, "product", 2 * N * rows * D, BF16 * N * rows + hidden + 4 * rows * D)
            yield Step(2, "label_rows", bytes=(hidden + 2 * acc) * rows / V, programs=min(N, PROGRAMS) * ceil(D / 1024))
            yield Step(2, "copy", bytes=(4 + BF16) * rows * D)


def extra_bytes(call: Call) -> int:
    """Peak of what is allocated besides the inputs, the gradients returned included."""
    N, D, V, plan = call.N, call.D, call.V, call.plan
    vectors = 64 * N  # references, sums, factors, labels in order
    chunk = BF16 * N * plan.chunk
    tile_sums = 8 * N * ceil(plan.chunk / 128)  # no tile that is tabled for bf16 is narrower without a softcap
    if call.work == NO_GRADIENT:
        return vectors + tile_sums
    acc, grad_hidden = 4 * N * D, BF16 * N * D
    if call.work == FROZEN:
        return vectors + max(acc + chunk + tile_sums, acc + grad_hidden)
    cached = BF16 * N * sum(stop - start for start, stop in plan.slices[: plan.cached])
    workspace = chunk if plan.cached < len(plan.slices) else 0
    scaled, scratch = BF16 * N * D, 4 * weight_slice(plan.chunk, D) * D
    grads = grad_hidden + BF16 * V * D
    return vectors + cached + workspace + acc + max(tile_sums, grads + scaled + scratch)
