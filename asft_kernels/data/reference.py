"""The log-probabilities under a reference that rows bring, as columns of the data set."""

import math
from typing import TYPE_CHECKING, Any

from asft_kernels.data.rows import BadRow, json_type
from asft_kernels.data.tokens import Tokens
from asft_kernels.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("logps", "token_logps")  # of an answer: its sum, or one of each reference model; one of each token


def reference_columns(row: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
    """Reads what a row has of ref_chosen_logps, ref_rejected_logps and their ref_*_token_logps.

    Args:
        row: as JSON has it.
        tokens: of its answers, those that are looked for.

    Raises:
        BadRow: a column is not made of finite numbers, or is not of the answer's tokens.
    """
    found = {}
    cut = any(note.startswith("answer cut") for note in tokens.notes)
    for side, answer in tokens.answers.items():
        for kind in KINDS:
            name = f"ref_{side}_{kind}"
            if (value := row.get(name)) is None:
                continue
            values = value if isinstance(value, list) else [value]
            if not values or not all(map(_is_finite, values)) or (kind == "token_logps" and values is not value):
                need = "a list of finite numbers" if kind == "token_logps" else "a finite number or a list of them"
                raise BadRow("wrong type", f"{name}: got {json_type(value)}, need {need}")
            if cut and kind == "logps":
                raise BadRow("reference of an answer that max_length cuts", f"{name} is of all of it")
            if kind == "token_logps" and (len(values) < len(answer) or (len(values) > len(answer) and not cut)):
                raise BadRow("reference of other tokens", f"{name}: got {len(values)}, need {len(answer)}")
            found[name] = values[: len(answer)] if kind == "token_logps" else value
    return found


def with_references(pairs: "Dataset", rows: list[dict[str, Any]], answers: tuple[str, ...]) -> "Dataset":
    """Adds the columns that `reference_columns` found in each of the rows.

    Raises:
        InputError: some rows have a column and others not, or one of another number of reference models.
    """
    for kind in KINDS:
        names = [f"ref_{side}_{kind}" for side in answers]
        if not any(name in row for row in rows for name in names):
            continue
        for name in names:
            shapes = [_shape(row.get(name), kind) for row in rows]
            wanted = next((shape for shape in shapes if shape != "nothing"), "a value")
            for index, shape in enumerate(shapes):
                if shape != wanted:
                    line = pairs[index]["line"]
                    raise InputError(f"data: {name}: line {line} has {shape}, need {wanted}, as in every other row; or "
                                     "leave the references out of all rows")  # fmt: skip
            pairs = pairs.add_column(name, [_floats(row[name]) for row in rows])
    return pairs


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shape(value: Any, kind: str) -> str:
    if value is None:
        return "nothing"
    if not isinstance(value, list):
        return "a number"
    return f"a list of {len(value)} numbers" if kind == "logps" else "a list of numbers"


def _floats(value: Any) -> Any:
    return [float(number) for number in value] if isinstance(value, list) else float(value)
