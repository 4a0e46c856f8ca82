"""LMPO, PoFT, FPO, BMC, RPO, MRPO: numbers by hand, identities, derivatives of the papers, extremes, state, errors.

What every objective must hold is in test_every_objective.py.
"""

import copy
import math

import pytest
import torch

from asft_kernels import fused_linear_logps, fused_preference_loss, reference
from asft_kernels.core.sequence import Logps
from asft_kernels.methods.bmc.diff_marks import diff_marks
from asft_kernels.objectives import (
    ASFT,
    BMC,
    DPO,
    FPO,
    LMPO,
    MRPO,
    OBJECTIVES,
    ORPO,
    RPO,
    SFT,
    PoFT,
    SigmoidNorm,
    SimPO,
    WeightedSum,
    get_objective,
    kto_kl,
    weighted_reference,
)  # fmt: skip
from bounds import fp32_bound, relative_error
from cases import make_case, packed
from objective_cases import call_inputs
from rank_processes import launch

# A handful of float64 roundings (exp, log, sigmoid, some products), each 1.1e-16; relative to the result.
DOUBLE = 1e-14
LENGTHS = torch.tensor([3, 7, 5, 2, 4, 9])
SUMS = torch.tensor([-2.0, -9.5, -3.0, -4.0, -6.5, -8.0], dtype=torch.float64)
REFS = torch.tensor(
    [[-2.5, -8.0, -4.0, -3.0, -6.0, -9.0], [-1.0, -7.0, -6.0, -5.0, -3.0, -9.5], [-4.0, -8.5, -2.0, -2.0, -9.0, -7.0]],
    dtype=torch.float64,
)
DISTANCES = torch.tensor([0.3, 0.1, 0.7, 0.2, 0.5, 0.4], dtype=torch.float64)


def policy(sums=SUMS, lengths=LENGTHS) -> Logps:
    return Logps(sums.detach().clone().requires_grad_(), lengths)


def pair(chosen: float, rejected: float, lengths=(1, 1)) -> Logps:
    return policy(torch.tensor([chosen, rejected], dtype=torch.float64), torch.tensor(lengths))


