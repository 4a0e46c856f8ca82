"""The base losses: numbers worked by hand, derivatives in closed form, identities, extremes, sums, errors."""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch

from asft_kernels import fused_preference_loss, reference
from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import (
    ASFT,
    CPO,
    DPO,
    IPO,
    KTO,
    ORPO,
    SFT,
    WPO,
    Hinge,
    HingeNorm,
    Robust,
    SigmoidNorm,
    SimPO,
    WeightedSum,
    expression_of,
    get_objective,
    kto_kl,
)
from asft_kernels.objectives.base import counting, reduce_loss
from asft_kernels.objectives.log_odds import FLOOR
from asft_kernels.objectives.orpo import continued_log_odds
from bounds import fp32_bound, relative_error
from cases import IGNORE, make_case
from objective_cases import call_inputs

# A handful of float64 roundings, each 1.1e-16; relative to the result.
DOUBLE = 1e-14


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


# One pair: S = -4 of 2 tokens against -9 of 3; reference -5 and -8. D = 1 + 1 = 2, d = 1/2 + 1/3 = 5/6.
PAIR, PAIR_REF = Logps(tensor(-4, -9), torch.tensor([2, 3])), tensor(-5, -8)
WORKED = [
    (DPO(), softplus(-0.2)),
    (DPO(label_smoothing=0.2), 0.8 * softplus(-0.2) + 0.2 * softplus(0.2)),
    (Robust(label_smoothing=0.2), (0.8 * softplus(-0.2) - 0.2 * softplus(0.2)) / 0.6),
    (IPO(), (5 / 6 - 5) ** 2),
    (SigmoidNorm(), softplus(-0.1 * 5 / 6)),
    (Hinge(), 1 - 0.05 * 5),
    (HingeNorm(), 1 - 0.05 * 2),
    (Hinge(gamma=0.25), 0.0),
    (SimPO(), softplus(-(2 * (-2 + 3) - 0.5))),
    (CPO(alpha=0.5), softplus(-0.1 * 5) + 0.5 * 2),
]


@pytest.mark.parametrize(("objective", "expected"), WORKED, ids=lambda x: str(x))
def test_worked_pair(objective, expected):
    terms = objective(PAIR, PAIR_REF if objective.needs_reference else None)
    assert terms.loss.item() == pytest.approx(expected, rel=DOUBLE)
    assert terms.sft.item() == 2


# Rewards of both answers, by hand: beta times log-ratios of 1 and -1, per token where the loss is; S without reference.
REWARDS = [
    (DPO(0.3), 0.3, -0.3),
    (Robust(0.3), 0.3, -0.3),
    (IPO(0.3), 0.15, -0.1),
    (SigmoidNorm(0.3), 0.15, -0.1),
    (Hinge(0.3), -1.2, -2.7),
    (HingeNorm(0.3), 0.3, -0.3),
    (SimPO(0.3), -0.6, -0.9),
    (CPO(0.3), -1.2, -2.7),
]


@pytest.mark.parametrize(("objective", "chosen", "rejected"), REWARDS, ids=lambda x: str(x))
def test_worked_rewards(objective, chosen, rejected):
    metrics = objective(PAIR, PAIR_REF if objective.needs_reference else None).metrics
    assert metrics["chosen_reward"].item() == pytest.approx(chosen, rel=DOUBLE)
    assert metrics["rejected_reward"].item() == pytest.approx(rejected, rel=DOUBLE)
    assert metrics["reward_margin"].item() == pytest.approx(chosen - rejected, rel=DOUBLE)
    assert metrics["reward_accuracy"].item() == 1


def test_equal_rewards_are_not_a_win():
    assert DPO()(Logps(tensor(-4, -4), torch.tensor([2, 3])), tensor(-5, -5)).metrics["reward_accuracy"].item() == 0


@pytest.mark.parametrize("objective", [Hinge(0.25), HingeNorm(0.25)], ids=str)
def test_hinge_has_gradient_0_at_its_kink(objective):
    """S of 0 and -4: the margin is 1 exactly, and the subgradient 0, relu's."""
    sums = tensor(0, -4).requires_grad_()
    terms = objective(Logps(sums, torch.tensor([2, 3])), tensor(0, 0) if objective.needs_reference else None)
    assert terms.loss.item() == 0
    assert torch.autograd.grad(terms.loss.sum(), sums)[0].tolist() == [0, 0]


