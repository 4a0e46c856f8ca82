"""The public calls as a whole against the plain reference, on every backend that runs here."""

import inspect
import os
import re
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asft_kernels import (
    FusedASFTLoss,
    fused_asft_loss,
    fused_linear_logps,
    fused_preference_loss,
    get_objective,
    reference,
)
from asft_kernels.core.options import KEYWORDS, Keywords, Options
from asft_kernels.methods.dnpo.noisy_logps import fused_noisy_linear_logps
from asft_kernels.objectives import ASFT
from asft_kernels.objectives.base import LossTerms
from bounds import fp32_bound, relative_error, rounded_once
from cases import IGNORE, figures, make_case, packed

BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.interpreter),
    pytest.param("triton", marks=[pytest.mark.emulated, pytest.mark.slow], id="triton-emulated"),
]
# The kernels are emulated one by one (tests/test_kernels.py); together in one test, and in all in `slow`.
EVERYWHERE = [*BACKENDS[:2], pytest.param("triton", marks=pytest.mark.emulated, id="triton-emulated")]
# fp32 sums of a few dozen terms and some 40 logits of size 10: well inside the bound for |z| <= 32.
FP32 = fp32_bound(32)


def bound(exact: torch.Tensor, dtype: torch.dtype, backend: str) -> float:
    """In units of one rounding of the exact gradient: 1.1 (torch), 1.9 (Triton with bf16: a row of dW that one token
    dominates sees three roundings, of E, of the scaled hidden row and its own: sqrt(3), and a tenth for the draw)."""
    if dtype == torch.float32:
        return FP32
    factor = 1.9 if backend == "triton" and dtype == torch.bfloat16 else 1.1
    return factor * rounded_once(exact, dtype)


