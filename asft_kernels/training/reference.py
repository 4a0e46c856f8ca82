"""The reference's log-probabilities as columns of the data."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from asft_kernels.errors import InputError
from asft_kernels.objectives import expression_of
from asft_kernels.score.table import SIDES, load_scores, load_token_logps, mean_avg_logps

SUMS = tuple(f"ref_{side}_logps" for side in SIDES)
TOKENS = tuple(f"ref_{side}_token_logps" for side in SIDES)


def given_columns(dataset: Any, per_token: bool) -> bool:
    """Whether a dataset brings the reference's log-probabilities.

    Raises:
        InputError: if it has sums alone, and values per token are needed.
    """
    columns = set(getattr(dataset, "column_names", None) or ())
    if per_token and columns >= set(SUMS) and not columns >= set(TOKENS):
        raise InputError(
            f"train_dataset: got {SUMS[0]}, sums of answers, need {TOKENS[0]} and {TOKENS[1]}: the objective compares "
            "token by token"
        )
    return columns >= set(SUMS) or columns >= set(TOKENS)


def require_references(objective: Any, files: Sequence[str] | None, datasets: Sequence[Any]) -> None:
    """Raises InputError unless the objective takes as many reference models as there are: without files or sums one.

    Args:
        objective: with a reference.
        files: one a reference model, or None.
        datasets: may bring sums in SUMS, a number or a list of one a reference model.
    """
    if files:
        numbers = [len(files) if objective.reference_kind == "sum" else 1]  # means are made one
    else:
        columns = [rows.select_columns(SUMS[0]) for rows in datasets if SUMS[0] in (rows.column_names or ())]
        # Of a stream the first row: it may have no end.
        brought = (row[SUMS[0]] for rows in columns for row in islice(rows, None if hasattr(rows, "__len__") else 1))
        numbers = sorted({len(sums) if isinstance(sums, list) else 1 for sums in brought}) or [1]
    for number in numbers:
        try:
            objective.check_references(number)
        except ValueError as error:
            need = "ref_scores has a file, ref_chosen_logps of each row an entry, for each"
            raise InputError(f"objective: {error}; {need}") from error


def of_answer(row: Mapping[str, Any], side: str, trained: int) -> Sequence[float]:
    """Returns a row's values per token. InputError unless they are as many as its answer has, or as are trained."""
    values, tokens = row[f"ref_{side}_token_logps"], row[f"{side}_ids"]
    if len(values) not in (len(tokens), trained):
        where = f" (line {row['line']})" if "line" in row else ""
        raise InputError(
            f"ref_{side}_token_logps: got {len(values)} values for an answer of {len(tokens)} tokens{where}, need one "
            "a token"
        )
    return values


def require_whole(dataset: Any, max_length: int | None, label: str) -> None:
    """Raises InputError if the trainer would cut an answer whose sums come with the data: these are of all of it."""
    columns = set(dataset.column_names or ())
    if max_length is None or not columns >= {*SUMS, "prompt_ids"}:
        return
    for number, row in enumerate(dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])):
        length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if length > max_length:
            raise InputError(
                f"max_length: got {max_length}, need at least {length} for row {number} of {label}: the reference's "
                "log-probabilities that come with it are of its whole answer"
            )


def with_scores(dataset: Any, files: Sequence[str], objective: Any, tokenizer: Any, *, per_token: bool) -> Any:
    """Returns the dataset with columns of what files of `asft score` hold, as the objective reads it.

    Args:
        dataset: of `asft_kernels.data.load_pairs`: its ids say which score is whose.
        files: one a reference model.
        objective: says whether sums or means are wanted.
        per_token: whether values per token are wanted.

    Raises:
        InputError: for files that do not fit the data, and an objective that has no use for them.
    """
    if not objective.needs_reference:
        raise InputError(f"ref_scores: got files, need none: {expression_of(objective)} has no reference")
    if "id" not in dataset.column_names:
        raise InputError("ref_scores: got a dataset without ids, need one of asft_kernels.data.load_pairs")
    if twice := set(TOKENS if per_token else SUMS) & set(dataset.column_names):
        raise InputError(f"ref_scores: got files, and rows with {min(twice)}; need one of both")
    if per_token:
        if len(files) > 1:
            raise InputError(
                f"ref_scores: got {len(files)} files, need one: {expression_of(objective)} has one reference"
            )
        of_sides = load_token_logps(files[0], dataset, tokenizer)
        for name, values in zip(TOKENS, of_sides, strict=True):
            dataset = dataset.add_column(name, [of_row.tolist() for of_row in values])
        return dataset
    if objective.reference_kind == "mean":
        values = mean_avg_logps(files, dataset)[None]
    else:
        values = load_scores(files, dataset, tokenizer)
    for name, of_side in zip(SUMS, values.unbind(dim=1), strict=True):
        dataset = dataset.add_column(name, of_side[0].tolist() if len(of_side) == 1 else of_side.T.tolist())
    return dataset
