"""Random calls of the public functions beside an oracle of torch alone (plain_losses.py): values and gradients.

ASFT_KERNELS_FUZZ=20000 python -m pytest tests/test_fuzz.py -n logical    so many examples a test, anew each time
"""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asft_kernels import fused_asft_loss, fused_linear_logps, fused_preference_loss
from asft_kernels.backends import triton_runs_on_cpu
from asft_kernels.objectives import get_objective
from bounds import entry_bound, unit_roundoff
from plain_losses import PAIRS, Rows, capped, label_logps, losses_of, reduced, saturated, tokens_of

DEEP = int(os.environ.get("ASFT_KERNELS_FUZZ", 0))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ["sft", *PAIRS]
HAS_NLL = ["asft", "orpo", "cpo"]
HAS_REFERENCE = ["dpo", "robust", "ipo", "sigmoid_norm", "hinge_norm", "sppo_hard", "nca_pair", "apo_zero", "apo_down"]
RANGES = {  # of each parameter of an objective
    "lam": st.floats(0, 2), "beta": st.floats(0.05, 2), "sft_weight": st.floats(0, 2), "gamma": st.floats(0.01, 1),
    "alpha": st.floats(0, 2), "label_smoothing": st.floats(0, 0.45),
}  # fmt: skip


def profile(examples: int) -> settings:
    """The same examples each time, unless many are asked for."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=DEEP or examples, deadline=None, derandomize=not DEEP, suppress_health_check=slow)


@dataclass
class Call:
    """A batch with its head, and keywords of any call."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    borders: list[int]  # of the sequences in the flat labels
    options: dict[str, Any]
    generator: torch.Generator
    leaves: list[Tensor] = field(default_factory=list)  # those that are trained

    @property
    def head(self) -> Any:
        return self.weight if self.bias is None else (self.weight, self.bias)

    @property
    def ignore(self) -> int:
        return self.options["ignore_index"]

    @property
    def shift(self) -> bool:
        return self.options["shift"]

    def tokens(self, labels: Tensor | None = None):
        return tokens_of(self.labels if labels is None else labels, self.borders, self.ignore, self.shift)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


