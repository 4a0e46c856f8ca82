"""Objectives made of others: one around another, and the weighted sum."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from asft_kernels.core.sequence import Logps
from asft_kernels.objectives.base import LossTerms, Objective, chosen_of_pairs, require_number, sum_of


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


class Around(Composite):
    """An objective around one other, `base`: asks for what that asks for."""

    def __init__(self, name: str, base: str | Objective | None) -> None:
        """name: of the objective, for errors. base: an objective, or the name of one (not its own)."""
        from asft_kernels.objectives import get_objective  # which imports this file

        super().__init__()
        made = get_objective(base) if isinstance(base, str) and base != name else base
        if not isinstance(made, Objective):
            raise ValueError(f"{name}: base: got {base!r}, need a name such as 'dpo' or an Objective such as DPO(); "
                             f"written {name}(base=dpo)")  # fmt: skip
        self.base = made
        asked = ("paired", "needs_reference", "reference_kind", "uses_nll_labels", "ref_per_token")
        for key in (*asked, "inputs", "optional_inputs", "stats", "stats_with_grad"):
            setattr(self, key, getattr(made, key))

    def check_references(self, number: int) -> None:
        self.base.check_references(number)

    def per_token(self, logps: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.base.per_token(logps, stats)

    def forward(self, policy: Logps, ref_logps: Tensor | None = None, **inputs: Tensor) -> LossTerms:
        return self.base(policy, ref_logps, **inputs)


def weighs_tokens(objective: Objective) -> bool:
    """Whether its sums are other than the caller's."""
    return hasattr(objective, "weigh_tokens") or objective.ref_per_token


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
        if not any(weight for weight, _ in self.terms):
            raise ValueError("weighted sum: got weights of 0 alone, need one above 0: nothing would be trained")
        objectives = [objective for _, objective in self.terms]
        self.parts = nn.ModuleList(o for o in objectives if isinstance(o, nn.Module))
        for name in ("paired", "needs_reference", "uses_nll_labels"):
            setattr(self, name, any(getattr(o, name) for o in objectives))
        for name in ("inputs", "optional_inputs"):
            setattr(self, name, {k: v for o in objectives for k, v in getattr(o, name).items()})
        for name in ("stats", "stats_with_grad"):
            setattr(self, name, tuple(dict.fromkeys(x for o in objectives for x in getattr(o, name))))
        kinds = {o.reference_kind: type(o).__name__ for o in objectives if o.needs_reference}
        if len(kinds) > 1:
            got = " and ".join(f"{name}, whose ref_logps are {kind}s" for kind, name in kinds.items())
            raise ValueError(f"weighted sum: got {got}, need objectives that read the same reference")
        vars(self).update(reference_kind=next(iter(kinds), "sum"))

    def check_references(self, number: int) -> None:
        for _, objective in self.terms:
            objective.check_references(number)

    def per_token(self, logps: Tensor, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for _, objective in self.terms for k, v in objective.per_token(logps, stats).items()}

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
    if weighs_tokens(objective):
        raise ValueError(
            f"weighted sum: got {type(objective).__name__}, which weighs tokens, need objectives of plain sums; bmc "
            "takes the others inside, as in \"bmc(base='dpo + 0.1 sft')\""
        )
    return weight, objective
