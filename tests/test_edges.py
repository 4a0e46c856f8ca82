"""Edges that a mutant has gone over unseen, or a random call has gone over once: each is named."""

import inspect

import pytest
import torch

from asft_kernels import (
    fused_asft_loss,
    fused_linear_logps,
    fused_preference_loss,
    get_objective,
    preference_loss_from_logps,
)
from asft_kernels.objectives import OBJECTIVES, kto_kl
from bounds import fp32_bound, relative_error
from cases import IGNORE, make_case


@pytest.mark.parametrize("above", [31.0, 60.0, 84.0, 86.0])
@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_many_logits_far_above_the_label(above, cache_bytes, as_on_a_gpu):
    """5,000 of them: exp(84) is finite in fp32, their sum is not, nor is one of them times a large row of the head."""
    hidden = torch.ones(1, 3, 1)
    weight = torch.full((5001, 1), above)
    weight[0] = 0.0
    labels = torch.zeros(1, 3, dtype=torch.int64)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logps = fused_linear_logps(hidden, weight, labels, shift=False, chunk_size=1000, cache_bytes=cache_bytes)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = (exact[0] @ exact[1].T).log_softmax(-1)[..., 0]
    assert relative_error(logps, truth) <= fp32_bound(above)
    for got, right in zip(
        torch.autograd.grad(logps.sum(), leaves), torch.autograd.grad(truth.sum(), exact), strict=True
    ):
        assert relative_error(got, right) <= fp32_bound(above)


@pytest.mark.parametrize("name", ["asft", "orpo", "cpo"])
def test_a_likelihood_of_no_tokens_is_0(name):
    """A chosen row without nll_labels: its likelihood term is 0 and not 0 / 0; its pair still counts."""
    case = make_case(dtype=torch.float64, valid=1.0)
    nll = case.labels[:2].clone()
    nll[1] = IGNORE
    parameters = {"cpo": {"alpha": 1.0}, "orpo": {}, "asft": {}}[name]
    without = {"cpo": {"alpha": 0.0}, "asft": {"sft_weight": 0.0}}
    loss, out = fused_preference_loss(
        case.hidden, case.head, case.labels, get_objective(name, **parameters), nll_labels=nll, reduction="none",
        return_outputs=True,
    )  # fmt: skip
    assert vars(out)["num_pairs"] == 2
    (grad,) = torch.autograd.grad(loss[1], case.hidden, retain_graph=True)
    assert grad.isfinite().all()
    if name in without:
        alone = fused_preference_loss(
            case.hidden, case.head, case.labels, get_objective(name, **without[name]), reduction="none"
        )
        assert loss[1].item() == pytest.approx(alone[1].item(), rel=1e-13)
        assert loss[0].item() > alone[0].item() + 0.1
    else:
        assert loss[1] < loss[0] / 2  # the odds term alone


def test_a_weight_that_is_nan_shows_where_its_row_counts():
    """Nan in, NaN out; beside it a row's loss stays what it is, and so does one whose NaN stands in a row of no use."""
    case = make_case(rows=4, valid=1.0)
    case.labels[3] = IGNORE
    weights = torch.ones(case.labels.shape)
    weights[1, 4] = torch.nan
    weights[3, 4] = torch.nan
    losses = fused_preference_loss(case.hidden, case.head, case.labels, "sft", token_weights=weights, reduction="none")
    assert losses.isnan().tolist() == [False, True, False, False]
    with_pair = fused_preference_loss(
        case.hidden, case.head, case.labels, "simpo", token_weights=weights, reduction="none"
    )
    assert with_pair.tolist()[1] == 0.0
    assert with_pair[0].isfinite()
    (grad,) = torch.autograd.grad(with_pair.sum(), case.hidden)
    assert grad.isfinite().all()


def loss_of_logps(*given, **options) -> torch.Tensor:
    loss = preference_loss_from_logps(*given, **options)
    assert isinstance(loss, torch.Tensor)
    return loss


