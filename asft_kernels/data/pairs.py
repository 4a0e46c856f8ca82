"""Names of data -> rows -> `datasets.Dataset` of token ids, under TRL's column names, and a report on every row."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from asft_kernels.data import limits
from asft_kernels.data.pair import BOTH, Pair, parse_pair
from asft_kernels.data.reference import reference_columns, with_references
from asft_kernels.data.report import DataReport
from asft_kernels.data.rows import KINDS, BadRow, RowFile, parse_row
from asft_kernels.data.splits import files_of
from asft_kernels.data.stored import without_nulls
from asft_kernels.data.tokens import PairTokenizer
from asft_kernels.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

# Columns that nothing reads, and that may hold a part of what is said.
UNREAD = re.compile(r"system_prompt|history|ref_(?!(chosen|rejected)_(token_)?logps$).*")
Names = str | Path | Sequence[str | Path]


def load_pairs(
    names: Names,
    processing_class: Any,
    *,
    split: str = "train",
    config: str | None = None,
    max_length: int | None = 1024,
    strict: bool = False,
    vocab_size: int | None = None,
    num_proc: int | None = None,
    answers: tuple[str, ...] = BOTH,
) -> "tuple[Dataset, DataReport]":
    """Reads, checks and tokenises preference pairs as TRL's DPOTrainer would.

    Args:
        names: one or several of: a file (JSON lines, a JSON array, gzip of them, Parquet, Arrow), a folder of such
            shards, a folder that datasets saved, a name on the hub. `asft_kernels.data.pair` lists the row formats.
        processing_class: the tokenizer, or the processor of a model that takes images too.
        split: of hub names and of folders whose files name one (`asft_kernels.data.splits`). Of other data all is
            "train".
        config: of hub names.
        max_length: tokens of prompt and answer. Longer answers are cut, as TRL's collator cuts them; rows whose prompt
            alone fills it are left out. None: no limit.
        strict: rows that cannot be used are an error instead.
        vocab_size: rows of the model's embedding, which no id may pass. None: not checked.
        num_proc: processes that tokenise.
        answers: ("chosen",) for rows whose rejected answer does not matter; the column is then left out.

    Returns:
        The dataset, with the columns line (int, from 1, over all files), id (`pair_id`), prompt_ids, chosen_ids and
        rejected_ids (int32), the rows' own ref_chosen_logps, ref_rejected_logps, ref_chosen_token_logps and
        ref_rejected_token_logps where they have them, and the report.

    Raises:
        InputError: data that cannot be read, has no such split or no usable pair; references in some rows alone; an id
            beyond vocab_size.
    """
    listed = [names] if isinstance(names, str | Path) else list(names)
    if not listed:
        raise InputError(f"data: got no name, need {KINDS}, or a name on the hub")
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length: got {max_length}, need at least 2 tokens")
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if vocab_size and tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= vocab_size:
        raise InputError(f"data: the pad token's id is {tokenizer.pad_token_id}, need less than {vocab_size}, the rows "
                         "of the model's embedding; resize it or give the tokenizer another pad token")  # fmt: skip
    encode = PairTokenizer(processing_class, max_length)
    rows, source = _stored_rows(listed, split, config)
    if not len(rows):
        raise InputError(f"data: {source} has no rows, need preference pairs")
    found = _mapped(rows, encode, vocab_size, num_proc, answers)
    report = DataReport(source, rows=len(found))
    kept = []
    for index, (line, problem, notes) in enumerate(zip(found["line"], found["problem"], found["notes"], strict=True)):
        if problem:
            report.add_bad(line, BadRow(*problem))
            continue
        kept.append(index)
        for note in notes:
            report.note(line, note)
    report.kept = len(kept)
    first = f"; first: {report.first_bad}" if report.first_bad else ""
    if not kept:
        raise InputError(f"data: no usable pair{first}\n{report}")
    if strict and report.left_out:
        raise InputError(
            f"data: {report.left_out} rows cannot be used, and --strict is on{first}; "
            f"mend them, or go without --strict to leave them out\n{report}"
        )
    pairs = found if len(kept) == len(found) else found.select(kept)
    references = [json.loads(text) for text in pairs["references"][:]]
    return with_references(pairs.remove_columns(["problem", "notes", "references"]), references, answers), report


def pair_id(pair: Pair) -> str:
    """sha256 (hex) over prompt, answers and tools as given: the same for every kind of file and every tokenizer."""
    content = [pair.prompt, *pair.answers.values(), *([pair.context] if pair.context else [])]
    return hashlib.sha256(json.dumps(without_nulls(content), sort_keys=True, default=str).encode()).hexdigest()


def _stored_rows(names: list[str | Path], split: str, config: str | None) -> "tuple[Dataset, str]":
    """(columns line and row, a row as JSON text; what the report calls it): rows of any schema travel as text."""
    from datasets import Dataset, Features, Value

    lines, texts, sources = [], [], []
    for name in names:
        files = files_of(Path(name), split)
        rows = _hub_rows(str(name), split, config) if files is None else _file_rows(files)
        start = len(lines)
        for text in rows:
            lines.append(len(lines) + 1)
            texts.append(text)
        sources.append(str(name) if len(names) == 1 else f"{name} (lines {start + 1} to {len(lines)})")
    features = Features({"line": Value("int64"), "row": Value("large_string")})
    return Dataset.from_dict({"line": lines, "row": texts}, features=features), ", ".join(sources)


def _file_rows(files: list[Path]) -> Iterator[str]:
    for file in files:
        bad = 0  # one after another
        for number, stored in RowFile(file):
            row = parse_row(stored)
            bad = bad + 1 if isinstance(row, BadRow) else 0
            if bad > limits.BAD_ROWS:
                raise InputError(f"data: {file}: more than {limits.BAD_ROWS:,} rows up to {number} that cannot be read "
                                 f"(the last: {row}); need a file of {KINDS}")  # fmt: skip
            yield json.dumps(_problem(row) if isinstance(row, BadRow) else row, default=str)


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # of datasets, huggingface_hub and the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data: {name!r} cannot be loaded ({reason}); need {KINDS}, or a name on the hub with its "
                         "split and config") from error  # fmt: skip
    if images := sorted({"image", "images"} & set(rows.column_names or [])):
        raise InputError(f"data: {name!r} has the column {images[0]}; need rows without images")
    for row in rows:
        yield json.dumps(without_nulls(dict(row)), default=str)


def _problem(problem: BadRow) -> list[str]:
    return [problem.kind, problem.detail]


def _mapped(
    rows: "Dataset", encode: PairTokenizer, vocab_size: int | None, num_proc: int | None, answers: tuple[str, ...]
) -> "Dataset":
    from datasets import Features, List, Value

    ids = {f"{name}_ids": List(Value("int32")) for name in ("prompt", *answers)}
    text = List(Value("string"))
    features = Features({"line": Value("int64"), "id": Value("string"), **ids, "references": Value("string"),
                         "problem": text, "notes": text})  # fmt: skip
    arguments = {"encode": encode, "vocab_size": vocab_size, "answers": answers}
    return rows.map(
        _tokenised, fn_kwargs=arguments, remove_columns=["row"], features=features, num_proc=num_proc, desc="Tokenising"
    )


def _tokenised(
    example: dict[str, Any], encode: PairTokenizer, vocab_size: int | None, answers: tuple[str, ...]
) -> dict[str, Any]:
    row = json.loads(example["row"])
    try:
        if isinstance(row, list):  # what the reader found wrong
            raise BadRow(*row)
        if images := sorted({"image", "images"} & {name for name, value in row.items() if value}):
            raise BadRow("row with images", f"{images[0]}: need rows without")
        pair = parse_pair(row, answers)
        tokens = encode(pair)
        references = reference_columns(row, tokens)
    except limits.SlowTemplate as error:
        raise InputError(f"data: line {example['line']}: {error}") from error
    except BadRow as problem:
        return {"id": "", "prompt_ids": [], **{f"{name}_ids": [] for name in answers},
                "references": "{}", "problem": _problem(problem), "notes": []}  # fmt: skip
    ids = {"prompt_ids": tokens.prompt, **{f"{name}_ids": tokens.answers[name] for name in answers}}
    largest = max(map(max, ids.values()))
    if vocab_size and largest >= vocab_size:
        token = encode.tokenizer.convert_ids_to_tokens(largest)
        raise InputError(f"data: line {example['line']} has the token {token!r} of id {largest}, need less than "
                         f"{vocab_size}, the rows of the model's embedding; resize it, or take the model's own "
                         "tokenizer")  # fmt: skip
    notes = [
        *tokens.notes,
        *(f"column {name}, which is not read" for name in row if row[name] and UNREAD.fullmatch(name)),
    ]
    return {"id": pair_id(pair), **ids, "references": json.dumps(references), "problem": [], "notes": notes}


def split_every_nth(pairs: "Dataset", nth: int) -> "tuple[Dataset, Dataset]":
    """(training, evaluation): evaluation takes every nth line of the file, line nth first.

    Counted from 0 these are the lines whose number mod nth is nth - 1. It goes by the line in the
    file, so a row left out moves no other row to the other side.
    """
    if nth < 2:
        raise InputError(f"eval_every_nth: got {nth}, need at least 2 (8 evaluates on an eighth)")
    held_out = [line % nth == 0 for line in pairs["line"]]
    train = [index for index, out in enumerate(held_out) if not out]
    evaluation = [index for index, out in enumerate(held_out) if out]
    if not train or not evaluation:
        raise InputError(
            f"eval_every_nth: {nth} leaves {len(train)} pairs for training and {len(evaluation)} "
            "for evaluation, need at least one of each; give more data or a smaller number"
        )
    return pairs.select(train), pairs.select(evaluation)


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of TRL's DataCollatorForPreference, (2B, T) each, with labels in the place of its `completion_mask`."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
