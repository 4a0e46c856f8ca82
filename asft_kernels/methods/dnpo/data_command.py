"""Dynamic sample labelling: a human and a generated answer with scores -> a pair, the better one chosen.

arXiv 2502.05400, Eq. 2. A row has a prompt, both answers and a score for each, higher for better, from
whatever judges them (the paper: a language model). The row written has prompt, chosen, rejected and
chosen_from, "human" or "generated". Equal scores: the human answer. Equal answers are left out.
"""

import argparse
from typing import Any

from asft_kernels.data import parse_pair
from asft_kernels.data_commands.fields import field_of, finite
from asft_kernels.data_commands.report import Report
from asft_kernels.data_commands.stream import by_row, run_stream
from asft_kernels.methods.dnpo.labelling import label_pair

FIELDS = ("prompt", "human", "generated", "human_score", "generated_score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}-field", default=name, metavar="NAME", help="its column")


def run(args: argparse.Namespace) -> None:
    run_stream(args, by_row(lambda line, row, report: labelled(line, row, report, args)))


def labelled(line: int, row: dict[str, Any], report: Report, args: argparse.Namespace) -> list[dict[str, Any]]:
    human, generated = (field_of(row, name) for name in (args.human_field, args.generated_field))
    scores = [finite(field_of(row, name), name) for name in (args.human_score_field, args.generated_score_field)]
    prompt = {"prompt": row[args.prompt_field]} if args.prompt_field in row else {}
    pair = parse_pair({**prompt, "chosen": human, "rejected": generated})
    if pair.answers["chosen"] == pair.answers["rejected"]:
        report.note(line, "left out, both answers are the same")
        return []
    chosen, rejected, source = label_pair(human, generated, *scores)
    report.note(line, "the generated answer is the better one", int(source == "generated"))
    report.note(line, "equal scores, the human answer is chosen", int(scores[0] == scores[1]))
    return [{**prompt, "chosen": chosen, "rejected": rejected, "chosen_from": source}]
