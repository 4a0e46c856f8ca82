"""Rows as a report reads them from a file."""

import argparse
import json
from contextlib import suppress
from pathlib import Path

from benchmarks.tables import SHAPE, Row


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, each with the file's name and its run; of what a run has twice, the last.

    run: when the invocation began that measured it; None in old rows, which count as one run a commit.
    """
    rows = {}
    for line in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):  # a run that was ended may leave half a line
            row = json.loads(line)
            if not (isinstance(row, dict) and {"kind", "set", "contestant", "about"} <= row.keys()):
                continue
            fields = [row.get(f) for f in ("kind", "set", "case", "inputs", "work", "contestant", *SHAPE)]
            about = [row["about"].get(f) for f in ("commit", "machine", "started")]
            rows[(*fields, *about)] = row | {"file": path.name, "run": about[-1]}
    return list(rows.values())


def is_smoke(row: Row) -> bool:
    """Of tiny shapes, which only show that everything works."""
    return row["set"] == "smoke"


def row_file(name: str) -> Path:
    """Of argparse: a file that holds rows."""
    path = Path(name)
    if not path.is_file() or not read_rows(path):
        wrong = "holds no row of a benchmark" if path.is_file() else "no such file"
        raise argparse.ArgumentTypeError(
            f"{name}: {wrong}; need a file that benchmarks.run or benchmarks.accuracy wrote (DATE-DEVICE.jsonl)"
        )
    return path
