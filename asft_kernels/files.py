"""Files that are whole or not there."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes hashed at once


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the name of a file beside `path` to write; it takes the place of `path` when the block ends well.

    On the disk before it replaces anything: after a power cut there is the old file or the new one. What a block that
    fails has written goes, so that a full disk does not stay full of it.
    """
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync(path: str | os.PathLike[str]) -> None:
    """Returns when what was written to a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 (hex) of a file's bytes, a block of them in memory at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
