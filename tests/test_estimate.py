"""`estimate` beside measurements: bytes within 10 % in fresh processes and to the allocator, products counted."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest
import torch

from asft_kernels import estimate, fused_linear_logps
from memory_trace import peak_and_operations

MIB = 2**20
BIG = 2**30


@dataclass
class Run:
    """A call, and the same as `estimate` takes it."""

    N: int = 48
    M: int = 96
    D: int = 32
    V: int = 700
    dtype: str = "float32"
    hidden_grad: bool = True
    head_grad: bool = False
    head_dtype: str | None = None
    lora: int = 0
    lora_dtype: str = "float32"
    bits: int | None = None
    bias: bool = False
    names: tuple = ()
    differentiable: tuple = ("lse",)
    softcap: float | None = None
    cache_bytes: int | None = 0
    chunk_size: int | None = 128
    backend: str = "torch"

    def estimate(self, **others):
        named = {x: getattr(torch, getattr(self, x) or "float32") for x in ("dtype", "lora_dtype", "head_dtype")}
        options = {x: getattr(self, x) for x in ("hidden_grad", "head_grad", "bits", "bias", "softcap", "backend")}
        return estimate(
            self.N, self.D, self.V, positions=self.M, **options, dtype=named["dtype"], lora_rank=self.lora,
            lora_dtype=named["lora_dtype"], head_dtype=named["head_dtype"] if self.head_dtype else None,
            return_stats=list(self.names), differentiable=list(self.differentiable) if self.names else [],
            cache_bytes=self.cache_bytes, chunk_size=self.chunk_size, **others,
        )  # fmt: skip

    def call(self):
        """What does it once, gradients and all; inputs stand outside of it."""
        dtype = getattr(torch, self.dtype)
        hidden = torch.randn(4, self.M // 4, self.D).to(dtype).requires_grad_(self.hidden_grad)
        labels = torch.full((self.M,), -100)
        labels[:: self.M // self.N] = torch.randint(self.V, (self.N,))
        head, labels = self.head(dtype), labels.view(4, -1)

        def run():
            out = fused_linear_logps(
                hidden, head, labels, shift=False, cache_bytes=self.cache_bytes, chunk_size=self.chunk_size,
                softcap=self.softcap, backend=self.backend, return_stats=list(self.names) or False,
                differentiable=list(self.differentiable) if self.names else ["lse"],
            )  # fmt: skip
            asked = self.differentiable if self.names else ()
            loss = sum((getattr(out, x).sum() for x in asked), (out.logps if self.names else out).sum())
            if loss.requires_grad:
                loss.backward()

        return run

    def head(self, dtype):
        if self.bits:
            return quantised(self.bits, self.V, self.D, dtype)
        of_head = getattr(torch, self.head_dtype) if self.head_dtype else dtype
        if self.lora:
            return with_lora(self.V, self.D, self.lora, of_head, self.lora_dtype == "float32")
        weight = (torch.randn(self.V, self.D) / self.D**0.5).to(of_head).requires_grad_(self.head_grad)
        return (weight, torch.zeros(self.V, dtype=dtype, requires_grad=self.head_grad)) if self.bias else weight


def with_lora(V, D, rank, dtype, fp32):
    peft = pytest.importorskip("peft", reason="needs the train extra: peft")
    model = torch.nn.Sequential()
    model.add_module("lm_head", torch.nn.Linear(D, V, bias=False, dtype=dtype))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["lm_head"])
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32).base_model.model.lm_head


def quantised(bits, V, D, dtype):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the test extra")
    if bits == 4:
        head = bnb.nn.Linear4bit(D, V, bias=False, compute_dtype=dtype)
        head.weight = bnb.nn.Params4bit(torch.randn(V, D, dtype=dtype) / D**0.5, requires_grad=False, quant_type="nf4")
    else:
        head = bnb.nn.Linear8bitLt(D, V, bias=False, has_fp16_weights=False)
        head.weight = bnb.nn.Int8Params(
            (torch.randn(V, D) / D**0.5).half(), requires_grad=False, has_fp16_weights=False
        )
    return head.to("cpu")


ENTROPY = {"names": ("entropy",), "differentiable": ("entropy",)}
MEAN = {"names": ("mean_logits",), "differentiable": ("mean_logits",)}
ALL = ("lse", "mean_logits", "entropy", "is_top1", "log_sum_sq_probs")
GRID = {
    "frozen": Run(),
    "no gradient": Run(hidden_grad=False),
    "trainable": Run(head_grad=True),
    "cached": Run(head_grad=True, cache_bytes=BIG),
    "partly cached": Run(head_grad=True, cache_bytes=4 * 48 * 300),
    "frozen body": Run(hidden_grad=False, head_grad=True),
    "bf16": Run(dtype="bfloat16"),
    "bf16, trainable": Run(dtype="bfloat16", head_grad=True),
    "fp16, cached": Run(dtype="float16", head_grad=True, cache_bytes=BIG),
    "float64": Run(dtype="float64", head_grad=True),
    "softcap": Run(softcap=20.0),
    "softcap, trainable": Run(softcap=20.0, head_grad=True),
    "bias": Run(bias=True, head_grad=True),
    "blocks of tokens": Run(N=2100, M=2100, V=300, head_grad=True),
    "figures": Run(names=ALL, head_grad=True, cache_bytes=BIG),
    "entropy": Run(**ENTROPY),
    "entropy, cached": Run(**ENTROPY, head_grad=True, cache_bytes=BIG),
    "entropy, softcap": Run(**ENTROPY, head_grad=True, softcap=20.0, cache_bytes=BIG),
    "mean": Run(**MEAN, head_grad=True, cache_bytes=BIG),
    "mean, softcap": Run(**MEAN, softcap=20.0),
    "fp32 head": Run(D=64, V=1000, dtype="bfloat16", head_dtype="float32", head_grad=True),
    "LoRA": Run(N=64, M=64, D=64, V=1000, lora=8, head_grad=True),
    "LoRA, few tokens": Run(N=16, M=512, D=64, V=300, lora=8, head_grad=True, dtype="bfloat16"),
    "LoRA, bf16": Run(D=64, V=1000, lora=8, head_grad=True, dtype="bfloat16", lora_dtype="bfloat16"),
    "4 bits": Run(D=64, V=1000, bits=4, dtype="bfloat16"),
    "4 bits, blocks over rows": Run(N=256, M=512, D=96, V=1000, bits=4),
    "8 bits": Run(N=256, M=512, D=64, V=1000, bits=8),
}


@pytest.mark.parametrize("name", GRID)
def test_bytes_and_products_are_those_of_a_call(name):
    """What each term's formula leaves out is some numbers a token, and buffers of bytes: below 5 %. LoRA's own A h
    and its two gradients take 6 M D r operations beside those of the head."""
    case = GRID[name]
    said, (bytes_, operations) = case.estimate(), peak_and_operations(case.call())
    assert said.peak == pytest.approx(bytes_, rel=0.05), said
    assert sum(said.operations.values()) + 6 * case.M * case.D * case.lora == pytest.approx(operations, rel=1e-9)


TRITON = {
    "frozen": {},
    "cached": {"head_grad": True, "cache_bytes": BIG},
    "bf16, whole": {"head_grad": True, "dtype": "bfloat16", "D": 64},
    "fp16, slices": {"head_grad": True, "dtype": "float16", "D": 64},
    "entropy": {**ENTROPY, "head_grad": True},
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TRITON)
def test_bytes_of_the_triton_backend(name, monkeypatch):
    """In the interpreter, whose closures keep tensors until they are collected: after each launch."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def collected(self, *args, **kwargs):
        try:
            return launch(self, *args, **kwargs)
        finally:
            gc.collect(0)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", collected)
    case = Run(**{"N": 32, "M": 32, "D": 32, "V": 150, "chunk_size": 64, "backend": "triton", **TRITON[name]})
    assert case.estimate().peak == pytest.approx(peak_and_operations(case.call())[0], rel=0.05), case.estimate()


