"""The plain formulas by name, and how they go over a batch.

A formula looks at one pair, (chosen, rejected, **parameters) -> its loss, at one row, (row, **parameters), or
at all the pairs or rows that count, ([...], **parameters) -> [their losses]. Its defaults are the paper's.
A row has logps (m,) of its valid tokens, m, S (their sum, times the caller's token weights), marks (those
weights, (m,), or None), logits (m, V) for objectives that ask for figures per token, nll_logps, ref (its
reference's sum, or (K,) of K, or (m,) per token) and, by name, what `objective_inputs` gave for it.
"""

import inspect

from asft_kernels.reference import base, dnpo, neighbours, trainers

# name: ("pair", "pairs", "row" or "rows", function)
FORMULAS = {**base.FORMULAS, **trainers.FORMULAS, **neighbours.FORMULAS, **dnpo.FORMULAS}


def evaluate(objective, rows, shared):
    """([loss of each pair or row, 0 where it does not count], how many count). shared: inputs without rows."""
    if isinstance(objective, str) and "+" in objective:
        terms = [term.split() for term in objective.split("+")]
        return _sum([(float(term[0]) if len(term) > 1 else 1.0, term[-1]) for term in terms], rows, shared)
    if not isinstance(objective, str) and hasattr(objective, "terms"):
        return _sum(objective.terms, rows, shared)
    name = base.name_of(objective)
    if name not in FORMULAS:
        raise ValueError(f"objective: got {objective!r}, need one of {', '.join(map(repr, FORMULAS))}")
    kind, formula = FORMULAS[name]
    given = {k: v for k, v in shared.items() if k in inspect.signature(formula).parameters}
    given = {**base.parameters_of(formula, objective), **given}
    half = len(rows) // 2
    groups = [(row,) for row in rows] if kind.startswith("row") else list(zip(rows[:half], rows[half:], strict=True))
    counting = [group for group in groups if all(row.m for row in group)]
    if kind in ("row", "pair"):
        losses = [formula(*group, **given) for group in counting]
    else:
        losses = formula([group[0] for group in counting] if kind == "rows" else counting, **given)
    values = iter(losses)
    return [next(values) if all(row.m for row in g) else g[0].S * 0 for g in groups], len(counting)


def _sum(terms, rows, shared):
    """Formulas of rows see the chosen ones of the pairs that count, if there is a formula of pairs beside them."""
    of_pairs = [FORMULAS[base.name_of(objective)][0].startswith("pair") for _, objective in terms]
    total, count = [], 0
    for (weight, objective), paired in zip(terms, of_pairs, strict=True):
        own = rows
        if any(of_pairs) and not paired:
            own = rows[: len(rows) // 2]
            for chosen, rejected in zip(own, rows[len(own) :], strict=True):
                chosen.m = chosen.m if rejected.m else 0
        values, count = evaluate(objective, own, shared)
        values = [weight * value for value in values]
        total = values if not total else [a + b for a, b in zip(total, values, strict=True)]
    return total, count