def refs(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def grad(objective, given: Logps, **inputs) -> torch.Tensor:
    return torch.autograd.grad(objective(given, **inputs).loss.sum(), given.sum)[0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def same(first, second) -> bool:
    return relative_error(first, second) <= DOUBLE


# RPO


def test_rpo_by_hand():
    """h = 0.5 ((-2 + 3) - (-4 + 3)) = 1; the likelihood of 2 pairs, S_w = -2, -6 over 1 and 3 tokens."""
    given = policy(refs(-2.0, -6.0, -4.0, -4.0), torch.tensor([1, 3, 2, 2]))
    ref = refs(-3.0, -7.0, -3.0, -3.0)
    dpo = softplus(-1.0)
    for normalization, imitation in (("sum", (0.2, 0.6)), ("sequence", (0.4, 0.4)), ("token", (0.2, 0.6))):
        loss = RPO(beta=0.5, eta=0.2, normalization=normalization)(given, ref).loss
        assert loss.tolist() == pytest.approx([dpo + x for x in imitation], rel=DOUBLE)


def test_rpo_token_is_the_mean_over_the_chosen_tokens_of_pairs_that_count():
    given = policy(lengths=torch.tensor([3, 7, 5, 2, 4, 0]))  # the third pair does not count
    loss = RPO(eta=0.3, normalization="token")(given, REFS[0]).loss - DPO()(given, REFS[0]).loss
    assert loss[:2].mean().item() == pytest.approx(0.3 * (2.0 + 9.5) / (3 + 7), rel=DOUBLE)


@pytest.mark.parametrize("normalization", ["sum", "sequence", "token"])
def test_rpo_without_imitation_is_dpo(normalization):
    terms, dpo = RPO(beta=0.3, eta=0.0, normalization=normalization)(policy(), REFS[0]), DPO(0.3)(policy(), REFS[0])
    assert torch.equal(terms.loss, dpo.loss)
    assert {k: v.tolist() for k, v in terms.metrics.items()} == {k: v.tolist() for k, v in dpo.metrics.items()}


@pytest.mark.parametrize("normalization", ["sum", "sequence", "token"])
def test_rpo_is_a_weighted_sum(normalization):
    """In "sum" eta is multiplied by beta, in the others not."""
    weight = 0.2 * (0.3 if normalization == "sum" else 1)
    both = WeightedSum(((1.0, DPO(0.3)), (weight, SFT(normalization=normalization))))
    assert same(RPO(0.3, 0.2, normalization)(policy(), REFS[0]).loss, both(policy(), REFS[0]).loss)


def test_rpo_derivatives_are_the_papers():
    """-beta sigmoid(-h) - eta beta and beta sigmoid(-h); eta / m_w in the sequence form."""
    beta, eta = 0.4, 0.25
    h = beta * ((SUMS - REFS[0])[:3] - (SUMS - REFS[0])[3:])
    pull = beta * torch.sigmoid(-h)
    for normalization, extra in (("sum", eta * beta), ("sequence", eta / LENGTHS[:3].double())):
        expected = torch.cat([-pull - extra, pull])
        assert same(grad(RPO(beta, eta, normalization), policy(), ref_logps=REFS[0]), expected)


def test_rpo_signs_its_own_errors():
    with pytest.raises(ValueError, match=r"rpo: ref_logps: got \(3, 6\), need a tensor \(6,\), one entry a row"):
        RPO()(policy(), REFS)


# MRPO


def test_mrpo_of_one_reference_is_dpo():
    for objective in (MRPO(), MRPO(alpha=(1.0,)), MRPO(clip=None)):
        for ref in (REFS[0], REFS[:1]):
            assert torch.equal(objective(policy(), ref).loss, DPO()(policy(), REFS[0]).loss)


def test_mrpo_held_to_the_base_is_dpo():
    assert same(MRPO(clip=0.0)(policy(), REFS).loss, DPO()(policy(), REFS[0]).loss)


def test_mrpo_fixed_by_hand():
    """Weights 1/4, 3/4, no clip: V = -log(e^2 / 4 + 3 e^1 / 4) for S = -2, -1, and for -1, -3 likewise."""
    v_w, v_l = -math.log(0.25 * math.e**2 + 0.75 * math.e), -math.log(0.25 * math.e + 0.75 * math.e**3)
    loss = MRPO(beta=0.5, alpha=(0.25, 0.75), clip=None)(pair(-1.5, -2.5), refs((-2.0, -1.0), (-1.0, -3.0))).loss
    assert loss.item() == pytest.approx(softplus(-0.5 * ((-1.5 - v_w) - (-2.5 - v_l))), rel=DOUBLE)


def test_mrpo_adapts_to_who_tells_the_answers_apart():
    """Gaps of 1 and 3 give shares of 1/4 and 3/4, to within the guard of 1e-6 in 4."""
    terms = MRPO(clip=None)(pair(-1.5, -2.5), refs((-2.0, -1.0), (-1.0, -4.0)))
    assert terms.metrics["base_weight"].item() == pytest.approx(0.25, abs=1e-6)
    fixed = MRPO(alpha=(0.25, 0.75), clip=None)(pair(-1.5, -2.5), refs((-2.0, -1.0), (-1.0, -4.0)))
    assert terms.loss.item() == pytest.approx(fixed.loss.item(), abs=1e-6)
    alike = MRPO()(pair(-1.5, -2.5), refs((-2.0, -2.0), (-3.0, -3.0)))  # no reference tells: the base's alone
    assert alike.metrics["base_weight"].item() == 1
    assert alike.loss.item() == pytest.approx(softplus(-0.1), rel=DOUBLE)


def test_mrpo_clip_by_hand():
    """Base -10 and -30, other -50 and -31: b = -30 and -30.5, so e_w = 0.1 * 30 / 60.5 holds -50 at -10 (1 + e_w)
    and e_l = 0.1 * 30.5 / 60.5 leaves -31 above -30 (1 + e_l); all weight on the other shows it as it is."""
    share = 30 / (60.5 + 1e-6)
    held = -10 * (1 + 0.1 * share)
    loss = MRPO(alpha=(0.0, 1.0))(pair(-20.0, -40.0), refs((-10.0, -30.0), (-50.0, -31.0))).loss
    assert loss.item() == pytest.approx(softplus(-0.1 * ((-20 - held) - (-40 + 31))), rel=DOUBLE)


def test_mrpo_clips_each_other_reference_by_itself():
    three = MRPO(alpha=(0.0, 1.0, 0.0))(policy(), REFS).loss
    assert same(three, MRPO(alpha=(0.0, 1.0))(policy(), REFS[:2]).loss)


def test_mrpo_swapped_is_the_authors_combination():
    """log V = S_oth + S_base - log(alpha e^S_oth + (1 - alpha) e^S_base), alpha the other's share."""
    swapped = MRPO(swap_weights=True, clip=None)(policy(), REFS[:2]).loss
    base, other = REFS[:2]
    gaps = [(x[:3] - x[3:]).abs() for x in (base, other)]
    alpha = (gaps[1] / (gaps[0] + gaps[1] + 1e-6)).repeat(2)
    virtual = other + base - torch.log(alpha * other.exp() + (1 - alpha) * base.exp())
    ratio = SUMS - virtual
    assert same(swapped, torch.nn.functional.softplus(-0.1 * (ratio[:3] - ratio[3:])))
    assert not same(swapped, MRPO(clip=None)(policy(), REFS[:2]).loss)
    even = MRPO(alpha=[0.5, 0.5], swap_weights=True)(policy(), REFS[:2]).loss
    assert torch.equal(even, MRPO(alpha=(0.5, 0.5))(policy(), REFS[:2]).loss)


def test_mrpo_derivatives_are_dpos_of_the_virtual_reference():
    given = policy()
    terms = MRPO(beta=0.4)(given, REFS)
    pull = 0.4 * torch.sigmoid(-terms.metrics["reward_margin"])
    assert same(grad(MRPO(beta=0.4), policy(), ref_logps=REFS), torch.cat([-pull, pull]))


def test_mrpo_is_pulled_to_the_least_likely_reference():
    """500 nats apart exp(-S) overflows; the sum of logs does not: V = -1000 + log 2."""
    loss = MRPO(beta=0.01, alpha=(0.5, 0.5), clip=None)(pair(-1.0, -1.0), refs((-1000.0, -1.0), (-500.0, -1.0))).loss
    assert loss.item() == pytest.approx(softplus(0.01 * (-1000 + math.log(2) + 1)), rel=DOUBLE)


# LMPO


def confidence_by_hand() -> list[float]:
    """M = (1 - p_w) (1 - (p_w - p_l)^5) / 2, p = exp(S mbar / m^2)."""
    values = []
    for i in range(3):
        (s_w, m_w), (s_l, m_l) = ((SUMS[j].item(), LENGTHS[j].item()) for j in (i, i + 3))
        mbar = (m_w + m_l) / 2
        p_w, p_l = math.exp(s_w * mbar / m_w**2), math.exp(s_l * mbar / m_l**2)
        values.append((1 - p_w) * (1 - (p_w - p_l) ** 5) / 2)
    return values


def lmpo_by_hand(z: list[float], beta=2.0, ratio=0.25, lam=0.2) -> list[float]:
    avg = (SUMS / LENGTHS).tolist()
    return [softplus(beta * ratio + lam * z[i] - beta * (avg[i] - avg[i + 3])) for i in range(3)]


def standardised(values, mean, std) -> list[float]:
    return [(x - mean) / (std + 1e-8) for x in values]


def mean_and_std(values) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def test_lmpo_first_step_standardises_by_its_own_batch():
    values = confidence_by_hand()
    objective = LMPO()
    terms = objective(policy())
    assert terms.metrics["unsureness"].tolist() == pytest.approx(values, rel=DOUBLE)
    z = standardised(values, *mean_and_std(values))
    assert terms.loss.tolist() == pytest.approx(lmpo_by_hand(z), rel=1e-12)  # z: differences of like numbers
    assert terms.metrics["target_margin"].mean().item() == pytest.approx(0.5, rel=1e-12)  # mean z is 0
    assert objective.steps == 1


def test_lmpo_running_statistics_over_two_steps():
    """a = 0.9 (0.1 x1) + 0.1 x2, divided by 1 - 0.81."""
    first = policy(SUMS * 1.5)
    objective = LMPO()
    objective(first)
    seen = [LMPO()(first).metrics["unsureness"].tolist(), confidence_by_hand()]
    (mean1, std1), (mean2, std2) = map(mean_and_std, seen)
    mean, std = ((0.09 * x + 0.1 * y) / 0.19 for x, y in ((mean1, mean2), (std1, std2)))
    loss = objective(policy()).loss
    assert loss.tolist() == pytest.approx(lmpo_by_hand(standardised(seen[1], mean, std)), rel=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_lmpo_without_lam_is_simpo(ratio):
    loss = LMPO(beta=2.5, gamma_beta_ratio=ratio, lam=0.0)(policy()).loss
    assert same(loss, SimPO(beta=2.5, gamma=2.5 * ratio)(policy()).loss)


def test_lmpo_margin_carries_no_gradient():
    """dL/dS_w = -beta g / m_w, dL/dS_l = beta g / m_l, g = sigmoid(target - beta (avg_w - avg_l))."""
    terms = LMPO()(policy())
    g = 1 - torch.exp(-terms.loss.detach())  # L = softplus(x), g = sigmoid(x)
    expected = torch.cat([-2 * g, 2 * g]) / LENGTHS
    assert relative_error(grad(LMPO(), policy()), expected) <= 1e-13  # 1 - exp(-L) cancels a digit


def test_lmpo_in_evaluation_changes_nothing():
    objective = LMPO()
    objective(policy())
    before = copy.deepcopy(objective.state_dict())
    objective.eval()(policy(SUMS * 2))
    assert objective.state_dict() == before
    assert set(before) == {"running_mean", "running_std", "steps"}
    assert same(LMPO().eval()(policy()).loss, SimPO()(policy()).loss)  # nothing seen yet: z = 0


def test_lmpo_state_goes_on_where_it_was_saved():
    whole, saved, loaded = LMPO(), LMPO(), LMPO()
    whole(policy())
    saved(policy())
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(whole(policy(SUMS * 2)).loss, loaded(policy(SUMS * 2)).loss)


@pytest.mark.parametrize(
    "make",
    [lambda: get_objective("lmpo + 0.1 sft"), lambda: BMC("lmpo"), lambda: BMC("0.5 dpo + lmpo"), LMPO],
    ids=["sum", "bmc", "bmc of a sum", "alone"],
)
def test_the_state_of_lmpo_is_that_of_what_it_is_part_of(make):
    """Read and held by a module around it, as PreferenceModel is one."""

    def call(objective, sums):
        return objective(policy(sums), REFS[0] if objective.needs_reference else None).loss

    objective, holder = make(), torch.nn.Module()
    holder.objective = objective
    call(objective, SUMS)
    (steps,) = (value for name, value in holder.state_dict().items() if name.endswith("steps"))
    assert steps == 1
    assert len(holder.state_dict()) == 3
    holder.eval()
    before = copy.deepcopy(holder.state_dict())
    held = call(objective, SUMS * 2)
    assert holder.state_dict() == before

    other = make()
    other.load_state_dict(objective.state_dict())
    assert torch.equal(call(other.eval(), SUMS * 2), held)
    assert not torch.equal(call(make().eval(), SUMS * 2), held)
    copied = copy.deepcopy(objective).train()
    call(copied, SUMS)
    assert holder.state_dict() == before
    assert {buffer.device.type for buffer in holder.to("meta").buffers()} == {"meta"}


def test_lmpo_compiled_updates_its_statistics():
    plain, other = LMPO(), LMPO()
    compiled = torch.compile(lambda sums: other(Logps(sums, LENGTHS)).loss, backend="aot_eager")
    for scale in (1.0, 2.0):
        assert same(compiled(SUMS * scale), plain(policy(SUMS * scale)).loss)
    assert other.state_dict() == plain.state_dict()


def test_statistics_of_lmpo_move_and_are_not_cast():
    objective = LMPO()
    objective(policy())
    before = copy.deepcopy(objective.state_dict())
    for cast in (torch.nn.Module.half, torch.nn.Module.float, lambda module: module.to(torch.bfloat16)):
        cast(torch.nn.ModuleList([objective]))
        assert objective.state_dict() == before
        assert objective.running_mean.dtype == objective.running_std.dtype == torch.float64
    assert LMPO().to("meta", torch.bfloat16).running_std.dtype == torch.float64
    empty = LMPO().to("meta").to_empty(device="cpu")
    empty.load_state_dict(before)
    assert empty.state_dict() == before


def test_lmpo_leaves_out_what_has_no_spread_and_pairs_that_do_not_count():
    objective = LMPO()
    assert same(objective(pair(-1.0, -2.0)).loss, SimPO()(pair(-1.0, -2.0)).loss)
    assert objective.steps == 0
    objective(policy())
    before = copy.deepcopy(objective.state_dict())
    assert objective(pair(-1.0, -2.0)).loss.isfinite().all()
    assert objective.state_dict() == before
    short = LMPO()
    short(policy(lengths=torch.tensor([3, 7, 5, 2, 4, 0])))
    two = LMPO()
    two(policy(SUMS[[0, 1, 3, 4]], LENGTHS[[0, 1, 3, 4]]))
    assert short.state_dict() == two.state_dict()


def test_lmpo_of_pairs_all_alike():
    """A spread of 0: z is 0, not NaN."""
    alike = policy(SUMS[[0, 0, 3, 3]], LENGTHS[[0, 0, 3, 3]])
    assert LMPO()(alike).metrics["target_margin"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lmpo_in_training_from_hidden_states(dtype):
    """As test_every_objective has it for the others: the reference by the statistics that the object holds."""
    case, other = (make_case(rows=8, dtype=dtype, seed=seed) for seed in (0, 1))
    exact = case.to(torch.float64)
    objective = LMPO()
    fused_preference_loss(other.hidden, other.head, other.labels, objective)
    loss = fused_preference_loss(case.hidden, case.head, case.labels, objective)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, objective)
    assert objective.steps == 2
    assert relative_error(loss, truth) <= fp32_bound(32)
    named = fused_preference_loss(case.hidden, case.head, case.labels, "lmpo")  # its first step
    assert relative_error(named, reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, "lmpo")) <= (
        fp32_bound(32)
    )
    grads, truths = (torch.autograd.grad(x, c.leaves) for x, c in ((loss, case), (truth, exact)))
    for got, right in zip(grads, truths, strict=True):
        # A bf16 gradient is rounded once, by 2^-8 of each entry at most.
        assert relative_error(got, right) <= fp32_bound(32) + (2**-8 if dtype == torch.bfloat16 else 0)


def of_rank(rank, world):
    rows = [[0, 3], [1, 2, 4, 5]][rank]
    objective = LMPO()
    losses = [objective(Logps(SUMS[rows] * scale, LENGTHS[rows])).loss for scale in (1.0, 2.0)]
    empty = torch.zeros(2, dtype=torch.int64) if rank == 0 else LENGTHS[[1, 2, 4, 5]]
    objective(Logps(SUMS[rows], empty))  # a rank without a counting pair joins all the same
    if rank == 0:
        objective.eval()(Logps(SUMS[rows], LENGTHS[rows]))  # alone: in evaluation nobody waits for anybody
    return losses, objective.state_dict(), kto_kl(SUMS[rows], SUMS[rows] - (-4, 3)[rank])


def test_statistics_of_lmpo_and_kto_are_of_all_ranks():
    """Ranks of one and two pairs have the losses and the state of one process with the three."""
    (losses0, state0, kl0), (losses1, state1, kl1) = launch(2, of_rank)
    # Gains of -4 on two rows and of 3 on four: the mean first, held at 0 after it.
    assert kl0.item() == kl1.item() == pytest.approx((2 * -4 + 4 * 3) / 6)
    whole = LMPO()
    for scale, first, second in zip((1.0, 2.0), losses0, losses1, strict=True):
        assert relative_error(torch.cat([first, second]), whole(policy(SUMS * scale)).loss) <= 1e-12
    whole(policy(SUMS[[1, 2, 4, 5]], LENGTHS[[1, 2, 4, 5]]))
    assert state0 == state1
    for name, value in whole.state_dict().items():
        assert state0[name].item() == pytest.approx(value.item(), rel=1e-12), name


# PoFT


def test_poft_by_hand():
    """avg -1 against rbar -2: L = softplus(-1), tau = sigmoid(-1), dL/dS = -tau / m."""
    given = policy(refs(-3.0), torch.tensor([3]))
    terms = PoFT()(given, refs(-2.0))
    assert terms.loss.item() == pytest.approx(softplus(-1.0), rel=DOUBLE)
    assert terms.metrics["weight"].item() == pytest.approx(sigmoid(-1.0), rel=DOUBLE)
    assert grad(PoFT(), given, ref_logps=refs(-2.0)).item() == pytest.approx(-sigmoid(-1.0) / 3, rel=DOUBLE)


def test_poft_level_with_the_panel_is_half_of_sft():
    avg = SUMS / LENGTHS
    assert same(PoFT()(policy(), avg).loss, torch.full((6,), math.log(2), dtype=torch.float64))
    assert same(grad(PoFT(), policy(), ref_logps=avg), grad(SFT(), policy()) / 2)


def test_poft_against_a_sure_panel_is_sft():
    """sigmoid(500) is 1 in float64: the gradient is SFT's, and the loss SFT's plus rbar."""
    rbar = torch.full((6,), 500.0, dtype=torch.float64)
    assert same(grad(PoFT(), policy(), ref_logps=rbar), grad(SFT(), policy()))
    moved = PoFT()(policy(), rbar).loss - rbar
    assert relative_error(moved, SFT()(policy()).loss) <= 500 * DOUBLE  # 501 - 500 keeps what is left of 501's digits


def test_poft_constants_of_the_code():
    """-log sigmoid(beta avg - beta rbar + gamma): gamma eases, the opposite of SimPO's."""
    given, rbar = policy(refs(-3.0), torch.tensor([3])), refs(-2.0)
    assert PoFT(beta=2.0, gamma=0.5)(given, rbar).loss.item() == pytest.approx(softplus(-2.5), rel=DOUBLE)
    expected = -2 * sigmoid(-2.5) / 3
    assert grad(PoFT(2.0, 0.5), given, ref_logps=rbar).item() == pytest.approx(expected, rel=DOUBLE)


# FPO


def test_fpo_by_hand():
    """avg - ref_avg = 1 and -1, D = 0.5 and 2: u = 0.1 (2 - 0.5 (2 - 0.5)) = 0.125."""
    loss = FPO()(pair(-2.0, -6.0, (2, 3)), refs(-4.0, -3.0), feature_distance=refs(0.5, 2.0)).loss
    assert loss.item() == pytest.approx(softplus(-0.125), rel=DOUBLE)


def test_fpo_rewards_by_hand():
    """beta times log-ratios per token, 1 and -1: the drift is a margin of the loss and no reward."""
    metrics = FPO(0.3)(pair(-2.0, -6.0, (2, 3)), refs(-4.0, -3.0), feature_distance=refs(0.5, 2.0)).metrics
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "chosen_reward": 0.3,
            "rejected_reward": -0.3,
            "reward_margin": 0.6,
            "reward_accuracy": 1,
            "chosen_feature_distance": 0.5,
            "rejected_feature_distance": 2,
        },
        rel=DOUBLE,
    )


