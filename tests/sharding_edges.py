"""What the processes of test_sharding.py run: a head over ranks where numbers are at the edge of a decision."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asft_kernels import fused_linear_logps
from asft_kernels.core.distributed import VocabParallelHead
from cases import make_case

EPS = torch.finfo(torch.float32).eps
# How far the other rank's largest logit stands above the label's -> whether the label still counts as the top.
TIES = {0.0: True, EPS: True, 16 * EPS: False, 1e-4: False, 0.05: False, -16 * EPS: True}
LEVELS = (8.0, -8.0, 1000.0)
FAR = ("gap of 60", "gap of 120", "1e3 and -1e3", "-1e3 and no rows", "none of the second")


def sharded(weight: Tensor, bias: Tensor, rank: int, ends: list[int]) -> tuple[list[Tensor], VocabParallelHead]:
    """(this rank's weight and bias, its head)."""
    own = slice(ends[rank], ends[rank + 1])
    leaves = [x[own].clone().requires_grad_() for x in (weight, bias)]
    return leaves, VocabParallelHead(*leaves, group=dist.group.WORLD)


def ties(rank: int, world: int) -> dict:
    """Biases are the logits: label 0 stands on the first rank, label 2 on the second."""
    out: dict[Any, Any] = {}
    for level in LEVELS:
        for above in TIES:
            for label in (0, 2):
                bias = torch.full((4,), level - 3)
                bias[label], bias[2 - label] = level, level * (1 + above if level > 0 else 1 - above)
                _, head = sharded(torch.zeros(4, 1), bias, rank, [0, 2, 4])
                found = fused_linear_logps(
                    torch.zeros(1, 1, 1), head, torch.tensor([[label]]), shift=False, return_stats=["is_top1"]
                )
                out[level, above, label] = bool(found.is_top1)
    return out


def apart(rank: int, world: int) -> dict:
    """How far the ranks' hidden states differ, of a column's norm -> the error, if one."""
    case = make_case()
    _, head = sharded(case.weight.detach(), torch.zeros(97), rank, [0, 40, 97])
    along = torch.arange(case.labels.numel()).double().cos()
    out = {}
    for distance, columns in ((0.0, 24), (0.02, 24), (0.1, 1), (0.5, 24), (0.85, 1)):
        hidden = case.hidden.detach().clone()
        columns_of = hidden.view(-1, 24)[:, :columns]
        step = distance * columns_of.double().norm(dim=0) / along.square().sum()
        if rank:
            columns_of += (step * along[:, None]).float()
        try:
            fused_linear_logps(hidden, head, case.labels)
            out[distance] = ""
        except ValueError as error:
            out[distance] = str(error)
    return out


def far_case(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and labels. The first of two ranks has the labels' rows: four of eight, or all.

    A gap: the second rank's stand-in for a label is that far below, 40 nats below the rest of its rank.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, generator=g), 0.1 * torch.randn(8, 4, generator=g)
    labels = torch.tensor([[0, 1, 2], [1, 0, 3]])
    if name == "none of the second":
        return hidden, weight, torch.tensor([0.0] * 4 + [-torch.inf] * 4), labels
    if name == "-1e3 and no rows":
        return hidden, weight, torch.full((8,), -1e3), labels
    if name == "1e3 and -1e3":
        return hidden, weight, torch.tensor([1e3, -1e3, 1e3, 0.0, -1e3, 1e3, 999.0, -1e3]), labels
    gap = float(name.split()[-1])
    bias = torch.tensor([0.0, 0, 0, 0, -gap, -gap, -gap, 40 - gap])
    labels = labels.clamp(max=2)
    return hidden, weight, bias, labels


def far_ends(name: str) -> list[int]:
    return [0, 8, 8] if name == "-1e3 and no rows" else [0, 4, 8]


def far(rank: int, world: int) -> dict:
    out = {}
    for backend in ("torch", "triton"):
        for name in FAR:
            for cache_bytes in (None, 0):
                hidden, weight, bias, labels = far_case(name)
                leaves, head = sharded(weight, bias, rank, far_ends(name))
                hidden.requires_grad_()
                found = fused_linear_logps(
                    hidden, head, labels, shift=False, backend=backend, cache_bytes=cache_bytes, chunk_size=2,
                    return_stats=["entropy", "lse", "log_sum_sq_probs"], differentiable=["entropy", "lse"],
                )  # fmt: skip
                aim = found.logps.sum() + (found.entropy + found.lse).sum() * (name == FAR[-1])
                grads = torch.autograd.grad(aim, [hidden, *leaves])
                figures = {x: getattr(found, x) for x in ("entropy", "lse", "log_sum_sq_probs")}
                out[backend, name, cache_bytes] = [found.logps.detach(), *grads, figures]
    return out


def empty(rank: int, world: int) -> dict:
    """bf16 on Triton; the first of two ranks has no rows."""
    case = make_case(rows=2, T=9, D=16, V=40, bias=True, dtype=torch.bfloat16)
    assert case.bias is not None, "bug: a case without a bias"
    leaves, head = sharded(case.weight.detach(), case.bias.detach(), rank, [0, 0, 40])
    logps = fused_linear_logps(case.hidden, head, case.labels, backend="triton", chunk_size=16)
    return {"of all": [logps.detach(), *torch.autograd.grad(logps.sum(), [case.hidden, *leaves])]}


def edges(rank: int, world: int) -> dict:
    return {function.__name__: function(rank, world) for function in (ties, apart, far, empty)}
