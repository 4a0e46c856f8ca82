"""How much one row, one file and one chat template may take: more is a bad row, or refused, before it is held."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ROW_BYTES = 4 << 20  # of a line, or of a row of Parquet, Arrow and arrays; tokenizers take 200 times that
LINE_BYTES = 1 << 30  # of a line that is read over: beyond it the file is none of rows
BAD_ROWS = 100_000  # unreadable ones or empty lines, one after another
ARRAY_BYTES = 1 << 30  # of a JSON array, which is in memory as a whole
GZIP_TIMES = 200  # as large as the file on the disk, of ZIP and Parquet too; JSON is some 3 to 20 times
GZIP_BYTES = 64 << 20  # unzipped, up to which any number of times will do
TEMPLATE_SECONDS = 10.0  # for one chat


class TooLarge(ValueError):
    """A file that is not read on: it holds more than a file of rows would."""


class SlowTemplate(Exception):
    """A chat template that had not ended after TEMPLATE_SECONDS."""


def require_ratio(unzipped: int, on_disk: int) -> None:
    """Raises TooLarge for compressed data that grows as only a file made to fill memory does."""
    if unzipped > max(GZIP_BYTES, GZIP_TIMES * on_disk):
        raise TooLarge(
            f"unpacked it is more than {GZIP_TIMES} times as large, over {GZIP_BYTES:,} bytes, as what is made to fill "
            "memory; need it unpacked, or less repetitive"
        )


@contextmanager
def rendering() -> Iterator[None]:
    """Ends a chat template that renders for longer than TEMPLATE_SECONDS; the tokenizer after it may take longer.

    In the main thread of a process on POSIX, where an alarm can interrupt; elsewhere there is no limit.

    Raises:
        SlowTemplate: it would have gone on.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def in_time(number: int, frame: Any) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<template>":  # what jinja compiles is called so
                raise SlowTemplate(f"the chat template takes more than {TEMPLATE_SECONDS:g} s for one chat; need one "
                                   "that ends, or rows without that chat")  # fmt: skip
            frame = frame.f_back

    handler = signal.signal(signal.SIGALRM, in_time)
    before = signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)