def test_layouts_of_a_loss_from_log_probabilities():
    """(R, T - 1) and (R, T) with shift, (R, T) without; nothing longer, no odd number of rows for pairs."""
    case = make_case(dtype=torch.float64)
    logps = fused_linear_logps(case.hidden, case.head, case.labels).detach()
    expected = fused_preference_loss(case.hidden, case.head, case.labels, "simpo").detach()
    for given in (logps, logps[:, :-1]):
        assert torch.equal(loss_of_logps(given, case.labels, "simpo"), expected)
    at_labels = logps.roll(1, dims=1)
    masked = case.labels.clone()
    masked[:, 0] = IGNORE
    assert torch.equal(loss_of_logps(at_labels, masked, "simpo", shift=False), expected)
    longer = torch.nn.functional.pad(logps, (0, 1))
    for given, labels, shift in (
        (longer, case.labels, True), (logps[:, :-2], case.labels, True), (logps[:, :-1], case.labels, False),
        (longer, case.labels, False), (logps[:3], case.labels, True), (logps[0], case.labels[0], True),
        (logps[0, 0], case.labels[0, 0], True), (logps, case.labels[0], True),
    ):  # fmt: skip
        need = r"labels \(R, T\) and logps \(R, T - 1\) or" if shift else r"both \(R, T\), as shift is False"
        with pytest.raises(ValueError, match=rf"logps: got shape .* and labels .*, need {need}"):
            loss_of_logps(given, labels, "simpo", shift=shift)
    with pytest.raises(ValueError, match="labels: got 3 rows, need chosen and rejected of each pair: an even number"):
        loss_of_logps(logps[:3], case.labels[:3], "simpo")
    assert loss_of_logps(logps[:3], case.labels[:3], "sft").isfinite()
    with pytest.raises(ValueError, match=r"stats: got none called 'lse', need it for SFT; ask the model"):
        loss_of_logps(logps, case.labels, get_objective("sft", lse_square_scale=0.1))


def test_float64_stays_float64_under_autocast():
    """A product in bf16 would be wrong in the third digit."""
    case = make_case(dtype=torch.float64, bias=True)
    expected = fused_asft_loss(case.hidden, case.head, case.labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_asft_loss(case.hidden, case.head, case.labels)
    assert loss.dtype == torch.float64
    assert torch.equal(loss, expected)


def test_the_reference_point_of_kto_is_0_without_rows():
    nothing = torch.empty(0)
    assert kto_kl(nothing, nothing) == 0


def test_sft_may_be_smoothed_whole():
    """label_smoothing 1: the mean over the vocabulary alone."""
    case = make_case(rows=2, dtype=torch.float64, valid=1.0)
    loss = fused_preference_loss(case.hidden, case.head, case.labels, get_objective("sft", label_smoothing=1.0))
    z = case.hidden[:, :-1] @ case.weight.T
    assert loss.item() == pytest.approx((z.logsumexp(-1) - z.mean(-1)).mean().item(), rel=1e-12)


DPO = {"beta": 0.1, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
DEFAULTS = {  # as the docstrings say; a reference that reads the objective's own would not see another
    "asft": {"lam": 1.0, "beta": 1.0, "sft_weight": 1.0},
    "sft": {"normalization": "sequence", "lse_square_scale": 0.0, "label_smoothing": 0.0, "token_accuracy": False},
    "dpo": DPO | {"label_smoothing": 0.0}, "robust": DPO | {"label_smoothing": 0.0}, "ipo": DPO, "sigmoid_norm": DPO,
    "hinge": {"gamma": 0.05}, "hinge_norm": {k: x for k, x in DPO.items() if k != "beta"} | {"gamma": 0.05},
    "exo_pair": DPO | {"label_smoothing": 1e-3}, "discopop": DPO | {"discopop_tau": 0.05},
    "nca_pair": {"beta": 0.1}, "bco_pair": {"beta": 0.1}, "sppo_hard": {"beta": 0.1}, "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1}, "aot": {"beta": 0.1, "label_smoothing": 0.0},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0.0},
    "orpo": {"lam": 0.1, "beta": 1.0, "nll_normalization": "sequence"},
    "simpo": {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0},
    "cpo": {"beta": 0.1, "alpha": 1.0, "label_smoothing": 0.0, "nll_normalization": "sequence"},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "dnpo": {"lam": 0.1, "alpha": 1.0}, "poft": {"beta": 1.0, "gamma": 0.0},
    "fpo": {"beta": 0.1, "alpha": 0.5, "top_k": 50}, "rpo": {"beta": 0.1, "eta": 0.005, "normalization": "sum"},
    "mrpo": {"beta": 0.1, "alpha": None, "clip": 0.1, "swap_weights": False},
    "lmpo": {"beta": 2.0, "gamma_beta_ratio": 0.25, "lam": 0.2, "power": 5},
    "bmc": {"base": None, "delta": 2.0, "ref_weighting": "own"},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_objectives(name):
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    assert {x.name: x.default for x in parameters} == DEFAULTS[name]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch 2.15 itself
def test_asfts_operators_and_their_fakes_agree():
    logps = (-torch.rand(9)).requires_grad_()
    offsets = torch.tensor([0, 2, 5, 5, 9])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (logps, offsets, 0.7, 0.5, 0.3)
    torch.library.opcheck(torch.ops.asft_kernels.asft_sequence.default, arguments, test_utils=checks)
    *_, coef = torch.ops.asft_kernels.asft_sequence(*arguments)
    backward = torch.ops.asft_kernels.asft_sequence_backward.default
    torch.library.opcheck(backward, (torch.rand(2), logps.detach(), coef.detach(), offsets), test_utils=checks[::2])