def test_worked_orpo():
    """p_w = 1/2, p_l = 1/4: odds of 1 and 1/3, so sigmoid(f_w - f_l) = 3/4, and 9/10 of twice that."""
    policy = Logps(tensor(3 * math.log(0.5), math.log(0.25)), torch.tensor([3, 1]))
    assert ORPO()(policy).loss.item() == pytest.approx(math.log(2) + 0.1 * math.log(4 / 3), rel=DOUBLE)
    assert ORPO(lam=0.5, beta=2.0)(policy).loss.item() == pytest.approx(
        math.log(2) + 0.5 * math.log(10 / 9), rel=DOUBLE
    )
    odds = ORPO(beta=2.0)(policy).metrics
    assert odds["chosen_reward"].item() == pytest.approx(0, abs=1e-15)
    assert odds["reward_margin"].item() == pytest.approx(2 * math.log(3), rel=DOUBLE)


def test_worked_kto():
    """S - ref_S of 1 and -1; a reference point of 3 moves both."""
    objective = KTO(desirable_weight=0.7, undesirable_weight=1.3)
    desirable = torch.tensor([True, False])
    loss = objective(PAIR, PAIR_REF, desirable=desirable).loss
    assert loss.tolist() == pytest.approx([0.7 * (1 - sigmoid(0.1)), 1.3 * (1 - sigmoid(0.1))], rel=DOUBLE)
    terms = objective(PAIR, PAIR_REF, desirable=desirable, kl=tensor(3)[0])
    assert terms.loss.tolist() == pytest.approx([0.7 * sigmoid(0.2), 1.3 * sigmoid(-0.4)], rel=DOUBLE)
    assert terms.metrics["reward"].tolist() == pytest.approx([0.1, -0.1], rel=DOUBLE)
    assert terms.metrics["reward_accuracy"].tolist() == [0, 1]
    assert terms.metrics["kl"].tolist() == [3, 3]


def test_worked_sft():
    policy = Logps(tensor(-4, -9, 0), torch.tensor([2, 3, 0]))
    assert SFT()(policy).loss.tolist() == [2, 3, 0]
    assert SFT("sum")(policy).loss.tolist() == [4, 9, 0]
    shares = reduce_loss(SFT("token")(policy).loss, counting(policy, paired=False), "mean")
    assert shares.item() == pytest.approx(13 / 5, rel=DOUBLE)


def odds_slope(avg: float) -> float:
    return -1 / math.expm1(avg)


def log_odds(avg: float) -> float:
    return avg - math.log(-math.expm1(avg))


@dataclass(frozen=True)
class Point:
    """Sums and lengths of one pair, and its margins: of sums and of means, with a reference and without."""

    sums: tuple[float, float]
    ref: tuple[float, float]
    lengths: tuple[int, int]

    def __post_init__(self):
        (w, r), (ref_w, ref_r), (m, n) = self.sums, self.ref, self.lengths
        margins = {"S": w - r, "D": w - ref_w - r + ref_r, "avg": w / m - r / n, "d": (w - ref_w) / m - (r - ref_r) / n}
        vars(self).update(margins, f=log_odds(w / m) - log_odds(r / n))


# -dL/dS of chosen and rejected, the latter with its sign changed. What the lengths divide is given before that.
SUMS = {
    DPO(0.3): lambda p: 0.3 * sigmoid(-0.3 * p.D),
    DPO(0.3, 0.2): lambda p: 0.3 * (0.8 - sigmoid(0.3 * p.D)),
    Robust(0.3, 0.2): lambda p: 0.3 * (0.8 * sigmoid(-0.3 * p.D) + 0.2 * sigmoid(0.3 * p.D)) / 0.6,
    Hinge(0.3): lambda p: 0.3 * (0.3 * p.S < 1),
    HingeNorm(0.3): lambda p: 0.3 * (0.3 * p.D < 1),
    CPO(0.3, 0.0): lambda p: 0.3 * sigmoid(-0.3 * p.S),
}
MEANS = {
    IPO(0.3): lambda p: (-2 * (p.d - 1 / 0.6),) * 2,
    SigmoidNorm(0.3): lambda p: (0.3 * sigmoid(-0.3 * p.d),) * 2,
    SimPO(2.0, 0.5): lambda p: (2 * sigmoid(-2 * p.avg + 0.5),) * 2,
    ORPO(0.7, 0.3): lambda p: (
        1 + 0.21 * sigmoid(-0.3 * p.f) * odds_slope(p.sums[0] / p.lengths[0]),
        0.21 * sigmoid(-0.3 * p.f) * odds_slope(p.sums[1] / p.lengths[1]),
    ),
}
POINTS = [
    Point((-4.0, -9.0), (-5.0, -8.0), (2, 3)),
    Point((-9.0, -4.0), (-8.0, -5.0), (3, 2)),
    Point((-510.0, -10.0), (-10.0, -10.0), (4, 5)),  # a margin of -500 nats
    Point((-10.0, -510.0), (-10.0, -10.0), (4, 5)),  # and of 500
    Point((-0.02, -0.01), (-30.0, -1.0), (1, 7)),  # confident answers
]


