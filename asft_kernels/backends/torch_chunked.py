"""Both phases in ATen calls, in place, on CPU, CUDA or ROCm: the default on CPU, the path for float64.

    stage               formula (one vocabulary chunk of rows k)                  tensor
    label logit         z_y = logit(H[t] . W[y])                                  (N,)
    exponentials        E = exp(z - r), label's own entry 0;  s += sum E          (N, k)
    hidden, unscaled    O += E' W_k,  E' = E * c,  c = (1 - (z/softcap)^2)        (N, D)
    close               total = s + exp(z_y - r);  logp = -softplus(r + log s - z_y)
    label entries       E'[t, y] = -s * c_y                                       cached or recomputed E'
    dH                  scale * g * ((1 - p_y) c_y W[y] - O / total)              (M, D)
    dW_k                -E'^T diag(scale * g / total) H                           (k, D)

r starts at the label's logit and moves up only where a logit passes it by more than MOVE; on a CPU only in
blocks of tokens in which a sum passes ROOM. The label entries make one product give dW whole: softmax and
label parts meet in the accumulator, before the one rounding into the head's dtype. Low-precision heads are
upcast chunk by chunk, so everything between the inputs and the returned tensors is fp32 (fp64 for fp64 input).

On a CPU blocks of tokens go through phase 1 one after another (plan.py says why); phase 2 takes all
tokens of a chunk in one product.

Logits and r are held in units of ln 2 (z log2(e)), but on Intel's processors, where torch's exp is faster than its
exp2 (elsewhere it takes four times as long). The product writes z - r at once, the unit being in its factor and -r its
addend. torch_stats.py sums what figures are wanted beside the log-probabilities.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from asft_kernels.backends import Gradients, Logits, Saved
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan, token_blocks
from asft_kernels.backends.processor import INTEL
from asft_kernels.backends.streaming import StreamedGradient, StreamedRows, reading
from asft_kernels.backends.token_stats import RowFactors, Stats, StatsGrads, Wanted, close, row_factors
from asft_kernels.backends.torch_products import accumulate
from asft_kernels.backends.torch_stats import BlockStats, StatsRoom, Weighing

ROOM = 1e20  # sums of exp(z - r) up to here: O and g / total keep 18 decades to the ends of fp32's range
LOOK = 16  # chunks between looks at the sums
MOVE = 30.0  # nats; exp(30) = 1e13: room for 1e25 such entries in fp32, and 13 digits below the reference


class Unit(NamedTuple):
    """A unit of logits and references."""

    nats: float
    exp: Callable[[Tensor], Tensor]
    exp_: Callable[[Tensor], Tensor]
    log: Callable[..., Tensor]


NAT = Unit(1.0, torch.exp, Tensor.exp_, torch.log)
BIT = Unit(math.log(2.0), torch.exp2, Tensor.exp2_, torch.log2)
UNIT = NAT if INTEL else BIT


def logit_unit() -> float:
    return UNIT.nats


def forward(
    hidden: Tensor,
    weight: HeadRows,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    logits: Logits,
    plan: Plan,
    *,
    needs_acc: bool,
    needs_exps: bool,
    wanted: Wanted | None = None,
) -> Saved:
    H = valid_rows(hidden, rows)
    acc = H.new_empty(H.shape if needs_acc else 0)
    exps = [H.new_empty(len(H), stop - start) for start, stop in plan.slices[: plan.cached if needs_exps else 0]]
    head = _Head(reading(weight, plan), bias, logits, plan, H)
    workspace = H.new_empty(head.block_size * plan.chunk if len(exps) < len(plan.slices) else 0)
    room = None if wanted is None else StatsRoom(wanted, H, head.block_size * plan.chunk, logits, needs_acc=needs_acc)
    blocks = [
        _forward_block(head, H[b], labels[b], acc[b], [E[b] for E in exps], workspace, room, b, needs_acc=needs_acc)
        for b in head.blocks
    ]
    logps, one_minus_p, inv_total, ref, z_y, *figures = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    if room is None:
        return Saved(logps, one_minus_p, inv_total, ref, acc, exps, None, z_y)
    *figures, largest = figures
    stats = Stats._make([*figures, room.log_acc, room.slope_acc])
    return Saved(logps, one_minus_p, inv_total, ref, acc, exps, stats, z_y, largest)


def _forward_block(
    head: "_Head", H: Tensor, labels: Tensor, acc: Tensor, exps: list[Tensor], workspace: Tensor,
    room: StatsRoom | None, tokens: slice, *, needs_acc: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """logps, one_minus_p, inv_total, ref and z_y of a block of tokens; figures wanted beside them, and largest.

    Writes the block's rows of acc, of the cached chunks and of room's accumulators.
    """
    z_y, label_slope = label_logits(H, head.weight, head.bias, labels, head.transform)
    entries = _LabelEntries(labels, head.plan)
    stats = None if room is None else room.block(tokens, z_y, entries)
    block = _Block(H, [*exps, *head.views(workspace, len(H), len(exps))], entries, stats)
    acc_or_none = acc if needs_acc else None
    ref, others = z_y, _exponentials(head, block, z_y, acc_or_none) if head.looks(z_y) else None
    refs = [ref] * len(exps)
    if others is None:
        ref, others, refs = _exponentials_moving(head, block, z_y, acc_or_none)

    total = others + UNIT.exp(z_y - ref)
    x = (ref - z_y + UNIT.log(others)) * UNIT.nats
    logps = -(x.clamp(min=0) + torch.exp(-x.abs()).log1p())  # -softplus(x), exact at both ends
    label_entry = -others if label_slope is None else -others * label_slope
    for k, E in enumerate(exps):
        if refs[k] is not ref:
            E.mul_(UNIT.exp((refs[k] - ref).clamp_(max=0))[:, None])  # as for shrink
        block.label_entries.set(E, k, label_entry)
    one_minus_p, inv_total = others / total, total.reciprocal()
    if room is None or stats is None:
        return logps, one_minus_p, inv_total, ref, z_y
    figures = close(
        room.wanted, stats.sums(ref, total, UNIT.nats), ref=ref * UNIT.nats, log_total=UNIT.log(total) * UNIT.nats,
        one_minus_p=one_minus_p, inv_total=inv_total, logps=logps,
    )  # fmt: skip
    return logps, one_minus_p, inv_total, ref, z_y, *figures, stats.largest(ref)


class _Block(NamedTuple):
    """A block of tokens: H (n, D), a place (n, rows) for each vocabulary chunk's E, where the labels stand, and what
    else is summed of its logits."""

    H: Tensor
    chunks: list[Tensor]
    label_entries: "_LabelEntries"
    stats: BlockStats | None


def _exponentials(head: "_Head", block: _Block, ref: Tensor, acc: Tensor | None) -> Tensor | None:
    """Sums of exp(z - ref) without the label's, (n,); None if one is above ROOM or NaN, and all is to be done again.

    Looks after the first chunk, where most of what is too high shows, and after every LOOK more: between products a
    look costs as much as the sums of a chunk (docs/algorithm.md).
    """
    minus_ref = -ref[:, None]
    others = torch.zeros_like(ref)
    chunks = len(block.chunks)
    sums = ref.new_empty(min(chunks, LOOK), len(ref))
    places = sums.unbind()
    for start, stop in pairwise([0, *range(1, chunks, LOOK), chunks]):
        for k, place in zip(range(start, stop), places, strict=False):
            E = block.chunks[k]
            weight_k, slope = head.logits(block.H, k, minus_ref, out=E)
            if block.stats is not None:
                block.stats.logits(E, k)
            block.label_entries.set(E, k, -torch.inf)
            torch.sum(UNIT.exp_(E), dim=1, out=place)
            if block.stats is not None:
                block.stats.exponentials(E, slope, weight_k, k)
            _accumulate(acc, E, slope, weight_k, k)
        others += sums[: stop - start].sum(dim=0)
        # Only where looking_is_free, so no device waits.
        if len(others) and not others.max().item() <= ROOM:  # nor is NaN
            return None
    return others


def _exponentials_moving(
    head: "_Head", block: _Block, z_y: Tensor, acc: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same for any logits, without a look: (ref, sums, ref at each chunk); ref moves up to a logit far above it."""
    ref = torch.where(z_y == -torch.inf, 0, z_y)
    move = MOVE / UNIT.nats
    limit = torch.where(z_y == -torch.inf, -torch.inf, move)  # how far above ref a logit may be
    others = torch.zeros_like(z_y)
    refs: list[Tensor] = []
    if block.stats is not None:
        block.stats.restart()
    for k, z in enumerate(block.chunks):
        weight_k, slope = head.logits(block.H, k, -ref[:, None], out=z)
        if block.stats is not None:
            block.stats.logits(z, k)
        block.label_entries.set(z, k, -torch.inf)
        highest = z.amax(dim=1)
        moves = highest > limit
        limit = torch.where(moves, move, limit)
        moved = torch.where(moves, ref + highest, ref)
        shrink = UNIT.exp((ref - moved).clamp_(max=0))  # a first finite logit may lie below 0
        z.sub_((moved - ref)[:, None])
        if block.stats is not None:
            block.stats.move(moved - ref, shrink, others, acc if k else None)
        others.mul_(shrink)
        if acc is not None and k:
            acc.mul_(shrink[:, None])
        ref = moved
        others.add_(UNIT.exp_(z).sum(dim=1))
        if block.stats is not None:
            block.stats.exponentials(z, slope, weight_k, k)
        _accumulate(acc, z, slope, weight_k, k)
        refs.append(ref)
    return ref, others, refs


