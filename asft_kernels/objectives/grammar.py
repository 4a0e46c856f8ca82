"""What the name of an objective says: "dpo", "dpo(beta=0.2)", "dpo(beta=0.2) + 0.005 sft".

sum    term, or several joined by +
term   NAME, or NAME(PARAMETER=VALUE, ...), with a weight before it or not: 0.005 sft, 0.005 * sft
VALUE  a number, a tuple, a string, None, True or False (in small letters, too); any other word is a string
"""

import ast
import re
from typing import Any, NamedTuple

TERM = re.compile(r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*\*?\s*)?([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)


class Term(NamedTuple):
    weight: float | None  # None: none is written
    name: str
    parameters: dict[str, Any]


def is_plain(text: str) -> bool:
    """Whether a text is one name and nothing else."""
    return re.fullmatch(r"\s*[\d.].*|.*[+(*].*", text, re.DOTALL) is None


def read_terms(text: str) -> list[Term]:
    """Reads a sum.

    Raises:
        ValueError: a term is none of the above.
    """
    return [_term(part) for part in _parts(text)]


def literal(text: str) -> Any:
    """Reads a VALUE."""
    if text.lower() in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _parts(text: str) -> list[str]:
    """The text between those + that stand outside of parentheses, but for that of 1e+3."""
    parts, depth = [""], 0
    for at, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "+" and depth == 0 and not re.search(r"[\d.]e$", text[:at]):
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _term(text: str) -> Term:
    match = TERM.fullmatch(text)
    parameters = match and _parameters(match[3] or "")
    if match is None or parameters is None:
        raise ValueError(
            f"objective: got the term {text.strip()!r}, need 'name' or 'weight name', its parameters behind it as in "
            "'name(parameter=value, ...)'"
        )
    return Term(None if match[1] is None else float(match[1]), match[2], parameters)


def _parameters(inside: str) -> dict[str, Any] | None:
    """Those between the parentheses; None where they are not NAME=VALUE, each name once."""
    source = f"f({inside})"
    try:
        call = ast.parse(source, mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        return None
    given = {x.arg: literal(ast.get_source_segment(source, x.value) or "") for x in call.keywords if x.arg}
    return given if len(given) == len(call.keywords) else None
