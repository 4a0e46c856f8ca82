"""Mutants that survive and may: (path, line before, line after) -> why no test can, or need, tell them apart."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
