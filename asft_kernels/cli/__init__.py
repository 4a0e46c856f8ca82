"""asft: fused preference losses at the command line.

asft COMMAND --help says what each takes. Names of options are TRL's (--model_name_or_path, --dataset_name, ...); `-`
and `_` are the same in them. Exit codes: 0 done, 1 a disk that is full or fails (one line on stderr), a failed check
of doctor, or a bug (with its traceback), 2 what was given cannot be used (one line), 130 stopped by Ctrl-C.
"""

import importlib
from collections.abc import Sequence

from asft_kernels.cli.frame import CommandParser

COMMANDS = {
    "train": "train a model with any objective, on TRL's DPOTrainer",
    "score": "log-probabilities of pairs under reference models, once, ahead of training",
    "data": "make the data that a method needs; asft data --help lists the methods",
    "eval": "accuracy, margins, lengths, BLEU and ROUGE of one or several models, in one report",
    "doctor": "what runs on this machine and with this model, for a bug report",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asft COMMAND ...`.

    Args:
        argv: words after `asft`; None: those of the process.

    Returns:
        The command's exit code.
    """
    import sys

    from asft_kernels import __version__

    words = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    parser = CommandParser(prog="asft", description=__doc__, epilog=f"commands:\n{listed}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("--version", action="version", version=f"asft_kernels {__version__}")
    if not words:
        print(parser.format_help(), file=sys.stderr, end="")
        return 2
    command = parser.parse_args(words[:1]).command
    # Imported only now: `asft --help` answers without torch.
    return importlib.import_module(f"asft_kernels.cli.{command}").main(words[1:])
