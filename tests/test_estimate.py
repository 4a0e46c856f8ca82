"""`estimate` beside measurements: bytes that the allocator is asked for, products that are counted."""

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from asft_kernels import estimate, fused_linear_logps
from benchmarks.cases import WORKS
from memory_trace import peak_and_operations

BIG = 2**30
ROOT = Path(__file__).parents[1]


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
            loss: Any = sum((getattr(out, x).sum() for x in asked), (out.logps if self.names else out).sum())
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
    "4 bits, all labels at once": Run(N=2048, M=2048, D=32, V=300, bits=4),
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


def test_a_head_on_several_ranks():
    whole, split = estimate(64, 32, 1000, head_grad=True), estimate(64, 32, 250, head_grad=True)
    shard = estimate(64, 32, 1000, head_grad=True, ranks=4, sharding="vocabulary")
    assert (shard.moments, shard.operations) == (split.moments, split.operations)
    gathered = estimate(64, 32, 1000, head_grad=True, ranks=4)
    assert gathered.peak == whole.peak + 4 * 1000 * 32
    assert gathered.operations == whole.operations
    streamed = estimate(64, 32, 1000, head_grad=True, ranks=4, sharding="streamed", chunk_size=100)
    assert streamed.operations == whole.operations
    on_the_way = 2 * 100 * 32 * 4 * (1 + 1 / 4)  # two chunks of dW, and what comes of them
    assert streamed.moments["backward, head"]["gradient on its way to them"] == on_the_way
    assert streamed.moments["backward, head"]["gradient of the head"] == 250 * 32 * 4
    with pytest.raises(ValueError, match="sharding: got 'streamed' with a quantised head, need 'gathered'"):
        estimate(64, 32, 1000, bits=8, ranks=4, sharding="streamed")


