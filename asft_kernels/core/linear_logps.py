"""The one differentiable primitive: (hidden, weight, bias, labels) -> per-token log-probabilities.

Phase 1 is the forward, phase 2 the gradients. Each is also a custom operator, so that torch.compile keeps it whole and
a double backward is refused: a backward of plain torch operations would return a wrong partial result in silence. An
eager call goes through an autograd Function, as an operator costs the host up to half a millisecond each way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from threading import Lock

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from asft_kernels.backends import Logits, Saved, exp_columns, exp_dtype
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan, make_plan, traced_chunk
from asft_kernels.backends.sharding import backend_for
from asft_kernels.backends.streaming import agreed_tokens, in_natural_order, in_read_order, order_of, ranks_of
from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES, Stats, StatsGrads, Wanted, stat_dtype
from asft_kernels.core import checks
from asft_kernels.kernels.configs import multiprocessors
from asft_kernels.memory import Sizes, explained


def linear_logps(
    hidden: Tensor,
    weight: HeadRows,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    *,
    backend: str,
    logits: Logits,
    chunk_size: int | None,
    cache_bytes: int,
    padded: bool,
    wanted: Wanted | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """log p(labels[t] | hidden[rows[t]]), (N,), differentiable in hidden, bias and what weight is made of; and figures.

    hidden (M, D + r), weight (V, D + r), bias (V,) or None share one floating dtype (low-rank columns may be fp32).
    rows (N,) int64 are distinct, labels (N,) int64 in [0, V); with padded=True a label of -1 marks a slot that carries
    no token: its logp is 0, and nothing that stands in its row is looked at.
    fp32 result, fp64 for fp64 input. GEMMs: 1 without gradients, 2 for hidden alone, 3 or 4 with weight; a gradient to
    the low-rank columns alone is a product of r columns, and no further one of D while E is kept.
    wanted: figures of each token (backends/token_stats.py), returned by name: (N,) in the dtype of the logps, is_top1
    bool; 0 or False in slots without a token. docs/algorithm.md has what they and their gradients cost.
    """
    tensors = (weight.weight, weight.low_rank)
    if torch.compiler.is_compiling():
        if weight.is_streamed:
            raise RuntimeError(
                "lm_head: got a streamed head under torch.compile, need eager mode; compile the body alone"
            )
        if chunk_size is None:
            exp_bytes = exp_dtype(backend, hidden.dtype).itemsize
            chunk_size = traced_chunk(hidden.shape[1], exp_bytes=exp_bytes, device_type=hidden.device.type)
    elif any(x is not None and unpack_dual(x).tangent is not None for x in (hidden, *tensors, bias)):
        raise RuntimeError(
            "asft_kernels: forward-mode derivatives (dual tensors) are not supported; use asft_kernels.reference, or "
            "reverse mode"
        )
    grad = torch.is_grad_enabled()
    needs_acc = grad and hidden.requires_grad
    needs_exps = grad and any(x is not None and x.requires_grad for x in (*tensors, bias))
    names, differentiable = [], []
    if wanted is not None:
        names = [name for name in NAMES if name in wanted.names]
        differentiable = [name for name in DIFFERENTIABLE if name in wanted.differentiable]
    inputs = (
        hidden, *tensors, bias, weight.codes, weight.placement, list(weight.scales), rows, labels, backend,
        logits.scale, logits.softcap, chunk_size, cache_bytes, padded, needs_acc, needs_exps,
        " ".join(names), " ".join(differentiable if needs_acc or needs_exps else []),
    )  # fmt: skip
    if not checks.is_eager():
        logps, *_, stats = _operator1(*inputs)
    elif needs_acc or needs_exps:
        logps, *stats = _Eager.apply(*inputs)
    else:
        logps, *_, stats = _phase1(*inputs)
    return logps, {name: stats[NAMES.index(name)] for name in names}


def _phase1(
    hidden: Tensor, weight: Tensor, low_rank: Tensor | None, bias: Tensor | None, codes: str,
    placement: str, scales: list[Tensor], rows: Tensor, labels: Tensor, backend: str, scale: float,
    softcap: float | None, chunk_size: int | None, cache_bytes: int, padded: bool, needs_acc: bool, needs_exps: bool,
    names: str, differentiable: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    wanted = Wanted.parse(names, differentiable)
    head = HeadRows(weight, low_rank, codes, tuple(scales), placement)
    plan = _plan(
        hidden, head, rows, backend, chunk_size, cache_bytes, needs_acc, needs_exps, names, differentiable,
        keeps=not wanted.recomputes(softcap),
    )  # fmt: skip
    needs = (needs_acc, needs_exps and head.is_plain, needs_exps and low_rank is not None, False)
    sizes = partial(_sizes, hidden, head, bias, rows, backend, softcap, chunk_size, cache_bytes, needs, wanted)
    with exact_products(hidden.device.type), explained(sizes, phase="forward"):
        inputs = _without_padding(hidden, rows, labels) if padded else (hidden, rows, labels)
        bias_read, labels_read = in_read_order(plan, bias, inputs[2])
        saved = backend_for(backend, head).forward(
            inputs[0], head, bias_read, inputs[1], labels_read, Logits(scale, softcap), plan,
            needs_acc=needs_acc, needs_exps=needs_exps, wanted=wanted if names else None,
        )  # fmt: skip
        stats = [] if saved.stats is None else list(saved.stats)
        if padded:
            masked = labels < 0
            saved = saved._replace(logps=saved.logps.masked_fill(masked, 0.0))
            figures = len(NAMES)
            stats[:figures] = [x.masked_fill(masked, 0) if len(x) else x for x in stats[:figures]]
    return saved.logps, saved.one_minus_p, saved.inv_total, saved.ref, saved.acc, saved.exps, stats


_operator1 = torch.library.custom_op("asft_kernels::linear_logps", _phase1, mutates_args=())


@_operator1.register_fake
def _(hidden, weight, low_rank, bias, codes, placement, scales, rows, labels, backend, scale, softcap, chunk_size,
      cache_bytes, padded, needs_acc, needs_exps, names, differentiable):  # fmt: skip
    wanted = Wanted.parse(names, differentiable)
    head = HeadRows(weight, low_rank, codes, tuple(scales), placement)
    plan = _plan(hidden, head, rows, backend, chunk_size, cache_bytes, keeps=not wanted.recomputes(softcap))
    n, dtype = rows.shape[0], _stats_dtype(hidden)
    widths = [stop - start for start, stop in plan.slices[: plan.cached]] if needs_exps else []
    stats = [hidden.new_empty(n, dtype=dtype) for _ in range(4)]
    acc = hidden.new_empty((n, hidden.shape[1]) if needs_acc else (0,), dtype=dtype)
    room = [(n, exp_columns(backend, width)) for width in widths]
    exps = [hidden.new_empty(shape, dtype=exp_dtype(backend, hidden.dtype)) for shape in room]
    of_tokens = []
    if names:
        of_tokens = [hidden.new_empty(n if x in wanted.names else 0, dtype=stat_dtype(x, dtype)) for x in NAMES]
        D, differentiable = hidden.shape[1], wanted.differentiable
        logs = (n, D) if needs_acc and "entropy" in differentiable else (0,)
        slopes = (1 if softcap is None else n, D) if needs_acc and "mean_logits" in differentiable else (0,)
        of_tokens += [hidden.new_empty(shape, dtype=dtype) for shape in (logs, slopes)]
    return *stats, acc, [x[:, :width] for x, width in zip(exps, widths, strict=True)], of_tokens


def _phase2(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, low_rank: Tensor | None, bias: Tensor | None, codes: str,
    placement: str, scales: list[Tensor], rows: Tensor, labels: Tensor, logps: Tensor,
    one_minus_p: Tensor, inv_total: Tensor, ref: Tensor, acc: Tensor, exps: list[Tensor],
    stats: list[Tensor], backend: str, scale: float, softcap: float | None, chunk_size: int | None,
    cache_bytes: int, padded: bool, needs_hidden: bool, needs_weight: bool, needs_low_rank: bool, needs_bias: bool,
    grad_lse: Tensor | None = None, grad_mean_logits: Tensor | None = None, grad_entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = HeadRows(weight, low_rank, codes, tuple(scales), placement)
    of_stats = (grad_lse, grad_mean_logits, grad_entropy)
    plan = _plan(
        hidden, head, rows, backend, chunk_size, cache_bytes, needs_hidden, needs_weight, needs_low_rank, needs_bias,
        *(g is None for g in of_stats), len(exps),
    )  # fmt: skip
    saved = Saved(logps, one_minus_p, inv_total, ref, acc, exps, Stats(*stats) if stats else None)
    needs = (needs_hidden, needs_weight, needs_low_rank, needs_bias)
    sizes = partial(_sizes, hidden, head, bias, rows, backend, softcap, chunk_size, cache_bytes, needs, Wanted())
    with exact_products(hidden.device.type), explained(sizes, phase="backward"):
        inputs = (hidden, rows, labels)
        if padded:
            inputs = _without_padding(*inputs)
            grad_logps = grad_logps.masked_fill(labels < 0, 0.0)
            of_stats = [None if g is None else g.masked_fill(labels < 0, 0.0) for g in of_stats]
        bias_read, labels_read = in_read_order(plan, bias, inputs[2])
        grads = backend_for(backend, head).backward(
            grad_logps.contiguous(), inputs[0], head, bias_read, inputs[1], labels_read, saved, Logits(scale, softcap),
            plan, needs_hidden=needs_hidden, needs_weight=needs_weight, needs_low_rank=needs_low_rank,
            needs_bias=needs_bias,
            stats_grads=None if all(g is None for g in of_stats) else StatsGrads._make(of_stats),
        )  # fmt: skip
        if padded and grads.hidden is not None:
            spread = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            grads = grads._replace(hidden=spread.index_copy_(0, rows, grads.hidden))
    grads = grads._replace(low_rank=in_natural_order(plan, grads.low_rank), bias=in_natural_order(plan, grads.bias))
    # An operator returns tensors alone: an empty one stands for "not asked for".
    a, b, c, d = (hidden.new_empty(0) if g is None else g for g in grads)
    return a, b, c, d


_operator2 = torch.library.custom_op("asft_kernels::linear_logps_backward", _phase2, mutates_args=())


@_operator2.register_fake
def _(grad_logps, hidden, weight, low_rank, bias, codes, placement, scales, rows, labels, logps, one_minus_p, inv_total,
      ref, acc, exps, stats, backend, scale, softcap, chunk_size, cache_bytes, padded, needs_hidden, needs_weight,
      needs_low_rank, needs_bias, grad_lse=None, grad_mean_logits=None, grad_entropy=None):  # fmt: skip
    asked = ((hidden, needs_hidden), (weight, needs_weight), (low_rank, needs_low_rank), (bias, needs_bias))
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else hidden.new_empty(0)
        for x, needed in asked
    )


def _save_for_phase2(ctx, inputs, output):
    *tensors, ctx.codes, ctx.placement, scales, rows, labels = inputs[:9]
    ctx.options = inputs[9:-1]
    *of_rows, exps, stats = output
    ctx.set_materialize_grads(False)  # else backward receives zeros of the size of E
    ctx.lengths = len(tensors), len(scales), 2 + len(of_rows), len(exps), len(stats)
    ctx.save_for_backward(*tensors, *scales, rows, labels, *of_rows, *exps, *stats)


def _fixed(stats: list[Tensor], differentiable: str) -> list[Tensor]:
    """The figures that get no gradient."""
    return [x for i, x in enumerate(stats) if i >= len(NAMES) or NAMES[i] not in differentiable.split()]


def _save_operator(ctx, inputs, output):
    _save_for_phase2(ctx, inputs, output)
    *of_rows, exps, stats = output
    ctx.mark_non_differentiable(*of_rows[1:], *exps, *_fixed(stats, inputs[-1]))


def _gradients(ctx, phase2, grad_logps, grad_stats):
    """Those of the tensors; None where there is none."""
    grad_stats = (grad_stats or (None,) * len(NAMES))[: len(DIFFERENTIABLE)]
    if grad_logps is None and all(g is None for g in grad_stats):
        return (None,) * 4
    saved = iter(ctx.saved_tensors)  # once: under checkpointing a second look is an error
    tensors, scales, of_rows, exps, stats = (list(islice(saved, n)) for n in ctx.lengths)
    if grad_logps is None:
        grad_logps = torch.zeros_like(of_rows[2])
    batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    if any(g is not None and batched(g) for g in (grad_logps, *grad_stats)):
        raise RuntimeError(checks.NO_TRANSFORM)  # is_grads_batched, past _refuse_vmap
    backend, scale, softcap, chunk_size, cache_bytes, padded, *_ = ctx.options
    needs = ctx.needs_input_grad[:4]
    grads = phase2(
        grad_logps, *tensors, ctx.codes, ctx.placement, scales, *of_rows, exps, stats,
        backend, scale, softcap, chunk_size, cache_bytes, padded, *needs, *grad_stats,
    )  # fmt: skip
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _operator_gradients(ctx, grad_logps, *others):
    nothing = (None, None, [None] * ctx.lengths[1], *(None,) * 12)  # of codes, placement, scales and what follows them
    return *_gradients(ctx, _operator2, grad_logps, others[-1]), *nothing


class _Eager(torch.autograd.Function):
    """Both phases, with what phase 2 needs saved beside the outputs and not among them."""

    @staticmethod
    def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        output = _phase1(*inputs)
        _save_for_phase2(ctx, inputs, output)
        logps, *_, stats = output
        ctx.mark_non_differentiable(*_fixed(stats[: len(NAMES)], inputs[-1]))
        ctx.count = len(inputs)
        return logps, *stats[: len(NAMES)]

    @staticmethod
    def backward(ctx, grad_logps, *grad_stats):  # pyright: ignore[reportIncompatibleMethodOverride]
        checks.no_transform()
        plain = checks.is_eager() and not torch.is_grad_enabled()  # a graph of the gradients ends in a refusal
        grads = _gradients(ctx, _phase2 if plain else _operator2, grad_logps, grad_stats)
        return *grads, *(None,) * (ctx.count - 4)


def _refuse(ctx, *_):
    raise RuntimeError(
        "asft_kernels: double backward is not supported: the gradients of the fused log-probabilities have no "
        "derivative of their own; use asft_kernels.reference, or drop create_graph=True"
    )


def _refuse_vmap(info, in_dims, *args):
    raise RuntimeError(checks.NO_TRANSFORM)


for _operator in (_operator1, _operator2):
    torch.library.register_vmap(_operator, _refuse_vmap)
torch.library.register_autograd(_operator1, _operator_gradients, setup_context=_save_operator)
torch.library.register_autograd(_operator2, _refuse, setup_context=lambda ctx, inputs, output: None)


def _plan(
    hidden: Tensor, weight: HeadRows, rows: Tensor, backend: str, chunk_size: int | None, cache_bytes: int,
    *same: object, keeps: bool = True,
) -> Plan:  # fmt: skip
    """same: what else must be the same on the ranks of a streamed head."""
    order, n_tokens, exp_bytes = None, rows.shape[0], exp_dtype(backend, hidden.dtype).itemsize
    if weight.is_streamed:
        if chunk_size is None:
            chunk_size = traced_chunk(hidden.shape[1], exp_bytes=exp_bytes, device_type=hidden.device.type)
        shared = (backend, hidden.dtype, weight.weight.dtype, *weight.size, chunk_size, cache_bytes, *same)
        n_tokens, order = agreed_tokens(weight, n_tokens, shared), order_of(weight, chunk_size)
    return make_plan(
        n_tokens, *weight.size, exp_bytes=exp_bytes,
        chunk_size=chunk_size, cache_bytes=cache_bytes if keeps else 0, device_type=hidden.device.type,
        multiprocessors=multiprocessors(hidden.device) if chunk_size is None else 0, order=order,
        copies=not weight.is_plain or weight.weight.stride(1) != 1 or exp_dtype(backend, hidden.dtype) != hidden.dtype,
    )  # fmt: skip


def _sizes(
    hidden, head: HeadRows, bias, rows, backend, softcap, chunk_size, cache_bytes,
    needs: tuple[bool, bool, bool, bool], wanted,
) -> Sizes:  # fmt: skip
    low_rank = head.low_rank
    return Sizes(
        len(rows), len(hidden), head.size[0], head.columns, hidden.dtype, backend, hidden.device, cache_bytes,
        chunk_size, 0 if low_rank is None else low_rank.shape[1], head.weight.dtype,
        torch.float32 if low_rank is None else low_rank.dtype, head.codes, bias is not None, softcap is not None,
        *needs, wanted, ranks_of(head), head.weight.stride(1) == 1,
    )  # fmt: skip


def _stats_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _without_padding(hidden: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A compact hidden in which the slots without a token are zero rows with label 0."""
    compact = hidden.index_select(0, rows).masked_fill_((labels < 0)[:, None], 0.0)
    return compact, torch.arange(len(rows), device=rows.device), labels.clamp(min=0)