@pytest.mark.parametrize("point", POINTS, ids=str)
@pytest.mark.parametrize("objective", [*SUMS, *MEANS], ids=str)
def test_gradients_are_those_of_the_papers(objective, point):
    sums, ref, lengths = tensor(*point.sums).requires_grad_(), tensor(*point.ref), torch.tensor(point.lengths)
    terms = objective(Logps(sums, lengths), ref if objective.needs_reference else None)
    (grad,) = torch.autograd.grad(terms.loss.sum(), sums)
    if objective in SUMS:
        chosen = rejected = SUMS[objective](point)
    else:
        chosen, rejected = (x / m for x, m in zip(MEANS[objective](point), point.lengths, strict=True))
    # Sums of size |S| make h good to some 2^-53 * 4 |S| beta <= 5e-13, in steps; sigmoid takes that over relatively.
    assert grad.tolist() == pytest.approx([-chosen, rejected], rel=1e-12, abs=0)


@pytest.mark.parametrize("kl", [0.0, 3.0, 400.0])
@pytest.mark.parametrize("sums", [(-4.0, -9.0), (-505.0, -508.0), (495.0, 492.0)], ids=str)
def test_gradient_of_kto(sums, kl):
    """-+ weight beta s (1 - s), s = sigmoid(beta (r - kl)); it fades on both sides, and is not lost to rounding."""
    x = tensor(*sums).requires_grad_()
    terms = KTO(0.3, 0.7, 1.3)(
        Logps(x, torch.tensor([2, 3])), PAIR_REF, desirable=torch.tensor([True, False]), kl=tensor(kl)[0]
    )
    (grad,) = torch.autograd.grad(terms.loss.sum(), x)
    h = [0.3 * (s - ref - kl) for s, ref in zip(sums, PAIR_REF.tolist(), strict=True)]
    expected = [sign * 0.3 * sigmoid(x) * sigmoid(-x) for sign, x in zip((-0.7, 1.3), h, strict=True)]
    assert grad.tolist() == pytest.approx(expected, rel=1e-12, abs=0)  # as above
    assert (grad != 0).all()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_orpo_goes_on_as_a_straight_line_and_pushes_a_certain_rejected_answer_hardest(beta):
    """f has value and slope of -FLOOR's tangent past it, on both sides; so the pull at p_l = 1 is lam beta / FLOOR."""
    avg = tensor(-FLOOR * (1 + 1e-9), -FLOOR, -FLOOR / 2, -1e-12, 0.0).requires_grad_()
    odds = continued_log_odds(avg)
    (slope,) = torch.autograd.grad(odds.sum(), avg)
    at = -FLOOR - math.log(-math.expm1(-FLOOR))
    steep = odds_slope(-FLOOR)
    assert slope[0].item() == pytest.approx(steep, rel=2e-9)  # f'' / f' = 1 / FLOOR
    assert slope[1:].tolist() == pytest.approx([steep] * 4, rel=DOUBLE)
    line = [at + steep * (x + FLOOR) for x in avg.tolist()]
    assert odds.tolist() == pytest.approx(line, rel=DOUBLE)

    sums = tensor(-3.0, 0.0).requires_grad_()
    (grad,) = torch.autograd.grad(ORPO(0.1, beta)(Logps(sums, torch.ones(2).long())).loss.sum(), sums)
    expected = 0.1 * beta * sigmoid(beta * (at + steep * FLOOR - log_odds(-3.0))) * steep
    assert grad[1].item() == pytest.approx(expected, rel=1e-12)


def random_pairs(pairs=4, lengths=None):
    gen = torch.Generator().manual_seed(0)
    length = torch.randint(1, 9, (2 * pairs,), generator=gen) if lengths is None else lengths
    sums, ref = (-3 * torch.rand(2, 2 * pairs, generator=gen, dtype=torch.float64)) * length
    return Logps(sums, length), ref


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(got, expected) <= DOUBLE


@pytest.mark.parametrize(
    ("objective", "other"),
    [
        (DPO(0.3, 0.0), Robust(0.3, 0.0)),
        (HingeNorm(0.1), Hinge(0.1)),
        (DPO(0.3), CPO(0.3, alpha=0)),
        (SigmoidNorm(0.3), SimPO(0.3, gamma=0)),
    ],
    ids=str,
)
def test_without_a_reference_or_smoothing(objective, other):
    """A reference of 0 is none."""
    policy, ref = random_pairs()
    ref = ref if other.needs_reference else torch.zeros_like(ref)
    assert_same(objective(policy, ref).loss, other(policy, ref if other.needs_reference else None).loss)


