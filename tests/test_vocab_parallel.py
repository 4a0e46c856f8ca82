"""A head whose vocabulary is sharded over processes gives the values and gradients of one that is whole.

Each launch of processes runs many cases (vocab_parallel_cases.py has them) and writes what each rank got.
"""

import pytest
import torch

from asft_kernels import fused_linear_logps, fused_preference_loss
from asft_kernels.objectives import LMPO
from bounds import fp32_bound, unit_roundoff
from rank_processes import launch
from vocab_parallel_cases import (
    CASES,
    DIFFERENTIABLE,
    FIGURES,
    cost,
    cut,
    further,
    gradients,
    lmpo_steps,
    loss_of,
    loss_of_logps,
    made,
    objective_loss,
    objectives,
    refusals,
    statistics,
    triton,
    without_the_first,
)


def assert_gradients(got: list[dict], name: str, world: int) -> None:
    """Values and gradients of a case on all ranks beside one process in float64 on the same numbers.

    float64: 100 roundings. float32: issue's 2e-6 of the largest entry, more for larger logits as everywhere
    (bounds.py). bf16 gradients are rounded once more. An entropy is the difference of ln total and sum E L / total,
    both up to the distance of the largest logit from the reference, 2 largest: two roundings of that.
    """
    options = CASES[name]
    case = made(name)
    exact = case.to(torch.float64)
    truth = fused_linear_logps(exact.hidden, exact.head, exact.labels, **options.call, **FIGURES)
    grads = torch.autograd.grad(loss_of(truth), exact.leaves, retain_graph=True)
    of_logps = torch.autograd.grad(loss_of_logps(truth.logps), exact.leaves)
    bound = 2e-14 if options.dtype == torch.float64 else fp32_bound(options.largest)
    once = torch.finfo(torch.bfloat16).eps / 2 if options.dtype == torch.bfloat16 else 0.0
    for rank, found in enumerate(x[name] for x in got):
        for figure in ("logps", *DIFFERENTIABLE, "log_sum_sq_probs"):
            error = (found[figure].double() - getattr(truth, figure)).abs().max()
            of_difference = 4 * options.largest * unit_roundoff(found["logps"].dtype) if figure == "entropy" else 0.0
            assert error <= bound * max(1, getattr(truth, figure).abs().max()) + of_difference, (name, rank, figure)
        assert torch.equal(found["is_top1"], truth.is_top1), rank
        own = cut(options, rank, world)
        pairs = [*zip(found["grads"], grads, strict=True), *zip(found["of logps"], of_logps, strict=True)]
        names = ["hidden", "weight", "bias"][: len(grads)] * 2
        for (grad, right), what in zip(pairs, names, strict=True):
            here = right if what == "hidden" else right[own]
            error = (grad.double() - here).abs()
            allowed = bound * right.abs().max() + once * here.abs()
            assert (error <= allowed).all(), (name, rank, what, error.max() / right.abs().max())


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients(world):
    got = launch(world, gradients)
    for name in CASES:
        assert_gradients(got, name, world)


def test_objectives():
    """Every objective, its value and the gradient of hidden: 100 roundings of float64 of the largest entry."""
    got = launch(2, objectives)
    case = made("float64")
    for name in got[0]:
        loss = objective_loss(name, case.hidden, case.head, case.labels)
        (grad,) = torch.autograd.grad(loss, case.hidden)
        for found in got:
            assert abs(found[name]["loss"] - loss.detach()) <= 2e-14 * max(1, abs(loss.detach())), name
            assert (found[name]["grad"] - grad).abs().max() <= 2e-14 * grad.abs().max(), name


def test_statistics_of_lmpo_count_each_pair_once():
    """In training, where they are summed over all ranks: 100 roundings of float64, its root and squares."""
    got, case = launch(2, statistics), made("float64")
    for pairs in got[0]:
        objective = LMPO()
        losses = lmpo_steps(case, case.head, pairs, objective)
        for found in got:
            *own, state = found[pairs]
            assert torch.stack(own).tolist() == pytest.approx(torch.stack(losses).tolist(), rel=2e-14)
            for name, value in objective.state_dict().items():
                assert state[name].item() == pytest.approx(value.item(), rel=2e-14), name


