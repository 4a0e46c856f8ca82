"""The contestants: one entry each, with what it can take and what it should cost.

What a contestant computes beside the valid tokens is its own cost, and stands in its note.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import asft_kernels
from asft_kernels.backends import exp_dtype
from asft_kernels.backends.plan import default_cache_bytes, make_plan
from asft_kernels.kernels.configs import multiprocessors
from benchmarks import calls
from benchmarks.cases import TRAINABLE, WORKS, Case, Inputs
from benchmarks.losses import LOSSES
from benchmarks.machine import package_version

BARE = "bare products"
TUNED = ", tuned"  # after the name of what has it measured with the tile that autotune stored
ALL_KEPT = ", all E kept"
EVERYTHING = 2**62  # cache_bytes that no E passes
MODULES = {
    "cut-cross-entropy": "cut_cross_entropy",
    "liger-kernel": "liger_kernel.chunked_loss",
    "trl": "trl.kernels.chunked_logprob",
}


@dataclass(frozen=True)
class Contestant:
    """run: the whole call, gradients of the work included.

    gemms: products that it should need for each of WORKS. positions: "valid" if it computes the N tokens that carry
    loss, "all" if the M of the batch. compiles: uses torch.compile. checked: has an answer to be checked.
    """

    name: str
    package: str
    run: Callable[[Case, Inputs], calls.Result]
    gemms: tuple[int, int, int] = (1, 2, 3)
    positions: str = "valid"
    works: tuple[str, ...] = WORKS
    losses: tuple[str, ...] = tuple(LOSSES)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    compiles: bool = False
    checked: bool = True
    note: str = ""

    def takes(self, case: Case) -> bool:
        named = not case.contestants or self.name.removesuffix(TUNED) in case.contestants
        here = case.device in self.devices or ("triton" in self.name and _interpreted(case))
        return named and here and case.work in self.works and case.loss in self.losses and case.dtype in self.dtypes

    def products(self, case: Case) -> float:
        """Of 2 N V D operations each, or 2 M V D where it computes all positions."""
        return self.gemms[WORKS.index(case.work)]

    @property
    def module(self) -> str:
        """What is imported of its package."""
        return MODULES.get(self.package, self.package)

    @property
    def version(self) -> str:
        if self.package == "asft_kernels":
            return asft_kernels.__version__
        return package_version(self.package)


def _interpreted(case: Case) -> bool:
    """Triton's interpreter does 0.05 GFLOP/s: it takes part where asked for and where the case is tiny."""
    return os.environ.get("TRITON_INTERPRET") == "1" and case.N * case.V * case.D <= 2**20


@dataclass(frozen=True)
class Ours(Contestant):
    """What of E exceeds cache_bytes (None: the default) is computed once more.

    tuned: takes the tile that autotune stored, whatever ASFT_KERNELS_TUNED says, and fails where none is; it takes part
    only where it is asked for.
    """

    backend: str = "torch"
    cache_bytes: int | None = None
    tuned: bool = False

    def takes(self, case: Case) -> bool:
        redundant = self.cache_bytes == EVERYTHING and self._kept_rows(case, None) == case.V
        return super().takes(case) and not redundant

    def products(self, case: Case) -> float:
        if case.work != TRAINABLE:
            return super().products(case)
        return 4 - self._kept_rows(case, self.cache_bytes) / case.V

    def _kept_rows(self, case: Case, cache_bytes: int | None) -> int:
        """Of the vocabulary: those whose exponentials are kept."""
        plan = make_plan(
            case.N, case.V, case.D, exp_bytes=exp_dtype(self.backend, case.torch_dtype).itemsize, chunk_size=None,
            cache_bytes=default_cache_bytes(case.device) if cache_bytes is None else cache_bytes,
            device_type=case.device, multiprocessors=multiprocessors(torch.device(case.device)),
        )  # fmt: skip
        return min(plan.cached * plan.chunk, case.V)


def _ours(backend: str, devices: tuple[str, ...]) -> list[Contestant]:
    name = f"asft_kernels {backend}"

    def with_cache(suffix: str, cache_bytes: int | None, **fields) -> Ours:
        run = partial(calls.ours, backend=backend, cache_bytes=cache_bytes)
        own: dict[str, Any] = {"backend": backend, "cache_bytes": cache_bytes, "devices": devices}
        return Ours(name + suffix, "asft_kernels", run, **own, **fields)

    tuned = with_cache(TUNED, None, tuned=True, note="the tile that autotune found fastest here")
    return [
        with_cache("", None),
        *[tuned] * (backend == "triton"),
        with_cache(", cache_bytes=0", 0, works=(TRAINABLE,)),
        with_cache(
            ALL_KEPT, EVERYTHING, works=(TRAINABLE,), note="cache_bytes as large as E, where E passes the default"
        ),
    ]


def _per_token(name: str, package: str, logps_of: calls.LogpsOf, **fields) -> Contestant:
    return Contestant(name, package, partial(calls.per_token, logps_of), **fields)


ALL = "logits of all M positions"
COMPACTED = "given the valid tokens"
HALF = ("bfloat16", "float16")
CONTESTANTS = [
    Contestant(BARE, "torch", calls.bare_products, checked=False, note="our schedule's products alone, all of E kept"),
    *_ours("torch", ("cpu", "cuda")),
    *_ours("triton", ("cuda",)),
    _per_token("plain torch", "torch", calls.plain_torch, positions="all", note=ALL),
    _per_token("torch F.linear_cross_entropy", "torch", partial(calls.torch_fused, chunked=False), note=COMPACTED),
    _per_token(
        "torch F.linear_cross_entropy, chunked", "torch", partial(calls.torch_fused, chunked=True), gemms=(1, 3, 4),
        note=f"{COMPACTED}; logits computed again in backward, as a loss per token needs",
    ),
    _per_token(
        "cut-cross-entropy torch_compile", "cut-cross-entropy", partial(calls.cce, impl="torch_compile"),
        compiles=True, note="keeps the logits of the valid tokens",
    ),
    _per_token(
        "cut-cross-entropy cce", "cut-cross-entropy", partial(calls.cce, impl="cce"), gemms=(1, 3, 4),
        devices=("cuda",), dtypes=HALF, note="its gradient filter at its default, which drops small probabilities",
    ),
    _per_token(
        "cut-cross-entropy cce, filter_eps=None", "cut-cross-entropy",
        partial(calls.cce, impl="cce", filter_eps=None), gemms=(1, 3, 4), devices=("cuda",), dtypes=HALF,
        note="nothing filtered",
    ),
    _per_token(
        "TRL ChunkedLogProbFunction", "trl", calls.trl_chunked, gemms=(1, 3, 4),
        note=f"{COMPACTED}, as TRL does on GPUs (on a CPU its trainers compute all positions)",
    ),
    *(
        Contestant(
            f"Liger-Kernel {name}", "liger-kernel", calls.liger, positions="all", losses=(name.lower(),),
            compiles=True, note=f"{ALL}, one pair at a time, loss and gradients in forward",
        )
        for name in ("SimPO", "DPO", "ORPO")
    ),
]  # fmt: skip


def contestants_of(case: Case) -> list[Contestant]:
    return [contestant for contestant in CONTESTANTS if contestant.takes(case)]
