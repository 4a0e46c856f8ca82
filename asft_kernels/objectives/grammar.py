"""What the name of an objective says: "dpo", "dpo(beta=0.2)", "dpo(beta=0.2) + 0.005 sft".

sum    term, or several joined by +
term   NAME, or NAME(PARAMETER=VALUE, ...), with a weight before it or not: 0.005 sft, 0.005 * sft
VALUE  a number, a tuple, a string, None, True or False (in small letters, too); any other word is a string
"""

import ast
import re
from typing import Any, NamedTuple

NUMBER, NAME = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", r"[A-Za-z_]\w*"
TERM = re.compile(rf"(?:({NUMBER})\s*\*?\s*)?({NAME})\s*(?:\((.*)\))?", re.DOTALL)
MISTAKES = (  # what a term may be that is none
    (r"", "nothing beside a +, need a name on both sides of it"),
    (rf"{NUMBER}\s*\*?", "a weight without a name, need the name behind it"),
    (rf"({NUMBER}\s*\*?\s*)?{NAME}\s*(\(.*\))?\s+{NUMBER}\s*\*?\s*{NAME}.*", "two terms, need a + between them"),
    (rf"{NAME}\s*(\(.*\))?\s*\*?\s*{NUMBER}", "a weight behind its name, need it before the name, as in '0.005 sft'"),
    (rf"({NUMBER}\s*\*?\s*)?{NAME}\s*(\(.*\))?[\s,;]+{NAME}.*", "two names, need a + between terms"),
    (rf"{NUMBER}\s*\*?\s*\(.*\)", "a weight before parentheses, need it before each name"),
    (r"[\d.].*", "a weight that is no number, need one such as 0.005 before the name"),
    (r".*", "need 'name' or 'weight name', its parameters behind it as in 'name(parameter=value, ...)'"),
)


class Term(NamedTuple):
    weight: float | None  # None: none is written
    name: str
    parameters: dict[str, Any]


def is_plain(text: str) -> bool:
    """Whether a text is one word and nothing else."""
    return re.fullmatch(r"([^\W\d][\w-]*)?", text.strip()) is not None


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
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # literal_eval's on odd texts
        return text


def _parts(text: str) -> list[str]:
    """The text between those + that stand outside of brackets, but for that of 1e+3."""
    parts, depth = [""], 0
    for at, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            raise ValueError(f"objective: got {text!r}, where a ) closes nothing, need a ( for it")
        if depth or letter not in "+-" or re.search(r"[\d.][eE]$", text[:at]):
            parts[-1] += letter
        elif letter == "+":
            parts.append("")
        else:
            what = "subtracts a term" if parts[-1].strip() else "has a negative weight"
            raise ValueError(f"objective: got {text!r}, which {what}, need terms joined by +, weights of at least 0")
    if depth:
        raise ValueError(f"objective: got {text!r}, where a ( is not closed, need a ) for it")
    return parts


def _term(text: str) -> Term:
    text = text.strip()
    match = TERM.fullmatch(text)
    if match is None:
        what = next(what for mistake, what in MISTAKES if re.fullmatch(mistake, text, re.DOTALL))
        raise ValueError(f"objective: got the term {text!r}, {what}")
    return Term(None if match[1] is None else float(match[1]), match[2], _parameters(text, match[3] or ""))


def _parameters(term: str, inside: str) -> dict[str, Any]:
    """Those between the parentheses of a term."""
    source = f"f({inside})"
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _not_parameters(term, f"parameters that cannot be read ({getattr(error, 'msg', error)})") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise _not_parameters(term, "more behind its parameters")
    for value in (*call.args, *(x.value for x in call.keywords if x.arg is None)):
        raise _not_parameters(term, f"{ast.get_source_segment(source, value)!r} without a parameter's name")
    given = {}
    for name, value in ((x.arg, ast.get_source_segment(source, x.value)) for x in call.keywords):
        if name in given:
            raise ValueError(f"objective: got the term {term!r}, {name!r} twice, need each parameter once")
        given[name] = literal(value or "")
    return given


def _not_parameters(term: str, what: str) -> ValueError:
    return ValueError(
        f"objective: got the term {term!r}, {what}, need 'name(parameter=value, ...)', a value of several "
        "words in quotes"
    )
