"""Bridging: each rejected answer is edited, with the chosen one as guide, into a new chosen answer.

arXiv 2408.07471 (BMC): pairs of an answer and its own edit differ only where it matters. The edits
come from a language model (--model), or from a file (--edits) of rows {"line": 3, "edited": "..."}
that name lines (of Parquet and Arrow: rows) of the input, in rising order. Written: prompt, chosen
(the edit), rejected, original_chosen.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from asft_kernels.data import BadRow, Pair, parse_pair
from asft_kernels.data.pair import BOTH, Messages
from asft_kernels.data.report import line_numbers
from asft_kernels.data.rows import KINDS, RowFile, json_type, parse_row
from asft_kernels.data_commands.fields import whole
from asft_kernels.data_commands.report import Report
from asft_kernels.data_commands.stream import run_stream
from asft_kernels.errors import InputError
from asft_kernels.models.generation import Generator, PromptTooLong, TransformersGenerator

BRIDGING = """\
You are given a request, a draft answer with faults, and a reference answer that is better.
Edit the draft until it is as good as the reference: correct what is wrong in it and add what it
lacks, and leave all that is already right word for word as it is.
Give the edited draft alone, without remarks.

[Request]
{request}

[Draft]
{rejected}

[Reference]
{chosen}

[Edited draft]
"""

Edits = Callable[[list[tuple[int, Pair]]], list[str | BadRow | None]]  # by line; None: there is no edit


class Editor(Protocol):
    """Anything that edits: a batch of prompts (as chats) with both answers -> the edited rejected answers."""

    def __call__(self, prompts: list[Messages], chosen: list[str], rejected: list[str]) -> list[str]: ...


class GenerationEditor:
    """`Editor` by greedy generation.

    chat: whether the generator takes chats; else it gets the same request as plain text.
    """

    def __init__(self, generator: Generator, *, max_new_tokens: int = 1024, chat: bool = True):
        self.generator, self.max_new_tokens, self.chat = generator, max_new_tokens, chat

    def __call__(self, prompts: list[Messages], chosen: list[str], rejected: list[str]) -> list[str]:
        texts = [
            BRIDGING.format(request=_request(prompt), chosen=better.strip(), rejected=worse.strip())
            for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
        ]
        asked: list[Any] = [[{"role": "user", "content": text}] for text in texts] if self.chat else texts
        return self.generator.generate(asked, max_new_tokens=self.max_new_tokens)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or hub name of the language model that edits")
    source.add_argument("--edits", help=f"edits made elsewhere: {KINDS}")
    parser.add_argument("--batch-size", type=whole(1), default=8, help="answers edited together")
    parser.add_argument("--max-new-tokens", type=whole(1), default=1024, help="longer edits are cut")


def run(args: argparse.Namespace) -> None:
    edits: Edits
    if args.edits:
        edits = FileEdits(args.edits)
    else:
        generator = TransformersGenerator.from_pretrained(args.model, batch_size=args.batch_size)
        chat = bool(getattr(generator.tokenizer, "chat_template", None))
        edits = edits_by(GenerationEditor(generator, max_new_tokens=args.max_new_tokens, chat=chat))
    report = run_stream(args, lambda rows, report: bridged(rows, report, edits), batch_size=args.batch_size)
    if isinstance(edits, FileEdits) and (beyond := edits.after(report.rows)):
        print(f"--edits: {args.edits} has {len(beyond)} more, beyond the input's last row ({line_numbers(beyond)})")


def bridged(
    rows: list[tuple[int, dict[str, Any]]], report: Report, edits: Edits
) -> Iterator[list[dict[str, Any]] | BadRow]:
    """For each row, its bridged pair; none where the edit is missing, empty or changes nothing."""
    parsed: list[Pair | BadRow] = []
    for _, row in rows:
        try:
            pair = parse_pair(row)
            for side in BOTH:
                pair.text(side)  # an answer of several messages cannot be edited
            parsed.append(pair)
        except BadRow as problem:
            parsed.append(problem)
    asked = [(line, pair) for (line, _), pair in zip(rows, parsed, strict=True) if isinstance(pair, Pair)]
    edited = iter(edits(asked) if asked else [])
    for (line, _), pair in zip(rows, parsed, strict=True):
        if isinstance(pair, BadRow):
            yield pair
            continue
        edit = next(edited)
        if isinstance(edit, BadRow):
            yield edit
            continue
        rejected = pair.text("rejected")
        problem = _useless(edit, rejected)
        if edit is None or problem:
            report.note(line, f"left out, {problem}")
            yield []
            continue
        before = rejected[: len(rejected) - len(rejected.lstrip())]  # dialogues: a space
        row = pair.row(chosen=before + edit.strip(), rejected=rejected)
        try:
            parse_pair(row)
        except BadRow as bad:
            yield BadRow(f"edit, {bad.kind}", bad.detail)
            continue
        yield [{**row, "original_chosen": pair.text("chosen")}]


def edits_by(editor: Editor) -> Edits:
    """Edits by an editor; pairs whose prompt it finds too long are bad rows."""

    def edits(asked: list[tuple[int, Pair]]) -> list[str | BadRow | None]:
        results: list[str | BadRow | None] = [None] * len(asked)
        waiting = list(range(len(asked)))
        while waiting:
            pairs = [asked[index][1] for index in waiting]
            try:
                texts = editor([p.messages for p in pairs], *([p.text(side) for p in pairs] for side in BOTH))
            except PromptTooLong as problem:
                results[waiting.pop(problem.index)] = BadRow("too long for the model that edits", str(problem))
                continue
            for index, text in zip(waiting, texts, strict=True):
                results[index] = text
            break
        return results

    return edits


class FileEdits:
    """Edits by the line numbers of a file, which is read along with the input.

    Raises InputError at once for a file with a wrong row anywhere, so it is read twice: a number out of order would
    hide every edit behind it.
    """

    def __init__(self, path: str):
        for _ in _edit_rows(path):
            pass
        self.rows = _edit_rows(path)
        self.ahead = next(self.rows, None)

    def __call__(self, asked: list[tuple[int, Pair]]) -> list[str | BadRow | None]:
        results: list[str | BadRow | None] = []
        for line, _ in asked:
            while self.ahead and self.ahead[0] < line:
                self.ahead = next(self.rows, None)
            results.append(self.ahead[1] if self.ahead and self.ahead[0] == line else None)
        return results

    def after(self, last: int) -> list[int]:
        """Numbers above that of the input's last row which have an edit."""
        unread = [] if self.ahead is None else [self.ahead]
        return [line for line, _ in itertools.chain(unread, self.rows) if line > last]


def _edit_rows(path: str) -> Iterator[tuple[int, str]]:
    last = 0
    rows = RowFile(path, "--edits")
    for number, stored in rows:
        row, where = parse_row(stored), f"--edits: {path}, {rows.numbered} {number}"
        if isinstance(row, BadRow):
            raise InputError(f"{where}: {row}")
        line, edited = row.get("line"), row.get("edited")
        if isinstance(line, bool) or not isinstance(line, int) or not isinstance(edited, str):
            raise InputError(
                f"{where}: got line as {json_type(line)}, edited as {json_type(edited)}; "
                "need a whole number (the line of the input) and a string"
            )
        if line <= last:
            raise InputError(f"{where}: got line {line} after {last}, need numbers from 1 that rise; sort the file")
        last = line
        yield line, edited


def _useless(edit: str | None, rejected: str) -> str:
    if edit is None:
        return "no edit in the file"
    if not edit.strip():
        return "empty edit"
    return "edit without a change" if edit.strip() == rejected.strip() else ""


def _request(prompt: Messages) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
