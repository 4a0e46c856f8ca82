"""Both phases from Triton kernels and plain products, step by step as the torch backend.

    stage            kernel or product              tensor
    label logit      label_logits                   z_y (N,), the first reference r
    per chunk:
      exponentials   logits_exp                     E' (N, rows), sums and references of its tiles
      running sums   settle                         r, s (N,); E' tiles and O rows whose reference moved
      hidden         torch: O += E' W_k             O (N, D) fp32
    close            close_statistics               logp, 1 - p, 1/total (N,); resettle of cached chunks
    row factors      label_logits, row_factors      c_y with a softcap; pull, push (N,)
    dH               grad_hidden                    (M, D)
    per chunk:       grad_bias                      db_k
      dW, "whole"    torch: E'^T Hs, label_columns  dW_k, rounded once; label_gradient then writes the labels' rows
      or, "slices"   torch: E'^T Hs, label_rows     slice by slice of dW_k, summed in fp32 and rounded once

E' stands relative to the final r of its row when phase 1 ends, so phase 2 has one factor a row.
Products: fp32 operands as they are; bf16 ones with fp32 output (CUDA, ROCm), which a CPU does not
have: there they are upcast. For fp16 inputs E' and Hs are fp32, as fp16 underflows, and the chunk of
the head is upcast. No host reads, no atomics, nothing kept between calls. Where figures are wanted beside the
log-probabilities, triton_stats.py makes each chunk's E' and sums, and phase 2's E' with factors of their own.
"""

import torch
from torch import Tensor

from asft_kernels.backends import Gradients, Logits, Saved, exp_dtype
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan, weight_slice
from asft_kernels.backends.streaming import StreamedGradient, StreamedRows, reading, take_part
from asft_kernels.backends.token_stats import StatsGrads, Wanted
from asft_kernels.backends.triton_stats import RunningStats, Weighing, close_stats, strips_for
from asft_kernels.kernels.configs import SLICES, WHOLE, Strips, Tile
from asft_kernels.kernels.exp_epilogue import empty_exps
from asft_kernels.kernels.grad_bias import grad_bias
from asft_kernels.kernels.grad_hidden import grad_hidden
from asft_kernels.kernels.label_gradient import LabelGradient
from asft_kernels.kernels.label_logits import label_logits
from asft_kernels.kernels.label_rows import label_rows
from asft_kernels.kernels.logits_exp import logits_exp, operand_rows
from asft_kernels.kernels.products import add_product, rounded_product
from asft_kernels.kernels.row_statistics import close_statistics, row_factors
from asft_kernels.kernels.scaled_hidden import scaled_hidden
from asft_kernels.kernels.settle import resettle, settle
from asft_kernels.kernels.tile_choice import Problem, best_form, best_tile


