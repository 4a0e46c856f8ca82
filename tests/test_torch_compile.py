"""torch.compile around the public calls: one graph, any number of tokens, the eager call's numbers."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from asft_kernels import fused_asft_loss
from asft_kernels.backends import HAS_TRITON, choose_backend
from cases import make_case
from test_contract import grads_of


def test_dynamic_shapes_compile_once():
    """The number of tokens stays open: neither the chunk nor the length of the cache may pin it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.randn(3000, 16, requires_grad=True)
    compiled = torch.compile(fused_asft_loss, fullgraph=True, dynamic=True, backend=counter)
    for T in (20, 60, 100, 333, 900):
        hidden, labels = torch.randn(2, T, 16, requires_grad=True), torch.randint(3000, (2, T))
        torch.testing.assert_close(compiled(hidden, weight, labels), fused_asft_loss(hidden, weight, labels))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_the_surrounding_model(dynamic):
    """fullgraph: nothing breaks the graph, and masked positions cost products but change nothing."""
    torch._dynamo.reset()
    body, head, case = nn.Linear(24, 24), nn.Linear(24, 97), make_case()

    def step(states):
        loss, out = fused_asft_loss(body(states), head, case.labels, return_outputs=True)
        return loss, out.margins

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, expected = compiled(case.hidden), step(case.hidden)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [case.hidden, *body.parameters(), *head.parameters()]
    for a, b in zip(grads_of(got[0], *leaves), grads_of(expected[0], *leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_choice_by_device_is_traced():
    """That of a call with GPU tensors that names no backend."""

    def step(x):
        return x + (choose_backend(None, torch.device("cuda"), x.dtype) == ("triton" if HAS_TRITON else "torch"))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1


def test_compile_with_inductor():
    torch._dynamo.reset()
    case = make_case()
    compiled = torch.compile(lambda h: fused_asft_loss(2 * h, case.head, case.labels), fullgraph=True)
    expected = fused_asft_loss(2 * case.hidden, case.head, case.labels)
    got = compiled(case.hidden)
    torch.testing.assert_close(got, expected)
    for a, b in zip(grads_of(got, *case.leaves), grads_of(expected, *case.leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
