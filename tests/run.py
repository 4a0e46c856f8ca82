"""All tests, in the processes that they need, and one summary: what `make test` runs.

    plain      everything on torch and in Triton's interpreter: `python -m pytest`
    slow       what takes minutes, of the same kind: `-m slow`
    compile    kernels cross-compiled for GPUs that need not be there: `-m compile`
    emulated   compiled kernels executed on the CPU: `-m emulated`, one process per file

They are apart because a kernel decorated for the interpreter cannot be compiled in that process,
and because a wild address in compiled code kills the process: here that is one failure, with its
file's name. The last line is `N passed, N failed, N skipped`. The exit code is 1 if anything
failed, a process died, or a part ran no test. With CI=true a part that skips everything fails as
well, and so does each skipped emulated test, if the emulator is there.
"""

import argparse
import ast
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("plain", "slow", "compile", "emulated")
EMULATOR_DIR = "ASFT_KERNELS_EMULATOR_DIR"
NO_TESTS = 5  # pytest's exit code for an empty selection


@dataclass
class Result:
    """Counts of one part, summed over its processes."""

    name: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> number of tests
    seconds: float = 0.0

    def fail(self, what: str) -> None:
        self.failed.append(f"{self.name}: {what}")


def run_pytest(result: Result, args: list[str], env: dict[str, str], what: str) -> None:
    """One pytest process, its output live on the terminal, its counts added to `result`."""
    with tempfile.TemporaryDirectory(prefix="asft-tests-") as folder:
        xml = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", *args, f"--junitxml={xml}"]
        print(f"\n== {result.name}: python -m pytest {' '.join(args)}", flush=True)
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode
        result.seconds += time.monotonic() - began
        failed_before = len(result.failed)
        cases = report(xml)
    add_counts(result, cases or [])
    if code < 0:
        result.fail(f"{what}: the process died of {signal_name(-code)}")
    elif code == NO_TESTS:
        result.fail(f"{what}: no test was collected")
    elif cases is None:
        result.fail(f"{what}: pytest ended with code {code} and left no readable report")
    elif code != 0 and len(result.failed) == failed_before:
        result.fail(f"{what}: pytest ended with code {code}, though no test failed")


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def report(xml: Path) -> list[ET.Element] | None:
    """One report's tests; None if there is no report, as after a crash."""
    try:
        return list(ET.parse(xml).iter("testcase"))
    except (OSError, ET.ParseError):
        return None


def add_counts(result: Result, cases: list[ET.Element]) -> None:
    failed: dict[str, None] = {}  # a test whose teardown fails too stands there twice
    for case in cases:
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed["::".join(filter(None, (case.get("classname"), case.get("name"))))] = None
        elif skip is not None:
            result.skipped[skip_reason(skip)] += 1
        else:
            result.passed += 1
    for name in failed:
        result.fail(name)


def skip_reason(skip: ET.Element) -> str:
    message = whole_file_skip(skip)[1] or skip.get("message") or ""
    if skip.get("type") == "pytest.xfail":
        message = f"expected to fail: {message}"
    return " ".join(message.split()) or "no reason given"


def whole_file_skip(skip: ET.Element) -> tuple[str, str]:
    """(path, reason) where a file skipped itself at import, else two empty strings."""
    if skip.get("message") != "collection skipped":
        return "", ""
    try:  # pytest's text for it: (path, line, "Skipped: reason")
        path, _, reason = ast.literal_eval(skip.text or "")
    except (ValueError, SyntaxError, TypeError):
        return "", skip.text or ""
    return path, reason.removeprefix("Skipped: ")


def emulated_files(result: Result, env: dict[str, str]) -> list[str]:
    """Test files that hold emulated tests, by pytest's own collection."""
    print("\n== emulated: looking for its files", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="asft-tests-") as folder:
        xml = Path(folder) / "junit.xml"
        args = ["-m", "emulated", "--collect-only", "-q", f"--junitxml={xml}"]
        found = subprocess.run(
            [sys.executable, "-m", "pytest", *args],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
        )
        whole = [skip for case in report(xml) or [] if (skip := case.find("skipped")) is not None]
    result.seconds += time.monotonic() - began
    if found.returncode not in (0, NO_TESTS):
        print(found.stdout, found.stderr, sep="\n", flush=True)
        result.fail(f"collection ended with code {found.returncode}")
    for skip in whole:  # files that skip themselves at import: pytest lists none of their tests
        path, reason = whole_file_skip(skip)
        if path and "mark.emulated" in Path(path).read_text(encoding="utf-8"):
            result.skipped[f"{Path(path).name}: {reason}"] += 1
    files = (line.split("::")[0] for line in found.stdout.splitlines() if "::" in line)
    return [name for name in dict.fromkeys(files) if (ROOT / name).is_file()]


def run_part(name: str) -> Result:
    result = Result(name)
    # The switches are each process's own (tests/conftest.py): none is inherited from the caller.
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    args = ["--durations=5", "--durations-min=5"]
    if name == "plain":
        run_pytest(result, args, env, "the process")
    elif name in ("slow", "compile"):
        run_pytest(result, ["-m", name, *args], env, "the process")
    elif not env.get(EMULATOR_DIR):
        run_pytest(result, ["-m", "emulated", *args], env, "the process")  # all skip: one is enough
    else:
        files = emulated_files(result, env)
        if not files and not result.failed:
            result.fail("no test was collected")
        for file in files:
            run_pytest(result, [file, "-v", "-m", "emulated", *args], env, file)
    check_skips(result)
    return result


def check_skips(result: Result) -> None:
    """In CI a part that should have run and did not is a failure, not a line to overlook."""
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    has_emulator = bool(os.environ.get(EMULATOR_DIR))
    if not in_ci or (result.name == "emulated" and not has_emulator):
        return
    if result.name == "emulated":
        for reason, count in result.skipped.items():
            for _ in range(count):
                result.fail(f"skipped in CI though {EMULATOR_DIR} is set: {reason}")
        result.skipped.clear()
    elif result.skipped and not result.passed and not result.failed:
        result.fail("all tests were skipped in CI")


def print_summary(results: list[Result]) -> None:
    print(f"\n== summary\n{'part':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for r in results:
        numbers = f"{r.passed:>8}{len(r.failed):>8}{r.skipped.total():>9}{r.seconds:>9.0f}"
        print(f"{r.name:<10}{numbers}")
        if r.skipped and not r.passed and not r.failed:
            print(f"{'':<10}  the whole part was skipped")
    for r in results:
        for reason, count in r.skipped.most_common():
            print(f"skipped {count:>4} ({r.name}): {reason}")
    for line, count in Counter(line for r in results for line in r.failed).items():
        print(f"FAILED {line}" + (f" ({count} times)" if count > 1 else ""))
    print(
        f"{sum(r.passed for r in results)} passed, "
        f"{sum(len(r.failed) for r in results)} failed, "
        f"{sum(r.skipped.total() for r in results)} skipped",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the test suite: four parts, one summary.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"part: got {unknown[0]!r}, need one of {', '.join(PARTS)}")
    results = [run_part(part) for part in PARTS if part in (options.parts or PARTS)]
    print_summary(results)
    return 1 if any(r.failed for r in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