def test_triton():
    """The kernels, interpreted: a small case with and without figures."""
    pytest.importorskip("triton")
    got = launch(2, triton, TRITON_INTERPRET="1")
    case = made("triton").to(torch.float64)
    for name in ("asft", "figures", "absent", "absent torch"):
        options = CASES["triton"].call
        if name == "absent":
            case = without_the_first(case)
        if "absent" in name:
            whole = fused_linear_logps(
                case.hidden, case.head, case.labels, **options, return_stats=["log_sum_sq_probs"]
            )
            loss = loss_of_logps(whole.logps)
            for found in got:
                error = (found[name + " figure"] - whole.log_sum_sq_probs).abs().max()
                assert error <= fp32_bound(32) * whole.log_sum_sq_probs.abs().max(), name
        elif name == "figures":
            loss = loss_of(fused_linear_logps(case.hidden, case.head, case.labels, **options, **FIGURES))
        else:
            loss = fused_preference_loss(case.hidden, case.head, case.labels, "asft", **options)
        grads = torch.autograd.grad(loss, case.leaves)
        for rank, found in enumerate(got):
            own = cut(CASES["triton"], rank, 2)
            for grad, right in zip(found[name]["grads"], (grads[0], *(x[own] for x in grads[1:])), strict=True):
                assert (grad - right).abs().max() <= fp32_bound(32) * right.abs().max(), (name, rank)


def test_adapters_and_torch_compile():
    """A local LoRA on each rank: gradients of A whole, of B its rows. Traced: the numbers of the eager call."""
    pytest.importorskip("peft")
    got = launch(2, further)
    for rank, found in enumerate(got):
        for what, (grad, right) in found["lora"].items():
            assert (grad - right).abs().max() <= 2e-14 * right.abs().max(), (rank, what)
        for grad, right in found["traced"]:
            assert (grad - right).abs().max() <= 2e-14 * right.abs().max(), rank


def test_refusals_reach_all_ranks():
    """What one rank refuses, and what is not the same on all: an error on each, and then a call that goes through."""
    got = launch(3, refusals)
    said = [x["said"] for x in got]
    assert said[0]["shape"] == said[2]["shape"]
    assert said[0]["shape"].startswith("rank 1 of lm_head's group refuses its arguments: ValueError: labels: got shape")
    assert said[1]["shape"].startswith("labels: got shape")
    assert said[1]["constructor"].startswith("weight: got Tensor, need this rank's rows (V_r, D)")
    assert said[0]["constructor"] == said[2]["constructor"]
    assert said[0]["constructor"].startswith("weight, vocab: got what rank 1 of the group refuses")
    assert said[0]["no vocab"].startswith("weight, vocab: got what rank 2 of the group refuses")
    assert said[2]["no vocab"].startswith("vocab: got '97', need an integer, or None")
    assert said[0]["keyword"].startswith("rank 2 of lm_head's group refuses its arguments: ValueError: softcap: got -1")
    for rank in range(3):
        assert said[rank]["labels"].startswith("labels: got what differs between ranks, need the same on all")
        assert said[rank]["hidden"].startswith("hidden: got what differs between ranks")
        assert said[rank]["options"].startswith("options: got what differs between ranks")
        assert said[rank]["range"].startswith("labels: got values from")
        assert said[rank]["order"].startswith("labels: got what differs between ranks")
        assert said[rank]["shift"].startswith("options: got what differs between ranks")
        assert "orpoo" in said[rank]["objective"]
        assert said[rank]["beta"].startswith("options: got what differs between ranks")
        assert "lam: got -1.0" in said[rank]["lam"]
        assert said[rank]["vocabs"].startswith("vocab: got [90, 91, 92] on the ranks of the group")
        assert said[rank]["large vocab"].startswith("vocab: got 1000, need 1 to")
        for name, what in (
            ("weights", "token_weights"),
            ("scale of weights", "token_weights"),
            ("order of weights", "token_weights"),
            ("scale of hidden", "hidden"),
            ("order of hidden", "hidden"),
            ("references", "ref_logps"),
            ("scale of references", "ref_logps"),
            ("inputs", "objective_inputs"),
        ):
            assert said[rank][name].startswith(f"{what}: got what differs between ranks"), name
        assert said[rank]["reduction"].startswith("options: got what differs between ranks")
        assert said[rank]["second labels"].startswith("labels: got what differs between ranks")
        assert said[rank]["borders"].startswith("labels: got what differs between ranks")
        assert said[rank]["fine"] == ""
    assert said[0]["num_valid"].startswith("softcap: got -1")


def test_products_and_bytes():
    """A rank multiplies its rows alone, and sends what docs/distributed.md counts: never logits."""
    got = launch(2, cost)
    for found in got:
        N, D = found["N"], found["D"]
        assert found["products"] == pytest.approx(3 / 2, rel=1e-9)
        facts = 8 * (1 + 2 * 28)
        assert found["bytes"] == [facts, 8 * N, 8 * 2 * N, 4 * N * D]
        assert found["with figures"] == [facts, 8 * 2 * N, 8 * 6 * N, 4 * N * D]
        assert found["evaluation"] == [facts, 8 * N, 8 * 2 * N]
