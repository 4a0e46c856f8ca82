"""Files that are whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the name of a file beside `path` to write; it takes the place of `path` when the block ends well.

    On the disk before it replaces anything: after a power cut there is the old file or the new one.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
