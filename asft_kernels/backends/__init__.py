"""The contract of a backend (both phases of the primitive) and the choice of one by device.

A backend is a module with the two functions of the `Backend` protocol. It sees compacted tokens and
knows no loss. DESIGN of the two phases: docs/algorithm.md. noisy_torch and noisy_triton are pairs of
another contract, that of asft_kernels/methods/dnpo/noisy_logps.py.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan
from asft_kernels.backends.token_stats import Stats, StatsGrads, Wanted

HAS_TRITON = find_spec("triton") is not None  # here, as torch 2.11's Dynamo refuses to trace find_spec


@dataclass(frozen=True)
class Logits:
    """z = softcap * tanh(u / softcap), u = scale * (h.W + b); z = u without a softcap."""

    scale: float = 1.0
    softcap: float | None = None


class Saved(NamedTuple):
    """What phase 1 hands to phase 2. acc and exps are empty where no gradient needs them."""

    logps: Tensor  # (N,) fp32 (fp64 for fp64 input): log-probability of each label
    one_minus_p: Tensor  # (N,) 1 - p_y, without cancellation
    inv_total: Tensor  # (N,) 1 / sum_v exp(z_v - ref)
    ref: Tensor  # (N,) the reference that E, acc and inv_total are relative to, in the backend's unit of logits
    acc: Tensor  # (N, D) fp32: O = sum_{v != y} exp(z_v - ref) * c_v * W_v, or (0,)
    exps: list[Tensor]  # plan.cached chunks (N, rows) of E' = exp(z - ref) * c; the label's entry is the backend's own
    stats: Stats | None = None  # where figures were asked for
    # Of phase 1, for sharding.py alone:
    label_logits: Tensor | None = None  # (N,) z_y, in the unit of ref
    largest: Tensor | None = None  # (N,) or (0,): the largest logit, in a unit of its own, where is_top1 is wanted


class Gradients(NamedTuple):
    """Each in its tensor's shape and dtype, None where not asked for; hidden's is 0 outside rows."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    low_rank: Tensor | None = None
    bias: Tensor | None = None


class Backend(Protocol):
    def logit_unit(self) -> float: ...  # nats in 1 of Saved.ref and Saved.label_logits

    def forward(
        self,
        hidden: Tensor,  # (M, D + r)
        weight: HeadRows,  # (V, D + r)
        bias: Tensor | None,  # (V,)
        rows: Tensor,  # (N,) int64, distinct: the rows of hidden that carry loss
        labels: Tensor,  # (N,) int64 in [0, V)
        logits: Logits,
        plan: Plan,
        *,
        needs_acc: bool,  # a gradient to hidden is wanted
        needs_exps: bool,  # a gradient to weight or bias is wanted
        wanted: Wanted | None = None,  # figures beside the log-probabilities
    ) -> Saved: ...

    def backward(
        self,
        grad_logps: Tensor,  # (N,)
        hidden: Tensor,
        weight: HeadRows,
        bias: Tensor | None,
        rows: Tensor,
        labels: Tensor,
        saved: Saved,
        logits: Logits,
        plan: Plan,
        *,
        needs_hidden: bool,
        needs_weight: bool,
        needs_low_rank: bool,
        needs_bias: bool,
        stats_grads: StatsGrads | None = None,  # where a gradient has come to one of them
    ) -> Gradients: ...


def exp_dtype(backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a backend keeps exponentials: bf16 only where a bf16 product consumes them.

    Never fp16, whose smallest normal number (6e-5) is a probability that matters.
    """
    if dtype == torch.float64 or (backend == "triton" and dtype == torch.bfloat16):
        return dtype
    return torch.float32


def exp_columns(backend: str, width: int) -> int:
    """Columns that a chunk of E has room for: Triton's rows begin at multiples of 16, for stores of vectors."""
    return -(-width // 16) * 16 if backend == "triton" else width


def triton_runs_on_cpu() -> bool:
    """Whether Triton launches on CPU tensors work here: interpreted, or emulated by the test suite."""
    return os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("ASFT_KERNELS_EMULATOR") == "1"


def interpreter_fault() -> str:
    """Why Triton's interpreter cannot run the kernels here; empty where it can.

    Before 3.7 it takes a loop's bound by int() of an array of shape (1,), which NumPy refuses from 2.4 on.
    """
    import numpy as np
    import triton

    from asft_kernels.kernels.configs import triton_release

    if triton_release() >= (3, 7) or tuple(map(int, np.__version__.split(".")[:2])) < (2, 4):
        return ""
    return (
        f"TRITON_INTERPRET: got Triton {triton.__version__} with NumPy {np.__version__}, whose arrays its interpreter "
        "cannot take for a loop's bound; need NumPy before 2.4, or Triton 3.7 or newer"
    )


def choose_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """`name` (one of checks.BACKENDS) if it can run here, else a ValueError; None: triton on CUDA and ROCm, else torch.

    float64 always runs on torch, the oracle's own precision.
    """
    if name == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and triton_runs_on_cpu()):
            raise ValueError(
                f"backend: got 'triton' with tensors on {device}, need CUDA or ROCm tensors; "
                "move them, use backend='torch', or set TRITON_INTERPRET=1 before starting Python to debug on a CPU"
            )
        if dtype == torch.float64:
            raise ValueError(
                "backend: got 'triton' with float64 tensors, need float32, float16 or bfloat16; use backend='torch'"
            )
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON
        # Not traced: Dynamo warns of the cache in triton_release.
        if interpreted and not torch.compiler.is_compiling() and (fault := interpreter_fault()):
            raise ValueError(fault)
    if name is None:
        triton_here = device.type == "cuda" and dtype != torch.float64 and HAS_TRITON
        return "triton" if triton_here else "torch"
    return name


def load_backend(name: str) -> Backend:
    if name == "triton":
        from asft_kernels.backends import triton_fused as backend
    else:
        from asft_kernels.backends import torch_chunked as backend
    return backend  # type: ignore[return-value]  # modules satisfy protocols structurally
