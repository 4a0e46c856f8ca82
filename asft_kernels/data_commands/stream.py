"""Rows in, rows out, a batch at a time: what every data command does around its own conversion."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from asft_kernels.data.rows import KINDS, BadRow, RowFile, Stored, parse_row
from asft_kernels.data_commands.partial import Partial, Row
from asft_kernels.data_commands.report import Report
from asft_kernels.errors import InputError

NOT_SETTINGS = ("input", "output", "strict", "overwrite")  # a run may go on with others
NOT_WRITTEN = (".parquet", ".arrow")
STRICT = "--strict is on: mend it and run the same command again, or go without --strict to leave such rows out"

# (number, row) of a batch -> for each, the rows to write or what is wrong with it.
Convert = Callable[[list[tuple[int, Row]], Report], Iterable[list[Row] | BadRow]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every data command takes."""
    parser.add_argument("input", help=KINDS)
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

    Raises InputError for files that cannot be used, for a bad row under `args.strict`, and where
    nothing was written.
    """
    from tqdm import tqdm

    source, output = RowFile(args.input, "input"), Path(args.output)
    if output.suffix in NOT_WRITTEN:
        raise InputError(f"output: got {str(output)!r}, need a name of JSON lines: .jsonl, or .jsonl.gz for gzipped")
    if output.exists() and not args.overwrite:
        raise InputError(f"output: {output} is there already; add --overwrite to replace it, or name another file")
    if output.is_dir() or (output.exists() and output.samefile(source.path)):
        raise InputError(f"output: got {str(output)!r}, a folder or the input itself; need another file")
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    unit: dict[str, Any] = {"unit": "B", "unit_scale": True} if source.numbered == "line" else {"unit": " rows"}
    # The bar shows on terminals only.
    with (
        Partial(output, settings, source) as partial,
        tqdm(total=source.size, desc=source.path.name, disable=None, **unit) as bar,
    ):
        report = partial.report
        if args.strict and report.bad:
            raise InputError(f"input: {source.path}: {report.first_bad}; {STRICT}")
        for batch in _batches(partial.new_rows(_shown(source, bar)), batch_size):
            report.rows += len(batch)
            rows, problems = [], {}
            for line, row in batch:
                if isinstance(row, BadRow):
                    problems[line] = row
                else:
                    rows.append((line, row))
            for (line, _), result in zip(rows, convert(rows, report), strict=True):
                try:
                    if isinstance(result, BadRow):
                        raise result
                    partial.write(result)
                except BadRow as problem:
                    problems[line] = problem
            for line, problem in sorted(problems.items()):
                if args.strict:
                    raise InputError(f"input: {source.path}: {source.numbered} {line}: {problem}; {STRICT}")
                report.add_bad(line, problem)
            partial.batch_done(batch[-1][0])
        partial.finish()
    print(report)
    return report


def _shown(source: RowFile, bar: Any) -> Iterator[tuple[int, Stored]]:
    """The rows of source, as the progress bar shows them."""
    for entry in source:
        yield entry
        bar.update(source.position - bar.n)


def _batches(stored: Iterator[tuple[int, Stored]], size: int) -> Iterator[list[tuple[int, Row | BadRow]]]:
    """Batches of (number, row or what is wrong with it)."""
    batch = []
    for number, row in stored:
        batch.append((number, parse_row(row)))
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch
