"""Mutation testing: one small change of the source at a time, and whether a test of that module fails.

    python -m tests.mutation                                a mutant of every kind and place: days
    python -m tests.mutation --sample 150 --seed 0          so many of them, drawn at random
    python -m tests.mutation --modules batch.py 'objectives/*'     of these modules of asft_kernels alone
    python -m tests.mutation --again                        those that survived, after a new test
    python -m tests.mutation --show                         what is written, and no run

Results go to mutation.jsonl line by line; the same command goes on where it was stopped. A mutant is killed if a test
fails or takes five times the processor time of all of them. `EQUIVALENT` has those that change nothing, with reasons.

Each mutant is a file in a copy of the tree, so that Triton and other processes read it too. Of the module's test files
(`TESTS`) those tests run that run the mutant's line; all of them if none does, as of lines that run at import.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from tests.equivalent_mutants import EQUIVALENT
from tests.mutants import Mutant, mutants
from tests.mutation_fork import ROOT, Lines, run_tests

PACKAGE = "asft_kernels"
CORE = "contract edges fuzz functional"
TESTS = {  # modules -> the files of tests/ that are to fail, the quickest to do so first
    "core/batch.py core/sequence.py core/linear_logps.py functional.py token_loss.py": (
        f"batch {CORE} base_objectives every_objective autocast extremes token_stats ranks"
    ),
    "core/checks.py": "checks contract functional base_objectives batch",
    "core/heads.py": "heads checks autocast sharding vocab_parallel sharded_data_parallel",
    "backends/torch_chunked.py": f"{CORE} extremes token_stats distributed_schedules accuracy cost",
    "backends/sharding.py core/distributed.py": "sharding vocab_parallel",
    "objectives/asft_fused.py": "edges kernels every_objective functional",
    "objectives/*": "every_objective objectives base_objectives neighbour_objectives edges fuzz",
    "kernels/*": "kernels triton_backend functional extremes token_stats noisy_kernels",
    "models/exact.py models/shard.py": "models_fuse models_check sharded_data_parallel models_ranks",
    "models/loading.py": "models_saving cli score",
    "models/*": "models_fuse models_preference models_check models_refusals models_saving",
}
WITHOUT_TESTS = "__init__.py kernels/configs.py kernels/tile_choice.py models/smollm2.py"  # a GPU's, or a download
INTERPRETED = ("asft_kernels/kernels/", "asft_kernels/objectives/asft_fused.py")
ALL = "not slow and not compile and not emulated"  # pytest's -m, for those
QUICK = f"{ALL} and not interpreter"
PATIENCE, LEAST = 5, 60  # times the tests' own time; seconds


def files_for(module: str) -> list[str]:
    """Test files of a path below asft_kernels; none if it has no row in the table."""
    for patterns, names in TESTS.items():
        if any(fnmatch(module, pattern) for pattern in patterns.split()):
            return [f"tests/test_{name}.py" for name in names.split()]
    return []


def modules(patterns: list[str]) -> list[str]:
    """Paths of the files below asft_kernels that have tests here and fit a pattern."""
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = str(path.relative_to(ROOT / PACKAGE))
        left_out = any(fnmatch(name, x) for x in WITHOUT_TESTS.split()) or not files_for(name)
        if not left_out and any(fnmatch(name, pattern) for pattern in patterns):
            found.append(name)
    return found


def copy_tree(folder: Path) -> None:
    names = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(names, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def written(out: Path) -> dict[tuple[str, str, str], dict]:
    """The last result of each mutant; half a last line is dropped."""
    results = {}
    for line in out.read_text().splitlines(keepends=True) if out.exists() else []:
        if line.endswith("\n"):
            row = json.loads(line)
            results[row["path"], row["before"], row["after"]] = row
    return results


def wanted_for(mutant: Mutant, lines: Lines) -> set[str] | None:
    """The tests that run the mutant's line; None for all, if none does."""
    return {test for test, ran in lines.items() if [mutant.path, mutant.line] in ran} or None