def test_fpo_without_alpha_is_length_normalised_dpo():
    inputs = {"ref_logps": REFS[0]}
    loss = FPO(beta=0.7, alpha=0.0)(policy(), feature_distance=DISTANCES, **inputs).loss
    assert torch.equal(loss, SigmoidNorm(0.7)(policy(), **inputs).loss)
    no_reference = {"ref_logps": torch.zeros(6, dtype=torch.float64), "feature_distance": DISTANCES}
    assert same(FPO(2.0, 0.0)(policy(), **no_reference).loss, SimPO(beta=2.0, gamma=0.0)(policy()).loss)


def test_fpo_derivatives_are_the_papers():
    """g = sigmoid(-u): -beta g / m_w, beta g / m_l, alpha beta g for D_l, and 0 for D_w."""
    beta, alpha = 0.6, 0.4
    given, distance = policy(), DISTANCES.clone().requires_grad_()
    loss = FPO(beta, alpha)(given, REFS[0], feature_distance=distance).loss
    ratio = (SUMS - REFS[0]) / LENGTHS
    u = beta * (ratio[:3] - ratio[3:] - alpha * (DISTANCES[3:] - DISTANCES[:3]))
    g = torch.sigmoid(-u)
    by_sum, by_distance = torch.autograd.grad(loss.sum(), (given.sum, distance))
    assert same(by_sum, torch.cat([-beta * g, beta * g]) / LENGTHS)
    assert same(by_distance, torch.cat([torch.zeros(3), alpha * beta * g]))