@pytest.fixture(autouse=True)
def _on_the_gpu():
    """Where there is one, what a test makes stands there."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def small(dtype=torch.float32, **more):
    case = make_case(**({"rows": 4, "T": 9, "D": 20, "V": 75} | more), dtype=dtype)
    return case.on("cuda") if torch.cuda.is_available() else case


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loss_outputs_and_gradients(backend, dtype):
    case = small(dtype, bias=True)
    case.labels[3] = IGNORE  # a pair that does not count
    exact = case.to(torch.float64)
    options = {"lam": 0.7, "beta": 0.5, "sft_weight": 0.3, "logit_scale": 0.8, "softcap": 6.0, "return_outputs": True}
    loss, out = fused_asft_loss(case.hidden, case.head, case.labels, **options, backend=backend, chunk_size=40)
    truth, plain = reference.fused_asft_loss(exact.hidden, exact.head, exact.labels, **options)
    assert relative_error(loss, truth) <= FP32
    for name, value in figures(out).items():
        assert relative_error(value, getattr(plain, name)) <= FP32, name
        assert not value.requires_grad, name
    grads = torch.autograd.grad(loss, case.leaves)
    for got, right in zip(grads, torch.autograd.grad(truth, exact.leaves), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, right) <= bound(right, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("beta", "sft_weight"), [(0.001, 0.0), (1.0, 1.0)])
def test_beta_and_second_stage(backend, beta, sft_weight):
    case = small()
    exact = case.to(torch.float64)
    loss = fused_asft_loss(case.hidden, case.head, case.labels, beta=beta, sft_weight=sft_weight, backend=backend)
    truth = reference.fused_asft_loss(exact.hidden, exact.head, exact.labels, beta=beta, sft_weight=sft_weight)
    assert relative_error(loss, truth) <= FP32
    for got, right in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(truth, exact.leaves), strict=True
    ):
        assert relative_error(got, right) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_answers(backend):
    """p = 1 to 1e-8 on both sides: past the floor value and gradient go on, finite and not 0."""
    hidden = torch.tensor([[[1.0], [0.0]], [[1.0], [0.0]]], requires_grad=True)
    weight = torch.tensor([[20.0], [0.0], [0.0]], requires_grad=True)
    labels = torch.tensor([[IGNORE, 0], [IGNORE, 0]])
    leaves = [hidden, weight]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for beta in (0.1, 1.0):
        loss = fused_asft_loss(*leaves, labels, beta=beta, backend=backend)
        truth = reference.fused_asft_loss(*exact, labels, beta=beta)
        assert relative_error(loss, truth) <= FP32
        grads = torch.autograd.grad(loss, leaves)
        assert all(g.abs().max() > 0 for g in grads)
        for got, right in zip(grads, torch.autograd.grad(truth, exact), strict=True):
            assert relative_error(got, right) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_pairs_that_do_not_count(backend, reduction):
    case = small(rows=6)
    case.labels[1] = IGNORE  # chosen of pair 1 empty
    case.labels[5] = IGNORE  # rejected of pair 2 empty
    exact = case.to(torch.float64)
    loss, out = fused_asft_loss(
        case.hidden, case.head, case.labels, reduction=reduction, backend=backend, return_outputs=True
    )
    truth = reference.fused_asft_loss(exact.hidden, exact.head, exact.labels, reduction=reduction)
    assert out.num_pairs == 1
    assert relative_error(loss, truth) <= FP32
    if reduction == "none":
        assert (loss[1:] == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), case.hidden)
    assert (grad[[1, 2, 4, 5]] == 0).all()
    assert (grad[[0, 3]] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend):
    case = small(dtype=torch.float32)
    hidden, labels, cu_seqlens = packed(case)
    exact = reference.fused_asft_loss(hidden.double(), case.weight.double(), labels, cu_seqlens=cu_seqlens)
    assert (
        relative_error(fused_asft_loss(hidden, case.head, labels, cu_seqlens=cu_seqlens, backend=backend), exact)
        <= FP32
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_logps(backend):
    case = small(rows=3)
    logps = fused_linear_logps(case.hidden, case.head, case.labels, backend=backend)
    exact = reference.fused_linear_logps(case.hidden.double(), case.weight.double(), case.labels)
    assert relative_error(logps, exact) <= FP32
    assert torch.equal(logps == 0, exact == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_num_valid_and_upstream_gradient(backend):
    case = small()
    loss = fused_asft_loss(case.hidden, case.head, case.labels, backend=backend)
    bounded = fused_asft_loss(case.hidden, case.head, case.labels, backend=backend, num_valid=30)
    upstream = torch.tensor(-1.7)
    for a, b in zip(
        torch.autograd.grad(loss, case.leaves, upstream),
        torch.autograd.grad(bounded, case.leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_sft_objective():
    case = small(rows=3)
    exact = case.to(torch.float64)
    loss, out = fused_preference_loss(case.hidden, case.head, case.labels, "sft", return_outputs=True)
    truth, plain = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, "sft", return_outputs=True)
    assert relative_error(loss, truth) <= FP32
    for name in figures(out):
        assert relative_error(getattr(out, name), getattr(plain, name)) <= FP32
    with pytest.raises(ValueError, match="objective: got 'nosuch', need one of 'asft', "):
        reference.fused_preference_loss(case.hidden, case.head, case.labels, "nosuch")


def test_objective_by_name_or_object_is_fused_asft_loss():
    case = small()
    expected = fused_asft_loss(case.hidden, case.head, case.labels, lam=1.0)
    assert torch.equal(fused_preference_loss(case.hidden, case.head, case.labels, "asft"), expected)
    assert torch.equal(fused_preference_loss(case.hidden, case.head, case.labels, ASFT()), expected)
    assert torch.equal(
        reference.fused_preference_loss(case.hidden, case.head, case.labels, "asft"),
        reference.fused_asft_loss(case.hidden, case.head, case.labels),
    )


class SumDPO:
    """What a user would bring: DPO on sums."""

    paired, needs_reference, uses_nll_labels = True, True, False

    def __call__(self, policy, ref_logps):
        ref_chosen, ref_rejected = ref_logps.chunk(2, dim=-1)
        margin = (policy.chosen.sum - ref_chosen) - (policy.rejected.sum - ref_rejected)
        loss = -torch.nn.functional.logsigmoid(0.1 * margin)
        return LossTerms(loss, -policy.chosen.avg, loss)


def test_an_objective_of_your_own_with_a_reference():
    case = small()
    exact = case.to(torch.float64)
    ref = torch.randn(4, dtype=torch.float64)
    loss = fused_preference_loss(case.hidden, case.head, case.labels, SumDPO(), ref_logps=ref)
    sums = reference.fused_linear_logps(exact.hidden, exact.head, exact.labels).sum(1)
    chosen, rejected = (sums - ref).chunk(2)
    truth = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert relative_error(loss, truth) <= FP32
    for got, right in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(truth, exact.leaves), strict=True
    ):
        assert relative_error(got, right) <= FP32
    with pytest.raises(ValueError, match="ref_logps: got None"):
        fused_preference_loss(case.hidden, case.head, case.labels, SumDPO())
    with pytest.raises(
        ValueError, match=r"ref_logps: got \(3,\) torch.float64, need a floating tensor \(4,\), or \(K, 4\) where"
    ):
        fused_preference_loss(case.hidden, case.head, case.labels, SumDPO(), ref_logps=ref[:3])


@pytest.mark.parametrize("shift", [True, False])
def test_token_weights_stand_at_their_labels(shift):
    case = small(rows=3)
    exact = case.to(torch.float64)
    weights = torch.rand(3, 9, requires_grad=True)
    loss = fused_preference_loss(
        case.hidden, case.head, case.labels, "sft", token_weights=weights, shift=shift, reduction="none"
    )
    logps = reference.fused_linear_logps(exact.hidden, exact.head, exact.labels, shift=shift)
    at = torch.cat([weights[:, 1:], torch.zeros(3, 1)], 1) if shift else weights
    counts = (case.labels[:, 1:] if shift else case.labels).ne(IGNORE).sum(1)
    truth = -(logps * at.detach()).sum(1) / counts
    assert relative_error(loss, truth) <= FP32
    assert (
        relative_error(
            torch.autograd.grad(loss.sum(), case.hidden)[0], torch.autograd.grad(truth.sum(), exact.hidden)[0]
        )
        <= FP32
    )
    with pytest.raises(RuntimeError):  # detached: the loss has no gradient to them
        torch.autograd.grad(
            fused_preference_loss(
                case.hidden.detach(), case.weight.detach(), case.labels, "sft", token_weights=weights
            ),
            weights,
        )


def test_nll_labels_take_the_likelihood_of_more_tokens():
    """ASFT with the likelihood term over prompt and answer, the odds over the answer."""
    case = small(valid=1.0)
    everything = case.labels[:2].clone()
    case.labels[:, :5] = IGNORE
    exact = case.to(torch.float64)
    loss, out = fused_preference_loss(
        case.hidden, case.head, case.labels, ASFT(lam=0.5), nll_labels=everything, return_outputs=True
    )
    align = reference.fused_asft_loss(exact.hidden, exact.head, exact.labels, lam=0.5, sft_weight=0.0)
    nll = reference.fused_preference_loss(exact.hidden[:2], exact.head, everything, "sft")
    assert relative_error(loss, nll + align) <= FP32
    assert relative_error(out.sft_loss, nll) <= FP32
    assert out.chosen_lengths.tolist() == [4, 4]
    for got, right in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(nll + align, exact.leaves), strict=True
    ):
        assert relative_error(got, right) <= FP32


EVERYTHING = {  # a value other than the default for every option that changes the result
    "shift": False, "ignore_index": 0, "logit_scale": 0.7, "softcap": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_reaches_every_call(backend):
    """A dropped keyword changes the number: each public call with all of them against the reference."""
    case = small(bias=True)
    case.labels[case.labels == IGNORE] = 0
    exact = case.to(torch.float64)
    inputs, truth = (case.hidden, case.head, case.labels), (exact.hidden, exact.head, exact.labels)
    steering = {"backend": backend, "cache_bytes": 1000, "chunk_size": 30, "num_valid": 40}
    calls = [
        (fused_linear_logps, reference.fused_linear_logps, {}),
        (fused_asft_loss, reference.fused_asft_loss, {"lam": 0.3, "beta": 0.6, "sft_weight": 0.2, "reduction": "sum"}),
    ]
    for fused, plain, more in calls:
        expected = plain(*truth, **EVERYTHING, **more)
        assert relative_error(fused(*inputs, **EVERYTHING, **more, **steering), expected) <= FP32
    objective = ASFT(0.3, 0.6, 0.2)
    loss = fused_preference_loss(*inputs, objective, **EVERYTHING, reduction="sum", **steering)
    assert relative_error(loss, expected) <= FP32
    module = FusedASFTLoss(0.3, 0.6, 0.2, **EVERYTHING, reduction="sum", return_outputs=True, backend=backend)
    loss, out = module(*inputs)
    assert relative_error(loss, expected) <= FP32
    assert out.num_pairs == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_nll_labels_together(backend):
    """The likelihood term takes its own tokens unweighted, the odds theirs weighted; no kernel skips either."""
    case = small(valid=1.0)
    everything = case.labels[:2].clone()
    case.labels[:, :5] = IGNORE
    weights = torch.rand(4, 9)
    exact = case.to(torch.float64)
    for options in (
        {"token_weights": weights},
        {"nll_labels": everything},
        {"token_weights": weights, "nll_labels": everything},
    ):
        loss = fused_preference_loss(case.hidden, case.head, case.labels, "asft", backend=backend, **options)
        truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, "asft", **options)
        assert relative_error(loss, truth) <= FP32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass_of_an_objective_is_its_own(backend):
    class Louder(ASFT):
        def __call__(self, policy, ref_logps=None):
            terms = super().__call__(policy, ref_logps)
            return LossTerms(100 * terms.loss, terms.sft, terms.align)

    case = small()
    quiet = fused_preference_loss(case.hidden, case.head, case.labels, ASFT(), backend=backend)
    loud = fused_preference_loss(case.hidden, case.head, case.labels, Louder(), backend=backend)
    assert relative_error(loud, 100 * quiet) <= FP32


def test_reference_values_are_not_trained():
    case = small()
    ref = torch.randn(4, requires_grad=True)
    fused_preference_loss(case.hidden, case.head, case.labels, SumDPO(), ref_logps=ref).backward()
    assert ref.grad is None


def test_equal_answers_are_no_win():
    case = small(rows=2)
    twins = torch.cat([case.hidden[:1], case.hidden[:1]]), case.labels[:1].repeat(2, 1)
    _, out = fused_asft_loss(twins[0], case.head, twins[1], return_outputs=True)
    assert out.accuracy == 0
    assert out.margins == 0


def test_long_sums_keep_their_digits():
    """Sequence sums in double: 20,000 fp32 log-probabilities added as if exactly."""
    hidden, weight = torch.randn(2, 20_001, 4), torch.randn(7, 4)
    labels = torch.randint(7, (2, 20_001))
    logps = fused_linear_logps(hidden, weight, labels).double().sum(1)
    _, out = fused_preference_loss(hidden, weight, labels, "sft", return_outputs=True)
    assert relative_error(out.logps, logps) <= 2**-24  # the one rounding to fp32


def test_logps_without_a_host_read_are_the_same():
    case = small()
    exact = fused_linear_logps(case.hidden, case.head, case.labels)
    assert torch.equal(fused_linear_logps(case.hidden, case.head, case.labels, num_valid=36), exact)


CALLS = [fused_asft_loss, fused_preference_loss, fused_linear_logps, fused_noisy_linear_logps]


def test_signatures_agree():
    """Options, its type and the one explicit signature name the same keywords with the same defaults."""
    explicit = inspect.signature(fused_linear_logps).parameters
    keywords = {name: p.default for name, p in explicit.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: keywords.pop(name) for name in ("return_stats", "differentiable")} == {
        "return_stats": False, "differentiable": ("lse",),
    }  # fmt: skip
    assert vars(Options()) == keywords
    assert set(Keywords.__annotations__) == set(keywords)
    case = small()
    own = inspect.signature(fused_asft_loss).parameters
    keywords |= {name: p.default for name, p in own.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords.pop("sequence_group") is None  # the reference knows one process
    assert reference.fused_asft_loss(case.hidden, case.head, case.labels, **keywords).isfinite()
    assert fused_asft_loss(case.hidden, case.head, case.labels, **keywords).isfinite()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_help_explains_every_argument(call):
    cached = call is not fused_noisy_linear_logps
    assert (textwrap.indent(KEYWORDS, 8 * " ") in call.__doc__) == cached
    text = call.__doc__[call.__doc__.index("Args:") : call.__doc__.index("Returns:")]
    named = [name for line in re.findall(r"^        ([\w, *]+):", text, re.MULTILINE) for name in line.split(", ")]
    own = [name for name, p in inspect.signature(call).parameters.items() if p.kind is not p.VAR_KEYWORD]
    shared = set(Keywords.__annotations__) - (set() if cached else {"cache_bytes"})
    assert sorted(named) == sorted({*own, *shared})


def test_a_misspelt_keyword_is_named():
    case = small()
    args = case.hidden, case.head, case.labels
    with pytest.raises(TypeError, match=r"fused_asft_loss\(\) got .* 'softcaps', it takes lam, .*mean 'softcap'\?"):
        fused_asft_loss(*args, softcaps=3.0)
    with pytest.raises(TypeError, match=r"fused_preference_loss\(\) .* 'ref_logp', .*did you mean 'ref_logps'\?"):
        fused_preference_loss(*args, "dpo", ref_logp=None)
    with pytest.raises(TypeError, match=r"FusedASFTLoss\(\) got .* 'num_valid', it takes"):
        FusedASFTLoss(num_valid=3)
    with pytest.raises(TypeError, match=r"'cache_bytes', it takes seed, cu_seqlens"):
        fused_noisy_linear_logps(case.hidden, case.head, case.head, case.labels, seed=1, cache_bytes=0)


def test_an_objectives_parameter_is_sent_to_the_objective():
    case = small()
    with pytest.raises(TypeError, match=r"got 'beta', which is the objective's own .*\('dpo', beta=...\)"):
        fused_preference_loss(case.hidden, case.head, case.labels, "dpo", beta=0.1)
    with pytest.raises(ValueError, match=r"dpo: got the parameter 'ldalpha', .*; did you mean 'ld_alpha'\?"):
        get_objective("dpo", ldalpha=0.5)


def test_an_objective_that_returns_a_tensor_is_told_what_to_return():
    case = small()

    class Plain(SumDPO):
        def __call__(self, policy, ref_logps=None):
            return policy.sum

    with pytest.raises(ValueError, match=r"objective: got \(4,\) torch.float64 from Plain, need .*LossTerms\(loss"):
        fused_preference_loss(case.hidden, case.head, case.labels, Plain(), ref_logps=torch.zeros(4))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([2, 4, 6]), T=st.integers(2, 12), D=st.integers(1, 17), V=st.integers(2, 60),
    valid=st.floats(0, 1), chunk_size=st.integers(1, 70), cache_bytes=st.integers(0, 4000), extra=st.integers(0, 5),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_invariances(rows, T, D, V, valid, chunk_size, cache_bytes, extra, seed):
    """To chunk_size, cache_bytes, padding, pair order and packing; float64, so that only rounding may differ."""
    case = make_case(rows, T, D, V, valid=valid, seed=seed, dtype=torch.float64)
    loss = fused_asft_loss(case.hidden, case.head, case.labels)
    expected = torch.autograd.grad(loss, case.leaves)

    def same(other):
        torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-13)
        grads = torch.autograd.grad(other, case.leaves)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)

    same(fused_asft_loss(case.hidden, case.head, case.labels, chunk_size=chunk_size, cache_bytes=cache_bytes))
    wide = torch.nn.functional.pad(case.hidden, (0, 0, 0, extra), value=float("nan"))
    same(fused_asft_loss(wide, case.head, torch.nn.functional.pad(case.labels, (0, extra), value=IGNORE)))
    order = torch.randperm(rows // 2)
    order = torch.cat([order, order + rows // 2])
    same(fused_asft_loss(case.hidden[order], case.head, case.labels[order]))
    hidden, labels, cu_seqlens = packed(case)
    same(fused_asft_loss(hidden, case.head, labels, cu_seqlens=cu_seqlens))


def test_interpreter_is_on_where_there_is_no_gpu():
    """Else the tests marked interpreter would pass for the wrong reason."""
    if not torch.cuda.is_available():
        assert os.environ.get("TRITON_INTERPRET") == "1"
