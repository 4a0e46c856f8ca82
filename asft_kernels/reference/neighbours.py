"""The losses of the papers around ASFT, each from its paper or its authors' code; see `reference.losses`."""

FORMULAS = {}
