"""A head over ranks at the edge of its decisions: ties, hidden states that differ, ranks that hold next to nothing."""

import pytest
import torch

from asft_kernels.backends import HAS_TRITON, interpreter_fault
from bounds import entry_bound, relative_error, rounded_once
from cases import IGNORE, make_case
from rank_processes import launch
from sharding_edges import FAR, LEVELS, TIES, edges, far_case, far_ends

pytestmark = pytest.mark.skipif(not HAS_TRITON or bool(interpreter_fault()), reason="needs Triton's interpreter")


@pytest.fixture(scope="module")
def two():
    return launch(2, edges, TRITON_INTERPRET="1")


def test_ties_across_ranks(two):
    """A logit that is larger by a rounding is a tie, as ranks' logits have been relative to numbers of their own."""
    for found in (x["ties"] for x in two):
        for level in LEVELS:
            for above, top in TIES.items():
                assert [found[level, above, label] for label in (0, 2)] == [top, top], (level, above)


def test_hidden_states_that_differ_between_ranks(two):
    """Refused from 0.05 of a column's norm on, in any of the first 8; what rounding does is below."""
    for found in (x["apart"] for x in two):
        assert found[0.0] == found[0.02] == ""
        for distance in (0.1, 0.5, 0.85):
            assert found[distance].startswith("hidden: got what differs between ranks, need the same on all"), distance


@pytest.mark.parametrize("name", FAR)
def test_logits_far_apart_between_ranks(two, name):
    """The second rank's share of the softmax is e^-20, e^-80, large, or none: the figures' gradients then as well.

    Below 1e20 times the least factor, 5e-31, what a rank's rows get may be anything up to 5e-11 (sharding.py): at e^-80
    their error is one of the gradient as a whole.
    """
    hidden, weight, bias, labels = far_case(name)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    z = leaves[0] @ leaves[1].T + leaves[2]
    truth = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    logs = z.log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1)
    exact = {"lse": z.logsumexp(-1), "log_sum_sq_probs": (2 * logs).logsumexp(-1), "entropy": entropy}
    aim = truth.sum() + (entropy + exact["lse"]).sum() * (name == FAR[-1])
    grads = torch.autograd.grad(aim, leaves)
    bound = entry_bound(hidden, weight, bias)
    for rank, found in enumerate(x["far"] for x in two):
        rows = slice(*far_ends(name)[rank : rank + 2])
        for (_, of, _), (logps, *own, figures) in found.items():
            if of != name:
                continue
            assert (logps - truth).abs().max() <= 2 * bound * max(1, truth.abs().max().item())
            for got, right, whole in zip(own, (grads[0], *(x[rows] for x in grads[1:])), grads, strict=True):
                size = (whole if name == "gap of 120" else right).norm()
                assert got.shape == right.shape
                assert (got - right).norm() <= 4 * bound * size
            for figure, right in exact.items():
                assert (figures[figure] - right).abs().max() <= 4 * bound * max(1, right.abs().max().item()), figure


def test_bf16_and_a_rank_without_rows_in_kernels(two):
    """Rounded as test_functional.py's bound has it: E, the scaled hidden row and the gradient itself."""
    case = make_case(rows=2, T=9, D=16, V=40, bias=True, dtype=torch.bfloat16)
    exact = case.to(torch.float64)
    target = torch.nn.functional.pad(case.labels[:, 1:], (0, 1), value=IGNORE)
    z = torch.nn.functional.linear(exact.hidden, exact.weight, exact.bias)
    own = z.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    truth = torch.where(target == IGNORE, 0, own)
    grads = torch.autograd.grad(truth.sum(), exact.leaves)
    for found, rows in zip(two, (slice(0), slice(40)), strict=True):
        logps, *of_rank = found["empty"]["of all"]
        assert relative_error(logps, truth) <= 2 * entry_bound(case.hidden, case.weight, case.bias)
        for grad, right in zip(of_rank, (grads[0], grads[1][rows], grads[2][rows]), strict=True):
            assert grad.shape == right.shape
            assert relative_error(grad, right) <= 1.9 * rounded_once(right, torch.bfloat16)
