"""Kinds of files that hold rows and not lines: Parquet, Arrow, folders that datasets saved, JSON arrays."""

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GZIP_MAGIC = b"\x1f\x8b"
ROWS_AT_ONCE = 64  # of Parquet and Arrow, as Python objects


@dataclass(frozen=True)
class Kind:
    """rows: path -> its rows, a JSON value each. count: path -> how many, from an index where there is one."""

    rows: Callable[[Path], Iterator[Any]]
    count: Callable[[Path], int]


def _arrow(tables: Callable[[Path], Iterator[Any]], count: Callable[[Path], int]) -> Kind:
    def rows(path: Path) -> Iterator[dict[str, Any]]:
        for table in tables(path):
            for start in range(0, table.num_rows, ROWS_AT_ONCE):
                yield from map(without_nulls, table.slice(start, ROWS_AT_ONCE).to_pylist())

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


def _array(path: Path) -> list[Any]:
    """All of it at once: JSON has no marks between rows."""
    with open_text(path) as (file, _):
        return json.loads(file.read().decode("utf-8-sig"))


ARRAY = Kind(lambda path: iter(_array(path)), lambda path: len(_array(path)))
SAVED_FOLDER = _arrow(_saved_tables, _saved_count)
BY_FIRST_BYTES = {
    b"PAR1": _arrow(_parquet_batches, _parquet_count),
    b"ARROW1": _arrow(_file_batches, _file_count),
    b"\xff\xff\xff\xff": _arrow(_stream_batches, _stream_count),
}