_precision_lock = Lock()
_precision_users: dict[str, int] = {"cpu": 0, "cuda": 0}
_precision_before: dict[str, str] = {}
_sums_before: list[tuple[tuple[bool, bool], bool]] = []


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Autocast off; fp32 products in fp32, bf16 and fp16 ones summed in fp32, whatever switches the user has set.

    The switches belong to the process: the first thread in sets them and the last one out restores them.
    """
    kind, backend = ("cpu", torch.backends.mkldnn) if device_type == "cpu" else ("cuda", torch.backends.cuda)
    matmul = backend.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with _precision_lock:
        if not _precision_users[kind]:
            if matmul.fp32_precision not in ("ieee", "none"):
                _precision_before[kind] = matmul.fp32_precision
                matmul.fp32_precision = "ieee"
            if kind == "cuda":  # the first is on by default: parts of a sum that is cut would be rounded to bf16
                cuts = matmul.allow_bf16_reduced_precision_reduction_split_k
                rounds = matmul.allow_bf16_reduced_precision_reduction, cuts
                _sums_before.append((rounds, matmul.allow_fp16_accumulation))
                matmul.allow_bf16_reduced_precision_reduction = False, cuts
                matmul.allow_fp16_accumulation = False
        _precision_users[kind] += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _precision_lock:
            _precision_users[kind] -= 1
            if not _precision_users[kind]:
                if kind in _precision_before:
                    before = _precision_before.pop(kind)
                    everywhere = torch.backends.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
                    inherited = getattr(backend, "fp32_precision", everywhere)
                    matmul.fp32_precision = "none" if before == inherited else before
                if kind == "cuda":
                    rounds, matmul.allow_fp16_accumulation = _sums_before.pop()
                    matmul.allow_bf16_reduced_precision_reduction = rounds
