"""`asft train`: TRL's names for model, data, LoRA and the Trainer, ours for the objective."""

import logging
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
        quiet()
        from accelerate import PartialState

        from asft_kernels.training.hooks import installed
        from asft_kernels.training.run import run

        arguments = {name: kind.Arguments for name, kind in installed().items() if kind.Arguments is not None}
        data, config, model, *of_methods = parse(argv, arguments)
        result = run(data, config, model, dict(zip(arguments, of_methods, strict=True)))
        PartialState().destroy_process_group()  # threads of gloo may abort a process that ends without
        return 130 if result.stopped else 0

    goes_on = "--resume auto goes on from the last whole checkpoint in --output_dir, or begins again without one"
    return frame.run("asft train", body, stopped=goes_on)


def quiet() -> None:
    """Silences, for this process, what TRL and transformers say of each other and no user could mend."""
    # TRL asks for names that transformers renamed.
    warnings.filterwarnings("ignore", "`.*` is deprecated and will be removed in v6", FutureWarning)
    # Of checkpoints within a second of each other; their order by number is the right one.
    logger = logging.getLogger("transformers.trainer_utils")
    if _worth_saying not in logger.filters:
        logger.addFilter(_worth_saying)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("mtime may not be reliable")


def parse(argv: Sequence[str] | None, of_methods: dict[str, Any]) -> tuple[Any, ...]:
    """(DataArguments, PreferenceConfig, ModelArguments, then one of each method's `Arguments`)."""
    import sys

    from asft_kernels.cli.train_parser import TrainParser

    usage = "asft train --model_name_or_path MODEL --dataset_name DATA [DATA ...] [--config FILE] [option ...]"
    parser = TrainParser(of_methods, prog="asft train", usage=usage, description=DESCRIPTION)
    return parser.read(sys.argv[1:] if argv is None else argv)
