"""What a call promises around autograd, dtypes and layouts (the public contract), line by line."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from asft_kernels import FusedASFTLoss, fused_asft_loss, fused_linear_logps, reference
from asft_kernels.core.batch import pack
from asft_kernels.objectives.asft import ASFT
from cases import IGNORE, figures, make_case, packed


def grads_of(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("upstream", [torch.tensor(0.37), torch.tensor(-2.0), torch.tensor(0.0)])
def test_any_upstream_gradient(upstream):
    case = make_case(dtype=torch.float64)
    loss = fused_asft_loss(case.hidden, case.head, case.labels)
    exact = reference.fused_asft_loss(case.hidden, case.head, case.labels)
    for got, right in zip(
        torch.autograd.grad(loss, case.leaves, upstream.double()),
        torch.autograd.grad(exact, case.leaves, upstream.double()), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-15)


def test_retain_graph_gives_the_same_gradients_twice():
    for cache_bytes in (None, 0):
        case = make_case()
        loss = fused_asft_loss(case.hidden, case.head, case.labels, cache_bytes=cache_bytes, chunk_size=20)
        first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
        second = torch.autograd.grad(loss, case.leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_live_graphs():
    a, b = make_case(seed=1), make_case(seed=2)
    alone = [grads_of(fused_asft_loss(c.hidden, c.head, c.labels), *c.leaves) for c in (a, b)]
    losses = [fused_asft_loss(c.hidden, c.head, c.labels) for c in (a, b)]
    together = [grads_of(x, *c.leaves) for x, c in reversed(list(zip(losses, (a, b), strict=True)))][::-1]
    for one, two in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_double_backward_is_refused():
    case = make_case()
    loss = fused_asft_loss(case.hidden, case.head, case.labels)
    (grad,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen):
    case = make_case(bias=True)
    everything = dict(
        zip(
            ("hidden", "weight", "bias"),
            grads_of(fused_asft_loss(case.hidden, case.head, case.labels), *case.leaves),
            strict=True,
        )
    )
    getattr(case, frozen).requires_grad_(False)
    fused_asft_loss(case.hidden, case.head, case.labels).backward()
    for name, grad in everything.items():
        got = getattr(case, name).grad
        assert got is None if name == frozen else torch.equal(got, grad)


def test_bias_alone_trains():
    case = make_case(bias=True)
    (expected,) = grads_of(fused_asft_loss(case.hidden, case.head, case.labels), case.bias)
    case.hidden.requires_grad_(False)
    case.weight.requires_grad_(False)
    fused_asft_loss(case.hidden, case.head, case.labels).backward()
    assert torch.equal(case.bias.grad, expected)


def test_checkpointing():
    case = make_case()
    plain = grads_of(fused_asft_loss(case.hidden, case.head, case.labels), *case.leaves)
    loss = checkpoint(lambda h, w: fused_asft_loss(h, w, case.labels), case.hidden, case.weight, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, grads_of(loss, *case.leaves), strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in make_dual
def test_forward_mode_is_refused():
    """Its tangents would be zeros in silence."""
    case = make_case()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.hidden.detach(), torch.ones_like(case.hidden))
        with pytest.raises(RuntimeError, match=r"forward-mode derivatives .* are not supported"):
            fused_asft_loss(dual, case.weight, case.labels)


def _transforms():
    case = make_case()
    h = case.hidden.detach()

    def loss(hidden):
        return fused_asft_loss(hidden, case.weight, case.labels)

    def batched_rows():
        logps = fused_linear_logps(case.hidden, case.weight, case.labels)
        return torch.func.vmap(lambda g: torch.autograd.grad(logps, case.hidden, g)[0])(torch.ones(2, *logps.shape))

    def batched_gradients():
        logps = fused_linear_logps(case.hidden, case.weight, case.labels)
        return torch.autograd.grad(logps, case.hidden, torch.ones(2, *logps.shape), is_grads_batched=True)

    return {
        "grad": lambda: torch.func.grad(loss)(h),
        "vmap": lambda: torch.func.vmap(loss)(torch.stack([h, h])),
        "jvp": lambda: torch.func.jvp(loss, (h,), (h,)),
        "jacrev": lambda: torch.func.jacrev(loss)(h),
        "forward over reverse": lambda: torch.func.jvp(torch.func.grad(loss), (h,), (h,)),
        "vmap of a gradient": batched_rows,
        "is_grads_batched": batched_gradients,
    }


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("name", list(_transforms()))
def test_functional_transforms_are_refused(name):
    with pytest.raises(RuntimeError, match=r"asft_kernels: torch.func transforms and vmap .* use loss.backward\(\)"):
        _transforms()[name]()


@pytest.mark.interpreter
def test_a_second_derivative_of_the_asft_loss_of_logps_is_refused():
    """Its coefficients depend on the log-probabilities: a derivative without them would be wrong in silence."""
    logps = (-torch.rand(4, 5) - 0.1).requires_grad_()
    labels = torch.randint(9, (4, 5))
    loss, _ = loss_of_tokens_by_kernel(logps, labels)
    (grad,) = torch.autograd.grad(loss, logps, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()


@pytest.mark.interpreter
def test_batched_gradients_of_the_asft_loss_of_logps():
    logps = (-torch.rand(4, 5) - 0.1).requires_grad_()
    _, losses = loss_of_tokens_by_kernel(logps, torch.randint(9, (4, 5)))
    (rows,) = torch.autograd.grad(losses, logps, torch.eye(2), is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(losses, logps, g, retain_graph=True)[0] for g in torch.eye(2)]
    assert torch.equal(rows, torch.stack(one_by_one))


def loss_of_tokens_by_kernel(logps, labels):
    """ASFT's mean, and the pairs' losses, by the Triton backend's kernel."""
    batch = pack(labels, vocab=9, cu_seqlens=None, shift=False, ignore_index=-100, num_valid=None)
    _, terms = ASFT().from_tokens(batch.take_at_rows(logps), batch.offsets, "triton")
    return terms.loss.mean(), terms.loss


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_selective_checkpointing_sees_one_operator(backend):
    """Which saves every product that it sees: not those inside, whose results are written into further on."""
    case = make_case()
    policy = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])

    def loss(hidden):
        return fused_asft_loss(hidden, case.weight, case.labels, backend=backend, chunk_size=40)

    plain = torch.autograd.grad(loss(case.hidden), (case.hidden, case.weight))
    kept = checkpoint(loss, case.hidden, use_reentrant=False, context_fn=policy)
    again = torch.autograd.grad(kept, (case.hidden, case.weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_nothing_but_the_logps_is_differentiable():
    """What backward needs is an output of the operator; autograd must not carry gradients of E's size for it."""
    case = make_case()
    rows, labels = torch.arange(8), torch.arange(8)
    *of_rows, exps, stats = torch.ops.asft_kernels.linear_logps(
        case.hidden.view(-1, 24), case.weight, None, None, "", "", [], rows, labels, "torch", 1.0, None, None, 2**20,
        False, True, True, "lse entropy", "lse",
    )  # fmt: skip
    assert of_rows[0].requires_grad
    assert exps
    assert not any(x.requires_grad for x in (*of_rows[1:], *exps))
    assert [x.requires_grad for x in stats] == [True] + 6 * [False]


def test_non_contiguous_inputs():
    case = make_case(bias=True)
    straight = fused_asft_loss(case.hidden, case.head, case.labels)
    expected = grads_of(straight, *case.leaves)
    hidden = case.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = case.weight.detach().T.contiguous().T.requires_grad_()
    labels = case.labels.T.contiguous().T
    loss = fused_asft_loss(hidden, (weight, case.bias), labels)
    torch.testing.assert_close(loss, straight)
    for got, right in zip(grads_of(loss, hidden, weight, case.bias), expected, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_valid", [None, 40])
def test_masked_rows_cannot_leak(poison, num_valid):
    case = make_case(valid=0.4)
    dead = torch.nn.functional.pad(case.labels[:, 1:] == IGNORE, (0, 1), value=True)
    clean = fused_asft_loss(case.hidden, case.head, case.labels)
    expected = grads_of(clean, *case.leaves)
    hidden = case.hidden.detach().masked_fill(dead[..., None], poison).requires_grad_()
    loss, out = fused_asft_loss(hidden, case.head, case.labels, num_valid=num_valid, return_outputs=True)
    grad_hidden, grad_weight = grads_of(loss, hidden, case.weight)
    torch.testing.assert_close(loss, clean)
    assert out.margins.isfinite().all()
    assert (grad_hidden[dead] == 0).all()
    torch.testing.assert_close(grad_hidden, expected[0])
    torch.testing.assert_close(grad_weight, expected[1])


@pytest.mark.parametrize("num_valid", [25, 38, 10_000])
def test_a_bound_on_the_count_changes_nothing(num_valid):
    case = make_case(valid=0.4, bias=True)
    exact = fused_asft_loss(case.hidden, case.head, case.labels)
    bounded = fused_asft_loss(case.hidden, case.head, case.labels, num_valid=num_valid)
    torch.testing.assert_close(bounded, exact)
    for a, b in zip(grads_of(bounded, *case.leaves), grads_of(exact, *case.leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_a_bound_too_low_is_an_error():
    case = make_case()
    with pytest.raises(RuntimeError, match="num_valid: got a bound below the number of valid labels"):
        fused_asft_loss(case.hidden, case.head, case.labels, num_valid=3)


@pytest.mark.parametrize("empty", ["all masked", "no pairs", "no positions"])
def test_nothing_to_learn_from(empty):
    """Loss 0 that still backpropagates, zeros everywhere, no NaN."""
    case = make_case(rows=0 if empty == "no pairs" else 4, T=0 if empty == "no positions" else 5)
    case.labels.fill_(IGNORE)
    loss, out = fused_asft_loss(case.hidden, case.head, case.labels, return_outputs=True)
    loss.backward()
    assert loss.item() == 0
    assert out.num_pairs == 0
    assert all(torch.isfinite(x).all() for x in figures(out).values())
    assert all((x.grad == 0).all() for x in case.leaves)


def test_one_token_vocabulary():
    case = make_case(V=1)
    logps = fused_linear_logps(case.hidden, case.head, case.labels)
    assert (logps == 0).all()
    grads = grads_of(logps.sum(), *case.leaves)
    assert all((g == 0).all() for g in grads)


def test_packed_gradients_return_in_the_callers_layout():
    case = make_case(dtype=torch.float64, rows=6)
    hidden, labels, cu_seqlens = packed(case)
    loss = fused_asft_loss(hidden, case.head, labels, cu_seqlens=cu_seqlens)
    padded = fused_asft_loss(case.hidden, case.head, case.labels)
    torch.testing.assert_close(loss, padded, rtol=1e-14, atol=0)
    for a, b in zip(grads_of(loss, *case.leaves), grads_of(padded, *case.leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


def test_linear_module_and_tied_weight():
    head = nn.Linear(24, 97)
    case = make_case()
    pair = fused_asft_loss(case.hidden, (head.weight, head.bias), case.labels)
    assert torch.equal(fused_asft_loss(case.hidden, head, case.labels), pair)
    embedding = nn.Embedding(97, 24)
    loss = fused_asft_loss(embedding(case.labels.clamp(min=0)), embedding.weight, case.labels)
    loss.backward()
    assert embedding.weight.grad.isfinite().all()


def test_module_holds_keywords():
    case = make_case()
    expected = fused_asft_loss(case.hidden, case.head, case.labels, lam=0.3, beta=0.5, reduction="sum")
    module = FusedASFTLoss(lam=0.3, beta=0.5, reduction="sum")
    assert torch.equal(module(case.hidden, case.head, case.labels), expected)
    assert "beta=0.5" in repr(module)


def test_float64_stays_float64():
    case = make_case(dtype=torch.float64)
    loss, out = fused_asft_loss(case.hidden, case.head, case.labels, return_outputs=True)
    assert loss.dtype == out.margins.dtype == torch.float64


def test_outputs_are_detached():
    case = make_case(dtype=torch.float64)
    _, out = fused_asft_loss(case.hidden, case.head, case.labels, return_outputs=True)
    assert not any(x.requires_grad for x in figures(out).values())
    with pytest.raises(AttributeError):
        out.margins = None
