"""The licences in docs/trust.md: of torch, triton and the train extra, with all that they need.

python -m tests.licences            prints the table
python -m tests.licences --write    writes it into docs/trust.md
"""

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).parents[1] / "docs" / "trust.md"
START, END = "<!-- licences -->", "<!-- end -->"
PACKAGE, EXTRA = "asft_kernels", "train"


def needed(name: str, extra: str, found: dict[str, str]) -> dict[str, str]:
    """Package -> its licence, of an installed package and all that it needs here."""
    try:
        about = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return found
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return found
    found[key] = licence(about.metadata)
    for text in about.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            needed(requirement.name, "", found)
    return found


def licence(about: metadata.PackageMetadata) -> str:
    """The SPDX expression, else the classifiers, else the first line of what stands there."""
    if "License-Expression" in about:
        return about["License-Expression"]
    classified = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or [] if "License" in text]
    stated = next(iter(about.get_all("License") or []), "").strip()
    return ", ".join(classified) or (stated.splitlines()[0] if stated else "not stated in its metadata")


def page() -> str:
    found = needed(PACKAGE, EXTRA, {})
    by_licence: dict[str, list[str]] = {}
    for name, text in found.items():
        by_licence.setdefault(text, []).append(name)
    lines = ["", "| licence | packages |", "| --- | --- |"]
    lines += [f"| {text} | {', '.join(sorted(names))} |" for text, names in sorted(by_licence.items())]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    table = page()
    print(table)
    if "--write" in argv:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(before + START + table + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
