"""JSON lines, JSON arrays, Parquet and Arrow, read row by row; what is wrong with a row is kept, not raised."""

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asft_kernels.data import limits
from asft_kernels.data.stored import ARRAY, BY_FIRST_BYTES, SAVED_FOLDER, BadRow, Kind, open_text, too_large
from asft_kernels.errors import INSTALL, InputError

OTHER_KINDS = {  # what else data often comes as, by its first bytes
    b"PK\x03\x04": "a ZIP archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
}
KINDS = "JSON lines or a JSON array (plain or gzipped), Parquet or Arrow, or a folder that datasets saved"
CSV_HEADER = re.compile(rb'["\w ]+([,;\t]["\w ]+)+')  # of a first line: names of columns
PEEKED = 512  # bytes of text in which a file of another kind shows
Stored = bytes | dict[str, Any] | BadRow


def read_rows(path: str | Path, argument: str = "data") -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yields (number from 1, the row or what is wrong with it) for every row that `RowFile` reads."""
    for number, stored in RowFile(path, argument):
        yield number, parse_row(stored)


class RowFile:
    """Reads the rows of a file as they are stored: (number from 1, a line's bytes or the dict of a stored row).

    A few rows are in memory at a time, of a JSON array the text; `limits` says how large they may be: a larger row is a
    BadRow, read over, and a file of nothing else is refused. An empty line is a row of no bytes, except at the very
    end of the file. Arrow cannot tell a missing key from a null: both are missing, inside of rows too.

    Args:
        path: JSON lines or a JSON array, plain or gzipped; Parquet; Arrow, as a file or as a stream; or a folder of
            `datasets.Dataset.save_to_disk`. What a file is stands in its first bytes, not in its name.
        argument: what messages call the path.

    Raises:
        InputError: the file cannot be read, or is of another kind.
    """

    def __init__(self, path: str | Path, argument: str = "data"):
        self.path, self.argument = Path(path), argument
        self.number = 0  # of the last row that was read
        self.position = 0  # how far of `size`
        self._kind: Kind | None = None  # lines, as long as nothing else is known
        self._kind = self._found_kind()

    @property
    def numbered(self) -> str:
        """What the numbers count: "row" or "line"."""
        return "row" if self._kind else "line"

    @property
    def size(self) -> int:
        """Of the whole: rows, or bytes of JSON lines."""
        with self._reading():
            return self._kind.count(self.path) if self._kind else self.path.stat().st_size

    def __iter__(self) -> Iterator[tuple[int, Stored]]:
        with self._reading():
            yield from self._stored_rows(self._kind) if self._kind else self._lines()

    def _found_kind(self) -> Kind | None:
        """None: JSON lines, which have no mark."""
        if self.path.is_dir():
            self._check_folder()
            return SAVED_FOLDER
        if not self.path.is_file():
            raise self._wrong(f"got {str(self.path)!r}, no such file; need a file of {KINDS}")
        with self._reading():
            with self.path.open("rb") as file:
                start = file.read(6)
            for magic, kind in OTHER_KINDS.items():
                if start.startswith(magic):
                    raise self._wrong(f"{self.path} is {kind}; need a file of {KINDS}")
            for magic, kind in BY_FIRST_BYTES.items():
                if start.startswith(magic):
                    return kind
            with open_text(self.path) as (file, _):
                text = file.peek(PEEKED)
        if b"\0" in text[:PEEKED]:
            raise self._wrong(f"{self.path} is a binary file or UTF-16; need a file of {KINDS}")
        text = text.removeprefix(b"\xef\xbb\xbf").lstrip()
        if CSV_HEADER.fullmatch(text.partition(b"\n")[0].strip()):
            raise self._wrong(
                f"{self.path} is CSV; need a file of {KINDS}; datasets.Dataset.from_csv({str(self.path)!r})"
                ".to_json('pairs.jsonl') writes one"
            )
        return ARRAY if text.startswith(b"[") else None

    def _check_folder(self) -> None:
        if (self.path / "dataset_dict.json").is_file():
            splits = ", ".join(sorted(part.name for part in self.path.iterdir() if part.is_dir()))
            raise self._wrong(f"{self.path} holds the splits {splits}; name the folder of one of them")
        if not (self.path / "state.json").is_file():
            raise self._wrong(f"got {str(self.path)!r}, is a folder that datasets did not save; need a file of {KINDS}")

    def _lines(self) -> Iterator[tuple[int, Stored]]:
        empty = 0  # lines just before
        with open_text(self.path) as (file, raw):
            for self.number, line in enumerate(_bounded(file, raw), start=1):
                if isinstance(line, bytes) and not line.strip():
                    empty += 1
                    if empty > limits.BAD_ROWS:
                        raise limits.TooLarge(f"more than {limits.BAD_ROWS:,} empty lines up to line {self.number}")
                    continue
                yield from ((number, b"") for number in range(self.number - empty, self.number))
                empty, self.position = 0, raw.tell()
                yield self.number, line

    def _stored_rows(self, kind: Kind) -> Iterator[tuple[int, Stored]]:
        for row in kind.rows(self.path):
            self.number += 1
            self.position = self.number
            yield self.number, row if isinstance(row, dict | BadRow) else json.dumps(row).encode()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What goes wrong inside becomes an InputError."""
        try:
            yield
        except InputError:
            raise
        except limits.TooLarge as error:
            raise self._wrong(f"{self.path}: {error}") from error
        except ImportError as error:
            raise self._wrong(f"{self.path} needs {error.name}: {INSTALL}") from error
        # pyarrow's are among these; RecursionError: JSON nested too deep
        except (OSError, EOFError, zlib.error, ValueError, NotImplementedError, RecursionError) as error:
            raise self._wrong(
                f"{self.path} cannot be read beyond {self.numbered} {self.number} ({error}); is the copy complete?"
            ) from error

    def _wrong(self, text: str) -> InputError:
        return InputError(f"{self.argument}: {text}")


def _bounded(file: Any, raw: Any) -> Iterator[bytes | BadRow]:
    """Lines of a file of bytes; one over the limit is read over, a part at a time."""
    read, zipped = 0, file is not raw
    while line := file.readline(limits.ROW_BYTES + 1):
        part, size = line, len(line)
        while len(part) > limits.ROW_BYTES and not part.endswith(b"\n"):
            part = file.readline(limits.ROW_BYTES + 1)
            size += len(part)
            if size > limits.LINE_BYTES:
                raise limits.TooLarge(f"a line of more than {limits.LINE_BYTES:,} bytes; need one row a line")
            if zipped:
                limits.require_ratio(read + size, raw.tell())
        read += size
        if zipped:
            limits.require_ratio(read, raw.tell())
        yield too_large(size) if size - line.endswith(b"\n") > limits.ROW_BYTES else line


def parse_row(stored: Stored) -> dict[str, Any] | BadRow:
    """Returns a row of `RowFile`, or what is wrong with it."""
    if isinstance(stored, dict | BadRow):
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
