"""Names of data -> rows -> `datasets.Dataset` of token ids, under TRL's column names, and a report on every row."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from asft_kernels.data import limits
from asft_kernels.data.images import ImagePairTokenizer, Stored, images_in, take_images, undecoded
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
    images: bool = False,
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
        images: True: in the form of data with images (below) though no row has one, for evaluation beside training
            data with images. Default: in that form where a row has one and processing_class takes it.

    Returns:
        The dataset, with the columns line (int, from 1, over all files), id (`pair_id`), prompt_ids, chosen_ids and
        rejected_ids (int32), the rows' own ref_chosen_logps, ref_rejected_logps, ref_chosen_token_logps and
        ref_rejected_token_logps where they have them, and the report. With images the ids' place is taken by prompt,
        chosen and rejected (as the chat template writes them), images (a list of `datasets.Image`), which TRL's vision
        collator encodes batch by batch, and their counts prompt_tokens, chosen_tokens and rejected_tokens.

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
    rows, source = _stored_rows(listed, split, config)
    if not len(rows):
        raise InputError(f"data: {source} has no rows, need preference pairs")
    images = hasattr(processing_class, "image_processor") and (images or "images" in rows.column_names)
    encode = ImagePairTokenizer(processing_class, max_length) if images else PairTokenizer(processing_class, max_length)
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
    if images:
        from datasets import Image, List

        report.images = images_in(pairs)[1]
        pairs = pairs.cast_column("images", List(Image()))
    references = [json.loads(text) for text in pairs["references"][:]]
    return with_references(pairs.remove_columns(["problem", "notes", "references"]), references, answers), report


def pair_id(pair: Pair, images: Sequence[str] = ()) -> str:
    """sha256 (hex) over prompt, answers and tools as given: the same for every kind of file and every tokenizer.

    Args:
        images: the digests of its images' files.
    """
    content = [pair.prompt, *pair.answers.values(), *([pair.context] if pair.context else []), *images]
    return hashlib.sha256(json.dumps(without_nulls(content), sort_keys=True, default=str).encode()).hexdigest()


def _stored_rows(names: list[str | Path], split: str, config: str | None) -> "tuple[Dataset, str]":
    """(columns line, row, images where a row has some; what the report calls it): rows travel as JSON text."""
    from datasets import Dataset, Features, List, Value

    lines, texts, images, sources = [], [], [], []
    for name in names:
        files = files_of(Path(name), split)
        rows = _hub_rows(str(name), split, config) if files is None else _file_rows(files)
        start = len(lines)
        for text, of_row in rows:
            lines.append(len(lines) + 1)
            texts.append(text)
            images.append(of_row)
        sources.append(str(name) if len(names) == 1 else f"{name} (lines {start + 1} to {len(lines)})")
    columns: dict[str, Any] = {"line": lines, "row": texts}
    features: dict[str, Any] = {"line": Value("int64"), "row": Value("large_string")}
    if any(images):
        columns["images"] = images
        features["images"] = List({"bytes": Value("binary"), "path": Value("string")})
    return Dataset.from_dict(columns, features=Features(features)), ", ".join(sources)


def _file_rows(files: list[Path]) -> Iterator[tuple[str, list[Stored]]]:
    for file in files:
        bad = 0  # one after another
        for number, stored in RowFile(file):
            row = parse_row(stored)
            bad = bad + 1 if isinstance(row, BadRow) else 0
            if bad > limits.BAD_ROWS:
                raise InputError(f"data: {file}: more than {limits.BAD_ROWS:,} rows up to {number} that cannot be read "
                                 f"(the last: {row}); need a file of {KINDS}")  # fmt: skip
            yield _as_text(row, file if file.is_dir() else file.parent)


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[tuple[str, list[Stored]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # of datasets, huggingface_hub and the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"data: {name!r} cannot be loaded ({reason}); need {KINDS}, or a name on the hub with its "
                         "split and config") from error  # fmt: skip
    for row in undecoded(rows):
        yield _as_text(without_nulls(dict(row)), None)


def _as_text(row: dict[str, Any] | BadRow, folder: Path | None) -> tuple[str, list[Stored]]:
    """(the row, or what is wrong with it, as JSON; its images)."""
    try:
        if isinstance(row, BadRow):
            raise row
        images = take_images(row, folder)
        return json.dumps(row, default=str), images
    except BadRow as problem:
        return json.dumps(_problem(problem)), []


def _problem(problem: BadRow) -> list[str]:
    return [problem.kind, problem.detail]


def _mapped(
    rows: "Dataset", encode: Any, vocab_size: int | None, num_proc: int | None, answers: tuple[str, ...]
) -> "Dataset":
    from datasets import Features, List, Value

    text, own = List(Value("string")), encode.features(answers)
    features = Features({"line": Value("int64"), "id": Value("string"), **own, "references": Value("string"),
                         "problem": text, "notes": text})  # fmt: skip
    arguments = {"encode": encode, "vocab_size": vocab_size, "answers": answers}
    unused = [name for name in rows.column_names if name not in features]
    return rows.map(
        _tokenised, fn_kwargs=arguments, remove_columns=unused, features=features, num_proc=num_proc, desc="Tokenising"
    )


def _tokenised(
    example: dict[str, Any], encode: Any, vocab_size: int | None, answers: tuple[str, ...]
) -> dict[str, Any]:
    row = json.loads(example["row"])
    try:
        if isinstance(row, list):  # what the reader found wrong
            raise BadRow(*row)
        pair = parse_pair(row, answers)
        tokens = encode(pair, example.get("images", ()))
        references = reference_columns(row, tokens)
        if references and "images" in tokens.columns():
            raise BadRow("reference's log-probabilities in data with images", min(references))
    except limits.SlowTemplate as error:
        raise InputError(f"data: line {example['line']}: {error}") from error
    except BadRow as problem:
        return {"id": "", **encode.nothing(answers), "references": "{}", "problem": _problem(problem), "notes": []}
    largest = tokens.largest()
    if vocab_size and largest >= vocab_size:
        token = encode.tokenizer.convert_ids_to_tokens(largest)
        raise InputError(f"data: line {example['line']} has the token {token!r} of id {largest}, need less than "
                         f"{vocab_size}, the rows of the model's embedding; resize it, or take the model's own "
                         "tokenizer")  # fmt: skip
    notes = [
        *tokens.notes,
        *(f"column {name}, which is not read" for name in row if row[name] and UNREAD.fullmatch(name)),
    ]
    columns = {"id": pair_id(pair, tokens.digests()), **tokens.columns(), "references": json.dumps(references)}
    return {**columns, "problem": [], "notes": notes}


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
