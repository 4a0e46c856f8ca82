"""The losses that trainers know by name: numbers by hand, limits, what a batch couples, tokens' weights, figures."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asft_kernels import fused_preference_loss, reference
from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import (
    AOT,
    BMC,
    CPO,
    DPO,
    IPO,
    LDDPO,
    LMPO,
    ORPO,
    SFT,
    WPO,
    AOTUnpaired,
    ApoDown,
    ApoZero,
    BcoPair,
    DiscoPOP,
    ExoPair,
    HingeNorm,
    NcaPair,
    Robust,
    SigmoidNorm,
    SimPO,
    SppoHard,
    WeightedSum,
    get_objective,
)
from asft_kernels.objectives.base import counting, reduce_loss
from asft_kernels.objectives.divergences import divergence_score
from bounds import fp32_bound, relative_error
from cases import IGNORE, make_case
from cases import packed as pack
from objective_cases import call_inputs

DOUBLE = 1e-14  # a handful of float64 roundings, each 1.1e-16; relative to the result


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


# One pair: S = -4 of 2 tokens against -9 of 3; reference -5 and -8, so log-ratios of 1 and -1.
PAIR, PAIR_REF = Logps(tensor(-4, -9), torch.tensor([2, 3])), tensor(-5, -8)
Q = sigmoid(0.2)
WORKED = [
    (ExoPair(), Q * (math.log(Q) - math.log(0.999)) + (1 - Q) * (math.log(1 - Q) - math.log(0.001))),
    (NcaPair(), softplus(-0.1) + 0.5 * softplus(0.1) + 0.5 * softplus(-0.1)),
    (BcoPair(), 2 * softplus(-0.1)),
    (SppoHard(), (1 - 5) ** 2 + (-1 + 5) ** 2),
    (AOT(), softplus(-0.2)),
    (AOTUnpaired(label_smoothing=0.2), 0.8 * softplus(-0.2) + 0.2 * softplus(0.2)),
    (ApoZero(), 2 * sigmoid(-0.1)),
    (ApoDown(), sigmoid(0.1) + sigmoid(-0.2)),
    (DiscoPOP(), softplus(-0.2) * sigmoid(-4) + math.exp(-0.2) * sigmoid(4)),
    (CPO(alpha=0, label_smoothing=0.2), 0.8 * softplus(-0.5) + 0.2 * softplus(0.5)),
    (SimPO(label_smoothing=0.2), 0.8 * softplus(-1.5) + 0.2 * softplus(1.5)),
    (DPO(f_divergence_type="forward_kl"), softplus(-0.1 * (math.e - 1 / math.e))),
    (DPO(f_divergence_type="js_divergence"), softplus(-0.1 * (softplus(1) - softplus(-1)))),
    (DPO(f_divergence_type="alpha_divergence"), softplus(-0.1 * 2 * (math.exp(0.5) - math.exp(-0.5)))),
    (IPO(f_divergence_type="forward_kl"), ((1 - 1 / math.e) / 2 - (1 - math.e) / 3 - 5) ** 2),
    (HingeNorm(f_divergence_type="forward_kl"), 1 - 0.05 * (math.e - 1 / math.e)),
]


@pytest.mark.parametrize(("objective", "expected"), WORKED, ids=lambda x: str(x))
def test_worked_pair(objective, expected):
    terms = objective(PAIR, PAIR_REF if objective.needs_reference else None)
    assert terms.loss.item() == pytest.approx(expected, rel=DOUBLE)
    assert terms.sft.item() == 2
    if objective.needs_reference and not hasattr(objective, "f_divergence_type"):
        figures = [terms.metrics[f"{side}_reward"].item() for side in ("chosen", "rejected")]
        assert figures == pytest.approx([0.1, -0.1], rel=DOUBLE)


# f-divergences


def test_alpha_divergence_has_both_kl_for_limits():
    r = tensor(-30, -1, -1e-9, 0, 1, 30)
    for coef, name in ((1.0, "reverse_kl"), (0.0, "forward_kl")):
        limit, exact = divergence_score(r, "alpha_divergence", coef), divergence_score(r, name, 0.5)
        assert torch.equal(limit, exact)
    near = divergence_score(r, "alpha_divergence", 1 + 1e-12)
    torch.testing.assert_close(near, r, rtol=1e-10, atol=0)  # expm1(k r) / k = r (1 + k r / 2 + ...), k r <= 3e-11


def test_scores_go_on_as_a_straight_line_where_an_exponential_would_end_them():
    r = tensor(-79, -81, -1e30, 1e30).requires_grad_()
    scores = divergence_score(r, "forward_kl", 0.5)
    (slope,) = torch.autograd.grad(scores.sum(), r)
    assert scores.tolist() == pytest.approx(
        [1 - math.exp(79), 1 - 2 * math.exp(80), -1e30 * math.exp(80), 1], rel=1e-12
    )
    assert slope.tolist() == pytest.approx([math.exp(79), math.exp(80), math.exp(80), 0], rel=DOUBLE)


OF_RATIOS = [objective for objective, _ in WORKED if objective.needs_reference]


@pytest.mark.parametrize("objective", OF_RATIOS, ids=str)
def test_margins_of_any_size_are_finite(objective):
    """In either direction, with the gradient; no exponential is taken of a margin by itself."""
    sums = tensor(-1e6, -1.0, -1e6, -1.0, -1e6, -1e6).requires_grad_()
    loss = objective(Logps(sums, torch.ones(6).long()), tensor(-1, -1e6, -1e6, -1e6, -1, -1)).loss
    (grad,) = torch.autograd.grad(loss.sum(), sums)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


# What a batch couples


def pairs(count=5):
    gen = torch.Generator().manual_seed(0)
    length = torch.randint(1, 9, (2 * count,), generator=gen)
    sums, ref = (-3 * torch.rand(2, 2 * count, generator=gen, dtype=torch.float64)) * length
    return Logps(sums, length), ref


@pytest.mark.parametrize("objective", [AOT(0.3), AOTUnpaired(0.3), CPO(nll_normalization="token"),
                                       ORPO(nll_normalization="token")], ids=str)  # fmt: skip
def test_pairs_that_do_not_count_are_not_in_the_batch(objective):
    """Neither ranked nor in a mean over tokens: whatever stands there, the others' losses are those without them."""
    policy, ref = pairs()
    kept = [0, 2, 3, 5, 7, 8]
    without = Logps(policy.sum[kept], policy.length[kept])
    reference_of = (lambda x: x) if objective.needs_reference else (lambda _: None)
    expected = objective(without, reference_of(ref[kept])).loss
    for value in (0.0, -1e3, 1e3):
        sums, length = policy.sum.clone(), policy.length.clone()
        sums[[1, 9]] = value
        length[[1, 9]] = 0
        got = objective(Logps(sums, length), reference_of(ref)).loss[[0, 2, 3]]
        torch.testing.assert_close(got, expected, rtol=DOUBLE, atol=0)


