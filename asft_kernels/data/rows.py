"""JSON lines, Parquet and Arrow, read row by row; what is wrong with a row is kept, not raised."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC, ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
KINDS = "JSON lines (plain or gzipped), Parquet or Arrow, or a folder that datasets saved"
ROWS_AT_ONCE = 64  # of Parquet and Arrow, as Python objects
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
    """What became of each row of one file. Line numbers (of Parquet and Arrow: rows) count from 1."""

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
            text.append(f"  left out, {kind}: {len(lines)} ({line_numbers(lines)})")
        if self.truncated:
            lines = line_numbers(self.truncated)
            text.append(f"  kept, answer cut at max_length {self.max_length}: {len(self.truncated)} ({lines})")
        return "\n".join(text)


def line_numbers(numbers: list[int]) -> str:
    """As a message names them: "line 3", "lines 1, 2 and 7 more"."""
    shown = ", ".join(map(str, numbers[:LINES_SHOWN]))
    more = len(numbers) - LINES_SHOWN
    return f"line{'s' * (len(numbers) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line number from 1, the row or what is wrong with it), for every line of the file.

    path: JSON lines, plain or gzipped; Parquet; Arrow, as a file or as a stream; or a folder of
    `datasets.Dataset.save_to_disk`. What a file is stands in its first bytes, not in its name. A few
    rows are in memory at a time. Arrow cannot tell a missing key from a null: both are missing.

    Empty lines count as bad rows, except at the very end of the file. Raises DataError where the
    file itself cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        yield from _arrow_rows(path, _saved_tables(path))
        return
    if not path.is_file():
        raise DataError(f"data: got {str(path)!r}, no such file; need a file of {KINDS}")
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(PARQUET_MAGIC):
        yield from _arrow_rows(path, _parquet_batches(path))
    elif start.startswith((ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC)):
        yield from _arrow_rows(path, _arrow_batches(path, stream=start.startswith(ARROW_STREAM_MAGIC)))
    else:
        yield from _json_rows(path, zipped=start.startswith(GZIP_MAGIC))


def _json_rows(path: Path, *, zipped: bool) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
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


def _arrow_rows(path: Path, tables: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of Arrow tables or record batches."""
    number = 0
    try:
        for table in tables:
            for start in range(0, table.num_rows, ROWS_AT_ONCE):
                for row in table.slice(start, ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f'data: {path} needs {error.name}: pip install "asft_kernels[train]"') from error
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        raise DataError(f"data: {path} cannot be read beyond row {number} ({error}); is the copy complete?") from error


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    # Without a buffer size a whole row group, often the whole file, is read at once.
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=ROWS_AT_ONCE)


def _arrow_batches(path: Path, *, stream: bool) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if stream:
            yield from pyarrow.ipc.open_stream(file)
        else:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _saved_tables(path: Path) -> Iterator[Any]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(part.name for part in path.iterdir() if part.is_dir()))
        raise DataError(f"data: {path} holds the splits {splits}; name the folder of one of them")
    if not (path / "state.json").is_file():
        raise DataError(f"data: got {str(path)!r}, is a folder that datasets did not save; need a file of {KINDS}")
    from datasets import Dataset

    yield from Dataset.load_from_disk(path).with_format("arrow").iter(ROWS_AT_ONCE)


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
