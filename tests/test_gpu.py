"""What only a GPU can show: no hidden synchronisation, sizes past 2**31 elements, peak memory."""

import pytest
import torch

from asft_kernels import fused_asft_loss, fused_linear_logps
from bounds import relative_error, rounded_once
from cases import make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_synchronisation(backend, dtype):
    """With num_valid given nothing waits for the device, through the return of backward."""
    case = make_case(rows=8, T=64, D=128, V=1000, dtype=dtype)
    hidden, weight = (x.detach().cuda().requires_grad_() for x in (case.hidden, case.weight))
    labels = case.labels.cuda()
    fused_asft_loss(hidden, weight, labels, backend=backend).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_asft_loss(hidden, weight, labels, backend=backend, num_valid=500).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
