"""ASFT's sequence terms from one kernel launch each way, for the Triton backend.

Custom operators for torch.compile and an autograd Function, as in linear_logps.py and for its reasons. The
formula stands in kernels/asft_sequence.py, the one deliberate second copy besides the reference.
"""

from functools import partial

import torch
from torch import Tensor

from asft_kernels.core import checks

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def asft_sequence_terms(logps: Tensor, offsets: Tensor, lam: float, beta: float, sft_weight: float) -> Terms:
    """(N,) logps, (2B+1,) offsets -> (sums (2B,), avgs (2B,), sft (B,), align (B,), loss (B,), coef (2B,)).

    Only loss is differentiable, in logps.
    """
    run = _Eager.apply if checks.is_eager() else _operator
    return run(logps, offsets, lam, beta, sft_weight)


def _forward(logps: Tensor, offsets: Tensor, lam: float, beta: float, sft_weight: float) -> Terms:
    from asft_kernels.kernels.asft_sequence import asft_sequence

    sums, avgs, sft, align, loss, coef = asft_sequence(logps, offsets, lam=lam, beta=beta, sft_weight=sft_weight)
    return sums, avgs, sft, align, loss, coef


_operator = torch.library.custom_op("asft_kernels::asft_sequence", _forward, mutates_args=())


@_operator.register_fake
def _(logps, offsets, lam, beta, sft_weight):
    rows = offsets.shape[0] - 1
    return tuple(logps.new_empty(n) for n in (rows, rows, rows // 2, rows // 2, rows // 2, rows))


def _backward(grad_loss: Tensor, logps: Tensor, coef: Tensor, offsets: Tensor) -> Tensor:
    """logps is not looked at: with it autograd knows what the gradient depends on."""
    from asft_kernels.kernels.asft_sequence import asft_sequence_grad

    return asft_sequence_grad(grad_loss, coef, offsets, len(logps))


_operator_backward = torch.library.custom_op("asft_kernels::asft_sequence_backward", _backward, mutates_args=())


@_operator_backward.register_fake
def _(grad_loss, logps, coef, offsets):
    return torch.empty_like(logps)


def _save(ctx, inputs, output):
    logps, offsets, *_ = inputs
    *others, coef = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others[:4], coef)
    ctx.save_for_backward(logps, coef, offsets)


def _gradient(ctx, *grads, backward):
    grad_loss, saved = grads[4], ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 5
    return backward(grad_loss, *saved), None, None, None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        "asft_kernels: double backward is not supported: ASFT's gradient of the log-probabilities has no derivative of "
        "its own on the Triton backend; use asft_kernels.reference, or drop create_graph=True"
    )


torch.library.register_autograd(_operator, partial(_gradient, backward=_operator_backward), setup_context=_save)
torch.library.register_autograd(_operator_backward, _refuse, setup_context=lambda ctx, inputs, output: None)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
        plain = (
            checks.is_eager() and not torch.is_grad_enabled() and not any(x is not None and batched(x) for x in grads)
        )
        return _gradient(ctx, *grads, backward=_backward if plain else _operator_backward)
