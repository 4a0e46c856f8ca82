"""What each contestant calls: functions of a case and its inputs that return (loss, dH, dW).

Those that yield per-token log-probabilities compute the same function of them (losses.py); Liger-Kernel's preference
losses come whole. Packages are imported in the call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asft_kernels import fused_asft_loss, fused_linear_logps
from asft_kernels.backends import exp_dtype
from asft_kernels.backends.plan import make_plan, token_blocks
from asft_kernels.kernels.configs import multiprocessors
from benchmarks.cases import FROZEN, NO_GRADIENT, TRAINABLE, Case, Inputs
from benchmarks.losses import IGNORE, LOSSES

LogpsOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (2B, T, D), weight (V, D), labels (2B, T) -> (2B, T)
Result = tuple[Tensor | None, Tensor | None, Tensor | None]  # loss, dH, dW, detached


def gradients(case: Case, inputs: Inputs, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Result:
    """loss_of(hidden, weight) and the gradients that the work asks for."""
    if case.work == NO_GRADIENT:
        with torch.no_grad():
            return loss_of(inputs.hidden, inputs.weight).detach(), None, None
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(case.work == TRAINABLE)
    loss = loss_of(hidden, weight)
    if case.work == FROZEN:
        return loss.detach(), torch.autograd.grad(loss, hidden)[0], None
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), grad_hidden, grad_weight


def per_token(logps_of: LogpsOf, case: Case, inputs: Inputs) -> Result:
    """A contestant that yields log-probabilities of the tokens: the case's loss of them."""
    labels = inputs.labels
    return gradients(case, inputs, lambda h, w: LOSSES[case.loss](logps_of(h, w, labels), labels))


def stored_dtype(case: Case) -> torch.dtype:
    """Of an exponential, in the backend that is the default on the case's device."""
    return exp_dtype("triton" if case.device == "cuda" else "torch", case.torch_dtype)


def bare_products(case: Case, inputs: Inputs) -> Result:
    """The products of our schedule and nothing else, chunk by chunk, into freshly allocated E and dW.

    The yardstick for 3 products keeps every chunk of E. On a CPU a low-precision operand is upcast before its product,
    chunk by chunk, as ours is; on a GPU operands have the case's dtype, with an fp32 accumulator for dH.
    """
    computed = torch.float32 if case.device == "cpu" else case.torch_dtype
    hidden = inputs.hidden.flatten(0, 1)[: case.N].to(computed)
    converts = computed != case.torch_dtype
    plan = make_plan(
        case.N, case.V, case.D, exp_bytes=stored_dtype(case).itemsize, chunk_size=None, cache_bytes=0,
        device_type=case.device, multiprocessors=multiprocessors(torch.device(case.device)),
    )  # fmt: skip
    keeps = case.work == TRAINABLE
    acc = torch.empty(case.N, case.D, device=case.device)
    wider: dict[str, Any] = {} if computed == acc.dtype else {"out_dtype": acc.dtype}
    wide = hidden.new_empty(plan.chunk if converts else 0, case.D)  # rows of W, then of dW
    blocks = token_blocks(case.N, case.device)
    longest = max(block.stop - block.start for block in blocks)
    kept = [hidden.new_empty(case.N, stop - start) for start, stop in plan.slices] if keeps else []
    workspace = hidden.new_empty(0 if keeps else longest * plan.chunk)
    for block in blocks:
        H, own = hidden[block], acc[block]
        for k, (start, stop) in enumerate(plan.slices):
            rows = inputs.weight[start:stop]
            if converts:
                rows = wide[: stop - start].copy_(rows)
            E = kept[k][block] if keeps else workspace[: len(H) * (stop - start)].view(len(H), -1)
            torch.mm(H, rows.T, out=E)
            if case.work != NO_GRADIENT:
                torch.addmm(own, E, rows, beta=min(k, 1), out=own, **wider)
    if keeps:
        grad = torch.empty_like(inputs.weight)
        for (start, stop), E in zip(plan.slices, kept, strict=True):
            rows = torch.mm(E.T, hidden, out=wide[: stop - start] if converts else grad[start:stop])
            if converts:
                grad[start:stop] = rows
    return None, None, None


def ours(case: Case, inputs: Inputs, *, backend: str, **options: Any) -> Result:
    """fused_asft_loss, and for the other losses the same log-probabilities by fused_linear_logps."""
    how: dict[str, Any] = {"shift": False, "backend": backend, **options}
    if case.loss == "asft":
        asft_loss: Any = fused_asft_loss
        return gradients(case, inputs, partial(asft_loss, labels=inputs.labels, **how))
    return per_token(partial(fused_linear_logps, **how), case, inputs)


def plain_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    flat = labels.flatten()
    return -F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), flat, reduction="none").view_as(labels)


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunked: bool) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    mask = labels != IGNORE
    nll = F.linear_cross_entropy(hidden[mask], weight, labels[mask], reduction="none", options=options)
    return nll.new_zeros(labels.shape).masked_scatter(mask, -nll)


def cce(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE, reduction="none", **options)


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = labels != IGNORE
    logps, *_ = ChunkedLogProbFunction.apply(hidden[mask], weight, None, labels[mask], 1.0, 32768, None, 1.0, ())
    return logps.new_zeros(labels.shape).masked_scatter(mask, logps)


def liger(case: Case, inputs: Inputs) -> Result:
    """Its defaults (compiled, one pair at a time), but for SimPO's extra NLL term and DPO's reference model."""
    from liger_kernel import chunked_loss

    if case.loss == "simpo":
        module = chunked_loss.LigerFusedLinearSimPOLoss(compute_nll_loss=False)
    elif case.loss == "dpo":
        module = chunked_loss.LigerFusedLinearDPOLoss(use_ref_model=False)
    else:
        module = chunked_loss.LigerFusedLinearORPOLoss()
    return gradients(case, inputs, lambda h, w: module(w, h, inputs.labels)[0])
