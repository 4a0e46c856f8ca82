"""`asft_kernels.liger` against the classes whose names it has: losses, figures and gradients in fp32."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from asft_kernels import fused_linear_logps
from asft_kernels import liger as ours
from bounds import fp32_bound, relative_error
from cases import IGNORE, gemms, make_case

LOGITS = 8  # the largest here
# Each side is off from the exact value by the fp32 bound of its logits at most, that of bounds.py.
BOUND = 2 * fp32_bound(LOGITS)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("liger_kernel.chunked_loss", reason="needs the test extra: liger-kernel")


@pytest.fixture
def case():
    """Labels already shifted; rows of 3 to 12 tokens."""
    case = make_case(rows=6, valid=1.0, bias=True)
    for row, length in zip(case.labels, [4, 11, 7, 3, 12, 5], strict=True):
        row[length:] = IGNORE
    return case


def near(case):
    """A reference: hidden states, weight and bias not far from the policy's."""
    gen = torch.Generator().manual_seed(1)
    moved = [x.detach() + 0.1 * torch.randn(x.shape, generator=gen) for x in case.leaves]
    return dict(zip(("ref_input", "ref_weight", "ref_bias"), moved, strict=True))


def assert_same(case, theirs, name, arguments, call) -> None:
    """Loss, figures and gradients of `name(**arguments)` here and in Liger, each called as call says."""
    got, got_figures = call(getattr(ours, name)(**arguments))
    right, right_figures = call(getattr(theirs, name)(**arguments, compiled=False))
    assert relative_error(got, right) <= BOUND
    assert len(got_figures) == len(right_figures)
    for mine, other in zip(got_figures, map(torch.as_tensor, right_figures), strict=True):
        assert mine.shape == other.shape
        # Differences of log-probabilities of up to 60 nats, each good to the bound of the logits.
        torch.testing.assert_close(mine, other, rtol=BOUND, atol=60 * BOUND)
        assert not mine.requires_grad
    for mine, other in zip(*(torch.autograd.grad(x, case.leaves) for x in (got, right)), strict=True):
        assert other.norm() > 0
        assert relative_error(mine, other) <= BOUND


PAIRED = [
    ("LigerFusedLinearORPOLoss", {"beta": 0.3}),
    ("LigerFusedLinearORPOLoss", {"beta": 0.3, "compute_nll_loss": False}),
    ("LigerFusedLinearCPOLoss", {"beta": 0.3, "alpha": 0.7}),
    ("LigerFusedLinearCPOLoss", {"label_smoothing": 0.2, "compute_nll_loss": False}),
    ("LigerFusedLinearCPOLoss", {"beta": 2.0, "average_log_prob": True}),
    ("LigerFusedLinearSimPOLoss", {"beta": 2.0, "gamma": 0.7, "alpha": 0.3}),
    ("LigerFusedLinearSimPOLoss", {"label_smoothing": 0.2, "compute_nll_loss": False}),
]


@pytest.mark.parametrize(("name", "arguments"), PAIRED, ids=str)
def test_without_a_reference(theirs, case, name, arguments):
    def call(module):
        return module(case.weight, case.hidden, case.labels, case.bias)

    assert_same(case, theirs, name, arguments, call)


