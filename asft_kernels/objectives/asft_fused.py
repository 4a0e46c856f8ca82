"""ASFT's sequence terms from one kernel launch each way, for the Triton backend.

Custom operators, as in linear_logps.py and for its reasons. The formula stands in
kernels/asft_sequence.py, the one deliberate second copy besides the reference.
"""

import torch
from torch import Tensor


@torch.library.custom_op("asft_kernels::asft_sequence", mutates_args=())
def asft_sequence_op(
    logps: Tensor, offsets: Tensor, lam: float, beta: float, sft_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(N,) logps, (2B+1,) offsets -> (sums (2B,), avgs (2B,), sft (B,), align (B,), loss (B,), coef (2B,)).

    Only loss is differentiable, in logps.
    """
    from asft_kernels.kernels.asft_sequence import asft_sequence

    sums, avgs, sft, align, loss, coef = asft_sequence(logps, offsets, lam=lam, beta=beta, sft_weight=sft_weight)
    return sums, avgs, sft, align, loss, coef


@asft_sequence_op.register_fake
def _(logps, offsets, lam, beta, sft_weight):
    rows = offsets.shape[0] - 1
    return tuple(logps.new_empty(n) for n in (rows, rows, rows // 2, rows // 2, rows // 2, rows))


@torch.library.custom_op("asft_kernels::asft_sequence_backward", mutates_args=())
def _asft_sequence_backward(grad_loss: Tensor, coef: Tensor, offsets: Tensor, n_tokens: int) -> Tensor:
    from asft_kernels.kernels.asft_sequence import asft_sequence_grad

    return asft_sequence_grad(grad_loss, coef, offsets, n_tokens)


@_asft_sequence_backward.register_fake
def _(grad_loss, coef, offsets, n_tokens):
    return coef.new_empty(n_tokens)


def _save(ctx, inputs, output):
    logps, offsets, *_ = inputs
    *others, coef = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others[:4], coef)
    ctx.save_for_backward(offsets, coef)
    ctx.n_tokens = logps.shape[0]


def _gradient(ctx, *grads):
    grad_loss, (offsets, coef) = grads[4], ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 5
    return _asft_sequence_backward(grad_loss, coef, offsets, ctx.n_tokens), None, None, None, None


torch.library.register_autograd(asft_sequence_op, _gradient, setup_context=_save)