def logit_unit() -> float:
    return 1.0


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
    N, D = rows.shape[0], hidden.shape[1]
    hidden, bias = _row_major(hidden), None if bias is None else bias.contiguous()
    acc = hidden.new_empty((N, D) if needs_acc else 0, dtype=torch.float32)
    exps: list[Tensor] = []
    strips, stats = strips_for(wanted), None
    if wanted is not None and strips is not None:
        stats = RunningStats(wanted, hidden, N, plan, logits, needs_acc=needs_acc)
    if N == 0:
        if plan.order is not None:
            take_part(weight, labels, plan.order, 0)
        logps, one_minus_p, inv_total, ref = (hidden.new_empty(0, dtype=torch.float32) for _ in range(4))
        exps = [_exps(hidden, 0, b - a) for a, b in plan.slices[: plan.cached] if needs_exps]
        of_none = None
        if wanted is not None:
            of_none = close_stats(
                wanted, stats, z_y=ref, ref=ref, logps=logps, one_minus_p=one_minus_p, inv_total=inv_total
            )
        return Saved(logps, one_minus_p, inv_total, ref, acc, exps, of_none, ref, ref)

    transform = {"scale": logits.scale, "softcap": logits.softcap}
    with torch.cuda.device_of(hidden):
        head = _Head(reading(weight, plan), bias, labels, hidden, plan)
        z_y = label_logits(hidden, head.labels_weight, head.labels_bias, rows, head.labels, **transform)
        ref, others = z_y, torch.zeros_like(z_y)
        kept_refs: list[Tensor] = []
        tile = _tile(hidden, head.aligned, rows, logits) if strips is None else strips
        tokens = operand_rows(hidden, rows, tile)
        workspace = None
        for k, (start, stop) in enumerate(plan.slices):
            weight_k = head.rows(start, stop)
            E = None
            if needs_exps and k < plan.cached:
                E = _exps(hidden, N, stop - start)
            elif needs_acc:
                workspace = _exps(hidden, N, plan.chunk) if workspace is None else workspace
                E = workspace[:, : stop - start]
            bias_k = None if bias is None else bias[start:stop]
            earlier = acc if needs_acc and k > 0 else None
            if stats is None or strips is None:
                tiles = logits_exp(
                    E, tokens, weight_k, bias_k, rows, labels, ref, first=start, sums=True, tile=tile, **transform
                )
                assert tiles is not None, "backend bug: asked for sums"
            else:
                tiles = stats.logits_exp(
                    E, tokens, weight_k, bias_k, labels, ref, others, earlier, first=start, strips=strips
                )
            ref = settle(tiles.sums, tiles.refs, ref, others, exps=E, acc=earlier, tile_width=tiles.width)
            if E is not None and needs_acc:
                add_product(E, weight_k, out=acc, fresh=k == 0)
            if E is not None and needs_exps and k < plan.cached:
                exps.append(E)
                kept_refs.append(ref)
        for E, written_at in zip(exps, kept_refs, strict=True):
            if written_at is not ref:  # the last chunk's is
                resettle(E, written_at, ref)
        logps, one_minus_p, inv_total = close_statistics(z_y, ref, others)
        figures = None
        if wanted is not None:
            figures = close_stats(
                wanted, stats, z_y=z_y, ref=ref, logps=logps, one_minus_p=one_minus_p, inv_total=inv_total
            )
    largest = None if stats is None else stats.largest
    return Saved(logps, one_minus_p, inv_total, ref, acc, exps, figures, z_y, largest)


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
    N = rows.shape[0]
    needs_head = needs_weight or needs_low_rank or needs_bias
    first_read = len(saved.exps) if needs_head else len(plan.slices)
    if N == 0:
        tensors = (hidden, weight.weight, weight.low_rank, bias)
        needs = (needs_hidden, needs_weight, needs_low_rank, needs_bias)
        grads = Gradients(
            *(_zeros_for(x) if x is not None and need else None for x, need in zip(tensors, needs, strict=True))
        )
        if plan.order is not None:
            streamed = take_part(weight, labels, plan.order, first_read, torch.float32 if needs_weight else None)
            grads = grads._replace(weight=streamed)
        return grads
    dH = db = None

    hidden, bias = _row_major(hidden), None if bias is None else bias.contiguous()
    transform = {"scale": logits.scale, "softcap": logits.softcap}
    with torch.cuda.device_of(hidden):
        head = _Head(reading(weight, plan, first_read), bias, labels, hidden, plan)
        of_labels = head.labels_weight, head.labels_bias, rows, head.labels
        c_y, weighing, acc = None, None, saved.acc
        if logits.softcap is not None:
            c_y = label_logits(hidden, *of_labels, slope=True, **transform)
        if stats_grads is not None:
            weighing = Weighing(grad_logps, stats_grads, saved, hidden, bias, rows, labels, c_y, logits, plan)
            pull, push = weighing.pull, weighing.push
            acc = weighing.acc() if needs_hidden else acc
        else:
            g = grad_logps.float().contiguous()
            pull, push = row_factors(g, saved.one_minus_p, saved.inv_total, c_y, scale=logits.scale)
        if needs_hidden:
            dH = grad_hidden(hidden, acc, head.labels_weight, rows, head.labels, pull, push)
        if not needs_head:
            return Gradients(dH)

        tile = _tile(hidden, head.aligned, rows, logits)
        workspace = tokens = dW = dL = None
        if needs_weight or needs_low_rank:
            scaled = scaled_hidden(hidden, rows, push, dtype=exp_dtype("triton", hidden.dtype))
            form = best_form(hidden.device, _problem(hidden, rows, logits), aligned=_aligned(hidden))
            D = weight.columns
            if needs_weight and plan.order is not None:
                sink = StreamedGradient(weight, plan.order, torch.float32)
                dW = SlicedGradient(weight.weight, plan, hidden[:, :D], rows, labels, pull, scaled[:, :D], sink)
            elif needs_weight:
                dW = GRADIENTS[form](weight.weight, plan, hidden[:, :D], rows, labels, pull, scaled[:, :D])
            if needs_low_rank and weight.low_rank is not None:
                further = scaled[:, D:].contiguous()
                dL = SlicedGradient(weight.low_rank, plan, hidden[:, D:], rows, labels, pull, further)
        if needs_bias and bias is not None:
            db = torch.empty_like(bias)
        for k, (start, stop) in enumerate(plan.slices):
            if k < len(saved.exps) and weighing is None:
                E = saved.exps[k]
            else:
                workspace = _exps(hidden, N, plan.chunk) if workspace is None else workspace
                E = workspace[:, : stop - start]
            weight_k = head.rows(start, stop) if k >= first_read else None
            if weighing is not None:
                weighing.chunk(k, weight_k, E)
            elif weight_k is not None:
                tokens = operand_rows(hidden, rows, tile) if tokens is None else tokens
                logits_exp(
                    E, tokens, weight_k,
                    None if bias is None else bias[start:stop], rows, labels, saved.ref,
                    first=start, sums=False, tile=tile, **transform,
                )  # fmt: skip
            for gradient in (dW, dL):
                if gradient is not None:
                    gradient.add(k, E)
            if db is not None:
                grad_bias(db[start:stop], E, labels, pull, push, first=start)
    dW, dL = (None if gradient is None else gradient.finish() for gradient in (dW, dL))
    return Gradients(dH, dW, dL, db)