def test_aot_compares_quantiles_and_not_pairs():
    """Swapping the references of two pairs changes DPO and not AOT; swapping rejected rows not the unpaired form."""
    policy, ref = pairs()
    order = torch.tensor([3, 1, 2, 0, 4])
    swapped = torch.cat([order, order + 5])
    torch.testing.assert_close(AOT(0.3)(policy, ref[swapped]).loss, AOT(0.3)(policy, ref).loss, rtol=DOUBLE, atol=0)
    assert relative_error(DPO(0.3)(policy, ref[swapped]).loss, DPO(0.3)(policy, ref).loss) > 1e-2
    rejected = torch.cat([torch.arange(5), order + 5])
    moved = Logps(policy.sum[rejected], policy.length[rejected])
    got = AOTUnpaired(0.3)(moved, ref[rejected]).loss
    torch.testing.assert_close(got, AOTUnpaired(0.3)(policy, ref).loss, rtol=DOUBLE, atol=0)


@pytest.mark.parametrize("objective", [CPO(0.3, 0.7, nll_normalization="token"), ORPO(0.7, nll_normalization="token")])
def test_a_likelihood_per_token_is_a_mean_over_the_chosen_tokens_of_the_batch(objective):
    policy, _ = pairs()
    weight = getattr(objective, "alpha", 1.0)
    align = replace(objective, alpha=0.0) if isinstance(objective, CPO) else None
    terms = objective(policy)
    aligned = align(policy).loss if align else objective.lam * terms.align
    nll = -policy.chosen.sum.sum() / policy.chosen.length.sum()
    torch.testing.assert_close(terms.loss.mean(), aligned.mean() + weight * nll, rtol=DOUBLE, atol=0)
    summed = WeightedSum(((1.0, objective), (1.0, SFT("token"))))(policy).loss.mean()
    torch.testing.assert_close(summed, terms.loss.mean() + nll, rtol=DOUBLE, atol=0)