def test_fpo_from_hidden_states_passes_gradients_to_the_distance():
    case = make_case(rows=8)
    inputs = call_inputs(FPO(), case.labels)
    distance = inputs["objective_inputs"]["feature_distance"].requires_grad_()
    loss, out = fused_preference_loss(case.hidden, case.head, case.labels, "fpo", return_outputs=True, **inputs)
    loss.backward()
    assert (distance.grad[:4] == 0).all()
    assert (distance.grad[4:] > 0).all()
    assert {"chosen_feature_distance", "rejected_feature_distance", "reward_margin"} <= set(out.metrics)


# BMC


def test_bmc_weights_by_hand():
    """Unmarked 1; marked 1 + 1/p up to 1 + delta."""
    logps = torch.log(torch.tensor([0.5, 0.8, 0.25, 0.9])).double()
    marks, borders = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0, 2, 4])
    weights = BMC("dpo", delta=3.0).weigh_tokens(logps, marks, borders)
    assert weights.tolist() == pytest.approx([1.0, 2.25, 4.0, 1.0], rel=1e-7)  # fp32 logs
    clipped = BMC("dpo", delta=0.5).weigh_tokens(logps, torch.ones(4), borders)
    assert clipped.tolist() == pytest.approx([1.5] * 4, rel=DOUBLE)
    far = BMC("dpo").weigh_tokens(torch.tensor([-1e4, 0.0]), torch.ones(2), borders)  # exp(1e4) overflows
    assert far.tolist() == pytest.approx([3.0, 2.0], rel=DOUBLE)


