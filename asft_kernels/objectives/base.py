"""What every objective is, their weighted sum, and the reduction over pairs that they share."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor, nn

from asft_kernels.sequence import Logps


@dataclass(frozen=True)
class LossTerms:
    """Per pair (paired objectives) or per row (unpaired), differentiable.

    loss: what is minimised. sft: the unweighted likelihood term, -avg of the chosen answer.
    align: the unweighted alignment term, 0 where an objective has none.
    metrics: detached figures of the method's own, by name; reported as means over what counts.
    """

    loss: Tensor
    sft: Tensor
    align: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """A small function of sequence statistics; it sees no hidden states and no kernels.

    paired: rows 0..B-1 are chosen and row B+i is the answer rejected for row i; else any rows.
    needs_reference: takes ref_logps, (R,) or (K, R), of each row under the reference.
    reference_kind: what they are: "sum" of a row's log-probabilities, or "mean" per token.
    uses_nll_labels: reads Logps.nll_avg, so that nll_labels make a difference.
    ref_per_token: ref_logps are given per token, in the labels' shape, and summed as the policy's are.
    inputs, optional_inputs: further tensors by name, with what they are: `objective_inputs` of the call,
        keywords of __call__.

    An objective may also have `weigh_tokens(logps, token_weights)`: (N,) detached log-probabilities of
    the valid tokens and the caller's (N,) token_weights -> the (N,) weights of the sums.
    """

    paired: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    reference_kind: ClassVar[str] = "sum"
    uses_nll_labels: ClassVar[bool] = False
    ref_per_token: ClassVar[bool] = False
    inputs: ClassVar[Mapping[str, str]] = {}
    optional_inputs: ClassVar[Mapping[str, str]] = {}

    def __call__(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        """policy: of all rows. ref_logps: detached, (R,) or (K, R)."""
        raise NotImplementedError

    def from_tokens(self, logps: Tensor, offsets: Tensor, backend: str) -> "tuple[Logps, LossTerms] | None":
        """The same at once from (N,) token logps and the rows' (R+1,) borders, where there is such a way on backend."""
        return None


class Composite(nn.Module, Objective):
    """An objective made of others: a module, so that the state of a part (lmpo) is its own: moved, saved, in train().

    Equal to another, as the dataclasses are, by what it is made of: `fields`, names of its attributes.
    """

    fields: ClassVar[tuple[str, ...]]

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        made_of = ", ".join(f"{name}={value!r}" for name, value in zip(self.fields, self._values(), strict=True))
        return f"{type(self).__name__}({made_of})"

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.fields)


