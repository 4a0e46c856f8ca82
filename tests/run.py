"""All tests, in the processes that they need, and one summary: what `make test` runs.

    plain      everything on torch and in Triton's interpreter: `python -m pytest`
    compile    kernels cross-compiled for GPUs that need not be there: `-m compile`
    emulated   compiled kernels executed on the CPU: `-m emulated`
    slow       what is thorough and long, of all three kinds: not part of `make test`
    quick      the core without the interpreter: what `make check` runs

The kinds are apart because a kernel decorated for the interpreter cannot be compiled in that process.
Each kind is spread over as many processes as there are processors, one thread each; a process that dies,
as of a wild address in compiled code, is one failure with the test's name, and another takes its place.
The last line is `N passed, N failed, N skipped`. The exit code is 1 if anything failed or a part ran no
test. With CI=true a part that skips everything fails as well, and so does each skipped emulated test, if
the emulator is there.
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
PARTS = {  # name -> pytest's -m, one process group for each
    "quick": ["not slow and not compile and not emulated and not interpreter"],
    "plain": ["not slow and not compile and not emulated"],
    "compile": ["compile and not slow"],
    "emulated": ["emulated and not slow"],
    "slow": ["slow and not compile and not emulated", "compile and slow", "emulated and slow"],
}
DEFAULT = ("plain", "compile", "emulated")
CORE = (  # of the quick part: they import no more than torch
    "autocast", "base_objectives", "batch", "checks", "contract", "edges", "every_objective", "extremes", "functional",
    "fuzz", "layers", "objectives", "plan",
)  # fmt: skip
EMULATOR_DIR = "ASFT_KERNELS_EMULATOR_DIR"
NO_TESTS = 5  # pytest's exit code for an empty selection


@dataclass
class Result:
    """Counts of one part, summed over its runs of pytest."""

    name: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> number of tests
    seconds: float = 0.0

    def fail(self, what: str) -> None:
        self.failed.append(f"{self.name}: {what}")


def run_pytest(result: Result, args: list[str]) -> None:
    """One run of pytest, its output live on the terminal, its counts added to `result`."""
    # The switches are each process's own (tests/conftest.py): none is inherited from the caller.
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    env.setdefault("OMP_NUM_THREADS", "1")
    # Neighbours stay together, for what they have in common is made once; who is done takes over from others.
    spread = ["-p", "xdist", "-n", "logical", "--dist", "worksteal"]
    with tempfile.TemporaryDirectory(prefix="asft-tests-") as folder:
        xml = Path(folder) / "junit.xml"
        command = [*args, *spread, "--durations=5", "--durations-min=5"]
        print(f"\n== {result.name}: python -m pytest {' '.join(map(repr, command))}", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", *command, f"--junitxml={xml}"]
        code = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode
        result.seconds += time.monotonic() - began
        failed_before = len(result.failed)
        cases = report(xml)
    add_counts(result, cases or [])
    if code < 0:
        result.fail(f"the process died of {signal_name(-code)}")
    elif code == NO_TESTS:
        result.fail("no test was collected")
    elif cases is None:
        result.fail(f"pytest ended with code {code} and left no readable report")
    elif code != 0 and len(result.failed) == failed_before:
        result.fail(f"pytest ended with code {code}, though no test failed")


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
    message = skip.get("message") or ""
    if message == "collection skipped":  # a file that skipped itself at import: (path, line, "Skipped: reason")
        path, _, reason = ast.literal_eval(skip.text or "")
        message = f"{Path(path).name}: {reason.removeprefix('Skipped: ')}"
    if skip.get("type") == "pytest.xfail":
        message = f"expected to fail: {message}"
    return " ".join(message.split()) or "no reason given"


def run_part(name: str) -> Result:
    """In CI a part that should have run and did not is a failure, not a line to overlook."""
    result = Result(name)
    files = [f"tests/test_{file}.py" for file in CORE] if name == "quick" else []
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    for selection in PARTS[name]:
        before = result.skipped.copy()
        run_pytest(result, [*files, "-m", selection])
        if in_ci and selection.startswith("emulated") and os.environ.get(EMULATOR_DIR):
            for reason in (result.skipped - before).elements():
                result.fail(f"skipped in CI though {EMULATOR_DIR} is set: {reason}")
            result.skipped = before
    if in_ci and name != "emulated" and result.skipped and not result.passed and not result.failed:
        result.fail("all tests were skipped in CI")
    return result


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
    parser = argparse.ArgumentParser(description="Runs the test suite in parts, with one summary.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: {', '.join(DEFAULT)}")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"part: got {unknown[0]!r}, need one of {', '.join(PARTS)}")
    results = [run_part(part) for part in PARTS if part in (options.parts or DEFAULT)]
    print_summary(results)
    return 1 if any(r.failed for r in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
