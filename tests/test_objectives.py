"""Objectives as functions of sequence statistics: values by hand, derivatives, the floor, what counts."""

import math

import pytest
import torch

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import ASFT, OBJECTIVES, SFT, get_objective
from asft_kernels.objectives.base import counting, reduce_loss
from asft_kernels.objectives.log_odds import FLOOR, log_odds, nll_of_odds
from bounds import relative_error

# A handful of float64 roundings (expm1, log, sigmoid, two products), each 1.1e-16; relative to the result.
DOUBLE = 1e-14
BETAS = [0.001, 0.1, 0.5, 1.0, 3.0]
AVGS = [-1e4, -300.0, -30.0, -2.5, -math.log(2), -0.1, -1e-3, -2e-6]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def logps(chosen, rejected, length=3) -> Logps:
    avg = torch.tensor([*chosen, *rejected], dtype=torch.float64, requires_grad=True)
    return Logps(avg * length, torch.full(avg.shape, length))


def test_worked_numbers():
    """p_w = 1/2, p_l = 1/4 at beta = 1: -2 log(1/2) - log(3/4) = 2 log 2 + log(4/3)."""
    terms = ASFT()(logps([math.log(0.5)], [math.log(0.25)]))
    assert terms.loss.item() == pytest.approx(2 * math.log(2) + math.log(4 / 3), rel=DOUBLE)
    assert terms.sft.item() == pytest.approx(math.log(2), rel=DOUBLE)
    assert terms.align.item() == pytest.approx(math.log(2) + math.log(4 / 3), rel=DOUBLE)


@pytest.mark.parametrize("avg", AVGS)
def test_closed_form_at_beta_one(avg):
    """-log sigmoid(f) = -avg and -log sigmoid(-f) = -log(1 - p)."""
    x = torch.tensor(avg, dtype=torch.float64)
    assert nll_of_odds(x, 1.0).item() == pytest.approx(-avg, rel=DOUBLE)
    rejected = -math.log1p(-math.exp(avg)) if avg < -math.log(2) else -math.log(-math.expm1(avg))
    # log(-expm1) rounds near p = 0: the term is then good to an eps of f = -|avg|, not of itself; so is exp's argument.
    assert nll_of_odds(x, -1.0).item() == pytest.approx(rejected, rel=DOUBLE * max(1, -avg), abs=1e-300)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("avg", AVGS)
def test_derivatives_are_the_papers(avg, beta):
    """-sft_weight - lam beta sigmoid(-beta f_w) / (1 - p_w), and lam beta sigmoid(beta f_l) / (1 - p_l)."""
    chosen, rejected = (torch.tensor([avg], dtype=torch.float64, requires_grad=True) for _ in range(2))
    policy = Logps(torch.cat([chosen, rejected]), torch.ones(2, dtype=torch.int64))
    grads = torch.autograd.grad(ASFT(lam=0.7, beta=beta, sft_weight=0.4)(policy).loss.sum(), (chosen, rejected))
    not_p = -math.expm1(avg)
    f = avg - math.log(not_p)
    up, down = sigmoid(beta * f), sigmoid(-beta * f)
    assert grads[0].item() == pytest.approx(-0.4 - 0.7 * beta * down / not_p, rel=DOUBLE)
    assert grads[1].item() == pytest.approx(0.7 * beta * up / not_p, rel=DOUBLE * max(1, -avg * beta), abs=1e-300)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("side", [1, -1])
def test_floor_is_c1_and_saturates_on_both_sides(beta, side):
    """Value and slope meet at -FLOOR; past it the slope is that of the floor, at 0 too."""

    def value_and_slope(avg):
        x = torch.tensor(avg, dtype=torch.float64, requires_grad=True)
        y = nll_of_odds(x, side * beta)
        return y.item(), torch.autograd.grad(y, x)[0].item()

    at, slope = value_and_slope(-FLOOR)
    below, slope_below = value_and_slope(-FLOOR * (1 + 1e-9))
    assert slope == pytest.approx(slope_below, rel=1e-8)
    assert at == pytest.approx(below + slope * FLOOR * 1e-9, rel=1e-13)
    for avg in (-FLOOR / 2, -1e-12, 0.0):
        value, there = value_and_slope(avg)
        assert there == pytest.approx(slope, rel=DOUBLE)
        assert slope != 0
        assert value == pytest.approx(at + slope * (avg + FLOOR), rel=1e-13)


@pytest.mark.parametrize("beta", BETAS)
def test_finite_everywhere(beta):
    avg = torch.tensor([-1e30, -1e4, -745.2, -1.0, -1e-8, -1e-300, 0.0], dtype=torch.float64, requires_grad=True)
    for sign in (1, -1):
        value = nll_of_odds(avg, sign * beta)
        (grad,) = torch.autograd.grad(value.sum(), avg)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert (grad[-3:] != 0).all()
    assert log_odds(avg).isfinite().all()


def test_twice_differentiable_in_the_sequence_statistics():
    avg = torch.tensor([-3.0, -0.4, -1e-3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: nll_of_odds(x, 0.3), avg)
    assert torch.autograd.gradgradcheck(lambda x: nll_of_odds(x, -0.3), avg)


def test_align_alone_is_the_second_stage():
    policy = logps([-0.5, -2.0], [-1.0, -0.2])
    full, align = ASFT(beta=0.1)(policy), ASFT(beta=0.1, sft_weight=0.0)(policy)
    assert relative_error(full.loss - full.sft, align.loss) < DOUBLE


def test_sides_are_separate():
    """ASFT couples nothing: moving one rejected answer moves no other gradient."""
    grads = []
    for rejected in (-0.2, -5.0):
        avg = torch.tensor([-1.0, -2.0, -0.7, rejected], dtype=torch.float64, requires_grad=True)
        terms = ASFT(beta=0.3)(Logps(avg, torch.ones(4, dtype=torch.int64)))
        grads.append(torch.autograd.grad(terms.loss.sum(), avg)[0])
    assert torch.equal(grads[0][:3], grads[1][:3])


def test_pairs_count_when_both_sides_have_a_token():
    policy = Logps(torch.zeros(6), torch.tensor([2, 0, 1, 1, 4, 0]))
    assert counting(policy, paired=True).tolist() == [True, False, False]
    assert counting(policy, paired=False).tolist() == [True, False, True, True, True, False]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 2.0), ("sum", 4.0), ("none", [1.0, 0.0, 3.0])])
def test_reductions(reduction, expected):
    loss = reduce_loss(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]), reduction)
    assert loss.tolist() == expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lam": -1}, "asft: lam: got -1, need a finite number >= 0"),
        ({"lam": float("nan")}, "asft: lam: got nan, need"),
        ({"beta": 0}, "asft: beta: got 0, need a finite number > 0"),
        ({"sft_weight": float("inf")}, "asft: sft_weight: got inf, need"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        ASFT(**parameters)


def test_table():
    assert get_objective("asft", beta=0.1) == ASFT(beta=0.1)
    assert get_objective("sft") == SFT()
    with pytest.raises(ValueError, match=r"objective: got 'aft', need one of 'asft', "):
        get_objective("aft")
    with pytest.raises(ValueError, match="asft: got the parameter 'gamma', need one of lam, beta, sft_weight"):
        get_objective("asft", gamma=1.0)
    for objective in OBJECTIVES.values():
        assert objective.__doc__