# Length desensitisation


def test_tokens_beyond_the_shorter_answer_weigh_ld_alpha():
    """Two pairs of 2 against 3 and 4 against 1 tokens, and two slots beyond the last."""
    offsets = torch.tensor([0, 2, 6, 9, 10])
    weights = LDDPO("dpo", 0.25).weigh_tokens(torch.zeros(12), None, offsets)
    assert weights.dtype == torch.float64
    assert weights[:10].tolist() == [1, 1, 1, 0.25, 0.25, 0.25, 1, 1, 0.25, 1]
    doubled = LDDPO("dpo", 0.25).weigh_tokens(torch.zeros(12), torch.full((12,), 2.0), offsets)
    assert torch.equal(doubled, 2 * weights)


@pytest.fixture
def answers():
    """Rows of 3 to 12 tokens, and a reference per token."""
    case = make_case(rows=6, valid=1.0)
    for row, length in zip(case.labels, [4, 11, 7, 3, 12, 5], strict=True):
        row[length:] = IGNORE
    ref = -2 * torch.rand(case.labels.shape, generator=torch.Generator().manual_seed(1))
    valid = torch.zeros(case.labels.shape, dtype=torch.bool)
    valid[:, :-1] = case.labels[:, 1:] != IGNORE
    return case, torch.where(valid, ref, 0)


