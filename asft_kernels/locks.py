"""One process at a time writes an output: the second one is told who does."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from asft_kernels.errors import InputError


@contextmanager
def only_writer(lock: Path, argument: str, output: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a file until the block ends or the process does, kill -9 included.

    The lock is POSIX's of a whole process: no forked worker that outlives it keeps it, and several threads share it.

    Args:
        lock: the file; made here and removed at the end. Its folder must be there.
        argument: what the error calls the output, such as "--output_dir".
        output: the file or folder that is written.

    Raises:
        InputError: another process holds it, with that process in the message; or the file cannot be made.
    """
    file = _locked(lock, argument, output)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
        file.close()


def _locked(lock: Path, argument: str, output: str | os.PathLike[str]) -> TextIO:
    while True:
        try:
            file = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(f"{argument}: {output} cannot be written to ({error.strerror}); name another") from error
        if not _taken(file):
            holder = file.read(200).strip() or "another process"
            file.close()
            raise InputError(f"{argument}: {output} is being written by {holder}; wait for it, or name another")
        try:
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
        except FileNotFoundError:
            same = False
        if same:
            break
        file.close()  # its holder removed it between opening and locking
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
    file.flush()
    return file


def _taken(file: TextIO) -> bool:
    """False: another process has it. Where nothing can be locked, everyone takes it."""
    try:
        import fcntl
    except ImportError:  # no POSIX
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # any other: a file system without locks
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
