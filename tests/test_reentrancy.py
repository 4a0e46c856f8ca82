"""A call keeps nothing: threads, forked workers, calls within calls and calls in another order give the same bits."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asft_kernels import fused_preference_loss

SHAPES = [(2, 5, 16, 40), (4, 7, 8, 33), (2, 3, 24, 57)]  # (2B, T, D, V)
OBJECTIVES = ["asft", "orpo", "simpo"]


def call(case):
    """(loss, gradient of the hidden states, gradient of the head) of a seeded batch, as bytes."""
    (rows, length, width, vocabulary), objective = case
    generator = torch.Generator().manual_seed(rows * length + vocabulary)
    hidden = torch.randn(rows, length, width, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (rows, length), generator=generator)
    loss = fused_preference_loss(hidden, head, labels, objective, backend="torch")
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return tuple(tensor.detach().numpy().tobytes() for tensor in (loss, hidden.grad, head.grad))


CASES = [(shape, objective) for shape in SHAPES for objective in OBJECTIVES]


@pytest.fixture(scope="module")
def alone():
    return [call(case) for case in CASES]


def test_calls_in_another_order_and_once_more(alone):
    order = [*range(len(CASES))[::-1], *range(len(CASES))]
    assert [call(CASES[at]) for at in order] == [alone[at] for at in order]


def test_threads(alone):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, CASES * 4)) == alone * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_of_a_process_that_has_called(alone):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(call, CASES).get(timeout=120) == alone


def test_a_call_within_the_backward_of_another(alone):
    inner = []
    (rows, length, width, vocabulary), objective = CASES[0]
    generator = torch.Generator().manual_seed(rows * length + vocabulary)
    hidden = torch.randn(rows, length, width, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (rows, length), generator=generator)
    between = hidden * 1

    @torch.enable_grad()  # backward is without
    def calls(_):
        inner.append(call(CASES[1]))

    between.register_hook(calls)
    fused_preference_loss(between, head, labels, objective, backend="torch").backward()
    assert inner == [alone[1]]
    assert hidden.grad is not None
    assert hidden.grad.numpy().tobytes() == alone[0][1]


def test_two_graphs_at_once_go_backward_in_either_order():
    """What forward saved of one call is not the other's."""
    (rows, length, width, vocabulary), objective = CASES[0]
    found = []
    for order in ((0, 1), (1, 0)):
        hidden = [torch.full((rows, length, width), 0.1 * (1 + i)).requires_grad_() for i in range(2)]
        head = torch.linspace(-1, 1, vocabulary * width).view(vocabulary, width)
        labels = torch.arange(rows * length).view(rows, length) % vocabulary
        losses = [fused_preference_loss(h, head, labels, objective, backend="torch") for h in hidden]
        for at in order:
            losses[at].backward()
        found.append([h.grad for h in hidden])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], found[0][1])
