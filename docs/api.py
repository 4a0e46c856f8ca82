"""Draws docs/api.md from signatures and docstrings, and README's table of objectives: `--write` writes them."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from asft_kernels.core.options import Keywords, Options
from asft_kernels.core.sequence import Logps
from asft_kernels.objectives import LDDPO, OBJECTIVES, WPO, LossTerms, Objective, WeightedSum

PAGE, README = Path(__file__).with_name("api.md"), Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- objectives: drawn by `python docs/api.py --write` -->\n", "<!-- /objectives -->"
MODULES = {
    "asft_kernels": "The calls",
    "asft_kernels.models": "Models",
    "asft_kernels.training": "Training",
    "asft_kernels.methods.dnpo.noisy_logps": "DNPO",
    "asft_kernels.liger": "Liger's names",
}
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
INTRO = """# API

Every public name, from its docstring (`python docs/api.py --write` draws this page). Shapes: R rows of T positions, of
pairs 2B = R rows (chosen first), M packed positions, N labels that carry loss, D hidden size, V vocabulary.
`asft_kernels.reference` has the same calls in plain torch, for tests and double backward.
"""


def page() -> str:
    parts = [INTRO]
    for module, title in MODULES.items():
        loaded = importlib.import_module(module)
        parts.append(f"## {title}: `{module}`\n")
        parts += [entry(f"{name}", getattr(loaded, name)) for name in loaded.__all__]
        parts += [entry(f"{name}.forward", call) for name, call in forwards(loaded)]
    parts.append(objectives())
    parts.append("### Objectives of your own, and around others\n")
    parts += [entry(x.__name__, x) for x in (Objective, LossTerms, Logps, WeightedSum, LDDPO, WPO)]
    return "\n".join(parts).rstrip() + "\n"


def forwards(module: Any) -> list[tuple[str, Any]]:
    """The forward methods of a module's public classes that say what they take."""
    calls = ((name, vars(getattr(module, name)).get("forward")) for name in module.__all__)
    return [(name, call) for name, call in calls if call is not None and "Args:" in (call.__doc__ or "")]


def entry(name: str, thing: Any) -> str:
    """A name with its signature, and its docstring: arguments as a table, the rest as text."""
    text, sections = split(inspect.getdoc(thing) or "")
    lines = [f"### `{name}`\n"]
    if "Attributes" not in sections and not is_error(thing):
        lines.append(f"```python\n{name}{signature(thing)}\n```\n")
    lines.append(prose(text))
    for title, heading in (("Args", "argument"), ("Attributes", "attribute")):
        if title in sections:
            lines.append(f"| {heading} | meaning |\n| --- | --- |")
            lines += [f"| `{arg}` | {cell(meaning)} |" for arg, meaning in items(sections[title])]
            lines.append("")
    for title in SECTIONS[2:]:
        if title in sections:
            lines.append(f"**{title}** {cell(sections[title])}\n")
    return "\n".join(lines)


def is_error(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


def inherited(thing: Any) -> set[str]:
    """Names of arguments that a class has from one of another library."""
    theirs = [base for base in getattr(thing, "__bases__", ()) if not base.__module__.startswith("asft_kernels")]
    fields = (getattr(base, "__dataclass_fields__", {}) for base in theirs)
    return {name for of_base in fields for name in of_base}


def signature(thing: Any) -> str:
    """Names and defaults without annotations, which the table explains; of the shared keywords each."""
    shown = []
    for p in inspect.signature(thing).parameters.values():
        if p.name in ("self", "unknown", *inherited(thing)):  # unknown: what is refused by name
            continue
        doc = inspect.getdoc(thing) or ""
        if p.kind is p.VAR_KEYWORD and "\n    num_valid:" in doc:
            named = [name for name in Keywords.__annotations__ if f"\n    {name}:" in doc]
            shown += [f"{name}={getattr(Options(), name)!r}" for name in named]
        else:
            shown.append(str(p.replace(annotation=p.empty)))
        if p.kind is p.KEYWORD_ONLY and "*" not in shown and not any(x.startswith("*") for x in shown):
            shown.insert(-1, "*")
    shown = [text.replace("'", '"') for text in shown]  # as `ruff format` has the page's code
    joined = ", ".join(shown)
    return f"({joined})" if len(joined) < 90 else "(\n    " + ",\n    ".join(shown) + ",\n)"


def split(doc: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the sections by title; doctests and what follows a section go to text."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", doc, flags=re.MULTILINE)
    text, sections = parts[0], {}
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = body.splitlines()
        end = next((i for i, line in enumerate(lines) if line and not line.startswith("    ")), len(lines))
        sections[title] = inspect.cleandoc("\n".join(lines[:end]))
        text += "\n\n" + "\n".join(lines[end:])
    return text.strip(), sections


def items(section: str) -> list[tuple[str, str]]:
    """("name", "meaning") of the entries of a section."""
    found = re.split(r"^(\*{0,2}[\w, ]+): ", section, flags=re.MULTILINE)
    return list(zip(found[1::2], found[2::2], strict=True))


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def prose(text: str) -> str:
    """Indented and doctest blocks as code, the rest as it is."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        code = block.startswith(("    ", ">>>")) or all(x.startswith("    ") for x in block.splitlines())
        blocks.append(f"```\n{inspect.cleandoc(block) if code else block}\n```" if code else block)
    return "\n\n".join(blocks) + "\n"


def objectives() -> str:
    lines = ["## Objectives: `asft_kernels.objectives`\n", "| name | parameters | what it is |\n| --- | --- | --- |"]
    for name, make in OBJECTIVES.items():
        given = inspect.signature(make).parameters.values()
        parameters = ", ".join(f"`{p.replace(annotation=p.empty)}`" for p in given)
        first = (inspect.getdoc(make) or "").partition("\n\n")[0]
        lines.append(f"| `{name}` | {parameters or '–'} | {cell(first)} |")
    return "\n".join(lines) + "\n"


def by_need() -> str:
    """Names of all objectives by what they take: pairs or single answers, with a reference model or without."""
    needs: dict[tuple[bool, bool], list[str]] = {}
    for name, make in OBJECTIVES.items():
        needs.setdefault((make.paired, make.needs_reference), []).append(f"`{name}`")
    rows = [
        f"| {'pairs' if paired else 'single answers'} | {'yes' if reference else 'no'} | {', '.join(names)} |\n"
        for (paired, reference), names in sorted(needs.items(), key=lambda x: (not x[0][0], x[0][1]))
    ]
    return "| takes | reference | names |\n| --- | --- | --- |\n" + "".join(rows)


def readme() -> str:
    """README.md with that table between its marks."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{by_need()}{END}{rest.split(END)[1]}"


def main() -> None:
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
        README.write_text(readme())
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
