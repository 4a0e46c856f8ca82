"""JSON lines, Parquet and Arrow, read row by row; what is wrong with a row is kept, not raised."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asft_kernels.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"
OTHER_KINDS = {  # what else data often comes as, by its first bytes
    b"PK\x03\x04": "a ZIP archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
}
KINDS = "JSON lines (plain or gzipped), Parquet or Arrow, or a folder that datasets saved"
ROWS_AT_ONCE = 64  # of Parquet and Arrow, as Python objects
PEEKED = 512  # bytes of text in which a file of another kind shows
LINES_SHOWN = 8  # line numbers that a summary spells out for each kind of problem


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


def read_rows(path: str | Path, argument: str = "data") -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(number from 1, the row or what is wrong with it), for every row that `RowFile` reads; arguments as there."""
    for number, stored in RowFile(path, argument):
        yield number, parse_row(stored)


class RowFile:
    """The rows of a file as they are stored: (number from 1, a line's bytes or the dict of Arrow's row).

    path: JSON lines, plain or gzipped; Parquet; Arrow, as a file or as a stream; or a folder of
        `datasets.Dataset.save_to_disk`. What a file is stands in its first bytes, not in its name.
    argument: what messages call the path.

    A few rows are in memory at a time. An empty line is a row of no bytes, except at the very end of the file.
    Arrow cannot tell a missing key from a null: both are missing, inside of rows too.

    Raises InputError where the file cannot be read, or is of another kind.
    """

    def __init__(self, path: str | Path, argument: str = "data"):
        self.path, self.argument = Path(path), argument
        self.number = 0  # of the last row that was read
        self.position = 0  # how far of `size`
        self._arrow = self._kind()

    @property
    def numbered(self) -> str:
        """What the numbers count: "row" or "line"."""
        return "row" if self._arrow else "line"

    @property
    def size(self) -> int:
        """Of the whole: rows, or bytes of JSON lines."""
        with self._reading():
            return self._arrow.count(self.path) if self._arrow else self.path.stat().st_size

    def __iter__(self) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
        with self._reading():
            yield from self._arrow_rows(self._arrow) if self._arrow else self._lines()

    def _kind(self) -> "ArrowKind | None":
        """None: JSON lines, which have no mark."""
        if self.path.is_dir():
            self._check_folder()
            return SAVED_FOLDER
        if not self.path.is_file():
            raise self._wrong(f"got {str(self.path)!r}, no such file; need a file of {KINDS}")
        with self._reading(), self.path.open("rb") as file:
            start = file.read(6)
        for magic, kind in OTHER_KINDS.items():
            if start.startswith(magic):
                raise self._wrong(f"{self.path} is {kind}; need a file of {KINDS}")
        return next((kind for magic, kind in ARROW_KINDS.items() if start.startswith(magic)), None)

    def _check_folder(self) -> None:
        if (self.path / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(part.name for part in self.path.iterdir() if part.is_dir()))
            raise self._wrong(f"{self.path} holds the splits {splits}; name the folder of one of them")
        if not (self.path / "state.json").is_file():
            raise self._wrong(f"got {str(self.path)!r}, is a folder that datasets did not save; need a file of {KINDS}")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        empty = 0  # lines just before
        with self.path.open("rb") as raw:
            zipped = raw.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
            file: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
            self._check_start(file.peek(PEEKED))
            for self.number, line in enumerate(file, start=1):
                if not line.strip():
                    empty += 1
                    continue
                yield from ((number, b"") for number in range(self.number - empty, self.number))
                empty, self.position = 0, raw.tell()
                yield self.number, line

    def _check_start(self, start: bytes) -> None:
        """Before the first line is read, which may be the whole file."""
        if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise self._wrong(f"{self.path} is one JSON array; need one JSON object a line")
        if b"\0" in start:
            raise self._wrong(f"{self.path} is a binary file or UTF-16; need a file of {KINDS}")

    def _arrow_rows(self, kind: "ArrowKind") -> Iterator[tuple[int, dict[str, Any]]]:
        for table in kind.tables(self.path):
            for start in range(0, table.num_rows, ROWS_AT_ONCE):
                for row in table.slice(start, ROWS_AT_ONCE).to_pylist():
                    self.number += 1
                    self.position = self.number
                    yield self.number, _without_nulls(row)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What goes wrong inside becomes a InputError."""
        try:
            yield
        except InputError:
            raise
        except ImportError as error:
            raise self._wrong(f'{self.path} needs {error.name}: pip install "asft_kernels[train]"') from error
        except (OSError, EOFError, zlib.error, ValueError, NotImplementedError) as error:  # pyarrow's are among these
            raise self._wrong(
                f"{self.path} cannot be read beyond {self.numbered} {self.number} ({error}); is the copy complete?"
            ) from error

    def _wrong(self, text: str) -> InputError:
        return InputError(f"{self.argument}: {text}")


@dataclass(frozen=True)
class ArrowKind:
    """tables: path -> tables or record batches. count: path -> rows of all, from an index where there is one."""

    tables: Callable[[Path], Iterator[Any]]
    count: Callable[[Path], int]


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    # Without a buffer size a whole row group, often the whole file, is read at once.
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=ROWS_AT_ONCE)


def _parquet_count(path: Path) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows


def _file_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _file_count(path: Path) -> int:
    from pyarrow import dataset

    return dataset.dataset(path, format="ipc").count_rows()


def _stream_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        yield from pyarrow.ipc.open_stream(file)


def _stream_count(path: Path) -> int:
    """Batch by batch, as a stream has no index; what is not compressed stays on disk."""
    return sum(batch.num_rows for batch in _stream_batches(path))


def _saved_tables(path: Path) -> Iterator[Any]:
    from datasets import Dataset

    yield from Dataset.load_from_disk(path).with_format("arrow").iter(ROWS_AT_ONCE)


def _saved_count(path: Path) -> int:
    from datasets import Dataset

    return len(Dataset.load_from_disk(path))


SAVED_FOLDER = ArrowKind(_saved_tables, _saved_count)
ARROW_KINDS = {
    b"PAR1": ArrowKind(_parquet_batches, _parquet_count),
    b"ARROW1": ArrowKind(_file_batches, _file_count),
    b"\xff\xff\xff\xff": ArrowKind(_stream_batches, _stream_count),
}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def parse_row(stored: bytes | dict[str, Any]) -> dict[str, Any] | BadRow:
    """A row of `RowFile`, or what is wrong with it."""
    if isinstance(stored, dict):
        return stored
    if not stored:
        return BadRow("empty line")
    try:
        row = json.loads(stored.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        return BadRow("unreadable JSON", str(error))
    if not isinstance(row, dict):
        return BadRow("not a JSON object", f"got {json_type(row)}")
    return row


def json_type(value: object) -> str:
    """What JSON calls the type of a parsed value; of one that JSON lacks (Parquet's bytes, dates), Python's name."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        dict: "an object",
        list: "a list",
    }
    return names.get(type(value), type(value).__name__)
