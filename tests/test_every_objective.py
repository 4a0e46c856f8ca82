"""What every objective must hold, without a line of its own: parity, derivatives, extremes, order, products."""

import pytest
import torch

from asft_kernels import fused_linear_logps, fused_preference_loss, preference_loss_from_logps, reference
from asft_kernels.objectives import OBJECTIVES
from asft_kernels.objectives.base import counting, reduce_loss
from bounds import fp32_bound, relative_error, unit_roundoff
from cases import IGNORE, gemms, make_case
from objective_cases import FORMS, call_inputs, direct_inputs, objective_of, policy_of

NAMES = list(dict.fromkeys([*OBJECTIVES, *FORMS]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_reference(name, dtype):
    case = make_case(rows=8, bias=True, dtype=dtype)
    case.labels[1] = IGNORE
    exact = case.to(torch.float64)
    objective = objective_of(name)
    inputs = call_inputs(objective, case.labels)
    for reduction in ("mean", "none"):
        loss = fused_preference_loss(case.hidden, case.head, case.labels, objective, **inputs, reduction=reduction)
        truth = reference.fused_preference_loss(
            exact.hidden, exact.head, exact.labels, objective, **inputs, reduction=reduction
        )
        # Low precision reads the same inputs as the oracle, and everything after them is fp32.
        assert relative_error(loss, truth) <= fp32_bound(32)  # logits stay below 32 here
    grads, truths = (torch.autograd.grad(x.sum(), c.leaves) for x, c in ((loss, case), (truth, exact)))
    for got, right in zip(grads, truths, strict=True):
        # bf16 gradients are rounded once: by the unit roundoff of each entry at most.
        assert relative_error(got, right) <= fp32_bound(32) + (unit_roundoff(dtype) if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("name", NAMES)
def test_from_log_probabilities(name):
    """The same numbers in the same order after the primitive: equal to a few roundings of float32."""
    case = make_case(rows=8, bias=True)
    case.labels[1] = IGNORE
    objective = objective_of(name)
    inputs = call_inputs(objective, case.labels)
    expected = fused_preference_loss(case.hidden, case.head, case.labels, objective, **inputs)
    wanted = torch.autograd.grad(expected, case.hidden)[0]
    names, grads = getattr(objective, "stats", ()), getattr(objective, "stats_with_grad", ())
    found = fused_linear_logps(
        case.hidden, case.head, case.labels, return_stats=names or ("lse",), differentiable=grads
    )
    stats = {x: getattr(found, x)[:, :-1] for x in names}  # as a fused model gives them
    loss = preference_loss_from_logps(found.logps[:, :-1], case.labels, objective, stats=stats, **inputs)
    assert relative_error(loss, expected.double()) <= 8 * unit_roundoff(torch.float32)
    grad = torch.autograd.grad(loss, case.hidden)[0]
    assert relative_error(grad, wanted.double()) <= 32 * unit_roundoff(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    objective = objective_of(name)
    avg = torch.tensor([-0.3, -2.0, -1e-3, -1.1], dtype=torch.float64, requires_grad=True)
    length = torch.tensor([3, 1, 2, 5])
    inputs = direct_inputs(objective, length)
    assert torch.autograd.gradcheck(lambda x: objective(policy_of(objective, x * length, length), **inputs).loss, avg)


@pytest.mark.parametrize("name", NAMES)
def test_extremes_and_empty_sequences_stay_finite(name):
    objective = objective_of(name)
    sums = torch.tensor([-1e-8, -1e4, 0.0, -3.0, -1e30, 0.0], dtype=torch.float64, requires_grad=True)
    policy = policy_of(objective, sums, torch.tensor([1, 3, 0, 2, 1, 4]))
    terms = objective(policy, **direct_inputs(objective, policy.length))
    loss = reduce_loss(terms.loss, counting(policy, objective.paired), "none")
    (grad,) = torch.autograd.grad(loss.sum(), sums)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert grad[2] == 0  # no token, no gradient


@pytest.mark.parametrize("name", NAMES)
def test_order_does_not_matter(name):
    objective = objective_of(name)
    lengths = torch.tensor([1, 2, 3, 4, 5, 6])
    sums = -torch.rand(6, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    both = torch.cat([order, order + 3])
    inputs = direct_inputs(objective, lengths)
    moved = {key: value[..., both] for key, value in inputs.items()}
    loss = objective(policy_of(objective, sums, lengths), **inputs).loss
    shuffled = objective_of(name)(policy_of(objective, sums[both], lengths[both]), **moved).loss
    # Sums over the batch in another order: some float64 roundings of 1.1e-16.
    torch.testing.assert_close(shuffled, loss[order if objective.paired else both], rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_comes_with_rows_that_do_not_count_is_not_read(name, value):
    """As of a score that is missing: loss and gradients are to the bit those of any other value there."""
    case = make_case(rows=8)
    case.labels[5] = IGNORE
    rows = [1, 5] if objective_of(name).paired else [5]
    results = []
    for spoilt in (False, True):
        objective = objective_of(name)
        call = {"token_weights": torch.ones(case.labels.shape), **call_inputs(objective, case.labels)}
        if spoilt:
            call["token_weights"][rows] = value
            if "ref_logps" in call:
                call["ref_logps"][rows if objective.ref_per_token else (..., rows)] = value
            for tensor in call.get("objective_inputs", {}).values():
                if tensor.is_floating_point():
                    tensor[rows] = value
        loss = fused_preference_loss(case.hidden, case.head, case.labels, objective, **call)
        results.append([loss, *torch.autograd.grad(loss, case.leaves)])
    assert results[1][0].isfinite()
    for clean, got in zip(*results, strict=True):
        assert torch.equal(clean, got)


@pytest.mark.parametrize("name", NAMES)
def test_same_products_as_asft(name):
    """As test_cost.py counts them, which has frozen heads as well: what an objective adds does not depend on them."""
    case = make_case(rows=8, T=9, D=16, V=256)
    objective = objective_of(name)
    inputs = call_inputs(objective, case.labels)
    valid = int((case.labels[:, 1:] != IGNORE).sum())

    def call():
        fused_preference_loss(case.hidden, case.weight, case.labels, objective, **inputs).backward()

    assert gemms(call, valid, 256, 16) == pytest.approx(3, rel=1e-9)
