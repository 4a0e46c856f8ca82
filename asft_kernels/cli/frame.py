"""How every command reads its options, and the one way in which it fails."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from asft_kernels.errors import INSTALL, SHORTAGE, InputError, is_out_of_memory

# What the train extra brings. Any other module that is missing is a bug.
OF_TRAIN = (
    "accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib", "numpy", "peft", "pyarrow", "rouge_score",
    "sacrebleu", "safetensors", "tokenizers", "tqdm", "transformers", "trl",
)  # fmt: skip

DISK = {errno.ENOSPC: "is full", errno.EDQUOT: "is full for this user", errno.EFBIG: "takes no file of that size",
        errno.EIO: "fails"}  # fmt: skip
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.ELOOP,
             errno.ENAMETOOLONG)  # fmt: skip


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Text as it stands, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, reads `-` and `_` in the names of options alike, and fails in one line.

    Args:
        options: those of ArgumentParser.
    """

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": _Help, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        declared = {_dashes(option): option for action in self._actions for option in action.option_strings}
        for index, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                words[index] = declared.get(_dashes(name), name) + equals + value
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _dashes(option: str) -> str:
    return option.replace("_", "-")


def positive(text: str) -> int:
    """Reads an option's value that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least 1")
    return int(text)


def make_folder(argument: str, folder: str | Path) -> None:
    """Makes the folder of a command's output, ahead of any work.

    Args:
        argument: what the error calls it, such as "--output_dir".
        folder: may be there already.

    Raises:
        InputError: it cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{argument}: {folder} is no folder and cannot be made one ({error.strerror})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{argument}: {folder} cannot be written to; name another folder")


def add_model_and_data(parser: argparse.ArgumentParser, *, several_models: bool = False) -> None:
    """Adds the options of a model and of preference pairs, under TRL's names and shorter ones.

    Args:
        parser: gets `model` (a list with several_models), `data` (a list) and `dtype`.
        several_models: whether `--model` may be given more than once.
    """
    times: dict[str, Any] = {"action": "append"} if several_models else {}
    once = "; once for each model" if several_models else ""
    parser.add_argument(
        "--model_name_or_path", "--model", dest="model", required=True, metavar="MODEL",
        help=f"folder or hub name of a causal language model{once}", **times,
    )  # fmt: skip
    parser.add_argument(
        "--dataset_name", "--data", dest="data", required=True, nargs="+", metavar="DATA",
        help="preference pairs: files (JSON lines, JSON, gzip, Parquet, Arrow), folders or hub names, one or several",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "auto"], default="float32", help="of the weights; auto: as stored"
    )


def run(command: str, body: Callable[[], int | None], *, stopped: str = "the same command goes on from there") -> int:
    """Runs a command and turns what the user can mend into one line on stderr.

    Args:
        command: its name, as "asft score", which begins the line.
        body: does the work; returns the exit code, None for 0.
        stopped: what Ctrl-C leaves, and how to go on.

    Returns:
        The exit code: the body's own; 2 for an InputError, a package of the train extra that is missing, a file that
        may not be read or written, and memory that is used up; 1 for a disk that is full or fails; 130 for Ctrl-C.

    Raises:
        Exception: any other, which is a bug: it keeps its traceback, and Python exits with 1.
    """
    try:
        return body() or 0
    except InputError as error:
        return _fail(command, str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OF_TRAIN:
            raise
        return _fail(command, f"{package}: not installed; {INSTALL}")
    except KeyboardInterrupt:
        return _fail(command, f"stopped; {stopped}", 130)
    except Exception as error:
        if is_out_of_memory(error):
            advice = str(error).partition(SHORTAGE)[2] or "try a smaller batch"
            return _fail(command, f"the device has too little memory ({first_line(error)}); {advice}")
        if _is_of_another_rank(error):
            return _fail(command, "another rank ended, which says why")
        if disk := _of_disk(error):
            return _fail(command, f"{disk}; what was complete is kept: make room, and {stopped}", 1)
        if isinstance(error, OSError) and error.errno in FORBIDDEN and error.filename is not None:
            return _fail(command, f"{error.filename}: {error.strerror}; name another, or mend it")
        raise


def _of_disk(error: Exception) -> str:
    """What is wrong with the disk, "" for an error of another kind. torch and safetensors raise no OSError."""
    text = first_line(error)
    if isinstance(error, OSError):
        number = error.errno
    elif type(error).__name__ == "SafetensorError":
        number = next((number for number in DISK if f"(os error {number})" in text), None)
    else:  # torch does not say why
        writing = isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text)
        number = errno.ENOSPC if writing else None
    return f"the disk {DISK[number]} ({text})" if number in DISK else ""


def _is_of_another_rank(error: Exception) -> bool:
    """gloo's error where a rank that it waits for has ended."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "by peer" in str(error)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fail(command: str, text: str, code: int = 2) -> int:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # as torchrun and accelerate say
    print(f"{command}{' [rank ' + os.environ.get('RANK', '?') + ']' if several else ''}: {text}", file=sys.stderr)
    return code


def require(packages: Iterable[str]) -> None:
    """Imports packages of the train extra now, before any work.

    Raises:
        ModuleNotFoundError: naming the first that is missing, as `run` expects it.
    """
    for package in packages:
        __import__(package)
