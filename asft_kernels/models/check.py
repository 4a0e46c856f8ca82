"""What a model makes of its head's output, found out on a batch, and whether we compute the same.

A pass without gradients, dropout off: where the head is called it works on a few tokens of the batch, and its output
goes on through the model's own forward with a row of probes beside it. What becomes of the probes is the model's scale
and cap; what becomes of the rest are its own logits.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf, isclose
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asft_kernels.functional import fused_linear_logps
from asft_kernels.models.positions import last_positions
from asft_kernels.models.seam import UnsupportedHead, causal_lm, own_forward, run_to_head

CHECKED_TOKENS = 8  # (9, V) logits in float64: 11 MB at V = 151936
# Powers of two, so that their scaled values are exact. A cap bends the small one by some 10^-13; the large one is past
# every cap.
SMALL, LARGE = 2.0**-20, 2.0**20


class LogitMap(NamedTuple):
    """z = softcap * tanh(logit_scale * (h.W + b) / softcap); no cap for None."""

    logit_scale: float
    softcap: float | None

    def at(self, temperature: float) -> "LogitMap":
        """The map to z / temperature."""
        return LogitMap(self.logit_scale / temperature, None if self.softcap is None else self.softcap / temperature)

    def but(self, logit_scale: float | None, softcap: float | None) -> "LogitMap":
        """The same with what a caller says otherwise, None where he says nothing."""
        return LogitMap(
            self.logit_scale if logit_scale is None else logit_scale, self.softcap if softcap is None else softcap
        )


def check_head(
    model: Any,
    call: Callable[..., Any],
    labels: Tensor,
    inputs: Mapping[str, Any],
    *,
    shift: bool,
    guess: LogitMap,
    given: tuple[float | None, float | None],
    temperature: float,
    options: Mapping[str, Any],
) -> tuple[LogitMap, float]:
    """Compares fused log-probabilities of a few tokens with log_softmax of the model's own logits.

    Args:
        model, call, inputs: as `run_to_head` takes them.
        labels: (R, T) integers, -100 where there is no loss.
        shift: whether position t predicts label t+1.
        guess: what the head may do, say by its config; a good one spares the second pass.
        given: logit_scale and softcap as the user has them, None for what is to be found out.
        temperature: what logits are divided by.
        options: keywords of `fused_linear_logps`, as in training: backend, cache_bytes, chunk_size.

    Returns:
        (scale and cap of the head, largest difference of the log-probabilities).

    Raises:
        UnsupportedHead: naming class, difference and way out, if the two differ by more than rounding explains, or the
            head cannot be fused.
    """
    name = type(causal_lm(model)).__name__
    with torch.no_grad(), _evaluating(model):
        for last in (False, True):
            at_head = _AtHead(name, labels, shift, guess.at(temperature), options)
            _, output = run_to_head(model, call, at_head, _with_own_cache(inputs))
            logits = _logits_of(output, at_head.output, name)
            found = _found_map(logits[-1], name)
            used = found.but(*given)
            if last or _same(used, guess):
                break
            guess = used
    own = (logits[:-1] / temperature).log_softmax(-1).gather(-1, at_head.labels[:, None])[:, 0]
    finite = own.isfinite()
    if not finite.all() and finite.equal(at_head.fused.isfinite()):  # broken weights, which the losses will show
        return guess, 0.0
    difference = (own - at_head.fused.double()).abs().max().item()
    allowed = _rounding(at_head, guess.at(temperature), logits[:-1] / temperature)
    if not difference <= allowed:  # written so that NaN fails too
        raise UnsupportedHead(
            f"{name}: log-probabilities from hidden states and head differ from those of the model's own logits by up "
            f"to {difference:.3g}, rounding explains {allowed:.2g}. Its head does more than scale (by "
            f"{guess.logit_scale:g}) and cap (at {guess.softcap}) the output of one linear layer, or logit_scale and "
            "softcap were given wrongly: leave them out to have them found, or use another model; training on would "
            "optimise what this model does not compute"
        )
    return guess, difference


class _AtHead:
    """At the head: its own output for some tokens with the probes, and their fused log-probabilities."""

    def __init__(self, name: str, labels: Tensor, shift: bool, guess: LogitMap, options: Mapping[str, Any]):
        self.name, self.all_labels, self.shift, self.guess, self.options = name, labels, shift, guess, options

    def __call__(self, hidden: Tensor, head: Any) -> Tensor:
        hidden = last_positions(hidden, self.all_labels, self.name)
        rows, self.labels = _some_tokens(self.all_labels.to(hidden.device), self.shift)
        self.hidden = hidden.flatten(0, 1)[rows][None]
        self.output = own_forward(head)(_as_wide(self.hidden, head))
        self.widest = _largest_row(head, self.hidden, self.output)
        try:
            self.fused = fused_linear_logps(
                self.hidden, head, self.labels[None], shift=False, **self.guess._asdict(), **self.options
            )[0]
        except ValueError as error:
            if not str(error).startswith("lm_head"):
                raise
            raise UnsupportedHead(f"{self.name}: its output head cannot be fused: {error}") from error
        # In float64 the model's own arithmetic after the head adds no rounding of its own.
        probes = self.output.new_zeros(1, 1, self.output.shape[-1], dtype=torch.float64)
        probes[..., 0], probes[..., -1] = SMALL, LARGE
        return torch.cat([self.output.double(), probes], dim=1)


def _as_wide(hidden: Tensor, head: Any) -> Tensor:
    """In the dtype of a wider head, which no linear layer takes by itself: an fp32 head over a bf16 body."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or torch.is_autocast_enabled(hidden.device.type):
        return hidden
    return hidden.to(weight.dtype) if torch.promote_types(hidden.dtype, weight.dtype) == weight.dtype else hidden


