"""Rows with a prompt and a chosen answer, read as `asft_kernels.data` reads pairs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from asft_kernels.data import BadRow, DataReport, parse_pair, read_rows, tokenize_pair
from asft_kernels.data.dialogue import Pair
from asft_kernels.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def with_chosen_only(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a pair of the chosen answer with itself: whatever it has as rejected does not matter."""
    return {**row, "rejected": row["chosen"]} if "chosen" in row else row


def parse_chosen(row: dict[str, Any]) -> Pair:
    """BadRow where it holds no prompt and chosen answer in one of the ways of `asft_kernels.data.dialogue`."""
    return parse_pair(with_chosen_only(row))


def load_chosen(
    path: str | Path, tokenizer: Any, *, max_length: int, max_prompt_length: int, strict: bool = False
) -> "tuple[Dataset, DataReport]":
    """Read and tokenise prompts and chosen answers; arguments, report and errors as `load_pairs`.

    Returns a dataset with the columns line (from 1), prompt, chosen (token ids).
    """
    from datasets import Dataset

    report = DataReport(str(path), max_length=max_length)
    columns: dict[str, list[Any]] = {"line": [], "prompt": [], "chosen": []}
    for line, row in read_rows(path):
        report.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            prompt, chosen, _, truncated = tokenize_pair(
                with_chosen_only(row), tokenizer, max_length=max_length, max_prompt_length=max_prompt_length
            )
        except BadRow as problem:
            report.add_bad(line, problem)
            continue
        if truncated:
            report.truncated.append(line)
        for name, value in (("line", line), ("prompt", prompt), ("chosen", chosen)):
            columns[name].append(value)
    report.kept = len(columns["line"])
    problem = "no usable row" if not report.kept else f"{report.left_out} rows cannot be used, and --strict is on"
    if not report.kept or (strict and report.left_out):
        raise InputError(f"data: {problem}; first: {report.first_bad or 'the file is empty'}\n{report}")
    return Dataset.from_dict(columns), report
