"""Seconds, extra memory and the machine's own GEMM rate."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

GPU_SECONDS = 0.3  # shorter calls are repeated until they fill it: a clock that has just woken is slow
CPU_SECONDS = 0.25  # likewise: one call of a tenth of a second says more of what else the machine did than of itself


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give the device back what this process holds and does not use: others share it."""
    if device == "cuda":
        torch.cuda.empty_cache()


def seconds_of_call(call: Callable[[], object], device: str) -> float:
    """Of one call, of as many as fill CPU_SECONDS their median; on a GPU the mean of as many as fill GPU_SECONDS, by
    events, after one unmeasured."""
    if device == "cpu":
        times: list[float] = []
        while sum(times) < CPU_SECONDS:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return median(times)
    began = time.perf_counter()
    call()
    wait(device)
    repeats = max(1, round(GPU_SECONDS / (time.perf_counter() - began)))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    wait(device)
    release(device)
    return start.elapsed_time(stop) / 1000 / repeats


def extra_memory(call: Callable[[], object], device: str) -> int | None:
    """Peak bytes during the call over those before it, what it returns included; None where the platform is silent.

    On a GPU by torch's allocator; on a CPU the resident set's, once the C library has given back what it kept.
    """
    if device == "cuda":
        release(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        wait(device)
        release(device)
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak, VmHWM, counts from here
        before = _resident("VmRSS")
    except (OSError, AttributeError):  # no Linux, no glibc
        return None
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class GemmRate:
    """Operations a second of torch.mm on random square matrices, in the dtype or in fp32 where that is faster."""

    def __init__(self, device: str, dtype: str):
        self.device, self.dtypes = device, {getattr(torch, dtype), torch.float32}

    def run(self) -> float:
        return max(self._rate(dtype) for dtype in self.dtypes)

    def _rate(self, dtype: torch.dtype) -> float:
        size = 8192 if self.device == "cuda" else 512
        while True:
            a = torch.randn(size, size, device=self.device).to(dtype)
            torch.mm(a, a)
            seconds = min(seconds_of_call(lambda a=a: torch.mm(a, a), self.device) for _ in range(3))
            # Larger ones until a product takes a while: a CPU that emulates the dtype stays at the first.
            if self.device == "cuda" or size == 4096 or seconds > 0.2:
                return 2 * size**3 / seconds
            size *= 2
