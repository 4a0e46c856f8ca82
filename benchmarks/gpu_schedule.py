"""The schedule of the Triton backend as launches with their operations and bytes, and the memory that it needs.

Chunks, cache and the ways that a call goes are those that the package would choose: plan.py and configs.py are asked,
not copied. A test runs the backend and compares its launches with these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch

from asft_kernels.backends.plan import Plan, default_cache_bytes, make_plan, weight_slice
from asft_kernels.kernels.configs import LABEL_TILES, WHOLE, Strips, Tile, forms
from asft_kernels.kernels.label_rows import PROGRAMS
from benchmarks.cases import FROZEN, NO_GRADIENT, TRAINABLE

BF16 = 2  # bytes of an element of H, W, E' and the gradients; sums and O are fp32
SECTOR = 32  # bytes that are moved for one element of a gathered column


@dataclass(frozen=True)
class Call:
    """N tokens of as many positions, V x D head, bf16. work: gradients wanted; cache_bytes: as in the public call.

    form: how dW is rounded; the package's default for N where it is None. multiprocessors: 0 cuts by bytes alone.
    distinct: share of the tokens whose label is no other token's, too: 1 at most, and about that for random labels.
    chunk_size: as in the public call.
    """

    N: int
    V: int
    D: int
    work: str
    cache_bytes: int = default_cache_bytes("cuda")
    form: str | None = None
    multiprocessors: int = 132
    distinct: float = 1.0
    chunk_size: int | None = None

    @cached_property
    def plan(self) -> Plan:
        return make_plan(
            self.N, self.V, self.D, exp_bytes=BF16, chunk_size=self.chunk_size, cache_bytes=self.cache_bytes,
            device_type="cuda", multiprocessors=self.multiprocessors if self.chunk_size is None else 0,
        )  # fmt: skip

    @property
    def whole(self) -> bool:
        return (self.form or forms(torch.bfloat16, self.N)[0]) == WHOLE

    @property
    def products(self) -> int:
        """Those that the gradients need: 1, 2 or 3."""
        return (NO_GRADIENT, FROZEN, TRAINABLE).index(self.work) + 1


@dataclass(frozen=True)
class Step:
    """One launch. engine: who multiplies, "triton" or "library". programs: those that read two numbers and return.

    tiles: of 128 x 256 results, which the chip's multiprocessors take in turns; 0 where a launch is no product.
    """

    phase: int
    name: str
    flops: float = 0.0
    bytes: float = 0.0
    programs: int = 0
    engine: str = "library"
    tiles: int = 0


def product(phase: int, rows: int, columns: int, terms: int, moved: float) -> Step:
    """(rows, columns) of sums of so many terms, by the library."""
    tiles = ceil(rows / 128) * ceil(columns / 256)
    return Step(phase, "product", 2 * rows * columns * terms, moved, tiles=tiles)


def schedule(call: Call, tile: Tile | Strips) -> Iterator[Step]:
    """Both phases of asft_kernels/backends/triton_fused.py, launch by launch, for a head without bias or softcap."""
    N, D, V, plan = call.N, call.D, call.V, call.plan
    hidden, acc = BF16 * N * D, 4 * N * D
    wants_acc, wants_exps = call.work != NO_GRADIENT, call.work == TRAINABLE  # a trainable head trains with its body
    tile_width = tile.BLOCK_V

    def exponentials(phase: int, width: int, *, sums: bool) -> Iterator[Step]:
        stored = wants_acc * BF16 * N * width + sums * 8 * N * ceil(width / tile_width)
        if isinstance(tile, Strips):
            step = tile.rows(N, width)
            for start in range(0, width, step):
                rows = min(step, width - start)
                yield product(phase, N, rows, D, hidden + BF16 * rows * D + 4 * N * rows)
                yield Step(phase, "exps_of_logits", bytes=4 * N * rows + stored * rows / width)
            return
        groups = ceil(ceil(N / tile.BLOCK_M) / tile.GROUP)  # each reads the chunk of W once
        yield Step(
            phase, "logits_exp", 2 * N * width * D, hidden + groups * BF16 * width * D + stored, engine="triton",
            tiles=ceil(N / tile.BLOCK_M) * ceil(width / tile.BLOCK_V),
        )  # fmt: skip

    yield Step(1, "label_logits", bytes=2 * hidden)
    for k, (start, stop) in enumerate(plan.slices):
        width = stop - start
        yield from exponentials(1, width, sums=True)
        yield Step(1, "settle", bytes=2 * 8 * N * ceil(width / tile_width))
        if wants_acc:
            yield product(1, N, D, width, BF16 * N * width + BF16 * width * D + (acc if k == 0 else 2 * acc))
    if wants_exps:
        for _ in plan.slices[: min(plan.cached, len(plan.slices) - 1)]:
            yield Step(1, "resettle", bytes=8 * N)
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
    labels = min(call.distinct * N, V)
    for k, (start, stop) in enumerate(plan.slices):
        width = stop - start
        if k >= plan.cached:
            yield from exponentials(2, width, sums=False)
        if call.whole:
            yield product(2, width, D, N, BF16 * N * width + hidden + BF16 * width * D)
            here = labels * width / V
            gathered = min(SECTOR * N * here, BF16 * N * width) + BF16 * N * here
            returning = ceil(N / 64) * ceil(min(N, V, width) / 64)
            yield Step(2, "label_columns", bytes=gathered, programs=returning)
            continue
        for first in range(0, width, step):
            rows = min(step, width - first)
            yield product(2, rows, D, N, BF16 * N * rows + hidden + 4 * rows * D)
            yield Step(2, "label_rows", bytes=(hidden + 2 * acc) * rows / V, programs=min(N, PROGRAMS) * ceil(D / 1024))
            yield Step(2, "copy", bytes=(4 + BF16) * rows * D)
    if call.whole:
        BLOCK_L, BLOCK_D, *_ = LABEL_TILES["sm_90"]
        blocks = ceil(labels / BLOCK_L) * ceil(D / BLOCK_D)
        moved = BF16 * N * labels + 2 * hidden + BF16 * labels * D
        tiles = ceil(blocks * BLOCK_L * BLOCK_D / (128 * 256))
        yield Step(2, "label_gradient", 2 * N * labels * D, moved, engine="triton", tiles=tiles)


def extra_bytes(call: Call, tile: Tile | Strips | None = None) -> int:
    """Peak of what is allocated besides the inputs, the gradients returned included. Descriptors and Strips read the
    tokens' rows side by side, Strips need room of theirs; None: neither."""
    N, D, V, plan = call.N, call.D, call.V, call.plan
    vectors = 64 * N  # references, sums, factors, labels in order
    chunk = BF16 * N * plan.chunk
    tile_sums = 8 * N * ceil(plan.chunk / 128)  # no tile that is tabled for bf16 is narrower without a softcap
    room = 0 if tile is None or (isinstance(tile, Tile) and not tile.descriptors) else BF16 * N * D
    if isinstance(tile, Strips):
        tile_sums = 8 * N * ceil(plan.chunk / tile.BLOCK_V)
        room += 4 * N * tile.rows(N, plan.chunk)
    during = tile_sums + room
    if call.work == NO_GRADIENT:
        return vectors + during
    acc, grad_hidden = 4 * N * D, BF16 * N * D
    if call.work == FROZEN:
        return vectors + max(acc + chunk + during, acc + grad_hidden)
    cached = BF16 * N * sum(stop - start for start, stop in plan.slices[: plan.cached])
    workspace = chunk if plan.cached < len(plan.slices) else 0
    scaled = BF16 * N * D
    rounding = BF16 * N * min(N, V) if call.whole else 4 * weight_slice(plan.chunk, D) * D
    grads = grad_hidden + BF16 * V * D
    again = room if plan.cached < len(plan.slices) else 0
    return vectors + cached + workspace + acc + max(during, grads + scaled + rounding + again)
