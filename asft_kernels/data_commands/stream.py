"""Rows in, rows out, a batch at a time: what every data command does around its own conversion."""

import argparse
import gzip
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from asft_kernels.data.rows import GZIP_MAGIC, BadRow, DataError
from asft_kernels.data.rows import _row as parse_row
from asft_kernels.data_commands.partial import Partial, Row
from asft_kernels.data_commands.report import Report

NOT_SETTINGS = ("input", "output", "strict", "overwrite")  # a run may go on with others
STRICT = "--strict is on: mend it and run the same command again, or go without --strict to leave such rows out"

# (line number, row) of a batch -> for each, the rows to write or what is wrong with it.
Convert = Callable[[list[tuple[int, Row]], Report], Iterable[list[Row] | BadRow]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every data command takes."""
    parser.add_argument("input", help="JSON lines, plain or gzipped")
    parser.add_argument("output", help="JSON lines, gzipped if the name ends with .gz")
    parser.add_argument("--strict", action="store_true", help="a bad row is an error")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there already")


def by_row(convert_row: Callable[[int, Row, Report], list[Row]]) -> Convert:
    """`Convert` from a function of one row, which may raise BadRow."""

    def convert(rows: list[tuple[int, Row]], report: Report) -> Iterator[list[Row] | BadRow]:
        for line, row in rows:
            try:
                yield convert_row(line, row, report)
            except BadRow as problem:
                yield problem

    return convert


def run_stream(args: argparse.Namespace, convert: Convert, *, batch_size: int = 1) -> Report:
    """Convert `args.input` into `args.output` and print the report.

    Raises DataError for files that cannot be used, for a bad row under `args.strict`, and where
    nothing was written.
    """
    from tqdm import tqdm

    source, output = Path(args.input), Path(args.output)
    if not source.is_file():
        what = "is a folder" if source.is_dir() else "no such file"
        raise DataError(f"input: got {str(source)!r}, {what}; need a file of JSON lines, plain or gzipped")
    if output.exists() and not args.overwrite:
        raise DataError(f"output: {output} is there already; add --overwrite to replace it, or name another file")
    if output.is_dir() or (output.exists() and output.samefile(source)):
        raise DataError(f"output: got {str(output)!r}, a folder or the input itself; need another file")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    # The bar shows on terminals only.
    with (
        Partial(output, settings, source) as partial,
        tqdm(total=source.stat().st_size, desc=source.name, unit="B", unit_scale=True, disable=None) as bar,
        closing(_lines(source, bar.update)) as lines,
    ):
        report = partial.report
        if args.strict and report.bad:
            raise DataError(f"input: {source}: {report.first_bad}; {STRICT}")
        for batch in _batches(lines, partial, batch_size):
            report.rows += len(batch)
            rows, problems = [], {}
            for line, row in batch:
                if isinstance(row, BadRow):
                    problems[line] = row
                else:
                    rows.append((line, row))
            for (line, _), result in zip(rows, convert(rows, report), strict=True):
                if isinstance(result, BadRow):
                    problems[line] = result
                else:
                    partial.write(result)
            for line, problem in sorted(problems.items()):
                if args.strict:
                    raise DataError(f"input: {source}: line {line}: {problem}; {STRICT}")
                report.add_bad(line, problem)
            partial.batch_done(batch[-1][0])
        partial.finish()
    print(report)
    return report


def _batches(
    lines: Iterator[tuple[int, bytes]], partial: Partial, size: int
) -> Iterator[list[tuple[int, Row | BadRow]]]:
    """Batches of (line number, row or what is wrong with it), from the first line not done on.

    Empty lines are bad rows, except at the very end of the file.
    """
    batch, empty = [], 0
    for number, line in partial.new_lines(lines):
        if not line.strip():
            empty += 1
            continue
        batch += [(before, BadRow("empty line")) for before in range(number - empty, number)]
        batch.append((number, parse_row(line)))
        empty = 0
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _lines(path: Path, advance: Callable[[int], object]) -> Generator[tuple[int, bytes], None, None]:
    """(number from 1, line) of a file, gzipped or not by its first bytes; `advance` hears of the bytes read."""
    number, position = 0, 0
    with path.open("rb") as raw:
        zipped = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        raw.seek(0)
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=raw) if zipped else raw, start=1):
                yield number, line
                advance(raw.tell() - position)
                position = raw.tell()
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"input: {path} cannot be read beyond line {number} ({error}); is the copy complete? "
                "with a complete one the same command goes on"
            ) from error
