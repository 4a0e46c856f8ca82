"""The base losses against TRL's own code on the same log-probabilities, values and gradients.

The trainers' methods run as they are, on a `self` that has only what they read, and a "model" that returns the
log-probabilities. Written against TRL 1.16.
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import (
    AOT,
    CPO,
    DPO,
    IPO,
    KTO,
    LDDPO,
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
    kto_kl,
)
from asft_kernels.objectives.base import mean_over
from bounds import relative_error

PAIRS, T = 4, 9
# Some twenty roundings of 2^-53, of sums up to 30 times what comes out.
DOUBLE = 1e-13
# ORPO's, which TRL computes in fp32: 16 roundings of 2^-24, of means and log-odds of at most 3.
SINGLE = 16 * 2**-24
# exp(x) in fp32, |x| <= 12 from sums of at most 24 nats: 16 roundings of 12 * 2^-24, relative once exponentiated.
EXPONENTIAL = 16 * 12 * 2**-24


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl", reason="needs the test extra: trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental trainers, and what they import
        from trl import DPOTrainer, KTOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


@pytest.fixture
def batch():
    """logps (2 PAIRS, T - 1) of tokens 1 to T - 1, 0 where masked, made of a leaf; mask (2 PAIRS, T); sums ref."""
    gen = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.randint(3, T + 1, (2 * PAIRS, 1), generator=gen)
    mask[:, :2] = False  # the prompt
    leaf = (-3 * torch.rand(2 * PAIRS, T - 1, generator=gen, dtype=torch.float64)).requires_grad_()
    ref = -3 * torch.rand(2 * PAIRS, generator=gen, dtype=torch.float64) * mask.sum(1)
    return SimpleNamespace(leaf=leaf, logps=leaf * mask[:, 1:], mask=mask, ref=ref)


def trainer(**fields) -> SimpleNamespace:
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), **same),
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        **fields,
    )


def model_of(logps, **figures):
    filler = torch.zeros(logps.shape)
    outputs = SimpleNamespace(log_probs=logps, entropy=filler, mean_logits=filler, is_top1=filler.bool(), **figures)
    return lambda **_: outputs


def tokens(mask) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones_like(mask).long(), "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def policy(batch) -> Logps:
    return Logps(batch.logps.sum(1), batch.mask.sum(1))


def assert_same(ours, theirs, leaf, bound) -> None:
    """Loss, and gradient in what the loss was computed from."""
    assert relative_error(ours, theirs) <= bound
    grads = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ours, theirs)]
    assert relative_error(*grads) <= bound
    assert grads[1].norm() > 0


def dpo_trainer(objective, loss_type, **fields) -> SimpleNamespace:
    own = {
        "beta": getattr(objective, "beta", getattr(objective, "gamma", 1.0)),
        "label_smoothing": getattr(objective, "label_smoothing", 0.0),
        "f_divergence_type": getattr(objective, "f_divergence_type", "reverse_kl"),
        "f_alpha_divergence_coef": getattr(objective, "f_alpha_divergence_coef", 0.5),
        "args": SimpleNamespace(discopop_tau=getattr(objective, "discopop_tau", 0.05)),
    }
    return trainer(
        loss_types=[loss_type], loss_weights=[1.0], **{**own, "ld_alpha": None, "use_weighting": False, **fields}
    )


def dpo_inputs(batch) -> dict[str, torch.Tensor]:
    refs = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), batch.ref.chunk(2), strict=True))
    return {**tokens(batch.mask), **refs}


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("sigmoid", DPO(0.3)),
        ("robust", Robust(0.3, 0.2)),
        ("ipo", IPO(0.3)),
        ("hinge", HingeNorm(0.07)),
        ("sigmoid_norm", SigmoidNorm(2.0)),
        ("sft", SFT("token")),
        ("exo_pair", ExoPair(0.1, 1e-2)),
        ("nca_pair", NcaPair(0.3)),
        ("bco_pair", BcoPair(0.3)),
        ("sppo_hard", SppoHard(0.3)),
        ("aot", AOT(0.1, 0.2)),
        ("aot_unpaired", AOTUnpaired(0.1, 0.2)),
        ("apo_zero", ApoZero(0.1)),
        ("apo_down", ApoDown(0.1)),
        ("discopop", DiscoPOP(0.1, 0.5)),
        ("sigmoid", DPO(0.3, f_divergence_type="forward_kl")),
        ("robust", Robust(0.3, 0.2, f_divergence_type="js_divergence")),
        ("ipo", IPO(0.3, f_divergence_type="forward_kl")),
        ("hinge", HingeNorm(0.07, f_divergence_type="js_divergence")),
        ("sigmoid_norm", SigmoidNorm(2.0, f_divergence_type="js_divergence")),
        ("exo_pair", ExoPair(0.1, 1e-2, f_divergence_type="js_divergence")),
        ("discopop", DiscoPOP(0.1, f_divergence_type="js_divergence")),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "f_divergence_type", "-"),
)
def test_dpo_trainer(trl, batch, loss_type, objective):
    stub = dpo_trainer(objective, loss_type)
    theirs = trl.dpo._compute_loss(stub, model_of(batch.logps), dpo_inputs(batch), False)
    rows = policy(batch) if objective.paired else policy(batch).chosen
    ours = objective(rows, batch.ref if objective.needs_reference else None)
    # TRL holds exo_pair's label smoothing and its logarithms in fp32.
    assert_same(ours.loss.mean(), theirs, batch.leaf, SINGLE if loss_type == "exo_pair" else DOUBLE)
    reverse = getattr(objective, "f_divergence_type", "reverse_kl") == "reverse_kl"
    # Their rewards are of sums and of log-ratios whatever the loss.
    if reverse and loss_type not in ("ipo", "sigmoid_norm", "sft"):
        for name, key in (("chosen_reward", "rewards/chosen"), ("reward_margin", "rewards/margins")):
            (logged,) = stub._metrics["eval"][key]
            assert ours.metrics[name].mean().item() == pytest.approx(logged, rel=DOUBLE)


@pytest.mark.parametrize("coef", [0.5, 1.0, -0.2, 2.0])
def test_dpo_trainers_alpha_divergence(trl, coef):
    """Of fp32 log-probabilities, as TRL takes no others here, and log-ratios of at most 6."""
    gen = torch.Generator().manual_seed(0)
    leaf = (-3 * torch.rand(2 * PAIRS, 2, generator=gen)).requires_grad_()
    mask = torch.tensor([False, True, True]).repeat(2 * PAIRS, 1)
    batch = SimpleNamespace(logps=leaf, mask=mask, ref=-6 * torch.rand(2 * PAIRS, generator=gen))
    objective = DPO(0.1, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coef)
    theirs = trl.dpo._compute_loss(dpo_trainer(objective, "sigmoid"), model_of(leaf), dpo_inputs(batch), False)
    ours = objective(Logps(leaf.double().sum(1), mask.sum(1)), batch.ref.double()).loss.mean()
    assert_same(ours, theirs, leaf, EXPONENTIAL)


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [("sigmoid", DPO(0.3)), ("sigmoid_norm", SigmoidNorm(2.0)), ("apo_zero", ApoZero(0.1)), ("aot", AOT(0.1))],
)
def test_dpo_trainers_ld_alpha(trl, batch, loss_type, objective):
    desensitised = LDDPO(objective, 0.3)
    ref_logps = -2 * torch.rand(batch.logps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ref_logps = ref_logps * batch.mask[:, 1:]
    stub = dpo_trainer(objective, loss_type, ld_alpha=0.3)
    stub.precompute_ref_logps = False
    stub.args.gradient_checkpointing_kwargs = None
    stub.model = torch.nn.Identity().eval()
    stub.model.is_gradient_checkpointing = False
    stub.ref_model = model_of(ref_logps)
    theirs = trl.dpo._compute_loss(stub, model_of(batch.logps), tokens(batch.mask), False)

    valid = batch.mask[:, 1:]
    offsets = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0))
    weights = desensitised.weigh_tokens(batch.logps[valid].detach(), None, offsets)
    assert (weights == 0.3).any()
    spread = torch.zeros(valid.shape, dtype=torch.float64).masked_scatter(valid, weights)
    rows = Logps((batch.logps * spread).sum(1), valid.sum(1))
    assert_same(desensitised(rows, (ref_logps * spread).sum(1)).loss.mean(), theirs, batch.leaf, DOUBLE)


@pytest.mark.parametrize(
    ("loss_type", "objective"), [("sigmoid", DPO(0.3)), ("ipo", IPO(0.3)), ("exo_pair", ExoPair(0.1, 1e-2))]
)
def test_dpo_trainers_weighting(trl, batch, loss_type, objective):
    weighted = WPO(objective)
    gen = torch.Generator().manual_seed(1)
    squares = -2 * torch.rand(batch.logps.shape, generator=gen, dtype=torch.float64)
    stub = dpo_trainer(objective, loss_type, use_weighting=True)
    model = model_of(batch.logps, log_sum_sq_probs=squares)
    theirs = trl.dpo._compute_loss(stub, model, dpo_inputs(batch), False)

    valid = batch.mask[:, 1:]
    terms = weighted.per_token(batch.logps, {"log_sum_sq_probs": squares})
    sums = {name: (values * valid).sum(1) for name, values in terms.items()}
    rows = Logps(batch.logps.sum(1), batch.mask.sum(1), terms=sums)
    bound = SINGLE if loss_type == "exo_pair" else DOUBLE
    assert_same(weighted(rows, batch.ref).loss.mean(), theirs, batch.leaf, bound)


def test_dpo_trainers_sigmoid_ignores_label_smoothing(trl, batch):
    """As docs/objectives/dpo.md says. Ours does not."""
    assert DPO(0.3, 0.2)(policy(batch), batch.ref).loss.mean() != DPO(0.3)(policy(batch), batch.ref).loss.mean()
    stub = dpo_trainer(DPO(0.3, 0.2), "sigmoid")
    theirs = trl.dpo._compute_loss(stub, model_of(batch.logps), dpo_inputs(batch), False)
    assert_same(DPO(0.3)(policy(batch), batch.ref).loss.mean(), theirs, batch.leaf, DOUBLE)


# Of the mismatched answers: the mean below 0, and above. Further off TRL's own s (1 - s) has few digits left.
@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_kto_trainer(trl, batch, shift):
    objective = KTO(0.3, 0.7, 1.3)
    desirable = torch.arange(2 * PAIRS) % 3 == 0
    kl_logps = batch.ref.flip(0) - 5 + shift
    ref_kl_logps = batch.ref.flip(0)
    stub = trainer(
        beta=0.3, desirable_weight=0.7, undesirable_weight=1.3, loss_type="kto", calculate_KL=True,
        _compute_kl_logps=lambda model, inputs: kl_logps,
    )  # fmt: skip
    inputs = {**tokens(batch.mask), "label": desirable, "ref_logps": batch.ref, "ref_KL_logps": ref_kl_logps}
    theirs = trl.kto._compute_loss(stub, model_of(batch.logps), inputs, False)
    kl = kto_kl(kl_logps, ref_kl_logps)
    assert kl == max(shift - 5, 0)
    ours = objective(policy(batch), batch.ref, desirable=desirable, kl=kl)
    assert_same(ours.loss.mean(), theirs, batch.leaf, DOUBLE)
    (reward,) = stub._metrics["eval"]["rewards/chosen"]
    assert mean_over(ours.metrics["reward"], desirable).item() == pytest.approx(reward, rel=DOUBLE)


@pytest.mark.parametrize(
    ("loss_type", "objective"),
    [
        ("sigmoid", CPO(0.3)),
        ("sigmoid", CPO(0.3, label_smoothing=0.2)),
        ("simpo", SimPO(2.0, 0.7)),
        ("simpo", SimPO(0.5, 0.0)),
        ("simpo", SimPO(2.0, 0.7, 0.2)),
    ],
)
def test_cpo_trainer(trl, batch, loss_type, objective):
    """Its comparison of answers; the likelihood that it adds is a token mean, test_parity_liger.py has that."""
    stub = trainer(
        alpha=0.0, beta=objective.beta, simpo_gamma=getattr(objective, "gamma", 0.0),
        label_smoothing=objective.label_smoothing, loss_type=loss_type,
    )  # fmt: skip
    logps = policy(batch).avg if loss_type == "simpo" else policy(batch).sum
    losses, chosen_rewards, _ = trl.cpo.cpo_loss(stub, *logps.chunk(2))
    terms = objective(policy(batch))
    assert_same(terms.align.mean(), losses.mean(), batch.leaf, DOUBLE)
    assert relative_error(terms.metrics["chosen_reward"], chosen_rewards) <= DOUBLE


def test_orpo_trainer(trl, batch):
    """Its odds-ratio term, which TRL computes in fp32 and returns with the sign changed."""
    terms = ORPO(lam=0.3)(policy(batch))
    losses, _, _, ratio, log_odds = trl.orpo.odds_ratio_loss(trainer(beta=0.3), *policy(batch).avg.chunk(2))
    assert_same(0.3 * terms.align.mean(), -losses.mean(), batch.leaf, SINGLE)
    assert terms.metrics["reward_margin"].mean().item() == pytest.approx(log_odds.item(), abs=3 * SINGLE)
    assert relative_error(-terms.align.mean(), ratio) <= SINGLE