def test_robust_undoes_the_flips():
    """Over pairs of which a share e is swapped, robust DPO's mean is DPO's on the pairs as they are."""
    (policy, ref), e = random_pairs(), 0.3

    def swapped(x):
        return x.roll(4)

    kept = Robust(0.3, e)(policy, ref).loss
    flipped = Robust(0.3, e)(Logps(swapped(policy.sum), swapped(policy.length)), swapped(ref)).loss
    assert_same((1 - e) * kept + e * flipped, DPO(0.3)(policy, ref).loss)


def test_one_token_each_is_no_normalisation():
    policy, ref = random_pairs(lengths=torch.ones(8).long())
    assert_same(SigmoidNorm(0.3)(policy, ref).loss, DPO(0.3)(policy, ref).loss)
    assert_same(SimPO(0.3, gamma=0)(policy).loss, CPO(0.3, alpha=0)(policy).loss)
    for normalization in ("sum", "token"):
        assert_same(SFT(normalization)(policy).loss, SFT()(policy).loss)


def test_odds_ratio_weight_of_zero_is_sft():
    policy, _ = random_pairs()
    assert_same(ORPO(lam=0)(policy).loss, SFT()(policy.chosen).loss)


def test_orpo_is_asft_less_a_coupling():
    """arXiv 2502.01237, theorem D.1: L_ORPO = L_ASFT + lam log(p_w (1 - p_l) + p_l (1 - p_w))."""
    policy, _ = random_pairs()
    p, q = policy.chosen.avg.exp(), policy.rejected.avg.exp()
    coupling = (p * (1 - q) + q * (1 - p)).log()
    assert_same(ORPO(lam=0.7)(policy).loss, ASFT(lam=0.7)(policy).loss + 0.7 * coupling)


def test_kl_is_the_mean_over_mismatched_answers_and_at_least_0():
    sums = tensor(-4, -9).requires_grad_()
    assert kto_kl(sums, tensor(-5, -14)).item() == 3
    assert not kto_kl(sums, tensor(-5, -14)).requires_grad
    assert kto_kl(sums, tensor(0, 0)).item() == 0


def test_a_negative_reference_point_is_refused():
    with pytest.raises(ValueError, match="kto: kl: got -5, need a number >= 0; kto_kl gives it"):
        KTO()(PAIR, PAIR_REF, desirable=torch.tensor([True, False]), kl=tensor(-5)[0])


def test_a_reference_point_of_each_row():
    """In each row that of a scalar; the metric is the mean over the rows that count."""
    kl, desirable = tensor(3, 0.5), torch.tensor([True, False])
    terms = KTO()(PAIR, PAIR_REF, desirable=desirable, kl=kl)
    for row in (0, 1):
        of_row = KTO()(PAIR, PAIR_REF, desirable=desirable, kl=kl[row])
        assert terms.loss[row] == of_row.loss[row]
    assert terms.metrics["kl"].tolist() == [3, 0.5]
    with pytest.raises(ValueError, match="kto: kl: got -2, need a number >= 0"):
        KTO()(PAIR, PAIR_REF, desirable=desirable, kl=tensor(1, -2))


def test_reference_points_of_rows_through_the_call():
    case = make_case(rows=5)
    case.labels[3] = IGNORE
    exact = case.to(torch.float64)
    inputs = call_inputs(KTO(), case.labels)
    inputs["objective_inputs"]["kl"] = tensor(2.5, 0, 1, float("nan"), 4)  # NaN where no token is
    loss = fused_preference_loss(case.hidden, case.head, case.labels, "kto", **inputs)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, "kto", **inputs)
    assert relative_error(loss, truth) <= fp32_bound(32)


def test_a_negative_reference_point_that_cannot_be_looked_at_is_held_at_0():
    """On a GPU and under torch.compile; here the latter."""
    compiled = torch.compile(
        lambda policy, kl: KTO()(policy, PAIR_REF, desirable=torch.tensor([True, False]), kl=kl).loss, backend="eager"
    )
    expected = KTO()(PAIR, PAIR_REF, desirable=torch.tensor([True, False])).loss
    assert torch.equal(compiled(PAIR, tensor(-5)[0]), expected)


def test_no_gradient_to_the_reference_point():
    kl, sums = tensor(3).requires_grad_(), tensor(-4, -9).requires_grad_()
    loss = KTO()(Logps(sums, torch.tensor([2, 3])), PAIR_REF, desirable=torch.tensor([True, False]), kl=kl[0]).loss
    assert torch.autograd.grad(loss.sum(), kl, allow_unused=True) == (None,)


