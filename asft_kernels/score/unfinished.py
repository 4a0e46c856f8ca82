"""The rows that a run has scored so far, on disk after each batch: a killed run loses one batch at most."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from asft_kernels.errors import InputError


class UnfinishedScores:
    """JSON lines: first the metadata, then a row a pair. What a killed run left half written is dropped.

    rows: line of the data -> row, those of an earlier run included.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] | None = None  # of an earlier run
        self.rows: dict[int, dict[str, Any]] = {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        complete = 0
        with self.path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                complete += len(text)
                try:
                    if self.metadata is None:
                        self.metadata = dict(json.loads(text))
                    else:
                        self._keep(json.loads(text))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    raise InputError(
                        f"--output_dir: {self.path} is damaged ({type(error).__name__}: {error}); delete that file"
                    ) from error
        with self.path.open("rb+") as file:
            file.truncate(complete)

    def start(self, metadata: dict[str, Any]) -> None:
        """Writes the metadata of a first run."""
        if self.metadata is None:
            self.metadata = metadata
            self.path.write_text(json.dumps(metadata) + "\n")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        rows = list(rows)
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self._keep(row)

    def _keep(self, row: dict[str, Any]) -> None:
        # Lists of Python numbers would take eight times the memory.
        self.rows[row["line"]] = {
            name: np.asarray(value, np.float32) if isinstance(value, list) else value for name, value in row.items()
        }
