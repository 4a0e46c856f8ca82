"""JSON lines, plain or gzipped, read row by row; what is wrong with a row is kept, not raised."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GZIP_MAGIC = b"\x1f\x8b"
LINES_SHOWN = 8  # line numbers that a summary spells out for each kind of problem


class DataError(ValueError):
    """A data file that cannot be used; the text says which, why, and what to do."""


class BadRow(ValueError):
    """One unusable row. `kind` is what the summary counts; `detail` is for this row's message."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


@dataclass
class DataReport:
    """What became of each row of one file. Line numbers count from 1, as an editor shows them."""

    source: str
    rows: int = 0
    kept: int = 0
    bad: dict[str, list[int]] = field(default_factory=dict)  # kind of problem -> line numbers
    first_bad: str = ""  # the first bad row's own message
    truncated: list[int] = field(default_factory=list)  # lines with an answer cut at max_length
    max_length: int = 0

    @property
    def left_out(self) -> int:
        return sum(map(len, self.bad.values()))

    def add_bad(self, line: int, problem: BadRow) -> None:
        self.bad.setdefault(problem.kind, []).append(line)
        self.first_bad = self.first_bad or f"line {line}: {problem}"

    def __str__(self) -> str:
        text = [f"{self.source}: {self.rows} rows, {self.kept} kept, {self.left_out} left out"]
        for kind, lines in sorted(self.bad.items(), key=lambda item: -len(item[1])):
            text.append(f"  left out, {kind}: {len(lines)} ({_lines(lines)})")
        if self.truncated:
            lines = _lines(self.truncated)
            text.append(f"  kept, answer cut at max_length {self.max_length}: {len(self.truncated)} ({lines})")
        return "\n".join(text)


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:LINES_SHOWN]))
    more = len(numbers) - LINES_SHOWN
    return f"line{'s' * (len(numbers) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line number from 1, the row's JSON object or what is wrong with it), for every line.

    Empty lines count as bad rows, except at the very end of the file.

    Whether the file is gzipped is read from its first bytes, not from its name. Raises DataError
    where the file itself cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(f"data: got {str(path)!r}, {what}; need a file of JSON lines, plain or gzipped")
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP_MAGIC
    number, empty = 0, 0  # the line's, and how many empty ones came just before it
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    empty += 1
                    continue
                for before in range(number - empty, number):
                    yield before, BadRow("empty line")
                empty = 0
                yield number, _row(line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data: {path} cannot be read beyond line {number} ({error}); is the copy complete?") from error


def _row(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        return BadRow("unreadable JSON", str(error))
    if not isinstance(row, dict):
        return BadRow("not a JSON object", f"got {json_type(row)}")
    return row


def json_type(value: object) -> str:
    """What JSON calls the type of a parsed value."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
    }
    return names.get(type(value), "an object" if isinstance(value, dict) else "a list")
