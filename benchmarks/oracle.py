"""Loss, dH and dW of a case in float64 by plain torch, and how far from them an answer may be.

Token chunks of the full logits, none of our kernels: logp = log_softmax(z)[y], dz = g (onehot(y) - softmax(z)),
dH = dz W, dW = dz^T H, with g = dL/dlogp from autograd of the case's loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.calls import Result
from benchmarks.cases import Case, Inputs
from benchmarks.losses import IGNORE, LOSSES

CHUNK_BYTES = 2**28  # of float64 logits


class Exact(NamedTuple):
    """noise_loss, noise_grad: what rounding each token's log-probability and its logits to the case's dtype does to the
    loss (absolute) and, through g, to the gradients (relative): the standard deviation, by random draws.
    condition: |dz| |W| over |dz W| in norm, for the first chunk of tokens: what cancels in the sum over the vocabulary.
    """

    loss: float
    grad_hidden: Tensor  # (2B, T, D)
    grad_weight: Tensor  # (V, D)
    logit_rms: float
    noise_loss: float
    noise_grad: float
    condition: float


class Errors(NamedTuple):
    """Of the loss relative, of the gradients relative in the Frobenius norm; None where there is nothing to compare."""

    loss: float
    grad_hidden: float | None
    grad_weight: float | None


class Tolerance(NamedTuple):
    loss: float
    grad: float


def exact_answer(case: Case, inputs: Inputs) -> Exact:
    """In float64 on the inputs' device. The gradients of low-precision cases are kept in fp32 (error 2**-24)."""
    mask = inputs.labels != IGNORE
    hidden, labels = inputs.hidden[mask].double(), inputs.labels[mask]
    weight = inputs.weight.double()
    chunk = max(1, CHUNK_BYTES // (8 * len(weight)))
    chunks = [slice(k, k + chunk) for k in range(0, len(labels), chunk)]
    logps, squares = [], 0.0
    for part in chunks:
        z = hidden[part] @ weight.T
        squares += z.square().sum().item()
        logps.append(z.log_softmax(1).gather(1, labels[part, None])[:, 0])
    logp = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    logp = logp.masked_scatter(mask, torch.cat(logps)).requires_grad_()
    loss = LOSSES[case.loss](logp, inputs.labels)
    (g,) = torch.autograd.grad(loss, logp)

    grad_rows, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    condition = 0.0
    for part in chunks:
        dz = (hidden[part] @ weight.T).softmax(1).neg_()
        dz[torch.arange(len(dz)), labels[part]] += 1
        dz *= g[mask][part, None]
        torch.mm(dz, weight, out=grad_rows[part])
        condition = condition or ((dz.abs() @ weight.abs()).norm() / grad_rows[part].norm()).item()
        grad_weight.addmm_(dz.T, hidden[part])
    kept = torch.float64 if case.dtype == "float32" else torch.float32
    grad_hidden = torch.zeros(inputs.hidden.shape, dtype=kept, device=hidden.device)
    grad_hidden[mask] = grad_rows.to(kept)
    logit_rms = (squares / (len(labels) * len(weight))) ** 0.5
    noise_loss, noise_grad = _noise(case, logp.detach(), inputs.labels, loss.item(), g, logit_rms)
    return Exact(loss.item(), grad_hidden, grad_weight.to(kept), logit_rms, noise_loss, noise_grad, condition)


def _noise(
    case: Case, logp: Tensor, labels: Tensor, loss: float, g: Tensor, logit_rms: float, draws: int = 16
) -> tuple[float, float]:
    generator = torch.Generator(logp.device).manual_seed(0)
    size = _roundoff(case) * (logp.abs() + logit_rms) * (labels != IGNORE)
    of_loss, of_grad = 0.0, 0.0
    for _ in range(draws):
        off = torch.randn(logp.shape, dtype=logp.dtype, device=logp.device, generator=generator)
        moved = (logp + size * off).requires_grad_()
        moved_loss = LOSSES[case.loss](moved, labels)
        (moved_g,) = torch.autograd.grad(moved_loss, moved)
        of_loss += (moved_loss.item() - loss) ** 2 / draws
        of_grad += ((moved_g - g).norm() / g.norm()).item() ** 2 / draws
    return of_loss**0.5, of_grad**0.5


def _roundoff(case: Case) -> float:
    return torch.finfo(case.torch_dtype).eps / 2


def tolerance(case: Case, exact: Exact) -> Tolerance:
    """What a correct implementation with several roundings stays within, and a wrong one does not.

    With u the unit roundoff of the case's dtype, the gradients may be off by
      u |z|             logits rounded to the dtype: their exponentials err by as much of themselves
      3 u               probabilities, their product with g, and the result, rounded once each
      u sqrt(pairs) / 2 a sum kept in the dtype, added to once a pair: partial sums j / k of the whole, 0.42 u rms each
      4 noise           the log-probabilities, rounded, move g: four standard deviations
    and the loss by four standard deviations of its noise and by its own rounding. In fp32 the sums are what counts: n
    terms added one by one err by u sqrt(n) of the sum of their sizes (random signs; Higham, section 4.2), n up to the
    vocabulary, the tokens and D; four standard deviations of it, in three products one after another. Where terms
    cancel, as label and softmax do in a calibrated model, that is `condition` times as much of the result. One token
    too many moves the gradients by 1 / sqrt(N), a masked share by its root.
    """
    u = _roundoff(case)
    grad = u * (3 + exact.logit_rms + case.pairs**0.5 / 2) + 4 * exact.noise_grad
    sums = 3 * 4 * 2**-24 * max(case.V, case.N, case.D) ** 0.5 * max(exact.condition, 1)
    loss = 4 * exact.noise_loss / abs(exact.loss) + u
    return Tolerance(loss + sums, grad + sums)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius, block of rows by block of rows: no copy of either in float64. NaN where got has one."""
    got, exact = got.flatten(0, -2), exact.flatten(0, -2)
    step = max(1, CHUNK_BYTES // (8 * exact.shape[1]))
    wrong, size = 0.0, 0.0
    for mine, true in zip(got.split(step), exact.split(step), strict=True):
        true = true.double()
        wrong += (mine.double() - true).square().sum().item()
        size += true.square().sum().item()
    return (wrong / size) ** 0.5


def compare(result: Result, exact: Exact) -> Errors:
    loss, grad_hidden, grad_weight = result
    if loss is None:
        raise ValueError("got no loss to compare")
    return Errors(
        abs(loss.double().item() - exact.loss) / abs(exact.loss),
        None if grad_hidden is None else relative_error(grad_hidden, exact.grad_hidden),
        None if grad_weight is None else relative_error(grad_weight, exact.grad_weight),
    )


def refusal(errors: Errors, allowed: Tolerance) -> str:
    """Why the answer has no speed; "" if it has. NaN passes no comparison."""
    limits = zip(("loss", "dH", "dW"), errors, (allowed.loss, allowed.grad, allowed.grad), strict=True)
    wrong = [
        f"{name} is off by {e:.1e} of itself, allowed {t:.1e}" for name, e, t in limits if e is not None and not e <= t
    ]
    return "; ".join(wrong)