def marked_case(**options):
    case = make_case(rows=8, dtype=torch.float64, **options)
    marks = (torch.rand(case.labels.shape) < 0.5).double()
    with torch.no_grad():
        logps = fused_linear_logps(case.hidden, case.head, case.labels)
    at_labels = torch.zeros_like(logps)
    at_labels[:, 1:] = logps[:, :-1]  # each where its label stands
    return case, marks, 1 + marks * torch.exp(-at_labels).clamp(max=2.0)


@pytest.mark.parametrize("base", ["asft", "orpo", "simpo", "dpo", "ipo", "hinge_norm", "rpo", "mrpo", "dpo + 0.1 sft"])
def test_bmc_is_its_base_with_token_weights(base):
    case, marks, weights = marked_case()
    ref = -torch.rand(8, dtype=torch.float64) * 20 if get_objective(base).needs_reference else None
    call = (case.hidden, case.head, case.labels)
    losses = [
        fused_preference_loss(*call, BMC(base), token_weights=marks, ref_logps=ref, reduction="none"),
        fused_preference_loss(*call, base, token_weights=weights, ref_logps=ref, reduction="none"),
    ]
    assert relative_error(*losses) <= 1e-13  # sums of 6 float64 terms of up to 10, by another exp
    grads = [torch.autograd.grad(loss.sum(), case.hidden)[0] for loss in losses]
    assert relative_error(*grads) <= 1e-13  # the weights carry no gradient


