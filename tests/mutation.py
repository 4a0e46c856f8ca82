"""Mutation testing: one small change of the source at a time, and whether a test of that module fails.

    python -m tests.mutation                                a mutant of every kind and place: days
    python -m tests.mutation --sample 150 --seed 0          so many of them, drawn at random
    python -m tests.mutation --modules batch.py 'objectives/*'     of these modules of asft_kernels alone
    python -m tests.mutation --again                        those that survived, after a new test

Results go to mutation.jsonl line by line; the same command goes on where it was stopped. A mutant is killed if a test
fails or runs longer than three times what all of them take. `EQUIVALENT` has those that change nothing, with reasons.

Each mutant is a file in a copy of the tree, so that Triton and other processes read it too, and its tests run in a
fork of a process that has torch and transformers imported already.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from tests.equivalent_mutants import EQUIVALENT
from tests.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "asft_kernels"
CORE = "contract fuzz functional"
TESTS = {  # modules -> the files of tests/ that are to fail, the quickest to do so first
    "batch.py sequence.py": f"batch base_objectives {CORE} host_reads",
    "functional.py token_loss.py": f"{CORE} base_objectives token_stats",
    "linear_logps.py": f"{CORE} extremes reentrancy autocast token_stats torch_compile",
    "checks.py": "checks contract functional base_objectives batch",
    "heads.py": "heads checks autocast",
    "backends/torch_chunked.py": f"{CORE} extremes accuracy token_stats cost",
    "backends/sharding.py distributed.py": "sharding vocab_parallel ranks",
    "objectives/*": "objectives base_objectives every_objective neighbour_objectives fuzz",
    "kernels/*": "kernels triton_backend functional extremes token_stats noisy_kernels",
    "models/*": "models_fuse models_preference models_check models_refusals models_saving",
}
WITHOUT_TESTS = "__init__.py kernels/configs.py kernels/tile_choice.py models/smollm2.py"  # a GPU's, or a download
QUICK, ALL = (
    "not slow and not compile and not emulated and not interpreter",
    "not slow and not compile and not emulated",
)
PATIENCE, LEAST = 3, 60  # times the tests' own time; seconds
MEMORY = 12 * 2**30  # bytes of a mutant's address space beyond this process's


def tests_of(module: str) -> list[str]:
    """Test files of a path below asft_kernels; none if it has no row in the table."""
    for modules, names in TESTS.items():
        if any(fnmatch(module, pattern) for pattern in modules.split()):
            return [f"tests/test_{name}.py" for name in names.split()]
    return []


def all_mutants(patterns: list[str]) -> list[Mutant]:
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = str(path.relative_to(ROOT / PACKAGE))
        if any(fnmatch(module, x) for x in WITHOUT_TESTS.split()) or not tests_of(module):
            continue
        if any(fnmatch(module, pattern) for pattern in patterns):
            found += mutants(f"{PACKAGE}/{module}", path.read_text())
    return found


def copy_tree(folder: Path) -> None:
    names = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, files: list[str], limit: float | None, selection: str) -> tuple[str, str, float]:
    """("passed", "failed" or "too long", the test that failed, seconds), in a fork."""
    report = folder / "failed.txt"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        _in_child(folder, files, selection, report, caches=limit is None)
    try:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if limit is not None and time.monotonic() - began > limit:
                break
            time.sleep(0.05)
    finally:
        _end(child, running=not ended[0])
    seconds = time.monotonic() - began
    if not ended[0]:
        return "too long", "", seconds
    code = os.waitstatus_to_exitcode(ended[1])
    return "passed" if code == 0 else "failed", report.read_text() if report.exists() else f"code {code}", seconds


def _end(child: int, *, running: bool) -> None:
    """The group: workers of several ranks too."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if running:
        os.waitpid(child, 0)


def _in_child(folder: Path, files: list[str], selection: str, report: Path, *, caches: bool) -> None:
    import pytest

    class First:
        @pytest.hookimpl
        def pytest_runtest_logreport(self, report):
            if report.failed:
                target.write_text(report.nodeid)

    target = report
    here = open(folder / "output.txt", "w")  # noqa: SIM115 (this process's output from here on)
    os.dup2(here.fileno(), 1)
    os.dup2(here.fileno(), 2)
    os.chdir(folder)
    paths = [str(folder), str(folder / "tests")]
    sys.path[:] = paths + [x for x in sys.path if Path(x or ".").resolve() not in (ROOT, ROOT / "tests")]
    os.environ |= {"PYTHONPATH": ":".join(paths)} | ({} if caches else {"PYTHONDONTWRITEBYTECODE": "1"})
    sys.dont_write_bytecode = not caches  # a stale .pyc would stand for a mutant of the same length and second
    _limit_memory()
    for name in [x for x in sys.modules if x.split(".")[0] == "tests"]:
        del sys.modules[name]
    quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of what the parent has imported
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *quiet, "-m", selection]
    for file in files:  # one by one: those after a failure are not even collected
        code = pytest.main([*options, file], plugins=[First()])
        if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            break
    else:
        code = 0
    here.flush()
    os._exit(int(code))


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)