def test_kl_through_the_call():
    case = make_case(rows=5)
    exact = case.to(torch.float64)
    inputs = call_inputs(KTO(), case.labels)
    inputs["objective_inputs"]["kl"] = tensor(2.5)[0]
    loss, out = fused_preference_loss(case.hidden, case.head, case.labels, "kto", **inputs, return_outputs=True)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, "kto", **inputs)
    assert relative_error(loss, truth) <= fp32_bound(32)
    assert out.metrics["kl"].item() == 2.5
    del inputs["objective_inputs"]["kl"]
    without = fused_preference_loss(case.hidden, case.head, case.labels, "kto", **inputs)
    assert relative_error(without, truth) > 1e-3


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_likelihood_over_labels_of_its_own(name):
    """Prompt and answer for the likelihood, the answer alone for the comparison."""
    case = make_case(rows=6, valid=0.9)
    full = case.labels[:3].clone()
    case.labels[:, :5] = IGNORE
    exact = case.to(torch.float64)
    loss = fused_preference_loss(case.hidden, case.head, case.labels, name, nll_labels=full)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, name, nll_labels=full)
    assert relative_error(loss, truth) <= fp32_bound(32)
    short = fused_preference_loss(case.hidden, case.head, case.labels, name)
    assert relative_error(short, truth) > 1e-3
    grads, truths = (torch.autograd.grad(x, c.leaves) for x, c in ((loss, case), (truth, exact)))
    for got, right in zip(grads, truths, strict=True):
        assert relative_error(got, right) <= fp32_bound(32)


@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_token_weights_are_read_at_the_labels_alone(name):
    """Where only nll_labels has a token its weight is not asked for."""
    case = make_case(rows=6, valid=0.9)
    full = case.labels[:3].clone()
    case.labels[:, :5] = IGNORE
    weights = torch.rand(case.labels.shape)
    spoilt = weights.masked_fill(case.labels == IGNORE, float("nan"))
    losses = [
        fused_preference_loss(case.hidden, case.head, case.labels, name, nll_labels=full, token_weights=x)
        for x in (weights, spoilt)
    ]
    assert torch.equal(*losses)


# Weighted sums


def test_a_sum_is_the_sum_of_its_parts():
    policy, ref = random_pairs()
    terms = get_objective("dpo + 0.005 sft")(policy, ref)
    dpo, sft = DPO()(policy, ref), SFT()(policy.chosen)
    assert_same(terms.loss, dpo.loss + 0.005 * sft.loss)
    assert_same(terms.align, dpo.align)
    assert_same(terms.sft, sft.sft)
    assert terms.metrics.keys() == dpo.metrics.keys()


def test_terms_have_their_own_parameters():
    made = get_objective(
        "dpo(beta=2e-1, f_divergence_type=js_divergence) + 1e+1*sft(normalization='sum') + .5 asft(lam = 3)"
    )
    expected = WeightedSum((
        (1.0, get_objective("dpo", beta=0.2, f_divergence_type="js_divergence")),
        (10.0, get_objective("sft", normalization="sum")), (0.5, get_objective("asft", lam=3)),
    ))  # fmt: skip
    assert made == expected
    assert get_objective("dpo(beta=0.2)") == DPO(beta=0.2), "one name without a weight is no sum"
    assert get_objective("dpo()") == DPO()
    assert get_objective("1 dpo(use_weighting=true)") == WeightedSum(((1.0, get_objective("dpo", use_weighting=True)),))


def test_terms_of_a_sum_are_weighed_in_the_alignment_and_not_in_the_likelihood():
    policy, ref = random_pairs()
    own = Logps(policy.sum, policy.length, 3 * policy.sum, policy.length)  # a likelihood term of other tokens
    terms = get_objective("0.5 orpo + 2 dpo")(own, ref)
    orpo, dpo = ORPO()(own, ref), DPO()(own, ref)
    assert_same(terms.align, 0.5 * orpo.align + 2 * dpo.align)
    assert_same(terms.sft, orpo.sft)
    assert relative_error(dpo.sft, orpo.sft) > 0.1


def test_names_of_sums():
    assert get_objective("dpo+sft") == WeightedSum(((1.0, DPO()), (1.0, SFT())))
    assert get_objective(" 2e-3 hinge_norm + .5*ipo + 3. sft ") == WeightedSum(
        ((2e-3, HingeNorm()), (0.5, IPO()), (3.0, SFT()))
    )
    assert get_objective("1e+3 dpo + 2.e+0 simpo+sft") == WeightedSum(((1e3, DPO()), (2.0, SimPO()), (1.0, SFT())))
    assert get_objective("hinge+sft") == WeightedSum(((1.0, Hinge()), (1.0, SFT())))  # its e is no exponent's
    assert get_objective("0.5 dpo") == WeightedSum(((0.5, DPO()),))
    assert get_objective("dpo + 1E-3 sft") == WeightedSum(((1.0, DPO()), (1e-3, SFT())))