def test_bmc_of_marks_nowhere_is_its_base():
    case, marks, _ = marked_case()
    call = (case.hidden, case.head, case.labels)
    plain = fused_preference_loss(*call, "simpo")
    assert torch.equal(fused_preference_loss(*call, BMC("simpo"), token_weights=0 * marks), plain)


def test_bmc_base_keeps_its_parameters():
    case, marks, weights = marked_case()
    call = (case.hidden, case.head, case.labels)
    strong = fused_preference_loss(*call, BMC(SimPO(beta=5.0)), token_weights=marks)
    assert relative_error(strong, fused_preference_loss(*call, SimPO(beta=5.0), token_weights=weights)) <= 1e-13
    assert relative_error(strong, fused_preference_loss(*call, BMC("simpo"), token_weights=marks)) > 0.1


@pytest.mark.parametrize("cut", [False, True])
def test_bmc_own_reference_of_the_policy_itself_has_margin_zero(cut):
    """Then both ways of weighing the reference agree: h = 0, L = log 2; padded and packed."""
    case, marks, _ = marked_case()
    hidden, labels, borders = case.hidden, case.labels, {}
    if cut:
        hidden, labels, cu_seqlens = packed(case)
        lengths = cu_seqlens.diff().tolist()
        marks = torch.cat([row[:n] for row, n in zip(marks, lengths, strict=True)])
        borders = {"cu_seqlens": cu_seqlens}
    tokens = fused_linear_logps(hidden, case.head, labels, **borders).detach()
    own = weighted_reference(tokens, marks, 2.0, **borders)
    for ref_weighting, ref in (("own", own), ("policy", tokens)):
        objective = BMC("dpo", ref_weighting=ref_weighting)
        loss = fused_preference_loss(
            hidden, case.head, labels, objective, token_weights=marks, ref_logps=ref, reduction="none", **borders
        )
        assert relative_error(loss, torch.full((4,), math.log(2), dtype=torch.float64)) <= 1e-13


