"""`asft-data`: preference data for methods that need their own, row by row.

asft-data rad scored.jsonl conditioned.jsonl

Reads JSON lines, Parquet, Arrow and folders that datasets saved; writes JSON lines, plain or gzipped
(by the output's name). Memory does not grow with the file, bad rows are named, and the same command
goes on where an interrupted run stopped.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from asft_kernels import methods
from asft_kernels.data_commands import stream
from asft_kernels.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input (said on stderr), 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser("asft-data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands: dict[str, Any] = dict(methods.modules("data_command"))
    for name, command in commands.items():
        text = command.__doc__ or ""
        subparser = subparsers.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        stream.add_arguments(subparser)
        command.add_arguments(subparser)
    args = parser.parse_args(argv)
    if importlib.util.find_spec("tqdm") is None:
        print('asft-data: tqdm: not installed; pip install "asft_kernels[train]"', file=sys.stderr)
        return 2
    try:
        commands[args.command].run(args)
    except InputError as error:
        print(f"asft-data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("asft-data: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
