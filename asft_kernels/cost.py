"""What a call will take, before it runs: bytes by term at each moment, and products (memory.py has the terms)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asft_kernels.backends import choose_backend, exp_dtype
from asft_kernels.backends.head_rows import EIGHT_BITS, FOUR_BITS, HeadRows, codes_text
from asft_kernels.backends.plan import default_cache_bytes
from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES, Wanted
from asft_kernels.core import checks
from asft_kernels.core.heads import ALIGNED, ResolvedHead
from asft_kernels.core.options import Options
from asft_kernels.kernels.configs import Tile
from asft_kernels.memory import Sizes, in_units, largest, moments, operations
from asft_kernels.memory.terms import ADVICE, GRAD_LOW_RANK, Terms
from asft_kernels.memory.triton_moments import tile_and_form

COPY, GATHERED, ADAPTER = "copies of hidden", "gathered head", "columns of the adapter"
FURTHER_ADVICE = {
    COPY: "a head (or adapter) in hidden's dtype, or fewer positions a call: a smaller batch",
    GATHERED: "a head that stays sharded over the vocabulary",
    ADAPTER: ADVICE[GRAD_LOW_RANK],
}
KINDS = {4: FOUR_BITS, 8: EIGHT_BITS}
SHARDINGS = ("gathered", "streamed", "vocabulary")
BLOCK = 64  # entries that share a scale, bitsandbytes' own default


@dataclass(frozen=True)
class Estimate:
    """What `estimate` says of one call: str() is a table.

    Attributes:
        moments: For each moment of a call in order ("forward, labels", "forward, chunks", "backward, labels",
            "backward, hidden", "backward, head", "backward, adapter"; those that the call has), bytes by term, beside
            the inputs.
        operations: Floating-point operations of the products with the head, by kind.
        product: Those of one product, 2 N V D.
        chunk: Vocabulary rows that are worked on at a time.
        chunks: How many such there are.
        cached: Chunks whose exponentials are kept for the head's gradient.
        what: The call in words.
    """

    moments: dict[str, Terms]
    operations: dict[str, int]
    product: int
    chunk: int
    chunks: int
    cached: int
    what: str

    @property
    def peak(self) -> int:
        """Bytes at the moment that takes most: beside the inputs, gradients included."""
        return sum(self.terms.values())

    @property
    def terms(self) -> Terms:
        """Bytes by term at that moment."""
        return largest(self.moments)[1]

    @property
    def products(self) -> dict[str, float]:
        """Matrix products by kind, in units of N V D; docs/cost.md counts them."""
        return {kind: operations / self.product for kind, operations in self.operations.items()}

    @property
    def advice(self) -> str:
        """The largest term at that moment, and what shrinks it."""
        name, size = max(self.terms.items(), key=lambda term: term[1])
        return f"most of it {name}, {in_units(size)}; what shrinks it: {(ADVICE | FURTHER_ADVICE)[name]}"

    def __str__(self) -> str:
        of_cache = f", {self.cached} of them cached" if self.cached else ""
        lines = [f"{self.what}; {self.chunks} chunks of {self.chunk:,} vocabulary rows{of_cache}"]
        counts = {**self.products, "together": sum(self.products.values())}
        lines += ["", "products of N x V x D", *(f"{kind:<32}{count:>17.2f}" for kind, count in counts.items())]
        names = list(dict.fromkeys(term for terms in self.moments.values() for term in terms))
        table = [("MiB", *self.moments)]
        table += [
            (name, *(f"{terms[name] / 2**20:.1f}" if name in terms else "" for terms in self.moments.values()))
            for name in names
        ]
        table.append(("together", *(f"{sum(terms.values()) / 2**20:.1f}" for terms in self.moments.values())))
        lines += ["", *((f"{name:<32}" + "".join(f"{cell:>18}" for cell in cells)).rstrip() for name, *cells in table)]
        return "\n".join([*lines, "", f"at most {in_units(self.peak)} ({largest(self.moments)[0]}), {self.advice}"])


def estimate(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    positions: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    hidden_grad: bool = True,
    head_grad: bool = False,
    head_dtype: torch.dtype | None = None,
    bits: int | None = None,
    lora_rank: int = 0,
    lora_dtype: torch.dtype = torch.float32,
    bias: bool = False,
    ranks: int = 1,
    sharding: str = "gathered",
    return_stats: bool | list[str] = False,
    differentiable: tuple[str, ...] | list[str] = ("lse",),
    softcap: float | None = None,
    backend: str | None = None,
    cache_bytes: int | None = None,
    chunk_size: int | None = None,
) -> Estimate:
    """Computes what a call takes beside its inputs, from the sizes that its backend would choose: nothing is run.

    Memory is what torch's allocator is asked for, on each rank; measured on a CPU it is within 10 % (tests). On a GPU
    chunks and tiles are those of the one that is here, and of an H100 where there is none. Not counted: what a loss
    makes of N log-probabilities, DoRA, dropout in the adapter, copies that autocast, num_valid or gloo make.

    Args:
        tokens: N, labels that carry loss.
        hidden_size: D.
        vocab_size: V.
        positions: M, rows of hidden states, from N on; None (default): N.
        dtype: Of the hidden states; default float32.
        device: "cpu" (default), "cuda" or another torch device but MPS, which need not be there.
        hidden_grad: Whether the hidden states get a gradient; default True.
        head_grad: Whether the head does (with lora_rank its adapter alone); default False: a frozen head.
        head_dtype: Of the head; None (default): dtype. float32 over 16 bits is the one other choice.
        bits: 4 or 8 for a head quantised by bitsandbytes; None (default): not quantised.
        lora_rank: Rank of the head's LoRA; 0 (default): none.
        lora_dtype: Of its matrices; default float32, as PEFT makes them.
        bias: Whether the head has a bias; default False.
        ranks: Ranks that the head's rows are sharded over; default 1.
        sharding: "gathered" (default): each rank gathers the whole head for the call, as with FSDP. "streamed": each
            reads it chunk by chunk (`ShardedLinear`). "vocabulary": each works on its V / ranks rows.
        return_stats: As in `fused_linear_logps`.
        differentiable: As in `fused_linear_logps`; counted as if a gradient came to each.
        softcap, backend, cache_bytes, chunk_size: As in `fused_linear_logps`.

    Returns:
        An `Estimate`, whose str() is a table.

    Raises:
        ValueError: The argument, what it was, what it must be.

    >>> print(estimate(8192, 4096, 151936, dtype=torch.bfloat16, head_grad=True).advice)
    most of it gradient of the head, 1.16 GiB; what shrinks it: a frozen head (requires_grad_(False)), or LoRA on it
    """
    least = {"tokens": 1, "hidden_size": 1, "vocab_size": 1, "positions": tokens, "lora_rank": 0, "ranks": 1}
    given = {"tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab_size, "lora_rank": lora_rank}
    for name, value in (given | {"ranks": ranks, "positions": tokens if positions is None else positions}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
            checks.refuse(name, repr(value), f"an integer >= {least[name]}")
    for name, value in {"dtype": dtype, "head_dtype": head_dtype or dtype, "lora_dtype": lora_dtype}.items():
        if value not in checks.FLOATING:
            checks.refuse(name, repr(value), f"one of {', '.join(map(str, checks.FLOATING))}")
    if head_dtype not in (None, dtype, torch.float32) or (head_dtype and dtype == torch.float64 != head_dtype):
        checks.refuse("head_dtype", head_dtype, f"{dtype}, as hidden, or float32 over 16 bits; cast one of them")
    if bits not in (None, *KINDS):
        checks.refuse("bits", repr(bits), "4, 8 or None for a head that is not quantised")
    if bits and head_grad and not lora_rank:
        checks.refuse("head_grad", "True with a quantised head", "a lora_rank: codes get no gradient")
    if bits == 4 and hidden_size % 2:
        checks.refuse("hidden_size", f"{hidden_size} with 4 bits", "an even number: a byte holds two entries")
    if sharding not in SHARDINGS:
        checks.refuse("sharding", repr(sharding), f"one of {', '.join(map(repr, SHARDINGS))}")
    if bits and sharding == "streamed":
        checks.refuse("sharding", "'streamed' with a quantised head", "'gathered': codes are not streamed")
    try:
        place = torch.device(device)
    except RuntimeError:
        checks.refuse("device", repr(device), "a device of torch's, such as 'cpu' or 'cuda'")
    if place.type == "mps":
        checks.refuse("device", repr(device), "a device with float64, in which sequences are summed: 'cpu' or 'cuda'")
    options = Options(softcap=softcap, backend=backend, cache_bytes=cache_bytes, chunk_size=chunk_size)
    names, grads = checks.stat_names(return_stats, differentiable, NAMES, DIFFERENTIABLE)

    def made(*shape: int, of: torch.dtype, grad: bool) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta", requires_grad=grad)

    V = -(-vocab_size // ranks) if sharding == "vocabulary" else vocab_size
    weight = made(V, hidden_size, of=head_dtype or dtype, grad=head_grad and not lora_rank)
    rows = HeadRows(weight)
    if bits:
        columns = hidden_size // 2 if bits == 4 else hidden_size
        codes = codes_text(KINDS[bits], BLOCK, dtype if bits == 4 else torch.float32)
        rows = HeadRows(made(V, columns, of=torch.uint8, grad=False), None, codes)
    if lora_rank:
        rows = rows._replace(low_rank=made(V, lora_rank, of=lora_dtype, grad=head_grad))
    of_bias = made(V, of=dtype, grad=head_grad and not lora_rank) if bias else None
    return of_head(
        ResolvedHead(rows, of_bias), tokens, positions or tokens, dtype, place, options,
        hidden_grad=hidden_grad, wanted=Wanted(names, grads), gathered=ranks > 1 and sharding == "gathered",
        streamed=ranks if sharding == "streamed" else 1,
    )  # fmt: skip


def of_head(
    head: ResolvedHead, tokens: int, positions: int, dtype: torch.dtype, device: torch.device, options: Options, *,
    hidden_grad: bool, wanted: Wanted | None = None, gathered: bool = False, streamed: int = 1,
) -> Estimate:  # fmt: skip
    """The same for a head that is there, or on the meta device: what of it asks for a gradient gets one.

    streamed: ranks that its rows are streamed from.
    """
    rows, bias = head.rows, head.bias
    widened = not rows.codes and rows.weight.dtype == torch.float32 and dtype.itemsize < 4
    product_dtype = torch.float32 if widened else dtype
    low_rank = rows.low_rank
    rank = 0 if low_rank is None else low_rank.shape[1]
    adapts = low_rank is not None and low_rank.requires_grad
    sizes = Sizes(
        tokens, positions, rows.size[0], rows.columns, product_dtype, choose_backend(options.backend, device, dtype),
        device, default_cache_bytes(device.type) if options.cache_bytes is None else options.cache_bytes,
        chunk_size=options.chunk_size, low_rank=rank + -rank % ALIGNED, weight_dtype=rows.weight.dtype,
        low_rank_dtype=torch.float32 if low_rank is None else low_rank.dtype, codes=rows.codes, bias=bias is not None,
        softcap=options.softcap is not None, needs_hidden=hidden_grad or adapts, needs_weight=rows.weight.requires_grad,
        needs_low_rank=adapts,
        needs_bias=bias is not None and bias.requires_grad, wanted=wanted or Wanted(), ranks=streamed,
        row_major=rows.weight.stride(1) == 1,
    )  # fmt: skip
    found, by = moments(sizes), sizes.backend
    if by == "triton":
        tile, whole_form = tile_and_form(sizes)
        if isinstance(tile, Tile) and not tile.in_one_loop(exp_dtype("triton", product_dtype), bias is not None):
            tile = replace(tile, one_loop=False, why="one loop where nothing is stored") if tile.one_loop else tile
        of_head_gradient = f", dW rounded {'whole' if whole_form else 'in slices'}" if sizes.needs_weight else ""
        by = f"triton by {tile} ({tile.why}){of_head_gradient}"
    M, D, item = positions, sizes.columns, product_dtype.itemsize
    whole = {GATHERED: rows.weight.numel() * rows.weight.itemsize * gathered}
    around = {moment: dict(whole) for moment in found}
    if widened:
        around = {moment: terms | {COPY: M * D * item} for moment, terms in around.items()}
    if low_rank is not None:
        columns = sizes.vocab * sizes.low_rank * low_rank.dtype.itemsize
        cast = low_rank.dtype.itemsize if low_rank.dtype != dtype else 0  # kept for its gradient
        kept = M * sizes.width * item + M * D * cast * adapts + widened * M * D * item
        for moment, terms in around.items():
            terms |= {COPY: kept, ADAPTER: columns * (2 if moment.startswith("forward") else 1)}
        if sizes.needs_hidden:  # what it multiplied and the gradient of that; then both gradients' sum
            ends = found[list(found)[-1]]
            around["backward, adapter"] = whole | {COPY: 2 * M * D * max(cast, item)}
            found["backward, adapter"] = {k: v for k, v in ends.items() if k.startswith("gradient")}
    return Estimate(
        {moment: {k: v for k, v in (terms | around[moment]).items() if v} for moment, terms in found.items()},
        operations(sizes), 2 * tokens * sizes.vocab * sizes.columns, sizes.plan.chunk, len(sizes.plan.slices),
        sizes.plan.cached if sizes.needs_exps else 0,
        f"{tokens:,} tokens of {positions:,} positions, D {sizes.columns:,}, V {sizes.vocab:,}, "
        f"{str(dtype).removeprefix('torch.')}, {device.type}, {by}",
    )  # fmt: skip