def test_bmc_own_and_policy_differ_away_from_the_reference():
    """One token an answer, p = 1/2 under the policy and 1/4 under the reference, marked, delta 9: own weighs the
    reference by 5, policy by 3."""
    tokens = torch.log(torch.tensor([[0.25, 0.0], [0.5, 0.0]])).nan_to_num(neginf=0).double()
    marks = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    own = weighted_reference(tokens, marks, 9.0)
    assert own.tolist() == pytest.approx([5 * math.log(0.25), 3 * math.log(0.5)], rel=1e-6)
    unshifted = weighted_reference(tokens, marks.roll(1, dims=1), 9.0, shift=False)
    assert torch.equal(unshifted, own)


def test_bmc_weighs_the_reference_at_the_labels_alone():
    """Where only nll_labels has a token the reference's sum has none."""
    case = make_case(rows=6, valid=0.9)
    full = case.labels[:3].clone()
    case.labels[:, :5] = -100
    exact = case.to(torch.float64)
    objective = BMC("dpo + orpo", ref_weighting="policy")
    inputs = {**call_inputs(objective, case.labels), "nll_labels": full}
    loss = fused_preference_loss(case.hidden, case.head, case.labels, objective, **inputs)
    truth = reference.fused_preference_loss(exact.hidden, exact.head, exact.labels, objective, **inputs)
    assert relative_error(loss, truth) <= fp32_bound(32)


def test_bmc_takes_from_its_base_what_the_call_needs():
    assert (BMC("simpo").needs_reference, BMC("simpo", ref_weighting="policy").ref_per_token) == (False, False)
    assert (BMC("dpo").ref_per_token, BMC("dpo", ref_weighting="policy").ref_per_token) == (False, True)
    assert BMC("orpo").uses_nll_labels
    assert set(BMC("fpo").inputs) == {"feature_distance"}
    assert BMC("orpo").base == ORPO()


# Marks


def test_diff_marks_by_hand():
    chosen, rejected = [1, 2, 3, 4, 9], [1, 5, 3, 9, 8]
    assert diff_marks(chosen, rejected) == ([0, 1, 0, 1, 0], [0, 1, 0, 0, 1])
    assert diff_marks(chosen, rejected, never={2, 8}) == ([0, 0, 0, 1, 0], [0, 1, 0, 0, 0])
    assert diff_marks(chosen, chosen) == ([0] * 5, [0] * 5)
    assert diff_marks([1, 2], []) == ([1, 1], [])


def test_diff_marks_of_long_answers_mark_the_edits_alone():
    """600 tokens of a vocabulary of 40: difflib by default takes every id for too common to anchor on."""
    gen = torch.Generator().manual_seed(0)
    rejected = torch.randint(40, (600,), generator=gen).tolist()
    chosen = list(rejected)
    edits = [50, 170, 290, 410, 530]
    for place in edits:
        chosen[place] = 40
    marks = diff_marks(chosen, rejected)
    for side in marks:
        assert [i for i, mark in enumerate(side) if mark] == edits


# All of them