def _accumulate(acc: Tensor | None, E: Tensor, slope: Tensor | None, weight_k: Tensor, k: int) -> None:
    """E becomes E'; acc += E' W_k, and for the first chunk acc = E' W_k."""
    if slope is not None:
        E.mul_(slope)
    if acc is not None:
        accumulate(acc, E, weight_k, k)


def backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: HeadRows,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    saved: Saved,
    logits: Logits,
    plan: Plan,
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_low_rank: bool,
    needs_bias: bool,
    stats_grads: StatsGrads | None = None,
) -> Gradients:
    H = valid_rows(hidden, rows)
    needs_head = needs_weight or needs_low_rank or needs_bias
    source = reading(weight, plan, len(saved.exps) if needs_head else len(plan.slices))
    label_slope = None
    if logits.softcap is not None:
        _, label_slope = label_logits(H, source, bias, labels, logits)
    factors = row_factors(
        grad_logps, stats_grads, logps=saved.logps, one_minus_p=saved.one_minus_p, inv_total=saved.inv_total,
        entropy=None if saved.stats is None else saved.stats.entropy, label_slope=label_slope, scale=logits.scale,
        vocab=plan.vocab,
    )  # fmt: skip
    grad_hidden = None
    if needs_hidden:
        grad_rows = grad_of_rows(source, labels, saved, factors, UNIT.nats)
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        grad_hidden.index_copy_(0, rows, grad_rows.to(hidden.dtype))
        del grad_rows
    if not needs_head:
        return Gradients(grad_hidden)

    streamed = None
    if needs_weight and plan.order is not None:
        streamed, needs_weight = StreamedGradient(weight, plan.order, H.dtype), False
    grad_weight, grad_low_rank = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and needed else None
        for x, needed in ((weight.weight, needs_weight), (weight.low_rank, needs_low_rank))
    )
    grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else None
    rounds = needs_weight and weight.weight.dtype != H.dtype
    head = _Head(source, bias, logits, plan, H)
    if stats_grads is None:  # E's rows have one factor each: it is H's
        weighing, row_factor = None, factors.linear[:, None]
        label_entry = _label_entry(saved, label_slope)
    else:
        scratch = H.new_empty(0 if factors.log is None else head.block_size * plan.chunk)
        weighing, row_factor = Weighing(factors, UNIT, scratch), None
        label_entry = factors.label_entry(label_slope)
    scaled = H * row_factor if (needs_weight or streamed or needs_low_rank) and row_factor is not None else H
    own, further = scaled[:, : weight.columns], scaled[:, weight.columns :]
    kept = 0 if weighing else len(saved.exps)
    workspace = H.new_empty(len(H) * plan.chunk if kept < len(plan.slices) else 0)
    label_entries = _LabelEntries(labels, plan)
    minus_ref = -saved.ref[:, None]
    weight_parts, low_rank_parts, bias_parts = (
        None if grad is None else grad.split(plan.widths) for grad in (grad_weight, grad_low_rank, grad_bias)
    )
    for k, E in enumerate([*saved.exps[:kept], *head.views(workspace, len(H), kept)]):
        if k >= kept:
            for b in head.blocks:
                if k < len(saved.exps) and weighing is not None:
                    weighing.cached(saved.exps[k][b], b, out=E[b])
                    continue
                _, slope = head.logits(H[b], k, minus_ref[b], out=E[b])
                if weighing is not None:
                    weighing.recomputed(E[b], b, slope)
                    continue
                UNIT.exp_(E[b])
                if slope is not None:
                    E[b].mul_(slope)
            label_entries.set(E, k, label_entry)
        if weight_parts is not None:
            # E is done with the chunk's upcast rows: their buffer takes the product.
            product = torch.mm(E.T, own, out=head.upcast[: E.shape[1], : own.shape[1]] if rounds else weight_parts[k])
            if rounds:
                weight_parts[k].copy_(product)  # the one rounding
        elif streamed is not None:
            torch.mm(E.T, own, out=streamed.room(k))
            streamed.send(k)
        if low_rank_parts is not None:
            low_rank_parts[k].copy_(E.T @ further)
        if bias_parts is not None:
            # A sum, not a matrix-vector product: BLAS adds the tokens one by one, sum() pairwise.
            sums = [(E[b] if row_factor is None else E[b] * row_factor[b]).sum(dim=0) for b in head.blocks]
            bias_parts[k].copy_(torch.stack(sums).sum(dim=0))
    if streamed is not None:
        grad_weight = streamed.finish()
    return Gradients(grad_hidden, grad_weight, grad_low_rank, grad_bias)