def test_the_largest_term_and_what_shrinks_it():
    said = estimate(1000, 64, 5000, head_grad=True)
    assert said.advice.startswith("most of it cached exponentials, 19.1 MiB; what shrinks it: a smaller cache_bytes")
    smaller = estimate(1000, 64, 5000, head_grad=True, cache_bytes=0)
    assert smaller.peak < said.peak
    assert sum(smaller.products.values()) == sum(said.products.values()) + 1 == 4
    assert str(said).endswith(said.advice)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "tokens: got 0, need an integer >= 1"),
        ({"positions": 3}, "positions: got 3, need an integer >= 8"),
        ({"vocab_size": 2.5}, "vocab_size: got 2.5, need an integer >= 1"),
        ({"dtype": torch.int8}, "dtype: got torch.int8, need one of torch.float32"),
        ({"head_dtype": torch.bfloat16}, "head_dtype: got torch.bfloat16, need torch.float32, as hidden, or float32"),
        ({"bits": 3}, "bits: got 3, need 4, 8 or None"),
        ({"bits": 4, "head_grad": True}, "head_grad: got True with a quantised head, need a lora_rank"),
        ({"bits": 4, "hidden_size": 7}, "hidden_size: got 7 with 4 bits, need an even number"),
        ({"ranks": 2, "sharding": "rows"}, "sharding: got 'rows', need one of 'gathered', 'streamed', 'vocabulary'"),
        ({"cache_bytes": -1}, "cache_bytes: got -1, need an integer >= 0"),
        ({"device": "mps"}, "device: got 'mps', need a device with float64, in which sequences are summed"),
        ({"device": "nowhere"}, "device: got 'nowhere', need a device of torch's"),
    ],
)
def test_what_is_not_understood_is_refused(wrong, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        estimate(**{"tokens": 8, "hidden_size": 16, "vocab_size": 32, **wrong})


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiles and chunks are those of the GPU that is here")
@pytest.mark.parametrize("work", WORKS)
def test_an_h100_took_what_is_said_of_one(work):
    """0.5 %: a few vectors of N numbers, 32 KiB each beside 72 MiB, of a loss's own or gone before the peak."""
    rows = map(json.loads, (ROOT / "bench_results" / "2026-11-27-nvidia-h100-80gb-hbm3.jsonl").read_text().splitlines())
    wanted = {"work": work, "N": 8192, "model": "Qwen3", "contestant": "asft_kernels triton", "set": "headline"}
    row = next(row for row in rows if wanted.items() <= row.items() and row["about"]["commit"] == "294c4e9")
    grads = {"hidden_grad": work != WORKS[0], "head_grad": work == WORKS[2]}
    said = estimate(8192, row["D"], row["V"], dtype=torch.bfloat16, device="cuda", **grads)
    assert said.peak == pytest.approx(row["extra_bytes"], rel=5e-3)


def test_the_example_in_the_docs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "cost.md").read_text()
    code, shown = re.findall(r"```(?:python|text)\n(.*?)```", page.partition("## Before it runs")[2], flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.rstrip() == shown.rstrip()


TRITON: dict[str, dict[str, Any]] = {
    "frozen": {},
    "cached": {"head_grad": True, "cache_bytes": BIG},
    "bf16, whole": {"head_grad": True, "dtype": "bfloat16", "D": 64},
    "fp16, slices": {"head_grad": True, "dtype": "float16", "D": 64},
    "entropy": {**ENTROPY, "head_grad": True},
}


@pytest.fixture
def collected_launches(monkeypatch):
    """The interpreter's closures keep tensors until they are collected: after each launch."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def collected(self, *args, **kwargs):
        try:
            return launch(self, *args, **kwargs)
        finally:
            gc.collect(0)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", collected)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", TRITON)
def test_bytes_of_the_triton_backend(name, collected_launches):
    case = Run(**{"N": 32, "M": 32, "D": 32, "V": 150, "chunk_size": 64, "backend": "triton", **TRITON[name]})
    assert case.estimate().peak == pytest.approx(peak_and_operations(case.call())[0], rel=0.05), case.estimate()


@pytest.fixture
def three_ranks_alike(monkeypatch):
    """A group of three of which this process is the first, and the others send what it sends: without copies."""
    import torch.distributed as dist

    class Done:
        def wait(self) -> None: ...

    def gathered(out, piece, **_):
        out.view(3, *piece.shape).copy_(piece)
        return Done()

    def summed(out, parts, **_):
        out.copy_(parts[: len(out)]).mul_(3)
        return Done()

    def sent_on(out, given, *_, **__):
        indices = not given.is_floating_point() and len(given) > 3  # of rows, all of them this process's first
        out.copy_(given).mul_(not indices)

    dist.init_process_group("fake", rank=0, world_size=3)
    monkeypatch.setattr(dist, "all_gather", lambda outs, own, **_: [x.copy_(own) for x in outs])
    monkeypatch.setattr(dist, "all_to_all_single", sent_on)
    for name, collective in (("all_gather_single", gathered), ("reduce_scatter_single", summed)):
        older = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}[name]
        monkeypatch.setattr(dist, name if hasattr(dist, name) else older, collective)
    yield dist.init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


STREAMED: dict[str, dict[str, Any]] = {
    "no gradient": {"hidden_grad": False},
    "frozen": {},
    "trainable": {"head_grad": True},
    "cached": {"head_grad": True, "cache_bytes": BIG},
    "frozen body": {"hidden_grad": False, "head_grad": True},
    "bf16": {"head_grad": True, "dtype": "bfloat16"},
    "two chunks": {"head_grad": True, "chunk_size": 450},
    "chunks by default": {"head_grad": True, "chunk_size": None, "V": 3000},
    "softcap": {"head_grad": True, "softcap": 20.0},
    "triton, frozen": {"backend": "triton", "V": 240, "chunk_size": 60},
    "triton": {"backend": "triton", "V": 240, "chunk_size": 60, "head_grad": True},
    "triton, bf16": {"backend": "triton", "V": 240, "chunk_size": 60, "head_grad": True, "dtype": "bfloat16"},
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", STREAMED)
def test_bytes_of_a_streamed_head(name, monkeypatch, three_ranks_alike, collected_launches):
    """Labels that stand on all ranks alike: as many rows are sent as come."""
    from torch.distributed.tensor import DTensor, Shard

    from asft_kernels.core.sharded_linear import ShardedLinear

    case = Run(**{"N": 48, "M": 96, "D": 64, "V": 900, "chunk_size": 150, **STREAMED[name]})

    def head(self, dtype):
        local = (torch.randn(case.V // 3, case.D) / case.D**0.5).to(dtype)
        weight = DTensor.from_local(local, three_ranks_alike, [Shard(0)], run_check=False)
        return ShardedLinear(weight.requires_grad_(case.head_grad), stream=True)

    balanced = torch.arange(case.N) % 3 * (case.V // 3) + torch.arange(case.N)
    monkeypatch.setattr(Run, "head", head)
    monkeypatch.setattr(torch, "randint", lambda *_: balanced)
    said = case.estimate(ranks=3, sharding="streamed")
    assert said.peak == pytest.approx(peak_and_operations(case.call())[0], rel=0.05), said


CHILD = """
import json, os, sys
from test_estimate import Run

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

def resident(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

for case in json.loads(sys.argv[1]):
    Run(**case).call()()  # imports, and the buffers that BLAS makes once, are not the call's memory
    run = Run(**case).call()
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the kernel's own peak, VmHWM, counts from here
    run()
    print("measured", resident("VmHWM") - before, Run(**case).estimate().peak, flush=True)
    del run
"""
SHAPE = {"N": 2048, "M": 4096, "D": 256, "V": 1000, "chunk_size": None}
LONG = {"N": 8192, "M": 8192, "D": 128, "V": 600, "chunk_size": None}
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
    "frozen body": {**SHAPE, "hidden_grad": False, "head_grad": True},
}


@pytest.mark.parametrize(
    ("dtype", "bias", "one_loop"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float16", False, False)],
)
def test_a_tile_is_called_one_loop_where_it_is_launched_so(dtype, bias, one_loop):
    pytest.importorskip("triton")
    said = estimate(8192, 4096, 151936, dtype=getattr(torch, dtype), device="cuda", backend="triton", bias=bias).what
    assert ("8 warps 3 stages descriptors one loop" in said) == one_loop, said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_fresh_process_takes_what_is_said():
    """Resident memory, within 10 % and the pages that Linux counts in batches (test_cost.py says how). malloc gives
    back each block of 128 KiB or more when it is freed: by default it would keep some."""
    pytest.importorskip("peft", reason="needs the train extra: peft")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = json.dumps([asdict(Run(**case)) for case in FRESH.values()])
    out = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    counted = 4 * max(32, 2 * (os.cpu_count() or 1)) * os.sysconf("SC_PAGE_SIZE")
    lines = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("measured")]
    table = {name: (int(x), int(said)) for name, (x, said) in zip(FRESH, lines, strict=True)}
    print(*(f"{name}: {x / 2**20:.1f} MiB measured, {y / 2**20:.1f} said" for name, (x, y) in table.items()), sep="\n")
    assert {name: pair for name, pair in table.items() if abs(pair[0] - pair[1]) > 0.1 * pair[0] + counted} == {}
