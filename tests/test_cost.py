"""What a call costs: matrix products, memory, reads of the device, and that it repeats to the bit."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from asft_kernels import fused_asft_loss, fused_linear_logps, fused_preference_loss
from cases import IGNORE, gemms, make_case, one_label_far_below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "cache_bytes", "expected"),
    [
        (True, False, None, 2),  # frozen head
        (True, True, None, 3),  # trainable, everything cached
        (True, True, 0, 4),  # trainable, nothing cached
        (False, True, None, 2),  # frozen body
        (False, True, 0, 3),
        (False, False, None, 1),  # no gradient asked for
    ],
)
def test_gemm_count(hidden_grad, weight_grad, cache_bytes, expected, dtype):
    case = make_case(rows=8, T=33, D=64, V=1024, valid=0.3, dtype=dtype)
    n = int((case.labels[:, 1:] != IGNORE).sum())
    case.hidden.requires_grad_(hidden_grad)
    case.weight.requires_grad_(weight_grad)

    def call():
        loss = fused_asft_loss(case.hidden, case.head, case.labels, chunk_size=100, cache_bytes=cache_bytes)
        if loss.requires_grad:
            loss.backward()

    assert gemms(call, n, 1024, 64) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("gap", "where", "expected"),
    [
        (26.0, 0, 1),  # e^26 = 2e11 a logit: the sums stay below 1e20
        (40.0, 35, 1),  # 125 such logits: 3e19
        (41.0, 0, 1 + 17 / 40),  # no chunk's sum passes, but that of 17 does
        (60.0, 0, 1 + 1 / 40),
        (60.0, 1, 1 + 17 / 40),
        (60.0, 16, 1 + 17 / 40),
        (60.0, 17, 1 + 33 / 40),
        (60.0, 39, 2),
    ],
)
def test_a_label_far_below_costs_the_products_until_a_look(gap, where, expected):
    """After 1, 17, 33 and all 40 chunks; then the block of tokens begins again, with a reference that moves."""
    case = one_label_far_below(make_case(rows=4, T=17, D=64, V=1000), gap, torch.arange(max(25 * where, 1), 1000))
    n = int((case.labels[:, 1:] != IGNORE).sum())
    with torch.no_grad():
        products = gemms(lambda: fused_linear_logps(case.hidden, case.weight, case.labels, chunk_size=25), n, 1000, 64)
    assert products == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_gemm_without_grad_mode(mode):
    """Leaves that ask for gradients are not enough: evaluation must not pay for a backward."""
    case = make_case(rows=4, T=17, D=16, V=256)
    n = int((case.labels[:, 1:] != IGNORE).sum())
    with mode():
        assert gemms(lambda: fused_asft_loss(case.hidden, case.head, case.labels), n, 256, 16) == pytest.approx(
            1, rel=1e-9
        )


@pytest.mark.parametrize("call", [fused_linear_logps, partial(fused_preference_loss, objective="asft")])
def test_other_calls_steer_alike(call):
    case = make_case(rows=4, T=17, D=16, V=400)
    n = int((case.labels[:, 1:] != IGNORE).sum())

    def run():
        call(case.hidden, case.head, case.labels, chunk_size=100, cache_bytes=0).sum().backward()

    assert gemms(run, n, 400, 16) == pytest.approx(4, rel=1e-9)


def test_partial_cache_recomputes_the_rest():
    case = make_case(rows=4, T=17, D=16, V=400)
    n = int((case.labels[:, 1:] != IGNORE).sum())
    half = 4 * n * 200  # bytes of the exponentials of 2 chunks of 100, out of 4

    def call():
        fused_asft_loss(case.hidden, case.head, case.labels, chunk_size=100, cache_bytes=half).backward()

    assert gemms(call, n, 400, 16) == pytest.approx(3.5, rel=1e-9)


def test_repeats_to_the_bit():
    case = make_case(rows=6, T=40, D=32, V=500, bias=True)

    def once():
        loss = fused_asft_loss(case.hidden, case.head, case.labels, chunk_size=128)
        return [loss, *torch.autograd.grad(loss, case.leaves)]

    first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def host_reads(monkeypatch):
    """Counts every way in which a tensor's value reaches Python."""
    seen = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            seen.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return seen


def test_one_host_read(host_reads, as_on_a_gpu):
    """Forward, outputs and backward: the valid count with the label range, once."""
    case = make_case()
    loss, _ = fused_asft_loss(case.hidden, case.head, case.labels, return_outputs=True)
    loss.backward(torch.tensor(0.37))
    assert host_reads == ["tolist"]


