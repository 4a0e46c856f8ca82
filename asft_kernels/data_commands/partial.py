"""The output of an unfinished run, and how far it has come.

OUT.partial grows and becomes OUT at the end. Beside it OUT.state says how far input and OUT.partial
go together: lines read, a digest of them, bytes written, and the counts. A run that finds the two cuts
OUT.partial back to those bytes and goes on with the next line, if the options are the same and so
is every line read before: later lines may have been mended.
"""

import gzip
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asft_kernels.data import DataError
from asft_kernels.data_commands.report import Report

COMMIT_BYTES = 1 << 20  # of output held back at most, before OUT.partial and OUT.state are brought together
COMMIT_SECONDS = 1.0  # and after this time at the next batch

Row = dict[str, Any]


@dataclass
class State:
    """How far input and OUT.partial go together."""

    settings: Row
    report: Report
    line: int = 0
    digest: str = ""  # of the lines up to that one
    size: int = 0  # bytes of OUT.partial


class Partial:
    """OUT.partial and OUT.state. A gzipped output is a chain of gzip members, one for each commit."""

    def __init__(self, output: Path, settings: Row, source: Path):
        self.output, self.source = output, source
        self.path = output.with_name(output.name + ".partial")
        self.state_path = output.with_name(output.name + ".state")
        self.settings = json.loads(json.dumps(settings))  # as they come back from the file
        self.pending, self.digest, self.committed = bytearray(), hashlib.blake2b(), time.monotonic()
        self.state = self._found() or State(self.settings, Report(str(source)))
        self.report = self.state.report

    def _found(self) -> State | None:
        if not self.state_path.is_file() or not self.path.is_file():
            return None
        try:
            fields = json.loads(self.state_path.read_text())
            state = State(**{**fields, "report": Report(**fields["report"])})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"output: {self.state_path} cannot be read ({error}); {self._anew}") from error
        if state.settings != self.settings:
            names = [name for name in self.settings if state.settings.get(name) != self.settings[name]]
            was, now = ({name: of.get(name) for name in names} for of in (state.settings, self.settings))
            raise DataError(f"output: {self.path} was begun with {was}, and now it is {now}; {self._anew}")
        if self.path.stat().st_size < state.size:
            raise DataError(f"output: {self.path} is shorter than the {state.size} bytes written; {self._anew}")
        print(f"goes on after line {state.line} of {state.report.source}")
        return state

    @property
    def _anew(self) -> str:
        return f"remove {self.path} to start anew, or name another output"

    def __enter__(self) -> "Partial":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("r+b" if self.state.line else "wb")
        self.file.truncate(self.state.size)
        self.file.seek(self.state.size)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def new_lines(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """`lines` without those done before. Raises DataError if these are not the lines that were done."""
        number, done = 0, self.state.line
        other = DataError(f"output: {self.path} was begun from another input than {self.source}; {self._anew}")
        for number, line in lines:
            self.digest.update(line.rstrip() + b"\n")
            if number == done and self.digest.hexdigest() != self.state.digest:
                raise other
            if number > done:
                yield number, line
        if number < done:
            raise other

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            # Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it.
            self.pending += json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self.report.written += len(rows)

    def batch_done(self, line: int) -> None:
        """Every line up to `line` is converted."""
        self.state.line = line
        if len(self.pending) >= COMMIT_BYTES or time.monotonic() - self.committed >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        self._flush()
        self.state.size, self.state.digest = self.file.tell(), self.digest.hexdigest()
        beside = self.state_path.with_name(self.state_path.name + ".new")
        beside.write_text(json.dumps(asdict(self.state)))
        beside.replace(self.state_path)
        self.committed = time.monotonic()

    def _flush(self) -> None:
        if self.pending:
            self.file.write(gzip.compress(self.pending, mtime=0) if self.output.suffix == ".gz" else self.pending)
            self.file.flush()
            self.pending.clear()

    def finish(self) -> None:
        """OUT.partial becomes OUT."""
        if not self.report.written:
            first = f"; first bad row: {self.report.first_bad}" if self.report.first_bad else ""
            raise DataError(f"input: no row of {self.source} gave a row to write{first}\n{self.report}")
        self._flush()
        self.file.close()
        self.path.replace(self.output)
        self.state_path.unlink(missing_ok=True)