def test_sums_compare_by_their_terms():
    assert len({get_objective("dpo + sft"), get_objective("dpo + sft"), get_objective("dpo + 2 sft")}) == 2
    assert repr(get_objective("0.5 asft")) == "WeightedSum(terms=((0.5, ASFT(lam=1.0, beta=1.0, sft_weight=1.0)),))"
    assert get_objective("0.5 sft") != get_objective("sft")


@pytest.mark.parametrize(
    "text",
    [
        "dpo", "1 dpo", "dpo + 0.005 sft", "dpo(beta=0.2, ld_alpha=0.5)", "dpo(use_weighting=True)",
        "bmc(base='dpo(beta=0.2) + 0.1 sft', delta=3)", "mrpo(alpha=(0.5, 0.5)) + 2 kto", "lmpo(power=3)",
        "dpo + 0.123456789 sft", "1234567.5 dpo + 1e-07 sft", "1e+16 dpo",
    ],
)  # fmt: skip
def test_an_objective_is_shown_as_it_may_be_written(text):
    assert expression_of(get_objective(text)) == text
    assert expression_of(WPO(get_objective("dpo + sft"))) == "WPO", "no text makes it"


def test_a_sum_knows_what_its_reference_is():
    kinds = [get_objective(name).reference_kind for name in ("dpo + sft", "poft + sft", "simpo + 0.1 poft", "poft")]
    assert kinds == ["sum", "mean", "mean", "mean"]


def test_the_first_of_two_metrics_of_one_name_is_reported():
    policy, ref = random_pairs()
    assert_same(
        get_objective("ipo + dpo")(policy, ref).metrics["chosen_reward"], IPO()(policy, ref).metrics["chosen_reward"]
    )


@pytest.mark.parametrize("term", [SFT("token"), SFT("sum"), KTO(undesirable_weight=0.5)], ids=str)
def test_unpaired_terms_see_the_chosen_rows_of_pairs_that_count(term):
    """A chosen row whose rejected one is empty is not part of the token mean either."""
    case = make_case(rows=8)
    case.labels[6] = IGNORE
    exact = case.to(torch.float64)
    objective = WeightedSum(((1.0, SimPO()), (0.3, term)))
    inputs = call_inputs(objective, case.labels)
    for reduction in ("mean", "none"):
        loss = fused_preference_loss(case.hidden, case.head, case.labels, objective, **inputs, reduction=reduction)
        truth = reference.fused_preference_loss(
            exact.hidden, exact.head, exact.labels, objective, **inputs, reduction=reduction
        )
        assert relative_error(loss, truth) <= fp32_bound(32)


def test_token_mean_of_cpo_is_a_sum_with_sft():
    policy, _ = random_pairs()
    tokens = WeightedSum(((1.0, CPO(alpha=0)), (1.0, SFT("token"))))(policy).loss.mean()
    expected = CPO(alpha=0)(policy).loss.mean() - policy.chosen.sum.sum() / policy.chosen.length.sum()
    assert_same(tokens, expected)


