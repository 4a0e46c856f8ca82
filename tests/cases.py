"""Inputs: random, peaked, masked, packed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

IGNORE = -100
ODD = (251, 507, 123)  # N, V, D: no multiple of anything


@dataclass
class Case:
    """hidden (rows, T, D), weight (V, D), bias (V,) and labels (rows, T), as leaves that ask for gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    @property
    def head(self):
        return self.weight if self.bias is None else (self.weight, self.bias)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> "Case":
        """A copy with leaves of its own; from a low precision to float64 the values stay what they are."""
        hidden, weight, bias = (
            None if x is None else x.detach().to(dtype, copy=True).requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
        )
        return Case(hidden, weight, bias, self.labels)

    def on(self, device: str) -> "Case":
        """A copy on another device, with leaves of its own."""
        leaves = (
            None if x is None else x.detach().to(device).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        )
        return Case(*leaves, self.labels.to(device))


def make_case(
    rows=4, T=13, D=24, V=97, *, dtype=torch.float32, valid=0.5, bias=False, peaked=False, spread=1.0, seed=0
) -> Case:
    """A batch with about `valid` of its labels unmasked; peaked copies rows of hidden into the head.

    peaked: a third of the labels' rows are made parallel to their hidden state (a softmax that is right and
    sure), a third of other rows are (sure and wrong). spread scales the logits.
    """
    gen = torch.Generator().manual_seed(seed)
    random = {"generator": gen, "device": "cpu"}  # the same numbers on all devices
    hidden = torch.randn(rows, T, D, **random)
    weight = torch.randn(V, D, **random) * spread / D**0.5
    labels = torch.randint(V, (rows, T), **random)
    if peaked:
        for row in range(rows):
            for t in range(0, T - 1, 3):
                right, wrong = labels[row, t + 1], (labels[row, t + 1] + 1 + t) % V
                weight[right if t % 2 else wrong] = hidden[row, t] * (30 * spread / D)
    labels[torch.rand(rows, T, **random) > valid] = IGNORE
    offset = torch.randn(V, **random).to(dtype).requires_grad_() if bias else None
    return Case(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), offset, labels)


def one_label_far_below(case: Case, gap: float, high: Tensor) -> Case:
    """The case with label 0 at its first valid token, whose logits are 0 but for those of the `high` rows: gap."""
    row, position = (case.labels[:, 1:] != IGNORE).nonzero()[0].tolist()
    hidden, weight, labels = case.hidden.detach().clone(), case.weight.detach().clone(), case.labels.clone()
    hidden[..., 0] = 0.0
    hidden[row, position] = 0.0
    hidden[row, position, 0] = gap
    weight[:, 0] = 0.0
    weight[high, 0] = 1.0
    labels[row, position + 1] = 0
    return Case(hidden.requires_grad_(), weight.requires_grad_(), case.bias, labels)


def packed(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The case's rows end to end, each without its masked tail: hidden (M, D), labels (M,), cu_seqlens (rows+1,)."""
    lengths = [int((row != IGNORE).nonzero().max()) + 1 if (row != IGNORE).any() else 0 for row in case.labels]
    hidden = torch.cat([h[:n] for h, n in zip(case.hidden, lengths, strict=True)])
    labels = torch.cat([y[:n] for y, n in zip(case.labels, lengths, strict=True)])
    return hidden, labels, torch.tensor([0, *lengths]).cumsum(0).int()


def figures(out) -> dict[str, torch.Tensor]:
    """The tensors of a call's outputs by name."""
    return {name: value for name, value in vars(out).items() if name != "metrics"}


def gemms(call, n_valid: int, V: int, D: int) -> float:
    """Multiply-adds of every mm and addmm that ran, in units of one N x V x D product."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        call()
    products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul"}
    events = (
        prof.profiler.kineto_results.events()
    )  # as recorded: prof.events() makes a tree of them, which takes longer
    return sum(e.flops() for e in events if e.name() in products) / (2 * n_valid * V * D)