def grad_of_rows(
    weight: HeadRows | StreamedRows, labels: Tensor, saved: Saved, factors: RowFactors, unit: float
) -> Tensor:
    """dH of the valid tokens, (N, D + r), before it is rounded. unit: nats in 1 of what saved.stats.log_acc holds."""
    grad = _label_rows(weight, labels, saved.acc.dtype).mul_(factors.label[:, None])
    grad.addcmul_(saved.acc, factors.linear[:, None])
    if saved.stats is not None and factors.log is not None:
        grad.addcmul_(saved.stats.log_acc, factors.log[:, None], value=unit)
    if saved.stats is not None and factors.uniform is not None:
        grad.addcmul_(saved.stats.slope_acc, factors.uniform[:, None])
    return grad


def set_label_entries(saved: Saved, labels: Tensor, label_slope: Tensor | None, plan: Plan) -> None:
    """Writes into the kept E' the labels' entries that go with saved.one_minus_p and saved.inv_total."""
    entries = _LabelEntries(labels, plan)
    value = _label_entry(saved, label_slope)
    for k, E in enumerate(saved.exps):
        entries.set(E, k, value)


def _label_entry(saved: Saved, label_slope: Tensor | None) -> Tensor:
    """(N,): times -1 / total it is (1 - p_y) c_y."""
    not_p = saved.one_minus_p if label_slope is None else saved.one_minus_p * label_slope
    return -not_p / saved.inv_total