def run(chosen: list[Mutant], out: Path) -> None:
    """Adds a line to out for each."""
    os.environ["TRITON_INTERPRET"] = "1"
    import hypothesis  # noqa: F401 (once, for all forks)
    import torch
    import transformers  # noqa: F401
    import triton  # noqa: F401

    torch.use_deterministic_algorithms(True)  # as conftest.py: it imports seconds of modules
    torch.use_deterministic_algorithms(False)
    baselines: dict[tuple[str, ...], tuple[float, Lines]] = {}
    with tempfile.TemporaryDirectory(prefix="asft-mutation-") as name, out.open("a") as rows:
        folder = Path(name)
        copy_tree(folder)
        for mutant in tqdm(chosen, desc="mutants", unit="mutant"):
            selection = ALL if mutant.path.startswith(INTERPRETED) else QUICK
            files = [x for x in files_for(mutant.path.removeprefix(f"{PACKAGE}/")) if (folder / x).exists()]
            if tuple(files) not in baselines:
                alike = {x.path for x in chosen if files_for(x.path.removeprefix(f"{PACKAGE}/"))[:1] == files[:1]}
                before = run_tests(folder, files, selection, traced=alike)
                if before.ended != "passed":
                    said = (folder / "output.txt").read_text()[-4000:]
                    raise SystemExit(f"{said}\nmutation: {before.failed} fails without a mutant; mend that first")
                baselines[tuple(files)] = before.processor, before.lines
            seconds, lines = baselines[tuple(files)]
            wanted = wanted_for(mutant, lines)
            reached = files if wanted is None else [x for x in files if any(t.split("::")[0] == x for t in wanted)]
            target = folder / mutant.path
            original = target.read_text()
            for stale in target.parent.glob(f"__pycache__/{target.stem}.*"):
                stale.unlink()
            target.write_text(mutant.source)
            limit = max(LEAST, PATIENCE * seconds)
            after = run_tests(folder, reached, selection, limit=(limit, 10 * limit), wanted=wanted)
            target.write_text(original)
            row = {
                "path": mutant.path, "line": mutant.line, "kind": mutant.kind, "before": mutant.before,
                "after": mutant.after, "result": "survived" if after.ended == "passed" else "killed",
                "by": after.failed if after.ended == "failed" else after.ended,
                "tests": None if wanted is None else len(wanted), "seconds": round(after.processor, 1),
            }  # fmt: skip
            rows.write(json.dumps(row) + "\n")
            rows.flush()


def print_report(rows: list[dict]) -> None:
    """Counts by folder, and what survived."""
    counts: dict[str, Counter] = {}
    left = []
    for row in rows:
        result = row["result"]
        if result == "survived" and (row["path"], row["before"], row["after"]) in EQUIVALENT:
            result = "equivalent"
        elif result == "survived":
            left.append(row)
        for name in (row["path"].removeprefix(f"{PACKAGE}/").split("/")[0], "all"):
            counts.setdefault(name, Counter())[result] += 1
    print(f"{'':<20}{'mutants':>8}{'killed':>8}{'survived':>10}{'equivalent':>12}{'killed, %':>11}")
    for name, of in sorted(counts.items(), key=lambda x: x[0] == "all"):
        share = 100 * of["killed"] / max(1, of.total() - of["equivalent"])
        print(f"{name:<20}{of.total():>8}{of['killed']:>8}{of['survived']:>10}{of['equivalent']:>12}{share:>11.1f}")
    for row in left:
        print(f"\n{row['path']}:{row['line']} survived\n-   {row['before']}\n+   {row['after']}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Changes the source in one place at a time and runs its tests.")
    parser.add_argument("--modules", nargs="+", default=["*"], metavar="PATTERN", help="of paths; default all")
    parser.add_argument("--sample", type=int, help="so many, drawn at random; default all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default 0")
    parser.add_argument("--again", action="store_true", help="run those that survived again")
    parser.add_argument("--show", action="store_true", help="report what is written, run nothing")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"), help="default mutation.jsonl")
    options = parser.parse_args()
    if options.show:
        print_report(list(written(options.out).values()))
        return 0
    names = modules(options.modules)
    chosen = [x for name in names for x in mutants(f"{PACKAGE}/{name}", (ROOT / PACKAGE / name).read_text())]
    if not chosen:
        got = " ".join(options.modules)
        parser.error(f"modules: no mutant of {got}, need paths below {PACKAGE} that TESTS has tests for")
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