def _with_own_cache(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with a copy of a cache that this pass may lengthen: prefix tuning hands one in."""
    cache = inputs.get("past_key_values")
    if cache is None:
        return inputs
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return {**inputs, "past_key_values": cache}


def _some_tokens(labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """(rows among the R * T positions, their labels), those that carry loss, spread over the batch."""
    if shift:
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    flat = labels.flatten()
    rows = (flat != -100).nonzero()[:, 0]
    if not len(rows):  # the head can be held against any label
        rows = torch.arange(len(flat), device=flat.device)
    rows = rows[torch.linspace(0, len(rows) - 1, min(CHECKED_TOKENS, len(rows)), device=flat.device).long()]
    return rows, flat[rows].where(flat[rows] != -100, 0)


def _logits_of(output: Any, of_head: Tensor, name: str) -> Tensor:
    """(N + 1, V) float64: what the model made of the (N, V) of its head and of the probes."""
    logits = output.get("logits") if isinstance(output, Mapping) else output[0]
    shape = (1, of_head.shape[1] + 1, of_head.shape[2])
    if not isinstance(logits, Tensor) or logits.shape != shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedHead(
            f"{name}: makes logits {got} of its head's output {shape}, need the same shape: a scale and a cap are all "
            "that may follow; compute the loss from its logits"
        )
    return logits[0].double()


def _found_map(probes: Tensor, name: str) -> LogitMap:
    scale, largest = probes[0].item() / SMALL, probes[-1].item()
    if not 0 < abs(scale) < inf:
        raise UnsupportedHead(f"{name}: its logits do not follow its head's output; compute the loss from its logits")
    # fp16 overflows at the large probe.
    capped = abs(largest) < abs(scale) * LARGE / 2
    return LogitMap(scale, abs(largest) if capped else None)


def _same(one: LogitMap, other: LogitMap) -> bool:
    """Up to fp32's rounding, in which many models scale."""
    caps = one.softcap is None, other.softcap is None
    return isclose(one.logit_scale, other.logit_scale, rel_tol=1e-6) and (
        all(caps) or (not any(caps) and isclose(one.softcap or 0, other.softcap or 0, rel_tol=1e-6))
    )


def _largest_row(head: Any, hidden: Tensor, output: Tensor) -> float:
    """Norm of the longest row of the head's weight; of a head that has none to read, what its output allows."""
    weight = getattr(head, "weight", None)
    reached = output.abs().max().item() / max(_norms(hidden).min().item(), 1e-30)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.shape[-1:] == hidden.shape[-1:]:
        return max(reached, _norms(weight).max().item())
    return reached * hidden.shape[-1] ** 0.5  # a random direction meets 1 / sqrt(D) of a row


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))


def _rounding(at_head: _AtHead, used: LogitMap, logits: Tensor) -> float:
    """How far two correct computations of the same log-probability may lie apart.

    logp = z_y - logsumexp(z) moves by at most 2 max|dz|. The head rounds its output into its dtype once, u max|z|,
    u = eps / 2. The product's own rounding is that of sqrt(D) accumulated fp32 terms (TF32 inputs where the user
    allows it), of size |h| |w|, in either path; the scale magnifies both. What follows the head may be in fp32: 4
    roundings of a logit. The fused path sums V exponentials in fp32, a relative error of up to sqrt(V) roundings, and
    rounds its fp32 result.
    """
    hidden, output, scale = at_head.hidden, at_head.output, abs(used.logit_scale)
    fp32_unit = torch.finfo(torch.float32).eps / 2
    product = 2 * product_unit(output.is_cuda) * hidden.shape[-1] ** 0.5 * _norms(hidden).max().item() * at_head.widest
    stored = torch.finfo(output.dtype).eps / 2 * output.abs().max().item()
    logit = scale * (product + stored) + 4 * fp32_unit * logits.abs().max().item()
    return 2 * logit + fp32_unit * (output.shape[-1] ** 0.5 + 2 * at_head.fused.abs().max().item())


def product_unit(on_gpu: bool) -> float:
    """Rounding unit of a matrix product's fp32 inputs: TF32's where the user allows it.

    Not `allow_tf32`: reading that raises once anyone (transformers' --tf32) has set fp32_precision.
    """
    if on_gpu and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2.0**-11
    return torch.finfo(torch.float32).eps / 2


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