def test_ld_alpha_of_1_is_the_base(answers):
    case, ref = answers
    got = fused_preference_loss(
        case.hidden, case.head, case.labels, get_objective("ipo", ld_alpha=1), ref_logps=ref, reduction="none"
    )
    expected = fused_preference_loss(
        case.hidden, case.head, case.labels, "ipo", ref_logps=ref.double().sum(1), reduction="none"
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # fp32 results
    other = fused_preference_loss(
        case.hidden, case.head, case.labels, get_objective("ipo", ld_alpha=0.9), ref_logps=ref, reduction="none"
    )
    assert relative_error(other, expected) > 1e-4


@pytest.mark.parametrize("bound", [None, 60])
def test_ld_alpha_packed_and_with_a_bound_on_the_tokens(answers, bound):
    case, ref = answers
    objective = get_objective("dpo", ld_alpha=0.3)
    padded = fused_preference_loss(
        case.hidden, case.head, case.labels, objective, ref_logps=ref, num_valid=bound, reduction="none"
    )
    truth = reference.fused_preference_loss(
        *(x.double() for x in (case.hidden, case.weight)), case.labels, objective, ref_logps=ref.double(),
        reduction="none",
    )  # fmt: skip
    assert relative_error(padded, truth) <= fp32_bound(32)
    hidden, labels, cu_seqlens = pack(case)
    lengths = cu_seqlens.diff().tolist()
    flat = torch.cat([row[:n] for row, n in zip(ref, lengths, strict=True)])
    packed = fused_preference_loss(
        hidden, case.head, labels, objective, ref_logps=flat, cu_seqlens=cu_seqlens, num_valid=bound, reduction="none"
    )
    assert relative_error(packed, truth) <= fp32_bound(32)


def test_ld_alpha_needs_a_reference_per_token(answers):
    case, _ = answers
    with pytest.raises(ValueError, match=r"ref_logps: got \(6,\) torch.float32, need a floating tensor \(6, 13\)"):
        fused_preference_loss(
            case.hidden, case.head, case.labels, get_objective("dpo", ld_alpha=0.5), ref_logps=torch.zeros(6)
        )


# Figures per token, from full logits in float64, as the calls sum them


def from_logits(case, objective, ref=None, weights=None):
    """The objective on what the primitive would give it, (loss, its leaves)."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.weight))
    bias = case.bias.detach().double().requires_grad_()
    rows = []
    for states, labels in zip(hidden, case.labels, strict=True):
        valid = labels[1:] != IGNORE
        logits = states[:-1][valid] @ weight.T + bias
        label = labels[1:][valid][:, None]
        lse, probs = logits.logsumexp(-1), logits.softmax(-1)
        figures = {
            "lse": lse,
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == label[:, 0],
            "log_sum_sq_probs": probs.square().sum(-1).log(),
        }
        logps = logits.gather(1, label)[:, 0] - lse
        grads = {name: figures[name].detach() for name in objective.stats if name not in objective.stats_with_grad}
        asked = {name: figures[name] for name in objective.stats}
        terms = objective.per_token(logps, {**asked, **grads})
        rows.append((logps.sum(), valid.sum(), {name: values.sum() for name, values in terms.items()}))
    sums, lengths, terms = zip(*rows, strict=True)
    summed = {name: torch.stack([row[name] for row in terms]) for name in terms[0]}
    policy = Logps(torch.stack(sums), torch.stack(lengths), terms=summed)
    loss = objective(policy, ref)
    return policy, loss, [hidden, weight, bias]


WITH_FIGURES = [
    SFT(label_smoothing=0.1),
    SFT("token", label_smoothing=0.3, lse_square_scale=1e-2),
    SFT("sum", lse_square_scale=1e-2, token_accuracy=True),
    get_objective("dpo", use_weighting=True),
    WPO("ipo + 0.3 sft"),
    WPO("simpo"),
    WeightedSum(((1.0, DPO()), (0.2, SFT(label_smoothing=0.1)))),
    WPO(WeightedSum(((1.0, SimPO()), (0.2, SFT(label_smoothing=0.1, token_accuracy=True))))),
]


@pytest.mark.parametrize("objective", WITH_FIGURES, ids=str)
def test_figures_as_the_reference_has_them(objective):
    case = make_case(rows=8, bias=True)
    case.labels[1] = IGNORE
    exact = case.to(torch.float64)
    inputs = call_inputs(objective, case.labels)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, objective, **inputs)
    policy, terms, leaves = from_logits(case, objective, inputs.get("ref_logps"))
    got = reduce_loss(terms.loss, counting(policy, objective.paired), "mean")
    # Both in float64, in another order: logits of up to 32 nats, some roundings of 2^-53 each.
    assert relative_error(got, truth) <= 1e-13
    for mine, right in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(truth, exact.leaves), strict=True):
        assert relative_error(mine, right) <= 1e-12


@pytest.mark.parametrize("objective", WITH_FIGURES, ids=str)
def test_figures_from_end_to_end(objective):
    case = make_case(rows=8, bias=True)
    case.labels[1] = IGNORE
    exact = case.to(torch.float64)
    inputs = call_inputs(objective, case.labels)
    loss, out = fused_preference_loss(case.hidden, case.head, case.labels, objective, **inputs, return_outputs=True)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, objective, **inputs)
    assert relative_error(loss, truth) <= fp32_bound(32)
    for mine, right in zip(
        torch.autograd.grad(loss, case.leaves), torch.autograd.grad(truth, exact.leaves), strict=True
    ):
        assert relative_error(mine, right) <= fp32_bound(32)
    policy, terms, _ = from_logits(case, objective, inputs.get("ref_logps"))
    counts = counting(policy, objective.paired)
    for name, values in terms.metrics.items():
        assert out.metrics[name].item() == pytest.approx(values[counts].mean().item(), rel=1e-4, abs=1e-6)


def test_tokens_weights_weigh_the_figures_too():
    case = make_case(rows=8)
    exact = case.to(torch.float64)
    objective = SFT("sum", label_smoothing=0.1, lse_square_scale=1e-2)
    weights = torch.rand(case.labels.shape)
    loss = fused_preference_loss(case.hidden, case.head, case.labels, objective, token_weights=weights)
    truth = reference.fused_preference_loss(
        exact.hidden, exact.head, exact.labels, objective, token_weights=weights.double()
    )
    assert relative_error(loss, truth) <= fp32_bound(32)


def test_token_accuracy_and_pair_weights_are_reported():
    case = make_case(rows=8, bias=True)
    _, terms, _ = from_logits(case, SFT(token_accuracy=True))
    assert terms.metrics["token_accuracy"].shape == (8,)
    assert ((terms.metrics["token_accuracy"] >= 0) & (terms.metrics["token_accuracy"] <= 1)).all()
    ref = call_inputs(DPO(), case.labels)["ref_logps"]
    _, weighted, _ = from_logits(case, WPO(DPO()), ref)
    _, plain, _ = from_logits(case, DPO(), ref)
    weight = weighted.metrics["pair_weight"]
    torch.testing.assert_close(weighted.loss, weight * plain.loss)
    assert not weight.requires_grad
    assert SFT().stats == () == DPO().stats
    assert SFT(label_smoothing=0.1).stats_with_grad == ("lse", "mean_logits")
    assert SFT(token_accuracy=True).stats == ("is_top1",)


# Names and errors


def test_parameters_of_trls_trainer():
    assert get_objective("dpo", beta=0.2, ld_alpha=0.5) == LDDPO(DPO(0.2), 0.5)
    assert get_objective("ipo", use_weighting=True) == WPO("ipo")
    assert get_objective("dpo", ld_alpha=0.5, use_weighting=True) == LDDPO(WPO(DPO()), 0.5)
    assert get_objective("dpo", ld_alpha=None, use_weighting=False) == DPO()
    assert get_objective("exo_pair", f_divergence_type="js_divergence") == ExoPair(f_divergence_type="js_divergence")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "dpo",
            {"f_divergence_type": "kl"},
            "dpo: f_divergence_type: got 'kl', need one of 'reverse_kl', 'forward_kl'",
        ),
        ("ipo", {"f_alpha_divergence_coef": math.inf}, "ipo: f_alpha_divergence_coef: got inf, need a finite number"),
        ("robust", {"f_alpha_divergence_coef": "a"}, "robust: f_alpha_divergence_coef: got 'a', need a finite number"),
        ("exo_pair", {"label_smoothing": 0}, "exo_pair: label_smoothing: got 0, need a finite number > 0"),
        ("exo_pair", {"label_smoothing": 0.5}, r"exo_pair: label_smoothing: got 0\.5, need a number below 0\.5"),
        ("nca_pair", {"beta": 0}, "nca_pair: beta: got 0, need a finite number > 0"),
        ("bco_pair", {"beta": -1}, "bco_pair: beta: got -1, need a finite number > 0"),
        ("sppo_hard", {"beta": 1e-200}, "sppo_hard: beta: got 1e-200, need 4e-155 at least"),
        ("aot", {"label_smoothing": 0.7}, r"aot: label_smoothing: got 0\.7, need a number below 0\.5"),
        ("aot_unpaired", {"beta": math.nan}, "aot_unpaired: beta: got nan, need a finite number > 0"),
        ("apo_zero", {"beta": 0}, "apo_zero: beta: got 0, need a finite number > 0"),
        ("apo_down", {"beta": 0}, "apo_down: beta: got 0, need a finite number > 0"),
        ("discopop", {"discopop_tau": 0}, "discopop: discopop_tau: got 0, need a finite number > 0"),
        ("cpo", {"label_smoothing": 0.5}, r"cpo: label_smoothing: got 0\.5, need a number below 0\.5"),
        ("cpo", {"nll_normalization": "sum"}, "cpo: nll_normalization: got 'sum', need one of 'sequence', 'token'"),
        ("orpo", {"nll_normalization": None}, "orpo: nll_normalization: got None, need one of 'sequence', 'token'"),
        ("simpo", {"label_smoothing": -0.1}, r"simpo: label_smoothing: got -0\.1, need a finite number >= 0"),
        ("sft", {"label_smoothing": 1.1}, r"sft: label_smoothing: got 1\.1, need a number from 0 to 1"),
        ("sft", {"lse_square_scale": -1}, "sft: lse_square_scale: got -1, need a finite number >= 0"),
        ("sft", {"token_accuracy": 1}, "sft: token_accuracy: got 1, need True or False"),
        ("dpo", {"use_weighting": 1}, "dpo: use_weighting: got 1, need True or False"),
        ("dpo", {"ld_alpha": 1.5}, r"ld_dpo: ld_alpha: got 1\.5, need a number from 0 to 1"),
        ("dpo", {"ld_alpha": -1}, "ld_dpo: ld_alpha: got -1, need a finite number >= 0"),
        ("simpo", {"ld_alpha": 0.5}, "ld_dpo: base: got SimPO, need a paired objective on log-ratios of plain sums"),
        ("kto", {"ld_alpha": 0.5}, "ld_dpo: base: got KTO, need a paired objective on log-ratios of plain sums"),
        ("sft", {"use_weighting": True}, r"wpo: base: got SFT, need a paired objective of plain sums"),
        (
            "aot",
            {"use_weighting": True},
            r"wpo: base: got AOT, need a paired objective of plain sums that has a loss",
        ),
        ("nca_pair", {"f_divergence_type": "js_divergence"}, "nca_pair: got the parameter 'f_divergence_type', need"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_objective(name, **parameters)


def test_bases_are_checked():
    with pytest.raises(ValueError, match="ld_dpo: base: got 3, need a name such as 'dpo' or an Objective"):
        LDDPO(3, 0.5)
    with pytest.raises(ValueError, match="ld_dpo: base: got BMC, need a paired objective on log-ratios"):
        LDDPO(BMC("dpo"), 0.5)
    with pytest.raises(ValueError, match="ld_dpo: base: got WeightedSum, need a paired objective on log-ratios"):
        LDDPO("dpo + cpo", 0.5)
    with pytest.raises(ValueError, match="wpo: base: got WeightedSum"):
        WPO("dpo + 0.5 aot_unpaired")
    with pytest.raises(ValueError, match="weighted sum: got LDDPO, which weighs tokens"):
        WeightedSum(((1.0, LDDPO("dpo", 0.5)), (1.0, SFT())))


def test_statistics_of_a_base_are_saved_and_moved():
    assert {"base.running_mean", "base.running_std", "base.steps"} <= set(WPO(LMPO()).state_dict())
    assert len({WPO("dpo"), WPO(DPO()), LDDPO("dpo", 0.5), LDDPO(DPO(), 0.5), LDDPO("dpo", 0.4)}) == 3
    assert repr(LDDPO(NcaPair(), 0.5)) == "LDDPO(base=NcaPair(beta=0.1), ld_alpha=0.5)"


@pytest.mark.parametrize("objective", [Robust(0.3, 0.2), SigmoidNorm(), DiscoPOP()], ids=str)
def test_the_default_divergence_is_the_log_ratio(objective):
    policy, ref = pairs()
    explicit = replace(objective, f_divergence_type="reverse_kl", f_alpha_divergence_coef=7.0)
    assert torch.equal(objective(policy, ref).loss, explicit(policy, ref).loss)


def test_the_code_of_the_page(answers):
    case, _ = answers
    page = (Path(__file__).parents[1] / "docs" / "objectives" / "trainers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {"hidden": case.hidden, "lm_head": case.head, "labels": case.labels}
    exec(code, {**names, "ref_hidden": case.hidden.detach(), "ref_lm_head": case.weight.detach()})
    names = re.findall(r"^\| [^|]*\| `(\w+)`", page.split("What TRL does")[0], re.M)
    assert len(names) == 13
    assert all(get_objective(name) for name in names)


def test_trls_sigmoid_is_dpo():
    with pytest.raises(ValueError, match=r"objective: got 'sigmoid', need .*; did you mean 'dpo'\?"):
        get_objective("sigmoid")
