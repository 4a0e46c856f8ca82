"""The losses that the field compares with, as TRL 1.16 defines them unless said; see `reference.losses`."""

import inspect


def name_of(objective):
    return objective if isinstance(objective, str) else type(objective).__name__.lower()


def parameters_of(formula, objective):
    """What the objective's object says of the formula's parameters; nothing for a name: the formula's defaults."""
    names = inspect.signature(formula).parameters
    return {} if isinstance(objective, str) else {k: getattr(objective, k) for k in names if hasattr(objective, k)}


def sft(rows, normalization="sequence"):
    """Mean negative log-likelihood: of each row, its sum, or shares of the mean over all tokens of the batch."""
    if normalization == "token":
        tokens = sum(row.m for row in rows)
        return [-row.S * len(rows) / tokens for row in rows]
    return [-row.S / (row.m if normalization == "sequence" else 1) for row in rows]


FORMULAS = {"sft": ("rows", sft)}
