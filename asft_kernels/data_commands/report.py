"""What became of each row of a stream, in memory that does not grow with the number of rows."""

from dataclasses import dataclass, field
from typing import Any

from asft_kernels.data.report import LINES_SHOWN
from asft_kernels.data.rows import BadRow

Tally = dict[str, Any]  # {"count": how many, "lines": the first line numbers, one more than are shown}


@dataclass
class Report:
    """Counts by kind, with the first numbers (from 1) of lines or rows. All of it is JSON."""

    source: str
    numbered: str = "line"  # or "row": what `RowFile.numbered` says
    rows: int = 0
    written: int = 0
    bad: dict[str, Tally] = field(default_factory=dict)  # rows that cannot be used
    first_bad: str = ""  # the first bad row's own message
    notes: dict[str, Tally] = field(default_factory=dict)  # what the method itself leaves out or changes

    def add_bad(self, line: int, problem: BadRow) -> None:
        _add(self.bad, problem.kind, line, 1)
        self.first_bad = self.first_bad or f"{self.numbered} {line}: {problem}"

    def note(self, line: int, what: str, count: int = 1) -> None:
        """`count` times `what` in this row; nothing for 0."""
        if count:
            _add(self.notes, what, line, count)

    def __str__(self) -> str:
        bad = sum(tally["count"] for tally in self.bad.values())
        text = [f"{self.source}: {self.rows} rows, {bad} bad; {self.written} rows written"]
        text += [f"  bad, {kind}: {self._shown(tally)}" for kind, tally in _largest_first(self.bad)]
        text += [f"  {what}: {self._shown(tally)}" for what, tally in _largest_first(self.notes)]
        return "\n".join(text)

    def _shown(self, tally: Tally) -> str:
        lines = tally["lines"]
        more = ", ..." if len(lines) > LINES_SHOWN else ""
        named = f"{self.numbered}{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:LINES_SHOWN]))}"
        return f"{tally['count']} ({named}{more})"


def _add(tallies: dict[str, Tally], kind: str, line: int, count: int) -> None:
    tally = tallies.setdefault(kind, {"count": 0, "lines": []})
    tally["count"] += count
    if len(tally["lines"]) <= LINES_SHOWN and line not in tally["lines"]:
        tally["lines"].append(line)


def _largest_first(tallies: dict[str, Tally]) -> list[tuple[str, Tally]]:
    return sorted(tallies.items(), key=lambda item: -item[1]["count"])
