"""Kinds of files that hold rows and not lines: Parquet, Arrow, folders that datasets saved, JSON arrays."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asft_kernels.data import limits

GZIP_MAGIC = b"\x1f\x8b"
ROWS_AT_ONCE = 64  # of Parquet and Arrow, as Python objects
BLANK = re.compile(r"[ \t\n\r]*")


class BadRow(ValueError):
    """One unusable row. `kind` is what the summary counts; `detail` is for this row's message."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


def too_large(size: int) -> BadRow:
    return BadRow(f"row over {limits.ROW_BYTES:,} bytes", f"{size:,}")


@dataclass(frozen=True)
class Kind:
    """rows: path -> its rows, a JSON value or BadRow each. count: path -> how many, from an index if there is one."""

    rows: Callable[[Path], Iterator[Any]]
    count: Callable[[Path], int]


def _arrow(tables: Callable[[Path], Iterator[Any]], count: Callable[[Path], int]) -> Kind:
    def rows(path: Path) -> Iterator[dict[str, Any] | BadRow]:
        for table in tables(path):
            for start in range(0, table.num_rows, ROWS_AT_ONCE):
                part = table.slice(start, ROWS_AT_ONCE)
                if part.nbytes <= limits.ROW_BYTES:
                    yield from map(without_nulls, part.to_pylist())
                    continue
                for row in (part.slice(index, 1) for index in range(part.num_rows)):
                    size = row.nbytes
                    yield too_large(size) if size > limits.ROW_BYTES else without_nulls(row.to_pylist()[0])

    return Kind(rows, count)


def without_nulls(value: Any) -> Any:
    """Arrow cannot tell a missing key from a null: both are missing, inside of rows too."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _parquet_batches(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    # Without a buffer size a whole row group, often the whole file, is read at once.
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
        limits.require_ratio(sum(group.total_byte_size for group in groups), path.stat().st_size)
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


@contextmanager
def open_text(path: Path) -> Iterator[tuple[Any, Any]]:
    """Gives (the bytes of a text file, gzipped or not; the file as it lies on the disk)."""
    with path.open("rb") as raw:
        zipped = raw.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
        yield (gzip.GzipFile(fileobj=raw) if zipped else raw), raw


def _array(path: Path) -> Iterator[Any]:
    """The text as a whole, as JSON has no marks between rows; the rows one by one."""
    with open_text(path) as (file, _):
        size = path.stat().st_size
        most = min(limits.ARRAY_BYTES, max(limits.GZIP_BYTES, limits.GZIP_TIMES * size))
        content = file.read((most if isinstance(file, gzip.GzipFile) else limits.ARRAY_BYTES) + 1)
    if len(content) > limits.ARRAY_BYTES:
        raise limits.TooLarge(f"a JSON array of more than {limits.ARRAY_BYTES:,} bytes; need one row a line")
    limits.require_ratio(len(content), size)
    text = content.decode("utf-8-sig")
    del content
    decode = json.JSONDecoder().raw_decode
    end = _after_blank(text, _after_blank(text, 0) + 1)
    if text[end : end + 1] != "]":
        while True:
            start = end
            row, end = decode(text, start)
            yield too_large(end - start) if end - start > limits.ROW_BYTES else row
            end = _after_blank(text, end)
            if text[end : end + 1] == "]":
                break
            if text[end : end + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            end = _after_blank(text, end + 1)
    if _after_blank(text, end + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, end + 1)


def _after_blank(text: str, start: int) -> int:
    found = BLANK.match(text, start)
    return found.end() if found else start


ARRAY = Kind(_array, lambda path: sum(1 for _ in _array(path)))
SAVED_FOLDER = _arrow(_saved_tables, _saved_count)
BY_FIRST_BYTES = {
    b"PAR1": _arrow(_parquet_batches, _parquet_count),
    b"ARROW1": _arrow(_file_batches, _file_count),
    b"\xff\xff\xff\xff": _arrow(_stream_batches, _stream_count),
}