def test_no_host_read_when_the_count_is_given(host_reads, as_on_a_gpu):
    case = make_case()
    loss, _ = fused_asft_loss(case.hidden, case.head, case.labels, num_valid=30, return_outputs=True)
    loss.backward()
    fused_linear_logps(case.hidden, case.head, case.labels, num_valid=30).sum().backward()
    fused_preference_loss(case.hidden, case.head, case.labels, "asft", num_valid=30).backward()
    assert host_reads == []


def test_host_read_counter_can_fail(host_reads):
    bool(torch.tensor(1) > 0)
    assert host_reads == ["__bool__"]


MEASURE = """
import json, os, sys, torch
from asft_kernels import fused_asft_loss
from asft_kernels.backends import processor

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def resident(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
def measure(N, M, D, V, dtype, weight_grad, cache, softcap, bias, intel):
    processor.INTEL, dtype = intel, getattr(torch, dtype)
    def inputs(N, M, D, V):
        hidden = torch.randn(4, M // 4, D).to(dtype).requires_grad_()
        weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_(weight_grad)  # no exponentials near 0: slow
        labels = torch.full((M,), -100)
        labels[:: M // N] = torch.randint(V, (N,))
        return hidden, weight, labels.view(4, -1)
    def run(hidden, weight, labels):
        head = (weight, torch.zeros(len(weight), dtype=dtype, requires_grad=True)) if bias else weight
        fused_asft_loss(hidden, head, labels, shift=False, cache_bytes=cache, softcap=softcap).backward()
    run(*inputs(8, 16, 8, 64))  # imports and first-call work are not the call's memory
    args = inputs(N, M, D, V)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the kernel's own peak, VmHWM, counts from here
    run(*args)
    print(json.dumps(resident("VmHWM") - before), flush=True)
for case in json.loads(sys.argv[1]):
    if not os.fork():
        measure(*case)
        os._exit(0)
    os.wait()
"""


SMALL, LONG = (512, 1024, 512, 4000), (8192, 8192, 64, 1500)  # N, M, D, V


MEASURED = [
    (*shape, *options, intel)
    for intel in (False, True)
    for shape, *options in [
        (SMALL, "float32", False, 0, None, False),
        (SMALL, "float32", True, 0, None, False),
        (SMALL, "float32", True, 2**30, None, False),
        (SMALL, "float32", True, 0, 30.0, False),
        (SMALL, "bfloat16", False, 0, None, False),
        (SMALL, "bfloat16", True, 0, None, False),
        (LONG, "float32", False, 0, None, False),
        (LONG, "float32", False, 0, 30.0, False),
        (LONG, "float32", True, 0, None, True),
        (LONG, "float32", True, 2**30, None, True),
    ]
]


@pytest.fixture(scope="module")
def measured():
    """Bytes of each case, in a forked process of its own."""
    # Every block of 1 MiB or more goes back when freed: glibc would keep some, and count them as ours.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps(MEASURED)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(zip(MEASURED, map(int, out.stdout.split()), strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_peak_memory_is_the_documented_formula(case, measured):
    """docs/algorithm.md, section Memory, measured in a fresh process.

    One thread on one CPU: others' stacks are not the call's, and Linux counts resident pages per CPU, in batches. Each
    of the two readings may miss one of anonymous pages and one of mapped files; each block of 1 MiB or more takes a
    page besides.
    """
    N, M, D, V, dtype, weight_grad, cache, softcap, _, intel = case
    MiB, itemsize = 2**20, getattr(torch, dtype).itemsize
    gradients = itemsize * (M * D + V * D * weight_grad)
    cached = 4 * N * V if weight_grad and cache else 0
    chunks = 2 + 2 * (softcap is not None)
    rows = max(1024, 2**20 // N) if intel else 512
    recomputed = 4 * N * rows if weight_grad and not cached else 0
    upcast = 4 * rows * D * (dtype != "float32")
    formula = gradients + cached + 16 * N * D + chunks * 4 * min(N, 1024) * rows + recomputed + upcast
    batch, page = max(32, 2 * (os.cpu_count() or 1)), os.sysconf("SC_PAGE_SIZE")  # percpu_counter_batch
    counted = (2 * 2 * batch + formula // MiB) * page
    if counted >= 4 * min(N, 1024) * rows:
        pytest.skip(f"{os.cpu_count()} CPUs: resident pages are counted in batches that would hide a missing chunk")
    extra = measured[case]
    print(f"{extra / MiB:.2f} MiB measured, {formula / MiB:.1f} by the formula, {counted / MiB:.2f} of counting")
    assert gradients + cached - counted < extra <= formula + counted
