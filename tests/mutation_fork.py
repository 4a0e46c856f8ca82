"""Runs test files in a fork of this process: the interpreter and its imports are there already."""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 12 * 2**30  # bytes of a fork's address space beyond this process's
Lines = dict[str, list[list[str | int]]]  # test -> [path, line] of what it ran, of the files asked for


@dataclass
class Run:
    """How tests went: "passed", "failed" or "too long"; the test that failed; seconds of processor time and of wall
    time; what each test ran, if asked for."""

    ended: str
    failed: str
    processor: float
    wall: float
    lines: Lines


class _Plugin:
    """Leaves out what is not wanted, notes the test that fails, and the lines of `traced` files that each test runs."""

    def __init__(self, folder: Path, wanted: Collection[str] | None, traced: Collection[str]) -> None:
        self.folder, self.wanted, self.traced = folder, wanted, {str(folder / x): x for x in traced}
        self.lines: dict[str, set[tuple[str, int]]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is not None:
            items[:] = [item for item in items if item.nodeid in self.wanted]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            (self.folder / "failed.txt").write_text(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        if not self.traced:
            return (yield)
        self.now = self.lines.setdefault(item.nodeid, set())
        sys.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename in self.traced else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.now.add((self.traced[frame.f_code.co_filename], frame.f_lineno))
        return self._line


def run_tests(
    folder: Path, files: Collection[str], selection: str, *, limit: tuple[float, float] | None = None,
    wanted: Collection[str] | None = None, traced: Collection[str] = (),
) -> Run:  # fmt: skip
    """Runs files of a copy of the tree up to the first failure.

    Args:
        folder: The copy.
        files: Of tests, in this order; each is collected only once those before it have passed.
        selection: pytest's -m.
        limit: Seconds of processor time, and of wall time; None for a run that may also write .pyc files.
        wanted: Names of tests, the others are left out; None for all.
        traced: Paths whose lines are noted.
    """
    for name in ("failed.txt", "lines.json"):
        (folder / name).unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        try:
            _in_child(folder, files, selection, limit, _Plugin(folder, wanted, traced))
        finally:
            os._exit(70)
    ended: Any = (0, 0, None)
    try:
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if limit is not None and time.monotonic() - began > limit[1]:
                break
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # workers of several ranks too
        if not ended[0]:
            os.waitpid(child, 0)
    wall = time.monotonic() - began
    if not ended[0]:
        return Run("too long", "", wall, wall, {})
    code, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
    processor = used.ru_utime + used.ru_stime
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Run("too long", "", processor, wall, {})
    failed = folder / "failed.txt"
    name = failed.read_text() if failed.exists() else f"code {code}"
    lines = json.loads((folder / "lines.json").read_text()) if code == 0 and traced else {}
    return Run("failed" if code else "passed", name, processor, wall, lines)


def _in_child(
    folder: Path, files: Collection[str], selection: str, limit: tuple[float, float] | None, plugin: _Plugin
) -> None:
    here = open(folder / "output.txt", "w")  # noqa: SIM115 (this process's output from here on)
    for number in (1, 2):
        os.dup2(here.fileno(), number)
    os.chdir(folder)
    paths = [str(folder), str(folder / "tests")]
    sys.path[:] = paths + [x for x in sys.path if Path(x or ".").resolve() not in (ROOT, ROOT / "tests")]
    os.environ["PYTHONPATH"] = ":".join(paths)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    if limit is not None:
        # A stale .pyc would stand for a mutant of the same length, written in the same second.
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        seconds = int(limit[0]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    for name in [x for x in sys.modules if x.split(".")[0] == "tests"]:
        del sys.modules[name]
    quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of what this process has imported
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *quiet, "-m", selection]
    code = 0
    for file in files:
        code = int(pytest.main([*options, file], plugins=[plugin]))
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            code = 0
        if code:
            break
    if plugin.traced:
        (folder / "lines.json").write_text(json.dumps({test: sorted(x) for test, x in plugin.lines.items()}))
    here.flush()
    os._exit(code)
