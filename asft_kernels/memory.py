"""What a call of the primitive takes beside its inputs: bytes by term at each of its moments, and matrix products.

    moment             torch (backends/torch_chunked.py)            triton (backends/triton_fused.py)
    forward, labels    label rows of a block of tokens              label rows, unless the head is a plain tensor
    forward, chunks    exponentials of a chunk, upcast rows of W    the same, sums of tiles or strips of logits
    backward, hidden   label rows of all tokens, dH                 dH
    backward, head     dW, H with its factor, a chunk               dW and its rounding, H with its factor, a chunk

What is freed within a moment counts where it is largest. Sizes are what an allocator is asked for: chunks and cache
are those of plan.py and configs.py, which the backends ask, too. Gradients count as if one came to every figure that
may have one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from asft_kernels.backends import exp_columns, exp_dtype
from asft_kernels.backends.head_rows import FOUR_BITS
from asft_kernels.backends.plan import Plan, make_plan, token_blocks, weight_slice
from asft_kernels.backends.token_stats import Wanted
from asft_kernels.errors import SHORTAGE, is_out_of_memory
from asft_kernels.kernels.configs import STRIPS, WHOLE, Strips, Tile, multiprocessors

Terms = dict[str, int]

ACC, FIGURES = "accumulators of dH", "accumulators of figures"
EXPS, WORKSPACE = "cached exponentials", "chunk of exponentials"
ROWS, SCALED = "rows of hidden", "rows of hidden, scaled"
LABELS, UPCAST, SCALES = "rows of labels", "upcast rows of the head", "scales of the codes"
STRIP, TILES, OPERANDS = "strips of logits", "sums of tiles", "operands in fp32"
GRAD_HIDDEN, GRAD_HEAD, GRAD_LOW_RANK = "gradient of hidden", "gradient of the head", "gradient of the adapter"
ROUNDING = "rounding of the head's gradient"
VECTORS = "numbers of each token"

_BATCH = "fewer tokens a call: a smaller batch, shorter answers"
ADVICE = dict.fromkeys(
    (ACC, FIGURES, ROWS, SCALED, LABELS, STRIP, GRAD_HIDDEN, VECTORS), _BATCH + " (gradient accumulation)"
) | {
    EXPS: "a smaller cache_bytes; what is not kept is recomputed, at one more product at most",
    **dict.fromkeys((WORKSPACE, UPCAST, TILES, OPERANDS), "a smaller chunk_size"),
    SCALES: "a head that is not quantised",
    GRAD_HEAD: "a frozen head (requires_grad_(False)), or LoRA on it",
    GRAD_LOW_RANK: "a smaller rank of the head's adapter, or none on it",
    ROUNDING: _BATCH,
}


@dataclass(frozen=True)
class Sizes:
    """One call of the primitive, in sizes: tensors as they go into it (asft_kernels/linear_logps.py)."""

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

    @cached_property
    def plan(self) -> Plan:
        recomputes = self.wanted.recomputes(1.0 if self.softcap else None)
        return make_plan(
            self.tokens, self.vocab, self.width, exp_bytes=self.exp_bytes, chunk_size=self.chunk_size,
            cache_bytes=0 if recomputes else self.cache_bytes, device_type=self.device.type,
            multiprocessors=multiprocessors(self.device) if self.chunk_size is None else 0,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """D + r."""
        return self.columns + self.low_rank

    @property
    def exp_bytes(self) -> int:
        return exp_dtype(self.backend, self.dtype).itemsize

    @property
    def is_plain(self) -> bool:
        return not self.low_rank and not self.codes

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
        """Bytes on the way from codes to rows of W; taken: rows here and there, which are copied first."""
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


def moments(sizes: Sizes) -> dict[str, Terms]:
    """Bytes by term at each moment of both phases, in order; a call without gradients has no backward."""
    found = (_torch if sizes.backend == "torch" else _triton)(sizes)
    return {name: {term: size for term, size in terms.items() if size} for name, terms in found.items()}


def largest(found: dict[str, Terms]) -> tuple[str, Terms]:
    """The moment that takes most, and its terms."""
    return max(found.items(), key=lambda moment: sum(moment[1].values()))


def operations(sizes: Sizes) -> dict[str, int]:
    """Floating-point operations of the large products, by kind."""
    product = 2 * sizes.tokens * sizes.width
    whole, of_figures = product * sizes.vocab, sizes.wanted.differentiable if sizes.needs_hidden else ()
    per_column = 2 * sizes.tokens * sizes.vocab
    found = {
        "logits": whole,
        "logits, recomputed": product * (sizes.vocab - sizes.cached) * sizes.needs_exps,
        "gradient of hidden": whole * sizes.needs_hidden,
        "gradient of the head": per_column * sizes.columns * sizes.needs_weight,
        "gradient of the adapter": per_column * sizes.low_rank * sizes.needs_low_rank,
        "gradient of entropy": whole * ("entropy" in of_figures),
        "gradient of mean_logits": whole * (sizes.softcap and "mean_logits" in of_figures),
    }
    return {kind: operations for kind, operations in found.items() if operations}


def _saved(s: Sizes, element: int) -> Terms:
    """What phase 1 keeps for phase 2, in numbers of so many bytes."""
    widths = [stop - start for start, stop in s.plan.slices[: s.plan.cached]] if s.needs_exps else []
    logs = s.needs_hidden and "entropy" in s.wanted.differentiable
    slopes = s.needs_hidden and "mean_logits" in s.wanted.differentiable
    return {
        ACC: element * s.tokens * s.width * s.needs_hidden,
        FIGURES: element * s.width * (s.tokens * logs + (s.tokens if s.softcap else 1) * slopes),
        EXPS: s.exps(widths),
        SCALES: s.scales,
        # Rows and labels as int64; four numbers for phase 2, and figures.
        VECTORS: s.tokens * (16 + element * (4 + len(s.wanted.names))),
    }


def _grads(s: Sizes) -> Terms:
    hidden = s.positions * s.width * s.dtype.itemsize * s.needs_hidden
    weight = s.vocab * s.columns * s.weight_bytes * s.needs_weight + s.vocab * s.dtype.itemsize * s.needs_bias
    low_rank = s.vocab * s.low_rank * s.low_rank_dtype.itemsize * s.needs_low_rank
    return {GRAD_HIDDEN: hidden, GRAD_HEAD: weight, GRAD_LOW_RANK: low_rank}


def _torch(s: Sizes) -> dict[str, Terms]:
    element, N, D, chunk = s.exp_bytes, s.tokens, s.width, s.plan.chunk
    block = max(b.stop - b.start for b in token_blocks(N, s.device.type))
    as_it_is = s.is_plain and s.weight_bytes == element
    all_kept = s.needs_exps and s.plan.cached == len(s.plan.slices)
    saved = _saved(s, element)
    rows, upcast = element * N * D, 0 if as_it_is else element * chunk * D
    of_block = element * block * chunk
    scratch = not s.wanted.names.isdisjoint(("entropy", "log_sum_sq_probs"))

    def labels(n: int) -> Terms:
        """The rows, and what makes them."""
        converting = 0 if as_it_is else s.dequantising(n, taken=True)
        return {LABELS: element * n * D + converting}

    logits = {  # buffers of phase 1
        **saved,
        ROWS: rows,
        WORKSPACE: of_block * ((not all_kept) + s.softcap + scratch),
        UPCAST: upcast,
    }
    dot = element * block * D
    found = {
        "forward, labels": logits | {LABELS: max(labels(block)[LABELS], 2 * dot)},
        "forward, chunks": logits
        | {
            UPCAST: upcast + (s.dequantising(chunk, taken=False) if s.codes else 0),
            # Sums of some chunks at a time, and places of labels.
            VECTORS: saved[VECTORS] + block * (element * min(len(s.plan.slices), 16) + 16),
        },
    }
    grads = _grads(s)
    if s.needs_hidden:
        rounded = N * D * s.dtype.itemsize * (s.dtype.itemsize != element)
        found["backward, hidden"] = {
            **saved,
            ROWS: rows,
            LABELS: max(labels(N)[LABELS], element * N * D + rounded),
            GRAD_HIDDEN: grads[GRAD_HIDDEN],
        }
    if s.needs_exps:
        kept = 0 if s.weighs else s.plan.cached
        scaled = (s.needs_weight or s.needs_low_rank) and not s.weighs
        recomputed = element * N * chunk * (kept < len(s.plan.slices))
        passes = s.softcap + (s.weighs and "entropy" in s.wanted.differentiable)  # chunks of a block of tokens
        passes += s.needs_bias and not s.weighs
        found["backward, head"] = {
            **saved,
            ROWS: rows,
            **grads,
            SCALED: rows * scaled,
            WORKSPACE: recomputed + of_block * passes + element * chunk * s.low_rank * s.needs_low_rank,
            UPCAST: upcast + (s.dequantising(chunk, taken=False) if s.codes and kept < len(s.plan.slices) else 0),
            VECTORS: saved[VECTORS] + N * (40 + 6 * element),  # places of labels, factors
        }
    return found


def _triton(s: Sizes) -> dict[str, Terms]:
    N, D, chunk, chunks = s.tokens, s.width, s.plan.chunk, len(s.plan.slices)
    low = s.dtype.itemsize if s.dtype.itemsize < 4 else 0
    saved, grads = _saved(s, 4), _grads(s)
    tile, whole = tile_and_form(s)
    weighed_acc = 4 * N * D * (s.weighs and s.needs_hidden)
    gathered, buffer, assembling, taking = 0, 0, 0, 0
    if not s.is_plain:
        gathered, buffer = s.dtype.itemsize * N * D, s.dtype.itemsize * chunk * D
        assembling, taking = s.dequantising(chunk, taken=False), s.dequantising(N, taken=True)

    summed = s.wanted.names - {"lse"}
    made = STRIPS[0] if summed else tile
    of_figures = s.wanted.differentiable if s.needs_hidden else frozenset()
    figures = ("entropy" in of_figures) + (s.softcap and "mean_logits" in of_figures)
    on_gpu, same = s.device.type == "cuda", s.exp_bytes == s.dtype.itemsize
    upcast = 4 * chunk * D * bool(low) + 4 * N * chunk * (s.exp_bytes < 4)
    by_library = 4 * D * (N + made.rows(N, chunk)) * bool(low) if isinstance(made, Strips) else 0
    operands = upcast * s.needs_hidden * (not (on_gpu and same)), by_library * (not on_gpu)
    found = {
        "forward, labels": {**saved, EXPS: 0, LABELS: gathered + taking},
        "forward, chunks": {
            **saved,
            **_strip(s, made),
            LABELS: gathered,
            WORKSPACE: s.exps([chunk]) * ((s.needs_hidden and s.cached < s.vocab) + figures),
            UPCAST: buffer + assembling,
            TILES: 4 * N * -(-chunk // made.BLOCK_V) * (6 if summed else 2),
            OPERANDS: max(operands[1], operands[0] - _strip(s, made).get(STRIP, 0)),  # a strip is gone by then
            VECTORS: saved[VECTORS] + N * 16,  # references and sums
        },
    }
    if s.needs_hidden:
        found["backward, hidden"] = {
            **saved,
            LABELS: gathered + taking,
            ACC: saved[ACC] + weighed_acc,
            GRAD_HIDDEN: grads[GRAD_HIDDEN],
        }
    if s.needs_exps:
        recomputes = s.plan.cached < chunks
        step = weight_slice(chunk, s.columns)
        columns = s.exp_bytes * N * exp_columns("triton", min(N, s.vocab)) * whole
        slices = 4 * step * s.columns * (s.weight_bytes != 4 and not whole)
        factors = N * (D * (s.needs_weight or s.needs_low_rank) + s.low_rank * s.needs_low_rank)
        width = chunk if whole else step
        upcast = 4 * (N * width + N * s.columns + whole * width * s.columns)
        again = _strip(s, STRIPS[0] if s.weighs else tile) if recomputes else {}
        found["backward, head"] = {
            **saved,
            **again,
            **grads,
            LABELS: gathered,
            ACC: saved[ACC] + weighed_acc,
            SCALED: s.exp_bytes * factors,
            ROUNDING: (columns + slices) * s.needs_weight,
            WORKSPACE: s.exps([chunk]) * (recomputes or s.weighs),
            UPCAST: buffer + assembling * recomputes,
            OPERANDS: max(0, upcast - again.get(STRIP, 0)) * (factors > 0 and s.exp_bytes < 4 and not on_gpu),
            VECTORS: saved[VECTORS] + N * 40,  # factors; labels in order
        }
    return found


def tile_and_form(s: Sizes) -> tuple[Tile | Strips, bool]:
    """What makes a chunk's exponentials, and whether dW is rounded whole. Without a GPU as on an H100."""
    from asft_kernels.kernels.tile_choice import Problem, assume_architecture, best_form, best_tile

    problem = Problem(s.dtype, s.width, s.tokens, s.softcap)
    aligned = s.width % 16 == 0
    there = s.device.type != "cuda" or torch.cuda.is_available()
    with nullcontext() if there else assume_architecture("sm_90"):
        tile = best_tile(s.device, problem, aligned=aligned)
        return tile, best_form(s.device, problem, aligned=aligned) == WHOLE