CHILD = """
import json, os, sys
from test_estimate import Run
import torch

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def resident(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

def measured(case):
    Run(**case).call()()  # imports, and the buffers that BLAS makes once, are not the call's memory
    run = Run(**case).call()
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the kernel's own peak, VmHWM, counts from here
    run()
    return resident("VmHWM") - before

for case in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not os.fork():  # a process of its own, without another import of torch
        os.write(write, json.dumps(measured(case)).encode())
        os._exit(0)
    os.wait()
    print(os.read(read, 100).decode(), flush=True)
"""
SHAPE = {"N": 512, "M": 1024, "D": 1024, "V": 4000, "chunk_size": None}
LONG = {"N": 8192, "M": 8192, "D": 64, "V": 1000, "chunk_size": None}
FRESH = {
    "frozen": SHAPE,
    "trainable": {**SHAPE, "head_grad": True},
    "cached": {**SHAPE, "head_grad": True, "cache_bytes": BIG},
    "bf16": {**SHAPE, "dtype": "bfloat16"},
    "bf16, trainable": {**SHAPE, "dtype": "bfloat16", "head_grad": True},
    "softcap": {**SHAPE, "head_grad": True, "softcap": 30.0},
    "long": {**LONG, "head_grad": True},
    "long, bias, cached": {**LONG, "head_grad": True, "bias": True, "cache_bytes": BIG},
    "entropy": {**LONG, **ENTROPY},
    "LoRA": {**SHAPE, "lora": 32, "head_grad": True, "dtype": "bfloat16"},
    "fp32 head": {**SHAPE, "dtype": "bfloat16", "head_dtype": "float32"},
    "4 bits": {**SHAPE, "bits": 4, "dtype": "bfloat16"},
}


BLAS = 2 * MIB  # packed operands, in memory of its own


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_fresh_processes_take_what_is_said():
    """Resident memory, within 10 %, and the pages that Linux counts in batches (test_cost.py says how)."""
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 8), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    pytest.importorskip("peft", reason="needs the train extra: peft")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the test extra")
    arguments = json.dumps([asdict(Run(**case)) for case in FRESH.values()])
    out = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    said = [Run(**case).estimate().peak for case in FRESH.values()]
    counted = 4 * max(32, 2 * (os.cpu_count() or 1)) * os.sysconf("SC_PAGE_SIZE")
    table = [(name, int(line), peak) for (name, line, peak) in zip(FRESH, out.stdout.split(), said, strict=True)]
    print("\n".join(f"{name}: {extra / MIB:.1f} MiB measured, {peak / MIB:.1f} said" for name, extra, peak in table))
    assert [row for row in table if abs(row[1] - row[2]) > 0.1 * row[1] + counted + BLAS] == []
