"""The contestants: one entry each, a function of a case's inputs that returns (loss, dH, dW).

Those that yield per-token log-probabilities compute the same function of them (losses.py); Liger-Kernel's preference
losses come whole. What a contestant computes beside the valid tokens is its own cost, and stands in its note. Packages
are imported when a contestant is called for the first time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

import asft_kernels
from asft_kernels import fused_asft_loss, fused_linear_logps
from asft_kernels.backends import exp_dtype
from asft_kernels.backends.plan import DEFAULT_CACHE_BYTES, make_plan
from benchmarks.cases import FROZEN, NO_GRADIENT, TRAINABLE, WORKS, Case, Inputs
from benchmarks.losses import IGNORE, LOSSES

BARE = "bare products"
LogpsOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (2B, T, D), weight (V, D), labels (2B, T) -> (2B, T)
Result = tuple[Tensor | None, Tensor | None, Tensor | None]  # loss, dH, dW, detached


@dataclass(frozen=True)
class Contestant:
    """run: the whole call, gradients of the work included. gemms: products needed for each of WORKS.

    positions: "valid" if it computes the N tokens that carry loss, "all" if the M of the batch. checked: whether it
    has an answer to be checked.
    """

    name: str
    package: str
    run: Callable[[Case, Inputs], Result]
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
        named = not case.contestants or self.name in case.contestants
        here = case.device in self.devices or (self.name in INTERPRETED and interpreted(case))
        return (
            named and here and case.work in self.works and case.loss in self.losses and case.dtype in self.dtypes
        )  # fmt: skip

    def products(self, case: Case) -> int:
        """Matrix products of 2 N V D operations (2 M V D where it computes all positions)."""
        return self.gemms[WORKS.index(case.work)]

    @property
    def version(self) -> str:
        if self.package == "asft_kernels":
            return asft_kernels.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "not installed"


def interpreted(case: Case) -> bool:
    """Triton's interpreter does 0.05 GFLOP/s: it takes part where asked for and where the case is tiny."""
    return os.environ.get("TRITON_INTERPRET") == "1" and case.N * case.V * case.D <= 2**20


def gradients(case: Case, inputs: Inputs, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Result:
    """loss_of(hidden, weight) and the gradients that the work asks for."""
    if case.work == NO_GRADIENT:
        with torch.no_grad():
            return loss_of(inputs.hidden, inputs.weight).detach(), None, None
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(case.work == TRAINABLE)
    loss = loss_of(hidden, weight)
    if case.work == FROZEN:
        return loss.detach(), *torch.autograd.grad(loss, hidden), None
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def from_logps(logps_of: LogpsOf) -> Callable[[Case, Inputs], Result]:
    """A contestant from its per-token log-probabilities: the case's loss of them."""

    def run(case: Case, inputs: Inputs) -> Result:
        labels = inputs.labels
        return gradients(case, inputs, lambda h, w: LOSSES[case.loss](logps_of(h, w, labels), labels))

    return run


def bare_products(case: Case, inputs: Inputs) -> Result:
    """The products of our schedule and nothing else, chunk by chunk, into freshly allocated E and dW.

    The yardstick for 3 products keeps every chunk of E. On a CPU the operands are fp32, as ours are there for every
    dtype; on a GPU they have the case's dtype, with an fp32 accumulator for the hidden states.
    """
    hidden = inputs.hidden.flatten(0, 1)[: case.N]
    weight = inputs.weight
    stored = exp_dtype("triton" if case.device == "cuda" else "torch", case.torch_dtype)
    if case.device == "cpu":
        hidden, weight = hidden.float(), weight.float()  # fp32: the same tensors
    plan = make_plan(
        case.N, case.V, case.D, exp_bytes=stored.itemsize, chunk_size=None, cache_bytes=0, device_type=case.device
    )
    acc = torch.empty(case.N, case.D, device=case.device)
    grad = torch.empty_like(weight) if case.work == TRAINABLE else None
    workspace = hidden.new_empty(0 if case.work == TRAINABLE else case.N, plan.chunk)
    kept = []
    for k, (start, stop) in enumerate(plan.slices):
        rows = weight[start:stop]
        E = hidden.new_empty(case.N, stop - start) if case.work == TRAINABLE else workspace[:, : stop - start]
        torch.mm(hidden, rows.T, out=E)
        if case.work == TRAINABLE:
            kept.append(E)
        if case.work != NO_GRADIENT:
            wider = {} if rows.dtype == acc.dtype else {"out_dtype": acc.dtype}
            torch.addmm(acc, E, rows, beta=min(k, 1), out=acc, **wider)
    if grad is not None:
        for (start, stop), E in zip(plan.slices, kept, strict=True):
            torch.mm(E.T, hidden, out=grad[start:stop])
    return None, None, None


def ours(backend: str, cache_bytes: int | None = None) -> Callable[[Case, Inputs], Result]:
    """fused_asft_loss, and for the other losses the same log-probabilities by fused_linear_logps."""
    keywords = {"shift": False, "backend": backend, "cache_bytes": cache_bytes}

    def run(case: Case, inputs: Inputs) -> Result:
        if case.loss == "asft":
            return gradients(case, inputs, lambda h, w: fused_asft_loss(h, w, inputs.labels, **keywords))
        return from_logps(lambda h, w, labels: fused_linear_logps(h, w, labels, **keywords))(case, inputs)

    return run


def plain_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    flat = labels.flatten()
    return -F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), flat, reduction="none").view_as(labels)


