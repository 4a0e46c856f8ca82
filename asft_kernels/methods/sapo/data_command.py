"""Self-augmentation: a segment of each chosen answer, written anew by a model, makes the rejected one.

One offline pass of arXiv 2405.20830 (SAPO), without its training: the model stays as it is
(`asft train --method sapo` trains along). Rows: prompt and chosen in any form of preference data;
what they have as rejected is ignored. Written: prompt, chosen, rejected.
"""

import argparse
from collections.abc import Iterator
from random import Random
from typing import Any

import torch

from asft_kernels.data import BadRow, Pair, PairTokenizer, parse_pair
from asft_kernels.data_commands.fields import whole
from asft_kernels.data_commands.report import Report
from asft_kernels.data_commands.stream import run_stream
from asft_kernels.errors import InputError
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.models.generation import TransformersGenerator
from asft_kernels.models.loading import fitted_length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub name of the language model that writes")
    parser.add_argument("--token-generate-length", type=whole(1), default=256, help="tokens of a segment")
    parser.add_argument("--max-length", type=whole(2), default=1024, help="tokens up to the segment's end")
    parser.add_argument("--temperature", type=float, default=0.7, help="of what is sampled")
    parser.add_argument("--top-k", type=whole(0), default=50, help="0: off")
    parser.add_argument("--top-p", type=float, default=0.95, help="1: off")
    parser.add_argument("--batch-size", type=whole(1), default=8, help="answers written together")
    parser.add_argument("--seed", type=int, default=0, help="with the line number it decides every draw")


def run(args: argparse.Namespace) -> None:
    regeneration = Regeneration(
        max_length=args.max_length,
        token_generate_length=args.token_generate_length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    try:
        writer = TransformersGenerator.from_pretrained(args.model, batch_size=args.batch_size)
        args.max_length = fitted_length(writer.model.config, args.max_length)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--model: {error}") from error
    run_stream(
        args, lambda rows, report: augmented(rows, report, regeneration, writer, args), batch_size=args.batch_size
    )


def augmented(
    rows: list[tuple[int, dict[str, Any]]],
    report: Report,
    regeneration: Regeneration,
    writer: TransformersGenerator,
    args: argparse.Namespace,
) -> Iterator[list[dict[str, Any]] | BadRow]:
    """For each row its pair; none where the segment came out as it was."""
    encode = PairTokenizer(writer.tokenizer)  # uncut: what lies behind the segment need not fit into the model
    read: list[tuple[Pair, dict[str, list[int]]] | BadRow] = []
    for _, row in rows:
        try:
            pair = parse_pair(row, ("chosen",))
            pair.text("chosen")
            tokens = encode(pair)
            if len(tokens.prompt) >= args.max_length:
                raise BadRow("prompt fills max_length", f"{len(tokens.prompt)} tokens, --max-length {args.max_length}")
            read.append((pair, {"prompt_ids": tokens.prompt, "chosen_ids": tokens.answers["chosen"]}))
        except BadRow as problem:
            read.append(problem)
    usable = [ids for _, ids in (entry for entry in read if not isinstance(entry, BadRow))]
    # By the first line, so that a run that goes on from here draws the same.
    draws = torch.Generator().manual_seed(Random(f"{args.seed}:{rows[0][0]}").getrandbits(63)) if rows else None
    negatives = iter(regeneration.negatives(usable, writer, draws) if draws and usable else [])
    for (line, _), entry in zip(rows, read, strict=True):
        if isinstance(entry, BadRow):
            yield entry
            continue
        pair, ids = entry
        negative = next(negatives)
        if negative == ids["chosen_ids"]:
            report.note(line, "left out, segment written anew as it was")
            yield []
            continue
        chosen, given_back = pair.text("chosen"), _text(writer, ids["chosen_ids"])
        if given_back.strip() != chosen.strip():
            report.note(line, "text that the tokenizer does not give back as it was, also outside the segment")
        before = chosen[: len(chosen) - len(chosen.lstrip())]  # dialogues: a space
        rejected = before + _text(writer, negative).lstrip()
        of_template = _space_behind(given_back)  # ChatML's new line behind the end, which no chosen answer has
        if of_template and rejected.endswith(of_template):
            rejected = rejected.removesuffix(of_template) + _space_behind(chosen)
        row = pair.row(chosen=chosen, rejected=rejected)
        try:
            parse_pair(row)
        except BadRow as problem:
            report.note(line, f"left out, new answer: {problem.kind}")
            yield []
            continue
        yield [row]


def _space_behind(text: str) -> str:
    return text[len(text.rstrip()) :]


def _text(writer: TransformersGenerator, ids: list[int]) -> str:
    return writer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
