"""Autocast, and the user's switches for fast products, which are neither followed nor changed."""

from threading import Thread

import pytest
import torch

from asft_kernels import fused_asft_loss
from asft_kernels.core import linear_logps
from cases import make_case
from test_contract import grads_of


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