def torch_fused(chunked: bool) -> LogpsOf:
    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        nll = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), reduction="none", ignore_index=IGNORE, options=options
        )
        return -nll.view_as(labels)

    return logps


def cce(impl: str) -> LogpsOf:
    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE, reduction="none", impl=impl)

    return logps


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = labels != IGNORE
    logps, *_ = ChunkedLogProbFunction.apply(hidden[mask], weight, None, labels[mask], 1.0, 32768, None, 1.0, ())
    return logps.new_zeros(labels.shape).masked_scatter(mask, logps)


def liger(case: Case, inputs: Inputs) -> Result:
    """Its defaults (compiled, one pair at a time), but for SimPO's extra NLL term and DPO's reference model."""
    from liger_kernel import chunked_loss

    if case.loss == "simpo":
        module = chunked_loss.LigerFusedLinearSimPOLoss(compute_nll_loss=False)
    elif case.loss == "dpo":
        module = chunked_loss.LigerFusedLinearDPOLoss(use_ref_model=False)
    else:
        module = chunked_loss.LigerFusedLinearORPOLoss()
    return gradients(case, inputs, lambda h, w: module(w, h, inputs.labels)[0])


ALL = "logits of all M positions"
INTERPRETED = ("asft_kernels triton", "asft_kernels triton, cache_bytes=0")
CONTESTANTS = [
    Contestant(BARE, "torch", bare_products, checked=False, note="our schedule's products alone, all of E kept"),
    Contestant("asft_kernels torch", "asft_kernels", ours("torch"), note="keeps 1 GiB of E; the rest is a 4th product"),
    Contestant(
        "asft_kernels torch, cache_bytes=0", "asft_kernels", ours("torch", 0), gemms=(1, 2, 4), works=(TRAINABLE,)
    ),
    Contestant(
        "asft_kernels torch, all E kept", "asft_kernels", ours("torch", 2**62), works=(TRAINABLE,),
        note="where E passes the default 1 GiB",
    ),
    Contestant("asft_kernels triton", "asft_kernels", ours("triton"), devices=("cuda",)),
    Contestant(
        "asft_kernels triton, cache_bytes=0", "asft_kernels", ours("triton", 0), gemms=(1, 2, 4), works=(TRAINABLE,),
        devices=("cuda",),
    ),
    Contestant(
        "asft_kernels triton, all E kept", "asft_kernels", ours("triton", 2**62), works=(TRAINABLE,),
        devices=("cuda",), note="where E passes the default 1 GiB",
    ),
    Contestant("plain torch", "torch", from_logps(plain_torch), positions="all", note=ALL),
    Contestant("torch F.linear_cross_entropy", "torch", from_logps(torch_fused(False)), positions="all", note=ALL),
    Contestant(
        "torch F.linear_cross_entropy, chunked", "torch", from_logps(torch_fused(True)), gemms=(1, 3, 4),
        positions="all", note=f"{ALL}, recomputed in backward, as a loss per token needs",
    ),
    Contestant(
        "cut-cross-entropy torch_compile", "cut-cross-entropy", from_logps(cce("torch_compile")), compiles=True,
        note="keeps the logits of the valid tokens",
    ),
    Contestant(
        "cut-cross-entropy cce", "cut-cross-entropy", from_logps(cce("cce")), gemms=(1, 3, 4), devices=("cuda",),
        dtypes=("bfloat16", "float16"), compiles=True, note="its own gradient filter",
    ),
    Contestant(
        "TRL ChunkedLogProbFunction", "trl", from_logps(trl_chunked), gemms=(1, 3, 4),
        note="given the valid tokens, as TRL does on GPUs (on a CPU its trainers compute all positions)",
    ),
    *(
        Contestant(
            f"Liger-Kernel {name}", "liger-kernel", liger, positions="all", losses=(name.lower(),), compiles=True,
            note=f"{ALL}, one pair at a time, loss and gradients in forward",
        )
        for name in ("SimPO", "DPO", "ORPO")
    ),
]  # fmt: skip


def find(name: str) -> Contestant:
    return next(contestant for contestant in CONTESTANTS if contestant.name == name)


def contestants_of(case: Case) -> list[Contestant]:
    """Those that take the case; "all E kept" only where the default keeps less."""
    stored = exp_dtype("triton" if case.device == "cuda" else "torch", case.torch_dtype)
    default_keeps_all = case.N * case.V * stored.itemsize <= DEFAULT_CACHE_BYTES
    return [c for c in CONTESTANTS if c.takes(case) and not (default_keeps_all and c.name.endswith("all E kept"))]
