"""The one error for what a user got wrong."""

import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))
INSTALL = 'pip install -e ".[train]" in the checkout'  # what brings the packages of commands and trainers
SHORTAGE = "\nasft_kernels: "  # between an allocator's own text and what we add to it


class InputError(ValueError):
    """An argument, a file or a model that cannot be used.

    The text is one that a command prints as it stands: what was given, what it must be, what to do. Commands end with
    exit code 2 on it; any other exception is a bug and keeps its traceback.
    """


def of_a_library(error: BaseException) -> bool:
    """Whether an error was raised outside of this package's code, as a library's own check of what it was given."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and not frame.tb_frame.f_code.co_filename.startswith(PACKAGE + os.sep)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of torch's has no memory left: a GPU's has a class for that, the CPU's a RuntimeError."""
    torch = sys.modules.get("torch")  # if nothing has imported it, the error is not its own
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
