"""Make the data that a method needs.

asft data rad scored.jsonl conditioned.jsonl

Commands with INPUT and OUTPUT go row by row: they read JSON lines, Parquet, Arrow and folders that datasets saved, and
write JSON lines, plain or gzipped (by the output's name). Memory does not grow with the file, bad rows are named, and
the same command goes on where an interrupted run stopped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asft_kernels.cli import frame
from asft_kernels.locks import only_writer


def parser() -> tuple[frame.CommandParser, dict[str, Any]]:
    """Makes the parser of `asft data`.

    Returns:
        (the parser, command -> the module that runs it).
    """
    from asft_kernels import methods
    from asft_kernels.data_commands import stream

    parser = frame.CommandParser(prog="asft data", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    streams = methods.modules("data_command")
    further = {name: module for of in methods.modules("commands").values() for name, module in of.COMMANDS.items()}
    commands: dict[str, Any] = {**streams, **further}
    for name, module in commands.items():
        text = module.__doc__ or ""
        subparser = subparsers.add_parser(name, help=text.splitlines()[0], description=text)
        if name in streams:
            stream.add_arguments(subparser)
        module.add_arguments(subparser)
    return parser, commands


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asft data`.

    Args:
        argv: its words; None: those of the process.

    Returns:
        The exit code, as `frame.run` says.
    """

    def body() -> int | None:
        frame.require(("tqdm",))
        made, commands = parser()
        args = made.parse_args(argv)
        output = Path(args.output)
        frame.make_folder("output", output.parent)
        with only_writer(output.with_name(f"{output.name}.lock"), "output", output):
            return commands[args.command].run(args)

    return frame.run("asft data", body)
