"""SimPO, ORPO, DPO and CPO against Liger-Kernel's fused losses: loss, gradients of hidden states and weight, in fp32.

Liger's likelihood is a mean over all chosen tokens of the batch: nll_normalization="token", or a sum with SFT("token").
Ours of one mean per sequence is the same where the chosen answers have one length.
"""

import pytest
import torch

from asft_kernels import fused_linear_logps, fused_preference_loss
from asft_kernels.objectives import (
    CPO,
    DPO,
    ORPO,
    SFT,
    ApoDown,
    ApoZero,
    BcoPair,
    DiscoPOP,
    ExoPair,
    NcaPair,
    SimPO,
    SppoHard,
    WeightedSum,
)
from bounds import fp32_bound, relative_error
from cases import IGNORE, make_case

LOGITS = 8  # the largest here
# Each side is off from the exact value by the fp32 bound of its logits at most, that of bounds.py.
BOUND = 2 * fp32_bound(LOGITS)


@pytest.fixture(scope="module")
def liger():
    return pytest.importorskip("liger_kernel.chunked_loss", reason="needs the test extra: liger-kernel")


def shifted_case(*, one_length: bool):
    """Labels already shifted, as Liger takes them; rows of 3 to 12 tokens, the chosen ones of 7 if one_length."""
    case = make_case(rows=6, valid=1.0, bias=True)
    lengths = [7, 7, 7, 3, 12, 5] if one_length else [4, 11, 7, 3, 12, 5]
    for row, length in zip(case.labels, lengths, strict=True):
        row[length:] = IGNORE
    return case


def assert_same(case, module, objective, *, liger_inputs=None, **inputs) -> None:
    theirs = module(case.weight, case.hidden, case.labels, bias=case.bias, **(liger_inputs or {}))[0]
    ours = fused_preference_loss(case.hidden, case.head, case.labels, objective, shift=False, **inputs)
    assert relative_error(ours, theirs) <= BOUND
    for got, right in zip(*(torch.autograd.grad(x, case.leaves) for x in (ours, theirs)), strict=True):
        assert right.norm() > 0
        assert relative_error(got, right) <= BOUND


def assert_same_with_reference(module, objective) -> None:
    case = shifted_case(one_length=False)
    gen = torch.Generator().manual_seed(1)
    ref_hidden, ref_weight = (
        x.detach() + 0.3 * torch.randn(x.shape, generator=gen) for x in (case.hidden, case.weight)
    )
    reference = {"ref_input": ref_hidden, "ref_weight": ref_weight, "ref_bias": case.bias.detach()}
    head = (ref_weight, reference["ref_bias"])
    ref_logps = fused_linear_logps(ref_hidden, head, case.labels, shift=False).sum(1)
    assert_same(case, module, objective, liger_inputs=reference, ref_logps=ref_logps)


def test_logits_are_as_small_as_the_bound_says():
    case = shifted_case(one_length=False)
    assert (case.hidden @ case.weight.T + case.bias).abs().max() <= LOGITS


def test_simpo(liger):
    module = liger.LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.7, compute_nll_loss=False, compiled=False)
    assert_same(shifted_case(one_length=False), module, SimPO(2.0, 0.7))


def test_simpo_with_its_likelihood(liger):
    module = liger.LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.7, alpha=0.3, compiled=False)
    objective = WeightedSum(((1.0, SimPO(2.0, 0.7)), (0.3, SFT("token"))))
    assert_same(shifted_case(one_length=False), module, objective)


def test_cpo(liger):
    module = liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.7, compiled=False)
    assert_same(shifted_case(one_length=True), module, CPO(0.3, 0.7))


def test_cpo_with_a_token_mean(liger):
    module = liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.7, compiled=False)
    case = shifted_case(one_length=False)
    assert_same(case, module, WeightedSum(((1.0, CPO(0.3, alpha=0)), (0.7, SFT("token")))))
    sequence_mean = fused_preference_loss(case.hidden, case.head, case.labels, CPO(0.3, 0.7), shift=False)
    theirs = module(case.weight, case.hidden, case.labels, bias=case.bias)[0]
    assert relative_error(sequence_mean, theirs) > 1e-3


def test_cpo_with_a_likelihood_per_token(liger):
    module = liger.LigerFusedLinearCPOLoss(beta=0.3, alpha=0.7, label_smoothing=0.2, compiled=False)
    assert_same(shifted_case(one_length=False), module, CPO(0.3, 0.7, 0.2, nll_normalization="token"))


def test_orpo_with_a_likelihood_per_token(liger):
    module = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)
    assert_same(shifted_case(one_length=False), module, ORPO(lam=0.3, nll_normalization="token"))


def test_simpo_with_label_smoothing(liger):
    module = liger.LigerFusedLinearSimPOLoss(
        beta=2.0, gamma=0.7, label_smoothing=0.2, compute_nll_loss=False, compiled=False
    )
    assert_same(shifted_case(one_length=False), module, SimPO(2.0, 0.7, 0.2))


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("exo_pair", ExoPair(0.1, 0.05)),
        ("nca_pair", NcaPair(0.1)),
        ("bco_pair", BcoPair(0.1)),
        ("sppo_hard", SppoHard(0.1)),
        ("apo_zero", ApoZero(0.1)),
        ("apo_down", ApoDown(0.1)),
        ("discopop", DiscoPOP(0.1, 0.5)),  # tau divides h, and multiplies the error of its fp32 sums
    ],
)
def test_dpos_other_losses(liger, loss_type, objective):
    smoothing = getattr(objective, "label_smoothing", 0.0)
    module = liger.LigerFusedLinearDPOLoss(
        beta=0.1, loss_type=loss_type, label_smoothing=smoothing, discopop_tau=0.5, compiled=False
    )
    assert_same_with_reference(module, objective)


def test_dpo(liger):
    assert_same_with_reference(liger.LigerFusedLinearDPOLoss(beta=0.3, compiled=False), DPO(0.3))


def test_orpo(liger):
    module = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)
    assert_same(shifted_case(one_length=True), module, ORPO(lam=0.3))


def test_orpo_with_its_likelihood_over_prompt_and_answer(liger):
    """Labels for the likelihood of all T places: one length."""
    case = shifted_case(one_length=False)
    full = torch.randint(97, case.labels.shape, generator=torch.Generator().manual_seed(1))
    full = torch.where(case.labels == IGNORE, full, case.labels)
    module = liger.LigerFusedLinearORPOLoss(beta=0.3, compiled=False)
    nll_target = torch.cat([full[:3], torch.full_like(full[3:], IGNORE)])  # Liger halves what it is given
    assert_same(case, module, ORPO(lam=0.3), liger_inputs={"nll_target": nll_target}, nll_labels=full[:3])
