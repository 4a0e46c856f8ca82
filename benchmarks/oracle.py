"""Loss, dH and dW of a case in float64 by plain torch, and how far from them an answer may be.

Token chunks of the full logits, none of our kernels: logp = log_softmax(z)[y], dz = g (onehot(y) - softmax(z)),
dH = dz W, dW = dz^T H, with g = dL/dlogp from autograd of the case's loss. The same once more in the case's dtype says
what plain torch itself is off by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.calls import Result
from benchmarks.cases import Case, Inputs
from benchmarks.losses import IGNORE, LOSSES
from benchmarks.tables import OURS

CHUNK_BYTES = 2**28  # of float64 logits
# How many times plain torch's error an answer may have. fp32: the order of sums alone; correct ones were seen 16 times
# off (a vocabulary of 128k summed chunk by chunk in place), TF32 is 300. Low precision: every rounding once more.
TIMES_PLAIN = {"float32": 30, "bfloat16": 2, "float16": 2}


class Errors(NamedTuple):
    """Of the loss relative, of the gradients relative in the Frobenius norm; None where there is nothing to compare."""

    loss: float
    grad_hidden: float | None
    grad_weight: float | None


class Exact(NamedTuple):
    """plain_loss, plain_grad: the errors of plain torch in the case's dtype, of the worse gradient.
    noise_loss, noise_grad: what rounding each token's log-probability and its logits to the case's dtype does to the
    loss (absolute) and, through g, to the gradients (relative): the standard deviation, by random draws.
    """

    loss: float
    grad_hidden: Tensor  # (2B, T, D)
    grad_weight: Tensor  # (V, D)
    logit_max: float
    plain_loss: float
    plain_grad: float
    noise_loss: float
    noise_grad: float


class Tolerance(NamedTuple):
    loss: float
    grad: float


class Answer(NamedTuple):
    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    logp: Tensor  # (2B, T)
    g: Tensor  # (2B, T)
    logit_max: float
    logit_rms: float


def exact_answer(case: Case, inputs: Inputs) -> Exact:
    """In float64 on the inputs' device. The gradients of low-precision cases are kept in fp32 (error 2**-24)."""
    kept = torch.float64 if case.dtype == "float32" else torch.float32
    true = _answer(case, inputs, torch.float64, torch.float64)
    noise = _noise(case, true, inputs.labels)
    true = true._replace(grad_hidden=true.grad_hidden.to(kept), grad_weight=true.grad_weight.to(kept))
    plain = _answer(case, inputs, torch.float32, case.torch_dtype)
    of_grad = max(
        relative_error(plain.grad_hidden, true.grad_hidden), relative_error(plain.grad_weight, true.grad_weight)
    )
    of_loss = abs(plain.loss.item() / true.loss.item() - 1)
    return Exact(true.loss.item(), true.grad_hidden, true.grad_weight, true.logit_max, of_loss, of_grad, *noise)


def _answer(case: Case, inputs: Inputs, computed: torch.dtype, rounded: torch.dtype) -> Answer:
    """Products in the dtype `computed`, every result rounded to the dtype `rounded`, as plain torch does in it."""

    def result(x: Tensor) -> Tensor:
        return x.to(rounded).to(computed)

    mask = inputs.labels != IGNORE
    hidden, labels, weight = inputs.hidden[mask].to(computed), inputs.labels[mask], inputs.weight.to(computed)
    chunk = max(1, CHUNK_BYTES // (8 * len(weight)))
    chunks = [slice(k, k + chunk) for k in range(0, len(labels), chunk)]
    logps, squares, largest = [], 0.0, 0.0
    for part in chunks:
        z = result(hidden[part] @ weight.T)
        squares += z.square().sum().item()
        largest = max(largest, z.aminmax().max.item(), -z.aminmax().min.item())
        logps.append(result(z.log_softmax(1).gather(1, labels[part, None])[:, 0]))
    logp = torch.zeros(mask.shape, dtype=computed, device=mask.device)
    logp = logp.masked_scatter(mask, torch.cat(logps)).requires_grad_()
    loss = LOSSES[case.loss](logp, inputs.labels)
    g = result(torch.autograd.grad(loss, logp)[0])

    grad_rows, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for part in chunks:
        dz = result((result(hidden[part] @ weight.T)).log_softmax(1)).exp_().neg_()
        dz[torch.arange(len(dz)), labels[part]] += 1
        dz = result(dz.mul_(g[mask][part, None]))
        grad_rows[part] = result(dz @ weight)
        grad_weight.addmm_(dz.T, hidden[part])
    grad_hidden = torch.zeros(inputs.hidden.shape, dtype=computed, device=hidden.device)
    grad_hidden[mask] = grad_rows
    rms = (squares / (len(labels) * len(weight))) ** 0.5
    return Answer(loss.detach(), grad_hidden, result(grad_weight), logp.detach(), g, largest, rms)


def _noise(case: Case, true: Answer, labels: Tensor, draws: int = 16) -> tuple[float, float]:
    generator = torch.Generator(labels.device).manual_seed(0)
    size = _roundoff(case) * (true.logp.abs() + true.logit_rms) * (labels != IGNORE)
    of_loss, of_grad = 0.0, 0.0
    for _ in range(draws):
        off = torch.randn(size.shape, dtype=size.dtype, device=size.device, generator=generator)
        moved = (true.logp + size * off).requires_grad_()
        loss = LOSSES[case.loss](moved, labels)
        (g,) = torch.autograd.grad(loss, moved)
        of_loss += (loss - true.loss).item() ** 2 / draws
        of_grad += ((g - true.g).norm() / true.g.norm()).item() ** 2 / draws
    return of_loss**0.5, of_grad**0.5


def _roundoff(case: Case) -> float:
    return torch.finfo(case.torch_dtype).eps / 2


def tolerance(case: Case, exact: Exact, package: str) -> Tolerance:
    """What a correct implementation with its own order of sums stays within, and a wrong one does not.

    The largest of what this package claims of itself in fp32 (2e-6, and more in proportion where logits pass 32), of
    TIMES_PLAIN times plain torch's error, and of four standard deviations of the noise: one answer of plain torch may
    be right by luck where the loss is the small difference of large sums. A sum of gradients kept in a low-precision
    dtype, added to once a pair, errs by u sqrt(pairs) / 2 more, with u the unit roundoff: partial sums j / k of the
    whole, 0.42 u rms each. One wrong token of N moves the gradients by 1 / sqrt(N).

    package: of the contestant. This one gets no multiple of plain torch's error in fp32: it is held to what it claims.
    """
    times, u = TIMES_PLAIN[case.dtype], _roundoff(case)
    if package == OURS and case.dtype == "float32":
        times = 1
    claimed = 2e-6 * max(1.0, exact.logit_max / 32) if case.dtype == "float32" else u
    loss = max(claimed, times * exact.plain_loss, 4 * exact.noise_loss / abs(exact.loss) + u)
    grad = max(claimed, times * exact.plain_grad, 4 * exact.noise_grad)
    return Tolerance(loss, grad + u * case.pairs**0.5 / 2)


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