class WeightedSum(Composite):
    """Several objectives of one batch: "dpo + 0.005 sft".

    terms: (weight, objective), at least one. With a paired one among them the unpaired ones see the chosen rows.
    Those with a reference read the same ref_logps: ValueError where one needs sums and another means.
    """

    fields = ("terms",)

    def __init__(self, terms: Iterable[tuple[float, Objective]]) -> None:
        super().__init__()
        self.terms = tuple(_checked_term(term) for term in terms)
        if not self.terms:
            raise ValueError("weighted sum: got no terms, need at least one (weight, objective)")
        objectives = [objective for _, objective in self.terms]
        self.parts = nn.ModuleList(o for o in objectives if isinstance(o, nn.Module))
        for name in ("paired", "needs_reference", "uses_nll_labels"):
            setattr(self, name, any(getattr(o, name) for o in objectives))
        for name in ("inputs", "optional_inputs"):
            setattr(self, name, {k: v for o in objectives for k, v in getattr(o, name).items()})
        kinds = {o.reference_kind: type(o).__name__ for o in objectives if o.needs_reference}
        if len(kinds) > 1:
            got = " and ".join(f"{name}, whose ref_logps are {kind}s" for kind, name in kinds.items())
            raise ValueError(f"weighted sum: got {got}, need objectives that read the same reference")
        vars(self).update(reference_kind=next(iter(kinds), "sum"))

    def forward(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        parts = []
        for weight, objective in self.terms:
            own = {k: v for k, v in inputs.items() if k in objective.inputs or k in objective.optional_inputs}
            ref = ref_logps if objective.needs_reference else None
            if self.paired and not objective.paired:
                own = {k: v.chunk(2, dim=-1)[0] if v.dim() else v for k, v in own.items()}
                ref = None if ref is None else ref.chunk(2, dim=-1)[0]
                parts.append((weight, objective(chosen_of_pairs(policy), ref, **own)))
            else:
                parts.append((weight, objective(policy, ref, **own)))
        return LossTerms(
            sum_of(weight * terms.loss for weight, terms in parts),
            parts[0][1].sft,
            sum_of(weight * terms.align for weight, terms in parts),
            {name: value for _, terms in reversed(parts) for name, value in terms.metrics.items()},
        )


def _checked_term(term: object) -> tuple[float, Objective]:
    if not isinstance(term, Sequence) or isinstance(term, str) or len(term) != 2:
        raise ValueError(f"weighted sum: got the term {term!r}, need a pair (weight, objective), such as (1.0, DPO())")
    weight, objective = term
    require_number("weighted sum", f"weight of {type(objective).__name__}", weight)
    if not isinstance(objective, Objective):
        raise ValueError(f"weighted sum: got {objective!r}, need an Objective, such as DPO()")
    if hasattr(objective, "weigh_tokens") or objective.ref_per_token:
        raise ValueError(
            f"weighted sum: got {type(objective).__name__}, which weighs tokens, need objectives of plain sums; give "
            "it the others as its base instead"
        )
    return weight, objective


def chosen_of_pairs(policy: Logps) -> Logps:
    """The chosen rows, empty where the pair does not count: what looks at the whole batch must not see those."""
    chosen = policy.chosen
    return replace(chosen, length=torch.where(counting(policy, paired=True), chosen.length, 0))


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def sum_over_ranks(sums: Tensor) -> Tensor:
    """In place, over all processes where torch.distributed runs; each of them must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Implicit rewards of (B,) pairs, as trainers log them."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).double(),
    }


def counting(policy: Logps, paired: bool) -> Tensor:
    """(B,) or (R,) bool: a row counts if it has a valid token, a pair only if both its rows do."""
    rows = counting_rows(policy.length, paired)
    return rows.chunk(2)[0] if paired else rows


def counting_rows(length: Tensor, paired: bool) -> Tensor:
    """(R,) bool of (R,) lengths: the rows that count, those of pairs that do if paired."""
    filled = length > 0
    if not paired:
        return filled
    chosen, rejected = filled.chunk(2)
    return (chosen & rejected).repeat(2)


def mean_over(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over what counts, 0 if nothing does; the rest has gradient exactly 0."""
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def reduce_loss(loss: Tensor, counts: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return mean_over(loss, counts)
    kept = torch.where(counts, loss, 0)
    return kept.sum() if reduction == "sum" else kept


def require_number(objective: str, name: str, value: float, *, above_zero: bool = False) -> None:
    """A ValueError that names the parameter unless it is finite, in float64 too, and >= 0, or > 0."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not (real and (value > 0 if above_zero else value >= 0) and value <= sys.float_info.max):
        raise ValueError(f"{objective}: {name}: got {value!r}, need a finite number {'>' if above_zero else '>='} 0")


def require_choice(objective: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{objective}: {name}: got {value!r}, need one of {', '.join(map(repr, choices))}")


def require_input(objective: str, name: str, tensor: object, rows: int) -> Tensor:
    """The tensor, or a ValueError unless it has one entry a row."""
    if not isinstance(tensor, Tensor) or tensor.shape != (rows,):
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{objective}: {name}: got {got}, need a tensor ({rows},), one entry a row")
    return tensor
