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

from asft_kernels.core.sharded_linear import ShardedLinear
from asft_kernels.functional import fused_linear_logps
from asft_kernels.models.exact import exact_output
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
) -> tuple[LogitMap, float | None]:
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
        (scale and cap of the head, largest difference of the finite log-probabilities, None if there is none).

    Raises:
        UnsupportedHead: naming class, difference and way out, if the two differ by more than rounding explains, or the
            head cannot be fused.
    """
    name = type(causal_lm(model)).__name__
    with torch.no_grad(), evaluating(model):
        for last in (False, True):
            at_head = _AtHead(name, labels, shift, guess.at(temperature), options)
            _, output = run_to_head(model, call, at_head, _with_own_cache(inputs))
            logits = _logits_of(output, at_head.output, name)
            after = max(torch.finfo(x).eps / 2 for x in (logits.dtype, torch.float32))
            logits = logits.double()
            found = _found_map(logits[-1], name)
            used = found.but(*given)
            if last or _same(used, guess):
                break
            guess = used
    own = (logits[:-1] / temperature).log_softmax(-1).gather(-1, at_head.labels[:, None])[:, 0]
    fused = at_head.fused.double()
    broken = ~own.isfinite() & ~fused.isfinite()  # weights or labels that the losses will show
    if broken.all():
        return guess, None
    difference = (own - fused).abs()[~broken]
    allowed = _rounding(at_head, guess.at(temperature), logits[:-1] / temperature, after)[~broken]
    if not (difference <= allowed).all():  # written so that NaN fails too
        worst = int((difference / allowed).nan_to_num(nan=inf).argmax())
        raise UnsupportedHead(
            f"{name}: log-probabilities from hidden states and head differ from those of the model's own logits by up "
            f"to {difference[worst].item():.3g}, rounding explains {allowed[worst].item():.2g}. Its head does more "
            f"than scale (by {guess.logit_scale:g}) and cap (at {guess.softcap}) the output of one linear layer, or "
            "logit_scale and softcap were given wrongly: leave them out to have them found, or use another model; "
            "training on would optimise what this model does not compute"
        )
    return guess, difference.max().item()


class _AtHead:
    """At the head: its exact output for some tokens with the probes, and their fused log-probabilities."""

    def __init__(self, name: str, labels: Tensor, shift: bool, guess: LogitMap, options: Mapping[str, Any]):
        self.name, self.all_labels, self.shift, self.guess, self.options = name, labels, shift, guess, options

    def __call__(self, hidden: Tensor, head: Any) -> Tensor:
        hidden = last_positions(hidden, self.all_labels, self.name)
        rows, self.labels = _some_tokens(self.all_labels.to(hidden.device), self.shift)
        self.hidden = hidden.flatten(0, 1)[rows][None]
        try:
            self.exact = exact_output(head, self.hidden[0])
            self.fused = fused_linear_logps(
                self.hidden, head, self.labels[None], shift=False, **self.guess._asdict(), **self.options
            )[0]
        except ValueError as error:
            if not str(error).startswith("lm_head"):
                raise
            raise UnsupportedHead(f"{self.name}: its output head cannot be fused: {error}") from error
        # bitsandbytes' own rounds hidden states to 8 bits, or repacks the codes. A sharded head's is a plain layer's
        # (tensor_parallel.py), between changes of layout, or ours, and gathers.
        if not (self.exact.quantised or self.exact.is_sharded or isinstance(head, ShardedLinear)):
            self._like_its_own(own_forward(head)(_as_wide(self.hidden, head))[0])
        # In float64 the model's own arithmetic after the head adds no rounding of its own.
        self.output = self.exact.values[None]
        probes = self.output.new_zeros(1, 1, self.output.shape[-1])
        probes[..., 0], probes[..., -1] = SMALL, LARGE
        return torch.cat([self.output, probes], dim=1)

    def _like_its_own(self, own: Tensor) -> None:
        """Holds the exact output against what the head's own forward makes, within the rounding of that.

        Into its dtype it rounds the output and the bias' sum, and partial sums of at most |h| |w|: one of a plain
        layer (cuBLAS may reduce in it), and of PEFT's some 8, of both products, the scale, the norm and their sums.
        """
        exact, unit = self.exact, torch.finfo(own.dtype).eps / 2
        largest = exact.sizes * (8 if exact.is_adapted else 1)
        allowed = unit * (2 * exact.values.abs() + largest[:, None]) + exact.product_rounding[:, None]
        finite = exact.values.isfinite()
        difference = (own.double() - exact.values).abs().where(finite, 0)
        if not (difference <= allowed).where(finite, True).all():
            worst = int((difference / allowed).nan_to_num(nan=inf).argmax())
            raise UnsupportedHead(
                f"{self.name}: its output head's own forward differs from hidden states times weight by "
                f"{difference.flatten()[worst].item():.3g}, rounding explains "
                f"{allowed.expand_as(difference).flatten()[worst].item():.2g}: it does more than one linear layer; use "
                "another model, or compute the loss from its logits"
            )


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
    """(N + 1, V): what the model made of the (N, V) of its head and of the probes."""
    logits = output.get("logits") if isinstance(output, Mapping) else output[0]
    shape = (1, of_head.shape[1] + 1, of_head.shape[2])
    if not isinstance(logits, Tensor) or logits.shape != shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedHead(
            f"{name}: makes logits {got} of its head's output {shape}, need the same shape: a scale and a cap are all "
            "that may follow; compute the loss from its logits"
        )
    return logits[0]


def _found_map(probes: Tensor, name: str) -> LogitMap:
    scale, of_zero, largest = probes[0].item() / SMALL, probes[1].item(), probes[-1].item()
    if of_zero != 0:
        raise UnsupportedHead(
            f"{name}: does more than scale and cap its head's output: an output of 0 becomes a logit of {of_zero:.3g}; "
            "use another model, or compute the loss from its logits"
        )
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


def _rounding(at_head: _AtHead, used: LogitMap, logits: Tensor, after: float) -> Tensor:
    """How far each fused log-probability (N,) may lie from that of the model's logits (N, V), made of exact ones.

    logp = z_y - logsumexp(z) moves by at most 2 max|dz|. The fused product is rounded as `exact_output` says, which
    the scale magnifies. What follows the head may be in fp32, or in the dtype of the model's logits, of unit `after`: 4
    roundings of a logit. The fused path sums V exponentials in fp32, a relative error of up to sqrt(V) roundings, and
    rounds its fp32 result.
    """
    fp32_unit = torch.finfo(torch.float32).eps / 2
    largest = logits.abs().where(logits.isfinite(), 0).amax(-1)
    logit = abs(used.logit_scale) * at_head.exact.product_rounding + 4 * after * largest
    return 2 * logit + fp32_unit * (logits.shape[-1] ** 0.5 + 2 * at_head.fused.double().abs())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation; each is then as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
