"""`asft train`: TRL's names for model, data, LoRA and the Trainer, ours for the objective."""

import warnings
from collections.abc import Sequence
from typing import Any

from asft_kernels.cli import frame

DESCRIPTION = """Fine-tune a language model on preference pairs, with ASFT or another objective.

asft train --model_name_or_path FOLDER --dataset_name pairs.jsonl --eval_every_nth 8 --output_dir run
asft train --config run.yaml   # the same names in YAML; `env:` sets environment variables
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asft train`.

    Args:
        argv: its words; None: those of the process.

    Returns:
        The exit code, as `frame.run` says; 130 as well where Ctrl-C ended training with a checkpoint.
    """

    def body() -> int:
        # TRL asks for names that transformers renamed: nothing that a user could mend.
        warnings.filterwarnings("ignore", "`.*` is deprecated and will be removed in v6", FutureWarning)
        from asft_kernels.training.hooks import installed
        from asft_kernels.training.run import run

        arguments = {name: kind.Arguments for name, kind in installed().items() if kind.Arguments is not None}
        data, config, model, *of_methods = parse(argv, arguments)
        result = run(data, config, model, dict(zip(arguments, of_methods, strict=True)))
        return 130 if result.stopped else 0

    return frame.run("asft train", body, stopped="--resume goes on from the last checkpoint in --output_dir")


def parse(argv: Sequence[str] | None, of_methods: dict[str, Any]) -> tuple[Any, ...]:
    """(DataArguments, PreferenceConfig, ModelArguments, then one of each method's `Arguments`)."""
    import argparse
    import sys

    from trl import TrlParser

    from asft_kernels.errors import InputError
    from asft_kernels.training.arguments import DataArguments, ModelArguments
    from asft_kernels.training.config import PreferenceConfig

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Defaults behind each option, the description as it stands."""

    kinds: Any = [DataArguments, PreferenceConfig, ModelArguments, *of_methods.values()]
    parser = TrlParser(kinds, prog="asft train", description=DESCRIPTION, formatter_class=Formatter)
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        return parser.parse_args_and_config(words)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # of TRL's and transformers' own checks of arguments
        raise InputError(str(error)) from error


def _underscored(word: str) -> str:
    """--max-length and --max_length are the same option."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word
