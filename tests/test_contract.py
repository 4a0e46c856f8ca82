"""What a call promises around autograd, dtypes and layouts (the public contract), line by line."""

from threading import Thread

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from asft_kernels import FusedASFTLoss, fused_asft_loss, fused_linear_logps, linear_logps, reference
from asft_kernels.backends import HAS_TRITON, choose_backend
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
    loss = checkpoint(
        lambda h, w: fused_asft_loss(h, w, case.labels),
        case.hidden,
        case.weight,
        use_reentrant=False,
    )
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


def test_nothing_but_the_logps_is_differentiable():
    """What backward needs is an output of the operator; autograd must not carry gradients of E's size for it."""
    case = make_case()
    rows, labels = torch.arange(8), torch.arange(8)
    *of_rows, exps, stats = torch.ops.asft_kernels.linear_logps(
        case.hidden.view(-1, 24), case.weight, None, None, "", [], rows, labels, "torch", 1.0, None, None, 2**20, False,
        True, True, "lse entropy", "lse",
    )  # fmt: skip
    assert of_rows[0].requires_grad
    assert exps
    assert not any(x.requires_grad for x in (*of_rows[1:], *exps))
    assert [x.requires_grad for x in stats] == [True] + 6 * [False]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_its_dtype_and_returns_each_tensors_own(dtype):
    """fp32 head and states under autocast: as if both had been cast, with gradients in fp32."""
    case = make_case(bias=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = fused_asft_loss(case.hidden, case.head, case.labels)
        grads = grads_of(loss, *case.leaves)  # backward under autocast must not round either
    cast = case.to(dtype)
    expected = fused_asft_loss(cast.hidden, cast.head, cast.labels)
    assert torch.equal(loss, expected)
    assert loss.dtype == torch.float32
    for got, right in zip(grads, grads_of(expected, *cast.leaves), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, right.float())


def test_autocast_with_mixed_leaves():
    """What happens in training: the body yields bf16 while the head is fp32."""
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_asft_loss(case.hidden.bfloat16(), case.head, case.labels)
    loss.backward()
    assert case.weight.grad.dtype == torch.float32


def test_user_switches_for_fast_products_change_nothing():
    case = make_case(rows=8, T=64, D=256, V=512)
    exact = [fused_asft_loss(case.hidden, case.head, case.labels)]
    exact += grads_of(exact[0], *case.leaves)
    matmul = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bf16 products for fp32 on CPUs that have them, TF32 on GPUs
    try:
        switched = matmul.fp32_precision
        got = [fused_asft_loss(case.hidden, case.head, case.labels)]
        got += grads_of(got[0], *case.leaves)
        assert torch.get_float32_matmul_precision() == "medium"  # ours to leave as it was
        assert matmul.fp32_precision == switched != "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(exact, got, strict=True))


def test_the_switch_for_fast_products_survives_threads_and_stays_inherited():
    case = make_case(rows=8, T=64, D=64, V=512)
    backends, matmul = torch.backends, torch.backends.mkldnn.matmul
    before = backends.fp32_precision
    matmul.fp32_precision = "none"  # as in a fresh process: it inherits
    try:
        backends.fp32_precision = "tf32"
        threads = [
            Thread(target=lambda: [fused_asft_loss(case.hidden, case.head, case.labels) for _ in range(20)])
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"  # inherited: nothing of ours was left behind
    finally:
        backends.fp32_precision = before


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA is not available")
def test_products_are_summed_in_fp32_on_a_gpu():
    """cuBLAS may cut a long sum and round its parts to bf16 unless it is told not to; the user's switch comes back."""
    matmul = torch.backends.cuda.matmul
    cuts = matmul.allow_bf16_reduced_precision_reduction_split_k
    before = (matmul.allow_bf16_reduced_precision_reduction, cuts), matmul.allow_fp16_accumulation
    try:
        for rounds, cuts in ((True, True), (False, True), (False, False)):
            matmul.allow_bf16_reduced_precision_reduction = rounds, cuts
            matmul.allow_fp16_accumulation = True
            with linear_logps.exact_products("cuda"), linear_logps.exact_products("cuda"):
                assert not matmul.allow_bf16_reduced_precision_reduction
                assert matmul.allow_bf16_reduced_precision_reduction_split_k == cuts
                assert not matmul.allow_fp16_accumulation
            assert matmul.allow_bf16_reduced_precision_reduction == rounds
            assert matmul.allow_bf16_reduced_precision_reduction_split_k == cuts
            assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_accumulation = before


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