def _strip(s: Sizes, made: Tile | Strips) -> Terms:
    """Logits that the library makes, and what a library or a descriptor reads: tokens' rows side by side."""
    if isinstance(made, Tile):
        return {ROWS: s.dtype.itemsize * s.tokens * s.width * made.descriptors}
    strip = 4 * s.tokens * exp_columns("triton", made.rows(s.tokens, s.plan.chunk))
    return {ROWS: s.dtype.itemsize * s.tokens * s.width, STRIP: strip}


def shortage(sizes: Sizes, *, phase: str) -> str:
    """What a call that ran out of memory is told: its largest term in that phase ("forward", "backward"), and what
    shrinks it."""
    found = {moment: terms for moment, terms in moments(sizes).items() if moment.startswith(phase)}
    moment, terms = largest(found)
    name, size = max(terms.items(), key=lambda term: term[1])
    return (
        f"{sizes.tokens:,} tokens of {sizes.positions:,} positions, D {sizes.columns:,}, V {sizes.vocab:,}: "
        f"{in_units(sum(terms.values()))} beside the inputs ({moment}), most of it {name}, {in_units(size)}; what "
        f"shrinks it: {ADVICE[name]}"
    )


def in_units(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@contextmanager
def explained(sizes: Callable[[], Sizes], *, phase: str) -> Iterator[None]:
    """Adds to an allocator's error what `shortage` says: the same exception, its own text first, as those who catch it
    by its text (accelerate's find_executable_batch_size) want it."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            error.args = (f"{error}{SHORTAGE}{shortage(sizes(), phase=phase)}",)
        raise