def test_a_sum_says_what_its_parts_need():
    both = get_objective("orpo + kto")
    assert both.paired
    assert both.needs_reference
    assert both.uses_nll_labels
    assert list(both.inputs) == ["desirable"]
    assert list(both.optional_inputs) == ["kl"]
    alone = get_objective("sft + 0.5 sft")
    assert not alone.paired
    assert not alone.needs_reference


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_objective("dpo + 0.1 aft"), "objective: got 'aft', need one of 'asft', "),
        (lambda: get_objective("DPPO"), r"parameters\); did you mean 'dpo'\?"),
        (lambda: get_objective("dpo + "), r"objective: got the term '', nothing beside a \+, need a name"),
        (lambda: get_objective("dpo + 1.2.3 sft"), "objective: got the term '1.2.3 sft', a weight that is no number"),
        (lambda: get_objective("dpo + -1 sft"), "which has a negative weight, need terms joined by"),
        (lambda: get_objective("dpo - 0.1 sft"), r"got 'dpo - 0\.1 sft', which subtracts a term, need terms joined by"),
        (lambda: get_objective("sft * 0.1"), r"got the term 'sft \* 0\.1', a weight behind its name, need it before"),
        (lambda: get_objective("dpo + 0.1"), r"got the term '0\.1', a weight without a name"),
        (lambda: get_objective("dpo, sft"), r"got the term 'dpo, sft', two names, need a \+"),
        (lambda: get_objective("dpo 0.1 sft"), r"got the term 'dpo 0\.1 sft', two terms, need a \+ between"),
        (lambda: get_objective("0.5 (dpo + sft)"), "a weight before parentheses, need it before each name"),
        (lambda: get_objective("dpo & sft"), "got the term 'dpo & sft', need 'name' or 'weight name', its parameters"),
        (lambda: get_objective("dpo + sft", beta=1.0), r"got 'dpo \+ sft' and beta beside it, need parameters"),
        (lambda: get_objective("2 dpo", beta=1.0), "got '2 dpo' and beta beside it, need parameters behind the name"),
        (lambda: get_objective("dpo(beta=1)", beta=1.0), r"got 'dpo\(beta=1\)' and beta beside it"),
        (lambda: get_objective("dpo(bet=1) + sft"), "dpo: got the parameter 'bet', need one of .*did you mean 'beta'"),
        (lambda: get_objective("dpo(beta=-1) + sft"), "beta: got -1, need "),
        (lambda: get_objective("dpo(beta) + sft"), r"'dpo\(beta\)', 'beta' without a parameter's name, need 'name"),
        (lambda: get_objective("dpo(beta=1)(beta=2)"), r"got the term 'dpo\(.*\)', more behind its parameters, need"),
        (lambda: get_objective("dpo(beta=1, beta=2)"), r"got the term 'dpo\(.*\)', 'beta' twice, need each .* once"),
        (lambda: get_objective("dpo(**{})"), r"got the term 'dpo\(\*\*\{\}\)', '\{\}' without a parameter's name"),
        (lambda: get_objective("dpo(beta=0.2 + sft"), r"got 'dpo\(beta=0.2 \+ sft', where a \( is not closed"),
        (lambda: get_objective("dpo) + sft"), r"got 'dpo\) \+ sft', where a \) closes nothing"),
        (lambda: get_objective("dpo(beta=0.2 sft)"), r"'dpo\(.*\)', parameters that cannot be read \(.*comma"),
        (lambda: get_objective("dpo(beta={[]:1})"), r"dpo: beta: got '\{\[\]:1\}', need a finite number"),
        (lambda: get_objective("dpo(name=3)"), "dpo: got the parameter 'name', need one of beta"),
        (lambda: get_objective("dpo + bmc"), r"bmc: base: got None, need a name .*; written bmc\(base=dpo\)"),
        (lambda: get_objective("dpo + poft"), "got DPO, whose ref_logps are sums and PoFT, whose ref_logps are means"),
        (lambda: WeightedSum((DPO(),)), r"got the term DPO\(.*\), need a pair \(weight, objective\), such as"),
        (lambda: WeightedSum(((True, DPO()),)), "weighted sum: weight of DPO: got True, need a finite number >= 0"),
        (lambda: WeightedSum(()), "weighted sum: got no terms, need at least one"),
        (lambda: WeightedSum(((-1.0, DPO()),)), "weighted sum: weight of DPO: got -1.0, need a finite number >= 0"),
        (lambda: WeightedSum(((1.0, "dpo"),)), r"weighted sum: got 'dpo', need an Objective, such as DPO\(\)"),
        (
            lambda: get_objective("bmc(base=dpo) + sft"),
            r"weighted sum: got BMC, which weighs tokens, .*\"bmc\(base='dpo \+ 0.1 sft'\)\"",
        ),
    ],
    ids=[
        "name", "near name", "empty term", "number", "sign", "minus", "weight behind", "weight alone", "comma",
        "two terms", "brackets", "other", "parameters", "parameters of one", "beside its own", "unknown", "not allowed",
        "no value", "twice behind", "twice", "stars", "open", "closed", "no comma", "odd value", "name as parameter",
        "bmc", "two references", "no pair", "bool", "nothing", "weight", "no object", "weighs tokens",
    ],
)  # fmt: skip
def test_impossible_sums(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Errors


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sft", {"normalization": "mean"}, "sft: normalization: got 'mean', need one of 'sequence', 'sum', 'token'"),
        ("dpo", {"beta": 0}, "dpo: beta: got 0, need a finite number > 0"),
        ("dpo", {"beta": True}, "dpo: beta: got True, need a finite number > 0"),
        ("dpo", {"beta": 10**400}, "dpo: beta: got 10+, need a finite number > 0"),
        ("dpo", {"beta": 10**22}, r"dpo: beta: got 10+, need a float, or an integer below 2\*\*31; write 1e\+22"),
        ("lmpo", {"beta": Fraction(1, 4)}, r"lmpo: beta: got Fraction\(1, 4\), need a float, .* write 0.25"),
        ("dpo", {"f_alpha_divergence_coef": -(10**22)}, "f_alpha_divergence_coef: got -10+, need a float"),
        ("dpo", {"f_alpha_divergence_coef": 10**400}, "f_alpha_divergence_coef: got 10+, need a finite number"),
        ("simpo", {"gamma": False}, "simpo: gamma: got False, need a finite number >= 0"),
        ("ipo", {"beta": 1e-320}, r"ipo: beta: got 1e-320, need 4e-155 at least: float64 has no \(1 / \(2 beta\)\)\^2"),
        ("dpo", {"label_smoothing": 0.5}, "dpo: label_smoothing: got 0.5, need a number below 0.5"),
        ("dpo", {"label_smoothing": -0.1}, "dpo: label_smoothing: got -0.1, need a finite number >= 0"),
        ("robust", {"beta": float("nan")}, "robust: beta: got nan, need a finite number > 0"),
        ("robust", {"label_smoothing": 0.7}, "robust: label_smoothing: got 0.7, need a number below 0.5"),
        ("ipo", {"beta": -1}, "ipo: beta: got -1, need a finite number > 0"),
        ("sigmoid_norm", {"beta": 0}, "sigmoid_norm: beta: got 0, need a finite number > 0"),
        ("hinge", {"gamma": 0}, "hinge: gamma: got 0, need a finite number > 0"),
        ("hinge_norm", {"gamma": "1"}, "hinge_norm: gamma: got '1', need a finite number > 0"),
        ("orpo", {"lam": -1}, "orpo: lam: got -1, need a finite number >= 0"),
        ("orpo", {"beta": 0}, "orpo: beta: got 0, need a finite number > 0"),
        ("simpo", {"beta": 0}, "simpo: beta: got 0, need a finite number > 0"),
        ("simpo", {"gamma": -0.5}, "simpo: gamma: got -0.5, need a finite number >= 0"),
        ("cpo", {"beta": 0}, "cpo: beta: got 0, need a finite number > 0"),
        ("cpo", {"alpha": float("inf")}, "cpo: alpha: got inf, need a finite number >= 0"),
        ("kto", {"beta": 0}, "kto: beta: got 0, need a finite number > 0"),
        ("kto", {"desirable_weight": -1}, "kto: desirable_weight: got -1, need a finite number >= 0"),
        ("kto", {"undesirable_weight": -1}, "kto: undesirable_weight: got -1, need a finite number >= 0"),
        ("simpo", {"simpo_gamma": 1.0}, "simpo: got the parameter 'simpo_gamma', need one of beta, gamma"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_objective(name, **parameters)


@pytest.mark.parametrize("name", [5, None, ["dpo"], b"dpo", DPO], ids=str)
def test_names_are_texts(name):
    with pytest.raises(ValueError, match=r"objective: got .*, need a name, such as 'dpo', or a sum of names"):
        get_objective(name)


def test_the_smallest_beta_of_ipo_has_a_finite_loss():
    loss = IPO(4e-155)(PAIR, PAIR_REF).loss
    assert loss.isfinite().all()
    assert loss.item() == pytest.approx((5 / 6 - 1 / 8e-155) ** 2, rel=DOUBLE)


def test_several_references_are_not_for_one():
    case = make_case()
    with pytest.raises(ValueError, match=r"dpo: ref_logps: got \(3, 4\), need a tensor \(4,\), one entry a row"):
        fused_preference_loss(case.hidden, case.head, case.labels, "dpo", ref_logps=torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"objective_inputs: got no 'desirable', need desirable: \(R,\) bool, whether the row's answer is a good"),
        ({"desirable": torch.ones(2).bool()}, r"kto: desirable: got \(2,\), need a tensor \(4,\), one entry a row"),
        ({"desirable": torch.ones(4)}, "kto: desirable: got torch.float32, need torch.bool; compare, as in score > 0"),
        ({"desirable": torch.ones(4).bool(), "kl": torch.zeros(3)}, r"kto: kl: got shape \(3,\), need a scalar, as"),
    ],
)  # fmt: skip
def test_inputs_of_kto(inputs, message):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        fused_preference_loss(
            case.hidden, case.head, case.labels, "kto", ref_logps=torch.zeros(4), objective_inputs=inputs
        )


def test_a_sum_of_weights_of_0_trains_nothing():
    with pytest.raises(ValueError, match="weighted sum: got weights of 0 alone, need one above 0"):
        get_objective("0 dpo + 0 sft")
    get_objective("dpo + 0 sft")