DPO = [
    {"beta": 0.3},
    {"beta": 0.3, "compute_nll_loss": True, "alpha": 0.5},
    {"beta": 2.0, "average_log_prob": True, "compute_nll_loss": True},
    {"beta": 0.07, "loss_type": "hinge"},
    {"beta": 0.1, "loss_type": "exo_pair", "label_smoothing": 1e-2},
    {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.2},
    {"beta": 0.1, "loss_type": "discopop", "discopop_tau": 0.5},
    *({"beta": 0.1, "loss_type": x} for x in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    {"beta": 1.0, "loss_type": "apo_zero", "average_log_prob": True},
]


@pytest.mark.parametrize("arguments", DPO, ids=str)
def test_dpo(theirs, case, arguments):
    def call(module):
        return module(case.weight, case.hidden, case.labels, case.bias, **near(case))

    assert_same(case, theirs, "LigerFusedLinearDPOLoss", arguments, call)


def test_dpo_without_a_reference_model(theirs, case):
    def call(module):
        return module(case.weight, case.hidden, case.labels, case.bias)

    assert_same(case, theirs, "LigerFusedLinearDPOLoss", {"use_ref_model": False}, call)


@pytest.mark.parametrize("prompt", [True, False])
def test_orpo_with_labels_of_its_own_for_the_likelihood(theirs, case, prompt):
    """Of prompt and answer, or of a part of the answer."""
    full = torch.randint(97, case.labels.shape, generator=torch.Generator().manual_seed(1))
    nll_target = torch.where(case.labels == IGNORE, full, case.labels) if prompt else case.labels.clone()
    nll_target[:, :2] = IGNORE
    nll_target[3:] = full[3:]  # of the rejected rows, which nobody reads

    def call(module):
        return module(case.weight, case.hidden, case.labels, case.bias, nll_target)

    assert_same(case, theirs, "LigerFusedLinearORPOLoss", {"beta": 0.3}, call)


GOOD = torch.tensor([True, False, True, True, False, False])


KL_OF_ROWS = torch.tensor([0, 1, 2, 0.5, 3, 1])


@pytest.mark.parametrize("kl", [None, torch.tensor(1.5), torch.tensor([2.0]), KL_OF_ROWS])
@pytest.mark.parametrize("arguments", [{"beta": 0.3}, {"beta": 2.0, "average_log_prob": True}], ids=str)
def test_kto(theirs, case, arguments, kl):
    arguments = {**arguments, "chunk_size": 6}  # of all rows: see the test of Liger's chunks below

    def call(module):
        return module(case.hidden, case.weight, case.labels, case.bias, GOOD, **near(case), kl=kl)

    assert_same(case, theirs, "LigerFusedLinearKTOLoss", {**arguments, "use_ref_model": True}, call)


def test_constructors_and_calls_are_ligers(theirs):
    transformers = pytest.importorskip(
        "liger_kernel.transformers.fused_linear_cross_entropy", reason="needs Triton and the test extra: liger-kernel"
    )
    for name in ours.__all__:
        if name == "CrossEntropyOutput":
            continue
        other = getattr(theirs, name, None) or getattr(transformers, name)
        for method in ("__init__", "forward"):
            mine, right = (inspect.signature(getattr(x, method)).parameters for x in (getattr(ours, name), other))
            assert list(mine) == list(right)
            assert [p.default for p in mine.values()] == [p.default for p in right.values()]


def test_products_are_those_of_the_primitive():
    """Three and the reference's one, of the places with a label alone; one and one where nothing is differentiated."""
    case = make_case(rows=6, T=33, D=64, V=1024, valid=0.3)
    reference = {"ref_input": case.hidden.detach(), "ref_weight": case.weight.detach()}
    module, valid = ours.LigerFusedLinearDPOLoss(compute_nll_loss=True), int((case.labels != IGNORE).sum())

    def evaluate():
        with torch.no_grad():
            module(case.weight, case.hidden, case.labels, **reference)

    def train():
        module(case.weight, case.hidden, case.labels, **reference)[0].backward()

    assert gemms(train, valid, 1024, 64) == pytest.approx(4, rel=1e-9)
    assert gemms(evaluate, valid, 1024, 64) == pytest.approx(2, rel=1e-9)


# Where Liger is wrong


def test_label_smoothing_of_dpo_is_not_dropped(theirs, case):
    reference = near(case)
    losses = {
        (source, smoothing): module.LigerFusedLinearDPOLoss(beta=0.3, label_smoothing=smoothing, compiled=False)(
            case.weight, case.hidden, case.labels, case.bias, **reference
        )[0]
        for source, module in (("ours", ours), ("liger", theirs))
        for smoothing in (0.0, 0.2)
    }
    assert losses["liger", 0.2] == losses["liger", 0.0]
    answers = [
        fused_linear_logps(h, head, case.labels, shift=False).sum(1)
        for h, head in (
            (case.hidden, case.head),
            (reference["ref_input"], (reference["ref_weight"], reference["ref_bias"])),
        )
    ]
    chosen, rejected = (0.3 * (answers[0] - answers[1])).chunk(2)
    h = chosen - rejected
    truth = -(0.8 * F.logsigmoid(h) + 0.2 * F.logsigmoid(-h)).mean()
    assert relative_error(losses["ours", 0.2], truth) <= BOUND


def test_gradients_of_a_bfloat16_head_are_rounded_once(theirs):
    """64 pairs are 64 sums in bf16 there."""
    case = make_case(rows=128, T=6, valid=1.0, dtype=torch.bfloat16)
    exact = case.to(torch.float64)

    def gradient(module, of):
        loss = module(beta=2.0, compute_nll_loss=False, compiled=False)(of.weight, of.hidden, of.labels)[0]
        return torch.autograd.grad(loss, of.weight)[0]

    truth = gradient(ours.LigerFusedLinearSimPOLoss, exact)
    # One rounding to 8 bits: 2^-9 of each entry at most, relative to it.
    assert relative_error(gradient(ours.LigerFusedLinearSimPOLoss, case), truth) <= 2**-8
    assert relative_error(gradient(theirs.LigerFusedLinearSimPOLoss, case), truth) > 2**-8


def test_a_pair_without_a_token_is_left_out_and_makes_no_nan(theirs, case):
    """Liger's mean over no tokens is NaN, in the loss and in all of the gradient."""
    case.labels[1] = IGNORE
    module = ours.LigerFusedLinearSimPOLoss(beta=2.0, compute_nll_loss=False)
    kept = [0, 2, 3, 5]
    whole = module(case.weight, case.hidden, case.labels, case.bias)[0]
    assert torch.equal(whole, module(case.weight, case.hidden[kept], case.labels[kept], case.bias)[0])
    assert all(x.isfinite().all() for x in torch.autograd.grad(whole, case.leaves))
    other = theirs.LigerFusedLinearSimPOLoss(beta=2.0, compute_nll_loss=False, compiled=False)
    assert other(case.weight, case.hidden, case.labels, case.bias)[0].isnan()


def test_a_reference_point_of_each_row_is_that_row_s(theirs, case):
    """Liger hands each chunk the whole of kl, so that a chunk of one row is compared with every row's point."""
    losses = {
        (source, size): module.LigerFusedLinearKTOLoss(beta=0.3, chunk_size=size, compiled=False)(
            case.hidden, case.weight, case.labels, case.bias, GOOD, kl=KL_OF_ROWS
        )[0]
        for source, module in (("ours", ours), ("liger", theirs))
        for size in (1, 6)
    }
    assert losses["ours", 1] == losses["ours", 6]
    assert relative_error(losses["ours", 1], losses["liger", 6]) <= BOUND
    assert losses["liger", 1] > 2 * losses["liger", 6]


# Refusals


def test_what_is_refused(case):
    dpo = ours.LigerFusedLinearDPOLoss
    with pytest.raises(ValueError, match=r"LigerFusedLinearDPOLoss: loss_type: got 'ipo', need one of 'sigmoid'"):
        dpo(loss_type="ipo")
    with pytest.raises(
        ValueError, match=r"label_smoothing: got 0.1 with loss_type='hinge', need 0, or one of 'sigmoid'"
    ):
        dpo(loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"exo_pair: label_smoothing: got 0.0, need a finite number > 0"):
        dpo(loss_type="exo_pair")
    with pytest.raises(ValueError, match=r"LigerFusedLinearDPOLoss: alpha: got -1, need a finite number >= 0"):
        dpo(alpha=-1)
    with pytest.raises(ValueError, match=r"LigerFusedLinearDPOLoss: chunk_size: got 0, need a finite number > 0"):
        dpo(chunk_size=0)
    with pytest.raises(ValueError, match=r"LigerFusedLinearDPOLoss: compiled: got 1, need True or False"):
        dpo(compiled=1)
    with pytest.raises(ValueError, match="ref_input, ref_weight: got none with use_ref_model=True, need both"):
        dpo()(case.weight, case.hidden, case.labels)
    with pytest.raises(
        ValueError, match="ref_input: got a reference with use_ref_model=False, need use_ref_model=True"
    ):
        dpo(use_ref_model=False)(case.weight, case.hidden, case.labels, **near(case))
    with pytest.raises(ValueError, match="target: got 3 rows, need an even number"):
        dpo(use_ref_model=False)(case.weight, case.hidden[:3], case.labels[:3])
    orpo = ours.LigerFusedLinearORPOLoss()
    with pytest.raises(ValueError, match=r"nll_target: got \(3, .*, the shape of target"):
        orpo(case.weight, case.hidden, case.labels, nll_target=case.labels[:3])
    with pytest.raises(ValueError, match="nll_target: got another label than target in the same place"):
        orpo(case.weight, case.hidden, case.labels, nll_target=case.labels.roll(1, dims=1))
    with pytest.raises(ValueError, match="preference_labels: got None, need a bool tensor"):
        ours.LigerFusedLinearKTOLoss()(case.hidden, case.weight, case.labels)
    entropy = ours.LigerFusedLinearCrossEntropyLoss
    with pytest.raises(ValueError, match="return_predicted_tokens: got True, need False"):
        entropy(return_predicted_tokens=True)
    with pytest.raises(ValueError, match=r"accum_dtype: got torch.bfloat16, need None or torch.float32"):
        entropy(accum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="ce_weight: got weights beside label_smoothing or lse_square_scale"):
        entropy(ce_weight=torch.ones(97), label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing: got 1.5, need a number from 0 to 1"):
        entropy(label_smoothing=1.5)
    with pytest.raises(ValueError, match="reduction: got 'max', need one of 'mean', 'sum', 'none'"):
        entropy(reduction="max")


# Cross-entropy, against torch in float64: Liger's is a Triton kernel and runs on a GPU alone


def cross_entropy(case, reduction="mean", z=0.0, softcap=None, **arguments):
    """Of (R, T, D) rows as N tokens."""
    logits = case.hidden.flatten(0, 1).double() @ case.weight.double().T + case.bias.double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    labels = case.labels.flatten()
    loss = F.cross_entropy(logits, labels, reduction=reduction, **arguments)
    z_loss = torch.where(labels != IGNORE, z * logits.logsumexp(-1).square(), 0)
    shares = {"mean": z_loss.sum() / (labels != IGNORE).sum(), "sum": z_loss.sum(), "none": z_loss}
    return loss + shares[reduction], shares[reduction], logits


def called(case, **arguments):
    module = ours.LigerFusedLinearCrossEntropyLoss(**arguments)
    return module(case.weight, case.hidden.flatten(0, 1), case.labels.flatten(), case.bias)


def assert_right(case, got, truth):
    assert relative_error(got, truth) <= BOUND
    upstream = torch.rand(got.shape, generator=torch.Generator().manual_seed(3))
    grads = [torch.autograd.grad(x, case.leaves, upstream.to(x.dtype)) for x in (got, truth)]
    for mine, right in zip(*grads, strict=True):
        assert relative_error(mine, right) <= BOUND


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cross_entropy(case, reduction, softcap):
    got = called(case, reduction=reduction, softcap=softcap)
    assert_right(case, got, cross_entropy(case, reduction, softcap=softcap)[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_weights_of_classes(case, reduction):
    weights = torch.rand(97, generator=torch.Generator().manual_seed(2))
    got = called(case, reduction=reduction, ce_weight=weights)
    assert_right(case, got, cross_entropy(case, reduction, weight=weights.double())[0])


def test_cross_entropy_with_token_scaling(case):
    got = called(case, reduction="none", use_token_scaling=True)
    each = cross_entropy(case, "none")[0]
    assert_right(case, got, each * torch.where(case.labels.flatten() == IGNORE, 0, (-each.detach()).exp()))


def test_cross_entropy_of_no_token_is_0(case):
    case.labels[:] = IGNORE
    assert called(case) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cross_entropy_with_smoothing_and_z_loss(case, reduction, softcap):
    arguments = {"reduction": reduction, "softcap": softcap, "label_smoothing": 0.1}
    got = called(case, **arguments, lse_square_scale=1e-2, return_z_loss=True, return_token_accuracy=True)
    truth, z_loss, logits = cross_entropy(case, z=1e-2, **arguments)
    assert_right(case, got.loss, truth)
    assert relative_error(got.z_loss, z_loss) <= BOUND
    labels = case.labels.flatten()
    right = (logits.argmax(-1) == labels).double()
    expected = {"none": right}.get(reduction, right.sum() / (labels != IGNORE).sum())
    assert relative_error(got.token_accuracy, expected) <= 2**-23  # a quotient of integers, rounded once
    assert got.predicted_tokens is None


def test_the_code_of_the_page(case):
    page = (Path(__file__).parents[1] / "docs" / "liger.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {"lin_weight": case.weight, "hidden": case.hidden, "target": case.labels, "bias": case.bias}
    names.update(ref_hidden=case.hidden.detach(), ref_weight=case.weight.detach() * 0.9)
    exec(code, names)
    names["loss"].backward()
    assert case.weight.grad.norm() > 0
    assert names["chosen_logps"].shape == (3,)
    assert len(names["figures"]) == 5