class _Head:
    """The head's rows in hidden's dtype: views of a plain weight; else a buffer a chunk, and a row for each label."""

    def __init__(
        self, weight: HeadRows | StreamedRows, bias: Tensor | None, labels: Tensor, hidden: Tensor, plan: Plan
    ) -> None:
        self.weight = weight
        if weight.is_plain:
            self.labels_weight, self.labels_bias, self.labels = weight.weight, bias, labels
            self.aligned = chunks_aligned(weight.weight)
            return
        self.labels_weight = weight.take(labels, hidden.dtype)
        self.labels_bias = None if bias is None else bias.index_select(0, labels)
        self.labels = torch.arange(len(labels), device=labels.device)
        self.buffer = hidden.new_empty(plan.chunk, weight.size[1])
        self.aligned = _aligned(self.buffer)

    def rows(self, start: int, stop: int) -> Tensor:
        if self.weight.is_plain:
            return _row_major(self.weight.weight[start:stop])
        return self.weight.chunk(start, stop, out=self.buffer)


class WholeGradient:
    """dW in bf16, a product a chunk that the library rounds; the labels' rows are made apart and written over it."""

    def __init__(
        self, weight: Tensor, plan: Plan, hidden: Tensor, rows: Tensor, labels: Tensor, pull: Tensor, scaled: Tensor
    ) -> None:
        self.out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        self.hidden, self.rows, self.pull, self.scaled = hidden, rows, pull, scaled
        self.slices = plan.slices
        self.labels = LabelGradient(labels, plan.vocab, plan.chunk)

    def add(self, k: int, E: Tensor) -> None:
        start, stop = self.slices[k]
        rounded_product(E.t(), self.scaled, out=self.out[start:stop])
        self.labels.gather(k, E, start)

    def finish(self) -> Tensor:
        self.labels.write(self.out, self.scaled, self.hidden, self.rows, self.pull)
        return self.out


class SlicedGradient:
    """dW, chunk by chunk of E', in slices that are summed in fp32 and rounded once; a streamed head's by its sink."""

    def __init__(
        self, weight: Tensor, plan: Plan, hidden: Tensor, rows: Tensor, labels: Tensor, pull: Tensor, scaled: Tensor,
        sink: StreamedGradient | None = None,
    ) -> None:  # fmt: skip
        self.sink, shape = sink, weight.shape if sink is None else (0,)
        self.out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.hidden, self.rows, self.pull, self.scaled = hidden, rows, pull, scaled
        self.slices, D = plan.slices, weight.shape[1]
        rounds = sink is None and weight.dtype != torch.float32
        self.step = weight_slice(plan.chunk, D) if rounds else plan.chunk
        self.scratch = torch.empty((self.step, D), dtype=torch.float32, device=weight.device) if rounds else None
        # Where each slice's labels begin and end in sorted order, without a number from or to the host.
        self.sorted_labels, self.order = torch.sort(labels, stable=True)
        borders = plan.borders(labels.device)
        steps = torch.arange(-(-plan.chunk // self.step) + 1, device=labels.device) * self.step
        ends = torch.minimum(borders[:-1, None] + steps, borders[1:, None])
        self.bounds = torch.searchsorted(self.sorted_labels, ends)

    def add(self, k: int, E: Tensor) -> None:
        first, last = self.slices[k]
        room = self.out[first:last] if self.sink is None else self.sink.room(k)
        for part, start in enumerate(range(first, last, self.step)):
            stop = min(start + self.step, last)
            dW = room[start - first : stop - first] if self.scratch is None else self.scratch[: stop - start]
            add_product(E[:, start - first : stop - first].t(), self.scaled, out=dW, fresh=True)
            label_rows(
                dW, self.hidden, self.rows, self.sorted_labels, self.order, self.pull,
                self.bounds[k, part : part + 2], first=start,
            )  # fmt: skip
            if self.scratch is not None:
                room[start - first : stop - first].copy_(dW)  # the one rounding
        if self.sink is not None:
            self.sink.send(k)

    def finish(self) -> Tensor:
        return self.out if self.sink is None else self.sink.finish()


GRADIENTS = {WHOLE: WholeGradient, SLICES: SlicedGradient}


def _exps(hidden: Tensor, N: int, width: int) -> Tensor:
    return empty_exps(N, width, exp_dtype("triton", hidden.dtype), hidden.device)


def _problem(hidden: Tensor, rows: Tensor, logits: Logits) -> Problem:
    return Problem(hidden.dtype, hidden.shape[1], rows.shape[0], logits.softcap is not None)


def _tile(hidden: Tensor, aligned: bool, rows: Tensor, logits: Logits) -> Tile | Strips:
    return best_tile(hidden.device, _problem(hidden, rows, logits), aligned=_aligned(hidden) and aligned)


def chunks_aligned(weight: Tensor) -> bool:
    """Of a plain head; those of a transposed one are copied."""
    return weight.stride(1) != 1 or _aligned(weight)


def _aligned(x: Tensor) -> bool:
    """Whether rows begin at multiples of 16 elements and of 16 bytes, and have a multiple of 16 elements."""
    return x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _zeros_for(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
