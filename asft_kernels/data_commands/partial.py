"""The output of an unfinished run, and how far it has come.

OUT.partial grows and becomes OUT at the end. Beside it OUT.state says how far input and OUT.partial
go together: rows read, a digest of them, bytes written, and the counts. A run that finds the two cuts
OUT.partial back to those bytes and goes on with the next row, if the options are the same and so
is every row read before: later ones may have been mended.
"""

import gzip
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from datetime import time as clock_time
from pathlib import Path
from typing import Any

from asft_kernels.data import BadRow
from asft_kernels.data.rows import RowFile, Stored
from asft_kernels.data_commands.report import Report
from asft_kernels.errors import InputError
from asft_kernels.files import replacing, sync

COMMIT_BYTES = 1 << 20  # of output held back at most, before OUT.partial and OUT.state are brought together
COMMIT_SECONDS = 1.0  # and after this time at the next batch

Row = dict[str, Any]


@dataclass
class State:
    """How far input and OUT.partial go together."""

    settings: Row
    report: Report
    line: int = 0  # or row: the number of the last one done
    digest: str = ""  # of all up to that one
    size: int = 0  # bytes of OUT.partial


class Partial:
    """OUT.partial and OUT.state. A gzipped output is a chain of gzip members, one for each commit."""

    def __init__(self, output: Path, settings: Row, source: RowFile):
        self.output, self.source = output, source
        self.path = output.with_name(output.name + ".partial")
        self.state_path = output.with_name(output.name + ".state")
        self.settings = json.loads(json.dumps(settings))  # as they come back from the file
        self.pending, self.digest, self.committed = bytearray(), hashlib.blake2b(), time.monotonic()
        self.state = self._found() or State(self.settings, Report(str(source.path), numbered=source.numbered))
        self.report = self.state.report

    def _found(self) -> State | None:
        if not self.state_path.is_file() or not self.path.is_file():
            return None
        try:
            fields = json.loads(self.state_path.read_text())
            state = State(**{**fields, "report": Report(**fields["report"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"output: {self.state_path} cannot be read ({error}); {self._anew}") from error
        if state.settings != self.settings:
            names = [name for name in self.settings if state.settings.get(name) != self.settings[name]]
            was, now = ({name: of.get(name) for name in names} for of in (state.settings, self.settings))
            raise InputError(f"output: {self.path} was begun with {was}, and now it is {now}; {self._anew}")
        if self.path.stat().st_size < state.size:
            raise InputError(f"output: {self.path} is shorter than the {state.size} bytes written; {self._anew}")
        print(f"goes on after {state.report.numbered} {state.line} of {state.report.source}")
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
        if not (self.state.size or self.state_path.is_file()):  # nothing to go on with
            self.path.unlink(missing_ok=True)

    def new_rows(self, rows: Iterable[tuple[int, Stored]]) -> Iterator[tuple[int, Stored]]:
        """Those of a RowFile that were not done before. Raises InputError if the first are not those that were done."""
        number, done = 0, self.state.line
        other = InputError(f"output: {self.path} was begun from another input than {self.source.path}; {self._anew}")
        for number, stored in rows:
            # As text with str() of what JSON lacks: the same for the same row, and nothing reads it back.
            text = stored.rstrip() if isinstance(stored, bytes) else json.dumps(stored, default=str).encode()
            self.digest.update(text + b"\n")
            if number == done and self.digest.hexdigest() != self.state.digest:
                raise other
            if number > done:
                yield number, stored
        if number < done:
            raise other

    def write(self, rows: list[Row]) -> None:
        """All of them, or none and BadRow where one has a value that JSON lacks."""
        # Half a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it.
        texts = [json.dumps(row, ensure_ascii=False, default=_as_json) for row in rows]
        self.pending += b"".join(text.encode(errors="backslashreplace") + b"\n" for text in texts)
        self.report.written += len(rows)

    def batch_done(self, line: int) -> None:
        """Every row up to that of the number `line` is converted."""
        self.state.line = line
        if len(self.pending) >= COMMIT_BYTES or time.monotonic() - self.committed >= COMMIT_SECONDS:
            self._commit()

    def _commit(self) -> None:
        self._flush()
        self.state.size, self.state.digest = self.file.tell(), self.digest.hexdigest()
        with replacing(self.state_path) as beside:
            beside.write_text(json.dumps(asdict(self.state)))
        self.committed = time.monotonic()

    def _flush(self) -> None:
        if self.pending:
            self.file.write(gzip.compress(self.pending, mtime=0) if self.output.suffix == ".gz" else self.pending)
            self.file.flush()
            self.pending.clear()

    def finish(self) -> None:
        """OUT.partial becomes OUT."""
        if not self.report.written:
            self.state_path.unlink(missing_ok=True)
            first = f"; first bad row: {self.report.first_bad}" if self.report.first_bad else ""
            raise InputError(f"input: no row of {self.source.path} gave a row to write{first}\n{self.report}")
        self._flush()
        self.file.close()
        sync(self.path)
        self.path.replace(self.output)
        self.state_path.unlink(missing_ok=True)


def _as_json(value: object) -> str:
    """Of Parquet and Arrow: dates and times as ISO 8601 has them."""
    if isinstance(value, date | clock_time):
        return value.isoformat()
    raise BadRow("value that JSON lacks", f"got {type(value).__name__}; leave its column out")
