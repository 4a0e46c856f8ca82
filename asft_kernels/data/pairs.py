"""Texts -> token ids -> `datasets.Dataset` -> padded (2B, T) batches.

Prompt and answer are encoded apart and joined, so that the prompt's tokens are the same whatever
follows them: both answers of a pair are conditioned on the very same prefix, and the mask's border
is exact. Only answers carry labels.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asft_kernels.data.dialogue import Pair, parse_pair, render_pair
from asft_kernels.data.rows import BadRow, DataReport, read_rows
from asft_kernels.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE_INDEX = -100
PADDED_TO = 8  # sequence lengths are multiples of this: fewer distinct shapes


def tokenize_pair(
    row: dict[str, Any], tokenizer: Any, *, max_length: int, max_prompt_length: int
) -> tuple[list[int], list[int], list[int], bool]:
    """(prompt, chosen, rejected, truncated): token ids, the answers without their prompt.

    truncated: whether an answer was cut so that prompt and answer fit into max_length. Raises
    BadRow for a row that holds no usable pair.
    """
    return _tokenize(parse_pair(row), tokenizer, max_length, max_prompt_length)


def _tokenize(
    pair: Pair, tokenizer: Any, max_length: int, max_prompt_length: int
) -> tuple[list[int], list[int], list[int], bool]:
    prompt_text, chosen_text, rejected_text, templated = render_pair(pair, tokenizer)
    prompt = _encode(tokenizer, prompt_text, special=not templated)
    if len(prompt) > min(max_prompt_length, max_length - 1):
        limits = f"max_prompt_length is {max_prompt_length}, max_length {max_length}"
        raise BadRow("prompt longer than the limit", f"{len(prompt)} tokens, {limits}")
    if not prompt:
        raise BadRow(
            "prompt without a token",
            "the first token of an answer has nothing to be predicted from",
        )
    answers = [_encode(tokenizer, text, special=False) for text in (chosen_text, rejected_text)]
    if not templated and tokenizer.eos_token_id is not None:
        answers = [[*answer, tokenizer.eos_token_id] for answer in answers]
    room = max_length - len(prompt)
    truncated = max(map(len, answers)) > room
    chosen, rejected = (answer[:room] for answer in answers)
    return prompt, chosen, rejected, truncated


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers close every text; a prompt goes on
    return ids


def pair_id(pair: Pair) -> str:
    """sha256 (hex) over prompt, chosen and rejected: the same for every file and tokenizer.

    Of the text as it stands, spaces included, where there is one; else of the chat messages.
    """
    content = [pair.messages if pair.text is None else pair.text, pair.chosen, pair.rejected]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_pairs(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    max_prompt_length: int = 512,
    strict: bool = False,
) -> "tuple[Dataset, DataReport]":
    """Read, check and tokenise a file of preference pairs.

    path: JSON lines, Parquet or Arrow, as `read_rows` takes; asft_kernels/data/dialogue.py lists the row formats.
    max_length: tokens of prompt and answer together; longer answers are cut, and counted.
    max_prompt_length: rows with longer prompts are left out, and counted.
    strict: rows that cannot be used are an error instead.

    Returns a dataset with the columns line (from 1), id (`pair_id`), prompt, chosen, rejected (token
    ids), and the report on the whole file. Raises InputError for a file that cannot be read or holds no pair.
    """
    from datasets import Dataset

    if max_length < 2 or max_prompt_length < 1:
        raise InputError(
            f"max_length, max_prompt_length: got {max_length}, {max_prompt_length}; need at least 2 and 1 tokens"
        )
    report = DataReport(str(path), max_length=max_length)
    columns: dict[str, list[Any]] = {"line": [], "id": [], "prompt": [], "chosen": [], "rejected": []}
    for line, row in read_rows(path):
        report.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            pair = parse_pair(row)
            prompt, chosen, rejected, truncated = _tokenize(pair, tokenizer, max_length, max_prompt_length)
        except BadRow as problem:
            report.add_bad(line, problem)
            continue
        if truncated:
            report.truncated.append(line)
        columns["line"].append(line)
        columns["id"].append(pair_id(pair))
        for name, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            columns[name].append(torch.tensor(ids, dtype=torch.int32).numpy())
    report.kept = len(columns["line"])
    if not report.kept:
        first = f"; first: {report.first_bad}" if report.first_bad else ""
        raise InputError(f"data: no usable pair{first}\n{report}")
    if strict and report.left_out:
        raise InputError(
            f"data: {report.left_out} rows cannot be used, and --strict is on; "
            f"first: {report.first_bad}; "
            f"mend them, or go without --strict to leave them out\n{report}"
        )
    return Dataset.from_dict(columns), report


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


class PairCollator:
    """B pairs -> input_ids, attention_mask, labels, each (2B, T), chosen rows first, padded right.

    pad_token_id: written where attention_mask is 0; any id of the vocabulary will do.
    """

    def __init__(self, pad_token_id: int):
        if not isinstance(pad_token_id, int):
            raise ValueError(
                f"pad_token_id: got {type(pad_token_id).__name__}, need a token id: tokenizer.pad_token_id, or "
                "tokenizer.eos_token_id where that is None"
            )
        self.pad_token_id = pad_token_id

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [(list(p["prompt"]), list(p[side])) for side in ("chosen", "rejected") for p in pairs]
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        shape = (len(rows), -(-longest // PADDED_TO) * PADDED_TO)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor(prompt + answer)
            attention_mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(answer)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
