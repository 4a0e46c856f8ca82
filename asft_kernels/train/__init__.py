"""Fine-tune a causal language model on preference pairs, with ASFT or another objective.

asft-train --model FOLDER --data pairs.jsonl --eval-every-nth 8 --output-dir run
"""

# parser, arguments -> run (data, head check, evaluation) -> trainer (transformers.Trainer) -> metrics, plot
import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("transformers", "datasets", "accelerate", "matplotlib")


def missing_extra(needed: Sequence[str] = NEEDED) -> str | None:
    """None if everything that the `train` extra brings is installed, else what to say."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    names = ", ".join(missing)
    return f'{names}: not installed, needed for training; pip install "asft_kernels[train]"'


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input (said on stderr), 130 stopped by Ctrl-C."""
    if problem := missing_extra():
        print(f"asft-train: {problem}", file=sys.stderr)
        return 2
    from asft_kernels.errors import InputError
    from asft_kernels.train.arguments import JobArguments
    from asft_kernels.train.parser import training_parser
    from asft_kernels.train.run import run

    parser = training_parser(JobArguments, prog="asft-train", description=__doc__)
    try:
        job, args = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:  # ours, and those of TrainingArguments about devices and dtypes
        print(f"asft-train: {error}", file=sys.stderr)
        return 2
    try:
        return 130 if run(job, args).stopped else 0
    except InputError as error:
        print(f"asft-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "asft-train: interrupted; checkpoints in --output-dir stay, --resume goes on from them",
            file=sys.stderr,
        )
        return 130