@pytest.mark.parametrize("margin", [500.0, -500.0])
@pytest.mark.parametrize("name", ["lmpo", "poft", "fpo", "rpo", "mrpo"])
def test_500_nats(name, margin):
    """Finite, and as large or as small as the margin says."""
    objective = get_objective(name)
    given = pair(-1.0 + min(margin, 0), -1.0 - max(margin, 0))
    inputs = {"ref_logps": refs(-1.0, -1.0)} if objective.needs_reference else {}
    if objective.inputs:
        inputs["feature_distance"] = refs(0.0, 0.0)
    loss = objective(given, **inputs).loss
    assert loss.isfinite().all()
    assert grad(objective, given, **inputs).isfinite().all()
    beta = objective.beta
    small = {"lmpo": softplus(0.5 - beta * 500), "rpo": softplus(-50.0) + 0.0005}.get(name, softplus(-beta * 500))
    large = {"lmpo": beta * 500 + 0.5, "rpo": 50 + 0.0005 * 501, "mrpo": 50.0, "fpo": 50.0}.get(name, 500.0)
    if name == "poft":  # of rows: the one that moved
        assert loss.max().item() == pytest.approx(500.0 if margin else 0, rel=DOUBLE)
    else:
        assert loss.item() == pytest.approx(small if margin > 0 else large, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rpo", {"beta": 0}, "rpo: beta: got 0, need a finite number > 0"),
        ("rpo", {"eta": -1}, "rpo: eta: got -1, need a finite number >= 0"),
        ("rpo", {"normalization": "mean"}, "rpo: normalization: got 'mean', need one of 'sum', 'sequence', 'token'"),
        ("mrpo", {"clip": -0.1}, "mrpo: clip: got -0.1, need a finite number >= 0"),
        ("mrpo", {"alpha": 0.5}, r"mrpo: alpha: got 0.5, need one weight a reference, or None \(adaptive\)"),
        ("mrpo", {"alpha": (0.5, 0.6)}, "mrpo: alpha: got weights of sum 1.1, need sum 1"),
        ("mrpo", {"alpha": (0.5, 0.50001)}, "mrpo: alpha: got weights of sum 1.00001, need sum 1"),
        ("mrpo", {"alpha": (True,)}, "mrpo: alpha: got True, need a finite number >= 0"),
        ("mrpo", {"swap_weights": "false"}, "mrpo: swap_weights: got 'false', need True or False"),
        ("mrpo", {"swap_weights": float("nan")}, "mrpo: swap_weights: got nan, need True or False"),
        ("mrpo", {"swap_weights": [1]}, r"mrpo: swap_weights: got \[1\], need True or False"),
        ("mrpo", {"swap_weights": 1}, "mrpo: swap_weights: got 1, need True or False"),
        ("mrpo", {"alpha": (1.5, -0.5)}, "mrpo: alpha: got -0.5, need a finite number >= 0"),
        ("lmpo", {"lam": float("nan")}, "lmpo: lam: got nan, need"),
        ("lmpo", {"gamma_beta_ratio": -1}, "lmpo: gamma_beta_ratio: got -1, need"),
        ("lmpo", {"power": 4}, "lmpo: power: got 4, need an odd integer >= 1"),
        ("lmpo", {"power": 10**40 + 1}, "lmpo: power: got 10+1, need an odd integer >= 1 that float64 holds"),
        ("lmpo", {"power": True}, "lmpo: power: got True, need an odd integer >= 1"),
        ("poft", {"beta": -1}, "poft: beta: got -1, need a finite number > 0"),
        ("poft", {"gamma": -1}, "poft: gamma: got -1, need a finite number >= 0"),
        ("fpo", {"top_k": 0}, "fpo: top_k: got 0, need an integer >= 1"),
        ("fpo", {"alpha": "a"}, "fpo: alpha: got 'a', need a finite number >= 0"),
        ("bmc", {"base": "dpo", "delta": 0}, "bmc: delta: got 0, need a finite number > 0"),
        ("bmc", {"base": "dpo", "ref_weighting": "x"}, "bmc: ref_weighting: got 'x', need one of 'own', 'policy'"),
        ("bmc", {}, "bmc: base: got None, need a name such as 'dpo' or an Objective such as DPO"),
        ("bmc", {"base": "bmc"}, "bmc: base: got 'bmc', need a name such as 'dpo' or an Objective such as DPO"),
        ("bmc", {"base": "simpo + poft"}, "bmc: base: got WeightedSum, need a paired objective of plain sums"),
        ("bmc", {"base": 3}, "bmc: base: got 3, need a name such as 'dpo' or an Objective"),
        ("bmc", {"base": "sft"}, "bmc: base: got SFT, need a paired objective of plain sums"),
        ("bmc", {"base": BMC("dpo")}, "bmc: base: got BMC, need a paired objective of plain sums"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_objective(name, **parameters)


def test_inputs_are_checked():
    with pytest.raises(ValueError, match=r"mrpo: alpha: got 2 weights for 3 references, need one each"):
        MRPO(alpha=(0.5, 0.5))(policy(), REFS)
    with pytest.raises(ValueError, match=r"mrpo: swap_weights: got True with 3 references, need 2"):
        MRPO(swap_weights=True)(policy(), REFS)
    with pytest.raises(ValueError, match=r"mrpo: ref_logps: got \(5,\), need a tensor \(K, 6\) of K >= 1 references"):
        MRPO()(policy(), REFS[0, :5])
    with pytest.raises(ValueError, match=r"mrpo: ref_logps: got \(0, 6\), need a tensor \(K, 6\) of K >= 1 references"):
        MRPO()(policy(), REFS[:0])
    with pytest.raises(ValueError, match=r"poft: ref_logps: got \(3, 6\), need a tensor \(6,\)"):
        PoFT()(policy(), REFS)
    with pytest.raises(ValueError, match=r"fpo: feature_distance: got \(3,\), need a tensor \(6,\)"):
        FPO()(policy(), REFS[0], feature_distance=DISTANCES[:3])
    with pytest.raises(ValueError, match=r"marks: got shape \(2, 3\), need \(2, 4\), that of logps"):
        weighted_reference(torch.zeros(2, 4), torch.zeros(2, 3), 2.0)
    with pytest.raises(ValueError, match="weighted_reference: delta: got 0, need a finite number > 0"):
        weighted_reference(torch.zeros(2, 4), torch.zeros(2, 4), 0)
    case = make_case(rows=4)
    with pytest.raises(ValueError, match=r"token_weights: got None, need"):
        fused_preference_loss(case.hidden, case.head, case.labels, BMC("simpo"))


def test_objects_compare_and_hash_by_their_parameters():
    assert MRPO(alpha=[0.5, 0.5]) == MRPO(alpha=(0.5, 0.5))
    assert len({MRPO(alpha=[0.5, 0.5]), MRPO(alpha=(0.5, 0.5)), BMC("dpo"), BMC(DPO())}) == 2
    assert repr(LMPO(power=3)) == "LMPO(beta=2.0, gamma_beta_ratio=0.25, lam=0.2, power=3)"
    assert {"lmpo", "poft", "fpo", "bmc", "rpo", "mrpo"} <= set(OBJECTIVES)
    assert BMC(ASFT()) == BMC("asft")