class _Head:
    """Logits of a block of tokens in one vocabulary chunk, with buffers that live for one phase."""

    def __init__(
        self, weight: HeadRows | StreamedRows, bias: Tensor | None, logits: Logits, plan: Plan, H: Tensor
    ) -> None:
        self.weight, self.bias, self.transform, self.plan = weight, bias, logits, plan
        self.as_it_is = weight.is_plain and weight.weight.dtype == H.dtype
        # Views are made here, all at once: between products each costs several times as much (docs/algorithm.md).
        self.rows = weight.weight.split(plan.chunk) if self.as_it_is else ()
        self.columns = [rows.T for rows in self.rows]
        self.biases = None if bias is None else bias.split(plan.widths)
        # Rows that come from other ranks are read once, by all tokens together.
        self.one_pass = isinstance(weight, StreamedRows)
        self.blocks = [slice(0, len(H))] if self.one_pass else token_blocks(len(H), H.device.type)
        self.block_size = max(b.stop - b.start for b in self.blocks)
        self.slope = H.new_empty(self.block_size * plan.chunk if logits.softcap is not None else 0)
        self.upcast = H.new_empty(0 if self.as_it_is else plan.chunk, H.shape[1])

    def looks(self, x: Tensor) -> bool:
        """Whether sums are looked at on the way, and a second pass made where they are too high."""
        return looking_is_free(x) and not self.one_pass

    def logits(self, H: Tensor, k: int, minus_ref: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """out (n, rows) becomes z - ref; returns (W_k (rows, D), c (n, rows) or None). H (n, D), minus_ref (n, 1)."""
        if self.as_it_is:
            weight_k, columns = self.rows[k], self.columns[k]
        else:
            weight_k = self.weight.chunk(*self.plan.slices[k], out=self.upcast)
            columns = weight_k.T
        factor = _product_factor(self.transform)
        bias_k = None if self.biases is None else self.biases[k].to(out.dtype) * factor
        if self.transform.softcap is None:
            addend = minus_ref if bias_k is None else torch.add(bias_k, minus_ref, out=out)
            torch.addmm(addend, H, columns, alpha=factor, out=out)
            return weight_k, None
        if bias_k is not None:
            out.copy_(bias_k)
        torch.addmm(out, H, columns, beta=bias_k is not None, alpha=factor, out=out)  # beta 0 does not read out
        slope = _cap(out, self.transform.softcap, _view(self.slope, *out.shape))
        out.add_(minus_ref)
        return weight_k, slope

    def views(self, workspace: Tensor, n: int, first: int) -> list[Tensor]:
        """The workspace as (n, rows) of each chunk from first on."""
        rows = [stop - start for start, stop in self.plan.slices[first:]]
        shapes = {width: _view(workspace, n, width) for width in set(rows)}
        return [shapes[width] for width in rows]


def _view(buffer: Tensor, *shape: int) -> Tensor:
    """The beginning of a flat buffer in a shape."""
    return buffer[: math.prod(shape)].view(shape)


def looking_is_free(x: Tensor) -> bool:
    """Whether Python may branch on x's values: on a GPU that would stop the stream (tests set it to False)."""
    return x.device.type == "cpu"


def valid_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """The valid rows, in the dtype that everything is computed in."""
    H = hidden.index_select(0, rows)
    return H if H.dtype == torch.float64 else H.float()


def _label_rows(weight: HeadRows | StreamedRows, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D + r), a tensor of its own."""
    return weight.weight.index_select(0, labels).to(dtype) if weight.is_plain else weight.take(labels, dtype)


def label_logits(
    H: Tensor, weight: HeadRows | StreamedRows, bias: Tensor | None, labels: Tensor, logits: Logits
) -> tuple[Tensor, Tensor | None]:
    """(z_y, c_y or None without a softcap)."""
    z = torch.linalg.vecdot(H, _label_rows(weight, labels, H.dtype))
    if bias is not None:
        z += bias.index_select(0, labels)
    z *= _product_factor(logits)
    return z, None if logits.softcap is None else _cap(z, logits.softcap, torch.empty_like(z))


def _product_factor(logits: Logits) -> float:
    """What H.W + b is multiplied by: it becomes z in UNITs or, with a softcap, the argument of tanh."""
    return logits.scale / UNIT.nats if logits.softcap is None else logits.scale / logits.softcap


def _cap(u: Tensor, softcap: float, slope: Tensor) -> Tensor:
    """u becomes z = softcap tanh(u) in UNITs, in place; slope becomes c = 1 - tanh(u)^2.

    c = 4 (p - p^2) with p = sigmoid(-2 |u|): where tanh saturates, the digits of 1 - tanh^2 are gone.
    """
    torch.abs(u, out=slope).mul_(-2).sigmoid_()
    torch.addcmul(slope, slope, slope, value=-1, out=slope).mul_(4)
    u.tanh_().mul_(softcap / UNIT.nats)
    return slope


class _LabelEntries:
    """The entries (t, y_t) of one vocabulary chunk after another.

    On a CPU the labels are grouped by chunk once and each chunk touches its own. On a GPU their number in a chunk
    would have to be read back: there each chunk goes over all tokens, and writes what stood there for the others.
    """

    def __init__(self, labels: Tensor, plan: Plan) -> None:
        self.labels, self.slices = labels, plan.slices
        self.groups: list[tuple[Tensor, Tensor]] | None = None  # of each chunk: tokens, and their places in flat E
        if looking_is_free(labels):
            borders = plan.borders(labels.device)
            of_chunk = torch.searchsorted(borders, labels, right=True) - 1
            start = borders[of_chunk]
            width = borders[of_chunk + 1] - start
            places = torch.arange(len(labels)).mul_(width).add_(labels - start)
            counts = of_chunk.bincount(minlength=len(plan.slices)).tolist()
            tokens = labels.argsort()
            self.groups = list(zip(tokens.split(counts), places[tokens].split(counts), strict=True))

    def set(self, E: Tensor, k: int, value: float | Tensor) -> None:
        """E[t, y_t - start] = value, or value[t], for the labels inside chunk k. E (N, rows), contiguous."""
        if self.groups is not None:
            tokens, places = self.groups[k]
            if isinstance(value, Tensor):
                E.view(-1).index_copy_(0, places, value[tokens])
            else:
                E.view(-1).index_fill_(0, places, value)
            return
        start, stop = self.slices[k]
        column = (self.labels - start).clamp_(0, stop - start - 1)[:, None]
        inside = (self.labels >= start) & (self.labels < stop)
        own = E.gather(1, column)[:, 0]
        E.scatter_(1, column, torch.where(inside, value, own)[:, None])

    def take(self, E: Tensor, k: int, out: Tensor) -> None:
        """out[t] = E[t, y_t - start] for the labels inside chunk k."""
        if self.groups is not None:
            tokens, places = self.groups[k]
            out.index_copy_(0, tokens, E.view(-1)[places])
            return
        start, stop = self.slices[k]
        column = (self.labels - start).clamp_(0, stop - start - 1)[:, None]
        inside = (self.labels >= start) & (self.labels < stop)
        torch.where(inside, E.gather(1, column)[:, 0], out, out=out)
