"""What only a GPU can show: parity at real sizes, CUDA graphs, no synchronisation, offsets, repeatability, memory."""

import pytest
import torch

from asft_kernels import fused_asft_loss, fused_linear_logps, reference
from asft_kernels.core.linear_logps import exact_products
from asft_kernels.kernels.products import TERMS, add_product
from bounds import fp32_bound, relative_error, rounded_once
from cases import Case, make_case
from test_token_stats import ALL, exact_gradients, gradients, oracle, rounded_exponents, stats_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]


def on_gpu(**sizes) -> Case:
    return make_case(**sizes).on("cuda")


def summed(dtype, D: int, backend: str) -> float:
    """Of a logit, relative. The torch backend multiplies in fp32. A matrix unit adds 16 products at a time and cuts the
    sum toward zero: half a rounding each in the mean, all to one side, where a sum of fp32 products errs to both. That
    is D / 16 halves of 2**-23."""
    low = backend == "triton" and dtype != torch.float32
    return fp32_bound(32) + low * D / 16 * 2**-24


@pytest.mark.parametrize(("D", "V"), [(1024, 40_000), (1032, 40_003)])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_at_real_sizes(dtype, backend, softcap, D, V):
    """Whole tiles and partial ones, several chunks, some recomputed. The bounds are tests/test_functional.py's.
    Rows of 1024 take the tiles that models take, and bf16 rounds dW whole; rows of 1032 take those of odd shapes."""
    case = on_gpu(rows=4, T=520, D=D, V=V, dtype=dtype, peaked=True)
    exact = case.to(torch.float64)
    loss = fused_asft_loss(
        case.hidden, case.head, case.labels, softcap=softcap, backend=backend, chunk_size=15_000, cache_bytes=2**26
    )
    truth = reference.fused_asft_loss(exact.hidden, exact.head, exact.labels, softcap=softcap)
    assert relative_error(loss, truth) <= summed(dtype, D, backend)
    grads = torch.autograd.grad(loss, case.leaves)
    for got, right in zip(grads, torch.autograd.grad(truth, exact.leaves), strict=True):
        bound = fp32_bound(32)
        if dtype != torch.float32:
            factor = 1.9 if backend == "triton" and dtype == torch.bfloat16 else 1.1
            bound = factor * rounded_once(right, dtype)
        assert relative_error(got, right) <= bound


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_at_real_sizes(dtype, backend, softcap):
    """Figures per token and their gradients; the bounds are tests/test_token_stats.py's."""
    case = on_gpu(rows=4, T=260, D=1024, V=40_003, dtype=dtype, peaked=True)
    exact, largest = oracle(case, softcap=softcap)
    stats = stats_of(case, softcap=softcap, backend=backend, chunk_size=15_000)
    for name in ("logps", "lse", "entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(stats, name), exact[name]) <= 2 * fp32_bound(largest)
    assert torch.equal(stats.is_top1, exact["is_top1"])
    grads = gradients(case, ALL, softcap=softcap, backend=backend, chunk_size=15_000, cache_bytes=2**25)
    low = backend == "triton" and dtype == torch.bfloat16
    others = [rounded_exponents(case, softcap=softcap) if low else 0.0, 0.0]
    for got, want, other in zip(grads, exact_gradients(case, ALL, softcap=softcap)[0], others, strict=True):
        rounding = 0.0 if dtype == torch.float32 else (1.9 if low else 1.1) * rounded_once(want, dtype) + other
        assert relative_error(got, want) <= max(2 * fp32_bound(largest), rounding)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_synchronisation(backend, dtype):
    """With num_valid given nothing waits for the device, through the return of backward."""
    case = on_gpu(rows=8, T=64, D=128, V=1000, dtype=dtype)
    fused_asft_loss(case.hidden, case.head, case.labels, backend=backend).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_asft_loss(case.hidden, case.head, case.labels, backend=backend, num_valid=500).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_graph(backend, dtype):
    """Captured once with num_valid given, replayed with other hidden states, labels and counts: the same as a plain
    call, but for the order in which cuBLAS may sum: two roundings of the result."""
    first, second = (on_gpu(rows=8, T=64, D=128, V=1000, dtype=dtype, valid=v, seed=s) for v, s in ((0.5, 0), (0.7, 1)))
    case = on_gpu(rows=8, T=64, D=128, V=1000, dtype=dtype, valid=0.3, seed=2)

    def step(case: Case) -> list[torch.Tensor]:
        loss = fused_asft_loss(case.hidden, case.head, case.labels, backend=backend, num_valid=480)
        return [loss.detach(), *torch.autograd.grad(loss, case.leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case)
    for new in (first, second, first):
        with torch.no_grad():
            for old, x in zip((*case.leaves, case.labels), (*new.leaves, new.labels), strict=True):
                old.copy_(x)
        graph.replay()
        for got, right in zip(captured, step(new), strict=True):
            assert relative_error(got, right) <= max(2 * torch.finfo(got.dtype).eps, fp32_bound(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_by_bit(backend, dtype):
    """Three calls with allocations in between; labels occur many times, so their sums would show an atomic order."""
    case = on_gpu(rows=8, T=512, D=1024, V=32_000, dtype=dtype)
    case.labels.clamp_(max=50)
    results, between = [], []
    for _ in range(3):
        loss = fused_asft_loss(case.hidden, case.head, case.labels, backend=backend, cache_bytes=2**27)
        results.append([loss.detach(), *torch.autograd.grad(loss, case.leaves)])
        between.append(torch.empty(10_000_019, device="cuda"))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_more_than_2_31_exponentials():
    """One chunk of N * V = 2.5e9 kept exponentials: 32-bit offsets would wrap. The last rows and entries are right."""
    N, D, V = 16_384, 64, 152_064
    hidden = torch.randn(1, N, D, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, D, device="cuda", dtype=torch.bfloat16) / 8).requires_grad_()
    labels = torch.randint(V - 100, V, (1, N), device="cuda")
    logps = fused_linear_logps(hidden, weight, labels, shift=False, chunk_size=V, cache_bytes=2 * N * V)
    z = hidden[0, -64:].double() @ weight.detach().double().T
    exact = z.log_softmax(-1).gather(1, labels[0, -64:, None])[:, 0]
    assert relative_error(logps[0, -64:], exact) < 1e-5  # bf16 inputs, fp32 sums of V terms
    (grad,) = torch.autograd.grad(logps[0, -64:].sum(), weight)
    p = z.softmax(-1)
    p[torch.arange(64), labels[0, -64:]] -= 1
    truth = -(p[:, -1000:].T @ hidden[0, -64:].double())
    assert relative_error(grad[-1000:], truth) <= 1.5 * rounded_once(truth, torch.bfloat16)


def test_long_sums_are_cut_into_shorter_ones():
    """Of positive terms, the worst for a unit that cuts its running sum toward zero: as in `summed`, but for TERMS of
    them at a time. 151,936 at once were short by 3.2e-4."""
    N, D, V = 512, 1024, 151_936
    exps = torch.rand(N, V, device="cuda").bfloat16()
    weight = (torch.randn(V, D, device="cuda") + 1).bfloat16()
    out = torch.full((N, D), torch.nan, device="cuda")
    with exact_products("cuda"):
        add_product(exps, weight, out=out, fresh=True)
    truth = exps.double() @ weight.double()
    assert relative_error(out, truth) <= TERMS / 16 * 2**-24 + V / TERMS * 2**-24


@pytest.mark.parametrize(("trainable", "limit"), [(False, 512), (True, 4096)], ids=["frozen head", "trainable head"])
def test_peak_memory(trainable, limit):
    """N=8192, D=4096, V=151936 in bf16: what one call and its backward take beside the inputs, gradients included."""
    N, D, V, MIB = 8192, 4096, 151_936, 2**20
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    hidden = torch.randn(2, N // 2, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16).div_(D**0.5).requires_grad_(trainable)
    labels = torch.randint(V, (2, N // 2), device="cuda")

    def step() -> None:
        fused_asft_loss(hidden, weight, labels, shift=False).backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert (torch.cuda.max_memory_allocated() - before) / MIB <= limit