def written(out: Path) -> dict[tuple[str, str, str], dict]:
    """The last result of each mutant; half a last line is dropped."""
    results = {}
    for line in out.read_text().splitlines(keepends=True) if out.exists() else []:
        if line.endswith("\n"):
            row = json.loads(line)
            results[row["path"], row["before"], row["after"]] = row
    return results


def run(chosen: list[Mutant], out: Path) -> None:
    """Adds a line to out for each."""
    os.environ["TRITON_INTERPRET"] = "1"
    import torch  # once, for all forks
    import transformers  # noqa: F401
    import triton  # noqa: F401

    torch.use_deterministic_algorithms(True)  # as conftest.py: it imports seconds of modules
    torch.use_deterministic_algorithms(False)

    baselines: dict[tuple[str, ...], float] = {}
    with tempfile.TemporaryDirectory(prefix="asft-mutation-") as name, out.open("a") as lines:
        folder = Path(name)
        copy_tree(folder)
        for mutant in tqdm(chosen, desc="mutants", unit="mutant"):
            selection = ALL if "/kernels/" in mutant.path else QUICK
            files = [x for x in tests_of(mutant.path.removeprefix(f"{PACKAGE}/")) if (folder / x).exists()]
            if tuple(files) not in baselines:
                ended, failed, seconds = run_tests(folder, files, None, selection)
                if ended != "passed":
                    said = (folder / "output.txt").read_text()[-4000:]
                    raise SystemExit(f"{said}\nmutation: {failed} fails without a mutant; mend that first")
                baselines[tuple(files)] = seconds
            target = folder / mutant.path
            original = target.read_text()
            for stale in target.parent.glob(f"__pycache__/{target.stem}.*"):
                stale.unlink()
            target.write_text(mutant.source)
            limit = max(LEAST, PATIENCE * baselines[tuple(files)])
            ended, failed, seconds = run_tests(folder, files, limit, selection)
            target.write_text(original)
            row = {
                "path": mutant.path, "line": mutant.line, "kind": mutant.kind, "before": mutant.before,
                "after": mutant.after, "result": "survived" if ended == "passed" else "killed",
                "by": failed if ended == "failed" else ended, "seconds": round(seconds, 1),
            }  # fmt: skip
            lines.write(json.dumps(row) + "\n")
            lines.flush()


def print_report(rows: list[dict]) -> None:
    """Counts by folder, and what survived."""
    counts: dict[str, Counter] = {}
    left = []
    for row in rows:
        module = row["path"].removeprefix(f"{PACKAGE}/")
        result = row["result"]
        if result == "survived" and (row["path"], row["before"], row["after"]) in EQUIVALENT:
            result = "equivalent"
        elif result == "survived":
            left.append(row)
        for name in (module.split("/")[0], "all"):
            counts.setdefault(name, Counter())[result] += 1
    print(f"{'':<20}{'mutants':>8}{'killed':>8}{'survived':>10}{'equivalent':>12}{'killed, %':>11}")
    for name, of in sorted(counts.items(), key=lambda x: x[0] == "all"):
        share = 100 * of["killed"] / max(1, of.total() - of["equivalent"])
        print(f"{name:<20}{of.total():>8}{of['killed']:>8}{of['survived']:>10}{of['equivalent']:>12}{share:>11.1f}")
    for row in left:
        print(f"\n{row['path']}:{row['line']} survived\n-   {row['before']}\n+   {row['after']}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Changes the source in one place at a time and runs its tests.")
    parser.add_argument(
        "--modules", nargs="+", default=["*"], metavar="PATTERN", help="below asft_kernels; default all"
    )
    parser.add_argument("--sample", type=int, help="so many, drawn at random; default all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default 0")
    parser.add_argument("--again", action="store_true", help="run those that survived again")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"), help="default mutation.jsonl")
    options = parser.parse_args()
    chosen = all_mutants(options.modules)
    if not chosen:
        parser.error(
            f"modules: no mutant of {' '.join(options.modules)}, need paths below {PACKAGE} with tests in TESTS"
        )
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    chosen = [x for x in chosen if x.compiles()]
    done = written(options.out)
    waiting = [
        x for x in chosen
        if x.key not in done or (options.again and done[x.key]["result"] == "survived" and x.key not in EQUIVALENT)
    ]  # fmt: skip
    try:
        run(waiting, options.out)
    except KeyboardInterrupt:
        print("\nmutation: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    done = written(options.out)
    print_report([done[x.key] for x in chosen if x.key in done])
    return 0


if __name__ == "__main__":
    sys.exit(main())
