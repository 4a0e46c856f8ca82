"""Where memory is used up, the error says what took most of it and what shrinks that, and stays what it was."""

import subprocess
import sys

import pytest
import torch

from asft_kernels import fused_asft_loss, fused_linear_logps
from asft_kernels.backends import torch_chunked
from asft_kernels.cli import frame
from asft_kernels.errors import is_out_of_memory
from asft_kernels.memory.terms import ADVICE
from cases import make_case

GPU_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB."
LIMITED = """
import resource, sys
import torch
from asft_kernels import fused_linear_logps

def run(N, V):
    hidden = torch.zeros(1, N, 8, requires_grad=True)
    weight = torch.zeros(V, 8, requires_grad=True)
    fused_linear_logps(hidden, weight, torch.zeros(1, N, dtype=torch.int64), shift=False).sum().backward()

run(8, 16)
with open("/proc/self/statm") as f:
    here = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + 2**28, here + 2**28))
try:
    run(2048, 2**16)  # exponentials: 512 MiB
except RuntimeError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its address space")
def test_a_processor_s_allocator_that_has_no_more():
    out = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("RuntimeError "), out.stdout + out.stderr
    assert "DefaultCPUAllocator: can't allocate memory" in out.stdout
    said = out.stdout.partition("\nasft_kernels: ")[2]
    assert said.startswith("2,048 tokens of 2,048 positions, D 8, V 65,536: 51"), said
    assert "beside the inputs (forward, chunks), most of it cached exponentials, 512.0 MiB" in said
    assert "what shrinks it: a smaller cache_bytes" in said


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_gpu_s_error_keeps_its_class_and_text(phase, padded, monkeypatch):
    case = make_case(rows=2, T=5, D=8, V=3000)

    def fails(*args, **options):
        raise torch.OutOfMemoryError(GPU_TEXT)

    monkeypatch.setattr(torch_chunked, phase, fails)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fused_asft_loss(
            case.hidden, case.weight, case.labels, cache_bytes=0, num_valid=8 if padded else None
        ).backward()
    assert len(caught.value.args) == 1  # accelerate's find_executable_batch_size looks for its text there
    text = caught.value.args[0]
    assert text.startswith(GPU_TEXT + "\nasft_kernels: ")
    assert text.count("asft_kernels: ") == 1
    name = "gradient of the head" if phase == "backward" else "chunk of exponentials"
    assert f"most of it {name}, 0.1 MiB" in text or f"most of it {name}, 0.0 MiB" in text, text
    assert text.endswith(f"what shrinks it: {ADVICE[name]}")


def test_other_errors_stay_as_they_are(monkeypatch):
    case = make_case(rows=2, T=5)

    def fails(*args, **options):
        raise RuntimeError("another")

    monkeypatch.setattr(torch_chunked, "forward", fails)
    with pytest.raises(RuntimeError, match=r"^another$"):
        fused_linear_logps(case.hidden, case.weight, case.labels)
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def test_a_command_says_it_in_one_line(capsys):
    def body():
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes.\nasft_kernels: what shrinks it: a smaller cache_bytes"
        )

    assert frame.run("asft x", body) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("asft x: the device has too little memory ([enforce fail")
    assert said.endswith("9 bytes.); what shrinks it: a smaller cache_bytes\n")
