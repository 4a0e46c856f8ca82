"""What became of each row of a data set, in words."""

from dataclasses import dataclass, field

from asft_kernels.data.rows import BadRow

LINES_SHOWN = 8  # line numbers that a summary spells out for each kind of problem


@dataclass
class DataReport:
    """Counts every row of a data set by what became of it. Lines (of Parquet, Arrow and arrays: rows) count from 1.

    Args:
        source: the files, with the lines of each where there are several, or the hub name.
        rows: rows read. kept: rows returned.
        bad: kind of problem -> lines left out for it.
        notes: what is worth a look -> lines kept nevertheless.
        first_bad: the first line left out, with its own message.
        images: rows kept that have some.
    """

    source: str
    rows: int = 0
    kept: int = 0
    bad: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    first_bad: str = ""
    images: int = 0

    @property
    def left_out(self) -> int:
        return sum(map(len, self.bad.values()))

    def add_bad(self, line: int, problem: BadRow) -> None:
        self.bad.setdefault(problem.kind, []).append(line)
        self.first_bad = self.first_bad or f"line {line}: {problem}"

    def note(self, line: int, what: str) -> None:
        self.notes.setdefault(what, []).append(line)

    def __str__(self) -> str:
        with_images = f", {self.images} of them with images" if self.images else ""
        text = [f"{self.source}: {self.rows} rows, {self.kept} kept{with_images}, {self.left_out} left out"]
        for what, tallies in (("left out", self.bad), ("kept", self.notes)):
            for kind, lines in sorted(tallies.items(), key=lambda item: -len(item[1])):
                text.append(f"  {what}, {kind}: {len(lines)} ({line_numbers(lines)})")
        return "\n".join(text)


def line_numbers(numbers: list[int]) -> str:
    """As a message names them: "line 3", "lines 1, 2 and 7 more"."""
    shown = ", ".join(map(str, numbers[:LINES_SHOWN]))
    more = len(numbers) - LINES_SHOWN
    return f"line{'s' * (len(numbers) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")
