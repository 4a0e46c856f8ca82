"""The parser of a training command: --help shows what a run is likely to need, --help-all every option."""

import argparse
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from asft_kernels.train.arguments import RunArguments

# Of the Trainer's 120 options.
USUAL = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "bf16", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit",
    "logging_steps", "report_to", "seed",
)  # fmt: skip


class HelpAll(argparse.Action):
    """Prints what --help leaves out, too."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        for action, text in parser.left_out:  # type: ignore[attr-defined]
            action.help = text
        parser.print_help()
        parser.exit()


def training_parser(job: Any, *, prog: str, description: str | None) -> HfArgumentParser:
    """job: a dataclass of the command's own arguments, all of which --help shows; the others are RunArguments."""
    kinds: Any = [job, RunArguments]
    parser = HfArgumentParser(
        kinds, prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--help-all: also the other options of transformers.TrainingArguments, all of which it takes.",
    )  # fmt: skip
    shown = {"help", *USUAL, *(field.name for field in fields(job))}
    hidden = [a for a in parser._actions if a.dest.removeprefix("no_") not in shown]
    vars(parser)["left_out"] = [(action, action.help) for action in hidden]
    for action in hidden:
        action.help = argparse.SUPPRESS
    parser.add_argument("--help-all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help="every option, and exit")
    return parser