@st.composite
def calls(draw, packed=None, dtypes=DTYPES) -> Call:
    rows, T = 2 * draw(st.integers(1, 3)), draw(st.integers(1, 7))
    D, V = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 5, 8, 13, 31, 40]))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    packed = draw(st.booleans()) if packed is None else packed
    lengths = torch.randint(0, T + 1, (rows,), generator=g).tolist() if packed else [T] * rows
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    shape = (borders[-1],) if packed else (rows, T)
    spread = draw(st.sampled_from([0.0, 0.3, 1.0, 4.0]))
    hidden = torch.randn(*shape, D, generator=g).to(dtype)
    of_head = draw(st.sampled_from([dtype, dtype, torch.float32])) if dtype != torch.float64 else dtype
    weight = (torch.randn(V, D, generator=g) * spread).to(of_head)
    bias = (torch.randn(V, generator=g) * spread).to(of_head) if draw(st.booleans()) else None
    ignore = draw(st.sampled_from([-100, -1, 0, V, V + 7]))
    labels = torch.randint(V, shape, generator=g)
    labels[torch.rand(shape, generator=g) > draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))] = ignore
    if draw(st.booleans()):
        hidden, weight = hidden.mT.contiguous().mT, weight.T.contiguous().T
    leaves = [x for x in (hidden, weight, bias) if x is not None and draw(st.sampled_from([True, True, False]))]
    options = {
        "shift": draw(st.booleans()), "ignore_index": ignore, "cu_seqlens": None,
        "logit_scale": draw(st.sampled_from([1.0, 0.37, -1.6])),
        "softcap": draw(st.sampled_from([None, None, 1.5, 20.0])),
        "chunk_size": draw(st.none() | st.integers(1, V + 2)),
        "cache_bytes": draw(st.sampled_from([None, 0, 150, 600])),
        "num_valid": None,
    }  # fmt: skip
    if packed:
        options["cu_seqlens"] = torch.tensor(borders, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    call = Call(hidden, weight, bias, labels, borders, options, g, [x.requires_grad_() for x in leaves])
    if draw(st.booleans()):
        options["num_valid"] = sum(map(len, call.tokens())) + draw(st.sampled_from([0, 1, 5, 1000]))
    return call


def roundings(call: Call) -> float:
    options = call.options
    return entry_bound(call.hidden, call.weight, call.bias, scale=options["logit_scale"], cap=options["softcap"])


def exact_logps(call: Call, tokens) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of the tokens, differentiable in the (N, V) logits before scale and cap, and those."""
    rows = torch.tensor([x.row for x in tokens], dtype=torch.int64)
    labels = torch.tensor([x.label for x in tokens], dtype=torch.int64)
    with torch.no_grad():
        raw = call.hidden.double().flatten(0, -2)[rows] @ call.weight.double().T
        raw = raw if call.bias is None else raw + call.bias.double()
    raw.requires_grad_()
    return label_logps(capped(raw, call.options["logit_scale"], call.options["softcap"]), labels), raw


def assert_logps(call: Call, got: Tensor, exact: Tensor, tokens) -> None:
    rows = torch.tensor([x.row for x in tokens], dtype=torch.int64)
    everywhere = torch.zeros(call.labels.numel(), dtype=torch.float64).index_copy(0, rows, exact.detach())
    assert got.shape == call.labels.shape
    assert got.dtype == (torch.float64 if call.hidden.dtype == torch.float64 else torch.float32)
    # Of ln(1 + e^x): the error of x, and relative to e^x where that is small; then a rounding of the result.
    allowed = everywhere.abs().clamp(max=1) * 2 * roundings(call) + everywhere.abs() * torch.finfo(got.dtype).eps
    allowed += torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # what is below it may be 0
    assert ((got.detach().flatten().double() - everywhere).abs() <= allowed).all()


def logps_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def assert_gradients(call: Call, got: tuple[Tensor, ...], logps: Tensor, raw: Tensor, upstream: Tensor, tokens) -> None:
    """upstream: the gradient of each log-probability, exact to 40 more roundings."""
    G = torch.autograd.grad(logps, raw, upstream)[0] if len(tokens) else raw.detach()
    # Where an entry is the difference of two, the error is that of both: the label's is 1 - p, found as a sum.
    rows = torch.tensor([x.row for x in tokens], dtype=torch.int64)
    H = call.hidden.detach().flatten(0, -2).double()
    W = call.weight.detach().double()

    def spread(x: Tensor) -> Tensor:
        return torch.zeros_like(H).index_add(0, rows, x).view(call.hidden.shape)

    exact = {id(call.hidden): spread(G @ W), id(call.weight): G.T @ H[rows], id(call.bias): G.sum(0)}
    size = {
        id(call.hidden): spread(G.abs() @ W.abs()), id(call.weight): G.abs().T @ H[rows].abs(),
        id(call.bias): G.abs().sum(0),
    }  # fmt: skip
    for leaf, grad in zip(call.leaves, got, strict=True):
        right = exact[id(leaf)]
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        once = right.abs() * unit_roundoff(leaf.dtype) * 1.01 if leaf.dtype.itemsize == 2 else 0.0
        # The spacing of subnormals, of the gradient and of 1 - p, which 42 upstreams of 2 and inputs of 24 multiply.
        least = torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps
        least += 2000 * torch.finfo(logps_dtype(leaf)).smallest_normal * torch.finfo(logps_dtype(leaf)).eps
        of_losses = 40 * unit_roundoff(torch.float32) * (leaf.dtype != torch.float64)
        allowed = 1.01 * (4 * roundings(call) + of_losses) * size[id(leaf)]
        assert ((grad.double() - right).abs() <= allowed + once + least).all()


@profile(120)
@given(call=calls())
def test_logps(call):
    tokens = [x for row in call.tokens() for x in row]
    logps = fused_linear_logps(call.hidden, call.head, call.labels, **call.options)
    exact, raw = exact_logps(call, tokens)
    assert_logps(call, logps, exact, tokens)
    assert logps.requires_grad == bool(call.leaves)
    if not call.leaves:
        return
    upstream = call.uniform(*call.labels.shape) * 4 - 2  # also where no token stands: ignored there
    rows = torch.tensor([x.row for x in tokens], dtype=torch.int64)
    got = torch.autograd.grad(logps, call.leaves, upstream.to(logps.dtype))
    assert_gradients(call, got, exact, raw, upstream.to(logps.dtype).double().flatten()[rows], tokens)


@pytest.mark.skipif(not triton_runs_on_cpu(), reason="Triton has nothing to run on here")
@profile(40)
@given(call=calls(dtypes=[torch.float32]))
def test_logps_of_kernels(call):
    tokens = [x for row in call.tokens() for x in row]
    logps = fused_linear_logps(call.hidden, call.head, call.labels, **call.options, backend="triton")
    exact, raw = exact_logps(call, tokens)
    assert_logps(call, logps, exact, tokens)
    if call.leaves:
        upstream = (call.uniform(*call.labels.shape) * 4 - 2).float()
        rows = torch.tensor([x.row for x in tokens], dtype=torch.int64)
        got = torch.autograd.grad(logps, call.leaves, upstream)
        assert_gradients(call, got, exact, raw, upstream.double().flatten()[rows], tokens)


@profile(240)
@given(call=calls(), name=st.sampled_from(NAMES), data=st.data())
def test_losses(call, name, data):
    """Each loss in its closed form of the call's own log-probabilities, which test_logps holds against float64."""
    options, labels = dict(call.options), call.labels
    of_rows = [len(row) for row in call.tokens()]
    given: dict[str, Any] = {}
    weights = torch.ones(labels.numel(), dtype=torch.float64)
    if data.draw(st.booleans(), label="weights"):
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        given["token_weights"] = call.uniform(*labels.shape).to(dtype)
        weights = given["token_weights"].double().flatten()
    refs = (-2 * call.uniform(len(of_rows)) * torch.tensor(of_rows)).tolist()
    if name in HAS_REFERENCE:
        given["ref_logps"] = torch.tensor(refs, dtype=torch.float64)
    union, nll = labels, None
    if name in HAS_NLL and options["cu_seqlens"] is None and data.draw(st.booleans(), label="nll"):
        half = len(labels) // 2
        extra = torch.randint(len(call.weight), (half, labels.shape[1]), generator=call.generator)
        extra[call.uniform(*extra.shape) > data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = call.ignore
        both = (labels[:half] != call.ignore) & (extra != call.ignore)
        given["nll_labels"] = nll = torch.where(both, labels[:half], extra)
        union = labels.clone()
        union[:half] = torch.where(labels[:half] == call.ignore, nll, labels[:half])
    tokens = call.tokens(union)
    if options["num_valid"] is not None:
        options["num_valid"] += sum(map(len, tokens)) - sum(of_rows)
    parameters = {x: data.draw(RANGES[x], label=x) for x in parameters_of(name)}

    with torch.no_grad():
        fused = fused_linear_logps(call.hidden, call.head, union, **call.options | {"num_valid": options["num_valid"]})
    logps = fused.double().flatten().requires_grad_()
    own = [{x.at for x in row} for row in call.tokens()]
    sums = [
        sum((logps[x.row] * weights[x.at] for x in row if x.at in own[i]), torch.zeros((), dtype=torch.float64))
        for i, row in enumerate(tokens)
    ]
    rows = Rows(sums, of_rows, [-s / max(n, 1) for s, n in zip(sums, of_rows, strict=True)], refs)
    if nll is not None:
        padded = torch.cat([nll, torch.full_like(nll, call.ignore)])
        nll_rows = call.tokens(padded)
        rows.nll = [
            -sum((logps[x.row] for x in row), torch.zeros((), dtype=torch.float64)) / max(len(row), 1)
            for row in nll_rows
        ]
    assume(name not in ("asft", "orpo") or not saturated(rows))
    losses, counts = losses_of(name, rows, parameters)
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction")
    truth = reduced(losses, counts, reduction)

    if name == "asft" and not given and data.draw(st.booleans(), label="by name"):
        loss = fused_asft_loss(call.hidden, call.head, labels, **parameters, reduction=reduction, **options)
    else:
        objective = get_objective(name, **parameters)
        loss = fused_preference_loss(
            call.hidden, call.head, labels, objective, reduction=reduction, **given, **options
        )  # fmt: skip
    # Sums of up to 7 float64 numbers; a result of fp32 is rounded once.
    eps = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=eps + 1e-12, atol=1e-11)
    if not call.leaves or not loss.requires_grad:
        assert not call.leaves
        return
    upstream = call.uniform(*truth.shape) * 4 - 2
    upstream = upstream.to(loss.dtype)
    got = torch.autograd.grad(loss, call.leaves, upstream)
    (of_logps,) = torch.autograd.grad(truth, logps, upstream.double()) if truth.requires_grad else (0 * logps,)
    flat = [x for row in tokens for x in row]
    exact, raw = exact_logps(call, flat)
    at = torch.tensor([x.row for x in flat], dtype=torch.int64)
    assert_gradients(call, got, exact, raw, of_logps[at], flat)


def parameters_of(name: str) -> list[str]:
    code = PAIRS[name].__code__ if name in PAIRS else None
    return list(code.co_varnames[3 : code.co_argcount]) if code else []


def test_the_oracle_can_disagree():
    """A token left out, a sign, a row too far: each is seen."""
    call = calls_example()
    exact, _ = exact_logps(call, tokens := [x for row in call.tokens() for x in row])
    got = fused_linear_logps(call.hidden, call.head, call.labels, **call.options)
    assert_logps(call, got, exact, tokens)
    for wrong in (-got, got.roll(1, dims=1), got * (1 + 1e-9), torch.where(got == got.min(), 0, got)):
        with pytest.raises(AssertionError):
            assert_logps(call, wrong, exact, tokens)


def calls_example() -> Call:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((2, 5, 4), (11, 4)))
    labels = torch.randint(11, (2, 5), generator=g)
    options = {"shift": True, "ignore_index": -100, "logit_scale": 1.0, "softcap": None}
    return Call(hidden, weight, None, labels, [0, 5, 10], options, g)
