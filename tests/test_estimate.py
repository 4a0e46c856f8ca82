"""`estimate` beside measurements: bytes that the allocator is asked for, products that are counted."""

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from asft_kernels import estimate, fused_linear_logps
from memory_trace import peak_and_operations

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
            out: Any = fused_linear_logps(
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


ENTROPY: dict[str, Any] = {"names": ("entropy",), "differentiable": ("entropy",)}
MEAN: dict[str, Any] = {"names": ("mean_logits",), "differentiable": ("mean_logits",)}
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


TRITON: dict[str, dict[str, Any]] = {
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
