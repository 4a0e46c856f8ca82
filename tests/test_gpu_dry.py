"""benchmarks/gpu.sh with an interpreter that only notes what it is asked: the steps, their order, what is reported.
And the modules that it starts, really run, at tiny size."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Notes its arguments. `python - NAMES` answers which modules are missing; benchmarks.run writes a row; pip lists a
# torch of the machine's own.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$NOTES"
checks() { echo "checks: ${ASFT_BENCHMARK_FAILED_CHECKS:-}" >> "$NOTES"; }
case "$*" in
    "- "*trl*) echo trl ;;
    "- xdist") echo "${NO_XDIST:-}" ;;
    *"Does Triton's interpreter"*) exit "${INTERPRETER_CODE:-0}" ;;
    *"device_slug"*) echo a-gpu ;;
    "-m pytest"*) checks; exit "${PYTEST_CODE:-0}" ;;
    *"pip list --format=freeze"*) printf '%s\\n' torch==9.9+cu999 triton==8.8 Liger_Kernel==1.0 ;;
    *"pip index"*) exit "${INDEX_CODE:-0}" ;;
    "-m benchmarks.run --out"*)
        echo '{}' >> "$4"; checks; [[ "$*" != *tuned* ]] || echo "no stored tile for this problem"
        [ -z "${HANG:-}" ] || { echo $$ > "$HANG.new"; mv "$HANG.new" "$HANG"; sleep 60; } ;;
esac
"""
PARTS = {
    "1": ["environment", "install", "parity", "qwen3", "llama-1b", "peers", "gpu-rest"],
    "2": ["gpu-tests", "kernel-tests", "autotune", "headline", "tuned"],
    "3": ["kernels", "small-n", "launch", "train", "growth"],
}


@pytest.fixture
def dry(tmp_path):
    """Runs the script and returns the commands that it gave to Python."""

    def run(*parts: str, **variables: str) -> list[str]:
        printed, _ = started(tmp_path, *parts, **variables).communicate()
        assert "steps not ok; rows and logs in" in printed
        return noted(tmp_path)

    return run


@pytest.fixture
def repository(tmp_path) -> Path:
    """What the script needs, where it may write into bench_results/."""
    root = tmp_path / "repository"
    (root / "bench_results").mkdir(parents=True)
    (root / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", root / "benchmarks")
    shutil.copy(ROOT / "constraints.txt", root)
    return root


def noted(folder: Path) -> list[str]:
    return (folder / "notes").read_text().splitlines()


def steps(printed: str) -> dict[str, int]:
    """Their names in order, and the limit of each."""
    return {name: int(limit) for name, limit in re.findall(r"^== (\S+) \(at most (\d+) s\)", printed, re.M)}


def results(work: Path) -> dict[str, str]:
    """What the summary says of each step."""
    lines = (line for line in (work / "summary.txt").read_text().splitlines() if re.match(r"\S+ +\d+ s ", line))
    return {line.split()[0]: line.split(maxsplit=3)[3] for line in lines}


def started(folder: Path, *parts: str, root: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """The script with the stub, and with an ncu that does nothing; all that it writes goes into the folder."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in (("python", STUB), ("ncu", "#!/bin/sh\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    own = {
        "DRY_RUN": "1", "PYTHON": str(commands / "python"), "NOTES": str(folder / "notes"), "TMPDIR": str(folder),
        "WORK": str(folder / "work"), "PATH": f"{commands}:{os.environ['PATH']}",
    }  # fmt: skip
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "ASFT_"))}
    return subprocess.Popen(
        [root / "benchmarks" / "gpu.sh", *parts],
        cwd=folder,
        env=inherited | own | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # bash traps none that it was born to ignore
    )


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def archived(out: Path) -> dict[str, str]:
    """Files of the archive, with their text."""
    found = {}
    with tarfile.open(out / "results.tgz") as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is not None:
                found[member.name] = file.read().decode()
    return found


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_running_step_and_the_script(tmp_path, sent):
    hangs, out = tmp_path / "hangs", tmp_path / "out"
    process = started(tmp_path, "2", OUT=str(out), HANG=str(hangs))
    until(hangs.exists)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    work = tmp_path / "work"
    assert f"rows and logs in {work}, all in {out / 'results.tgz'}" in printed
    *_, last = (work / "summary.txt").read_text().splitlines()
    assert (last.split()[0], last.split()[-1]) == ("headline", "interrupted")
    assert last in printed
    assert last in archived(out)["work/summary.txt"]
    assert "== tuned" not in printed
    until(lambda: not Path(f"/proc/{hangs.read_text().strip()}").exists())
    assert not list(tmp_path.glob("tmp.*"))  # the copy is removed
    assert "-- part 2" in (out / "summary.txt").read_text()
    assert not list(out.glob(".*"))


def test_what_there_is_comes_out_while_a_step_runs(tmp_path):
    """Whoever ends the machine meanwhile: after SIGKILL, too, the archive is whole."""
    hangs, out = tmp_path / "hangs", tmp_path / "out"
    process = started(tmp_path, "2", OUT=str(out), HANG=str(hangs), SAVE_SECONDS="0.2")
    until(hangs.exists)
    until(lambda: (out / "rows.jsonl").exists())
    assert archived(out)["work/rows.jsonl"] == "{}\n"
    process.kill()
    assert "work/logs/gpu-tests.log" in archived(out)
    for left in Path("/proc").glob("[0-9]*"):  # its saver and its step, which nobody else ends
        try:
            mine = f"WORK={tmp_path / 'work'}\0".encode() in (left / "environ").read_bytes()
        except OSError:
            continue
        if mine and int(left.name) != os.getpid():
            os.kill(int(left.name), signal.SIGKILL)
    process.communicate(timeout=30)


def test_the_parts_in_the_order_of_their_worth(tmp_path, repository):
    """All three, in ten minutes each: every limit, what may follow an interrupt, and the looks between."""
    process = started(tmp_path, root=repository, DRY_RUN="0")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    limits = steps(printed)
    assert list(limits) == [*PARTS["1"], *PARTS["2"], *PARTS["3"], "report"]
    script = (repository / "benchmarks" / "gpu.sh").read_text()
    grace, look = (int(re.findall(rf"^{name}=(\d+)", script, re.M)[0]) for name in ("GRACE", "LOOK"))
    looks = 2  # for modules; in part 1 again after the installation, in the others for the device's name at the end
    for part, names in PARTS.items():
        ends = [*names, *["report"] * (part != "1")]
        assert sum(limits[name] + grace for name in ends) + looks * (look + 1) <= 570, part
    assert script.count('timeout -k 1 "$LOOK"') == 2  # of `missing` and of the name
    assert 'timeout -s INT -k "$GRACE" "$limit"' in script
    asked = noted(tmp_path)
    rows = tmp_path / "work" / "rows.jsonl"
    for contestants, sets in (
        ("", "headline"),
        ("--contestants triton, tuned -- ", "headline"),
        ("", "headline growth-n"),
    ):
        assert f"-m benchmarks.run --out {rows} --limit 30 {contestants}{sets}" in asked
    (published,) = (repository / "bench_results").iterdir()
    assert published.name.endswith("-a-gpu.jsonl")
    assert published.read_text() == rows.read_text()
    assert asked[-1] == "-m benchmarks.report --write"
    assert not any(line.removeprefix("checks: ") for line in asked if line.startswith("checks: "))


def test_the_dry_run_takes_the_same_steps(tmp_path):
    """Of parts that come one by one, too; it installs nothing, and what it draws is in the archive."""
    out = tmp_path / "an out"
    for part, names in PARTS.items():
        process = started(tmp_path, part, OUT=str(out))
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        assert list(steps(printed)) == [name for name in names if name != "install"] + ["report"] * (part != "1")
        if part == "1":
            assert results(out)["report"] == "left out: no rows of benchmarks.run, which parts 2 and 3 measure"
    (asked,) = {line for line in noted(tmp_path) if "benchmarks.report" in line}
    rows = tmp_path / "work" / "rows.jsonl"
    assert asked.startswith(f"-m benchmarks.report --out {tmp_path / 'work' / 'report'} {rows} ")
    assert rows.read_text() == (out / "rows.jsonl").read_text() == "{}\n" * 3
    kept = archived(out)
    assert kept["work/rows.jsonl"] == "{}\n" * 3
    assert {f"work/logs/{name}.log" for name in ("parity", "headline", "growth")} <= kept.keys()
    assert {result for name, result in results(out).items() if name != "modules"} == {"ok"}


def test_a_part_goes_on_from_the_one_before(tmp_path, dry):
    """Its failed checks mark the later rows, until they pass; part 1 begins anew."""
    work = tmp_path / "work"
    dry("1", PYTEST_CODE="1")
    assert {name for name, result in results(work).items() if "FAILED" in result} == {"parity", "gpu-rest"}
    dry("2")
    marks = [line for line in noted(tmp_path) if line.startswith("checks: ")]
    assert marks[-1] == "checks: gpu-rest, parity"
    dry("2", PYTEST_CODE="1")
    dry("2")
    assert [line for line in noted(tmp_path) if line.startswith("checks: ")][-1] == "checks: gpu-rest, parity"
    assert results(work)["parity"] == "FAILED with code 1"
    dry("1")
    assert results(work)["parity"] == "ok"
    dry("3")
    assert [line for line in noted(tmp_path) if line.startswith("checks: ")][-1] == "checks: "


def test_what_cannot_end_in_time_is_not_begun(tmp_path, dry):
    """A check among it has not passed: later rows say so."""
    dry("1", BUDGET="66")
    found = results(tmp_path / "work")
    assert [name for name, result in found.items() if result == "ok"] == ["environment", "llama-1b", "gpu-rest"]
    assert re.fullmatch(r"not run: may take 90 s and 5 to end, 6[3-6] are left", found["parity"])
    dry("2")
    assert [line for line in noted(tmp_path) if line.startswith("checks: ")][-1] == "checks: parity"


def test_growth_ends_where_its_time_does(tmp_path):
    """It is wanted as far as it comes; of every other step a limit that is reached is a failure."""
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    step = script[script.index("step() {") : script.index("check() {")]
    around = 'LOGS=.; GRACE=1; PATIENCE=1; BUDGET=99; part_began=0; failed=0; say() { echo "- $1 $3"; }'
    run = "step one 1 sleep 9; as_far=1 step two 1 sleep 9; step three 9 false; step four 9 bash -c 'sleep 99 &'"
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", f"{around}\n{step}\n{run}; echo - $failed"], cwd=tmp_path, capture_output=True, text=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("- ")] == [
        "- one stopped at its limit of 1 s",
        "- two ok, stopped at its limit of 1 s",
        "- three FAILED with code 1",
        "- four ok",
        "- 2",
    ]
    assert time.monotonic() - began < 60  # nobody waits for what a step left behind


def test_after_a_failed_parity_everything_goes_on_and_nothing_is_published(tmp_path, repository):
    process = started(tmp_path, root=repository, DRY_RUN="", PYTEST_CODE="1")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert list(steps(printed)) == [*PARTS["1"], *PARTS["2"], *PARTS["3"], "report"]
    work = tmp_path / "work"
    checks = ["gpu-rest", "gpu-tests", "kernel-tests", "parity"]
    assert sorted(name for name, result in results(work).items() if "FAILED with code 1" in result) == checks
    asked = noted(tmp_path)
    assert not any("--write" in line for line in asked)
    assert asked[-1].startswith(f"-m benchmarks.report --out {work / 'unchecked'} ")
    assert f"the pages are left as they were: not ok: {', '.join(checks)}; drawn: --out" in printed
    headline = next(i for i, line in enumerate(asked) if line.endswith("headline"))
    assert asked[headline + 1] == f"checks: {', '.join(checks)}"  # its rows will say so
    assert not list((repository / "bench_results").iterdir())


def test_a_relative_folder_is_the_caller_s(dry, tmp_path):
    dry("1", OUT="here", WORK="there")
    assert "there/summary.txt" in archived(tmp_path / "here")
    assert (tmp_path / "there" / "logs" / "parity.log").exists()


def test_an_unknown_part_is_named(tmp_path):
    process = started(tmp_path, "1", "4")
    printed, _ = process.communicate()
    assert (process.returncode, printed) == (2, "part: got '4', need 1, 2 or 3; none for all\n")


def test_an_old_torch_is_named(tmp_path):
    """The step itself, by this interpreter, with a torch that says it is 2.10."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("__version__ = '2.10.1+cu126'\n")
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    function = script[script.index("environment() {") : script.index("# One process compiles")]
    environment = os.environ | {"PYTHONPATH": str(fake), "PYTHON": sys.executable, "WORK": str(tmp_path)}
    done = subprocess.run(["bash", "-c", f"{function}\nenvironment"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch 2.10.1+cu126 is here, asft_kernels needs 2.11 or newer" in done.stderr
    assert "Traceback" not in done.stderr


def test_installing_keeps_what_the_machine_has(tmp_path, repository):
    started(tmp_path, "1", root=repository, DRY_RUN="0").communicate()
    installs = [line for line in noted(tmp_path) if "pip install" in line]
    assert [line.split()[-1] for line in installs] == ["trl"]  # what is missing, and nothing else
    pins = (tmp_path / "work" / "logs" / "pins.txt").read_text().splitlines()
    assert pins[:3] == ["torch==9.9+cu999", "triton==8.8", "Liger_Kernel==1.0"]
    rest = (ROOT / "constraints.txt").read_text().splitlines()
    here = ("torch==", "triton==", "liger-kernel==")
    assert pins[3:] == [line for line in rest if "==" in line and not line.startswith(("#", *here))]


@pytest.mark.parametrize("links", ["", "wheels"])
def test_installing_without_an_index(tmp_path, repository, links):
    """The folder of wheels alone, or nothing: no package is waited for in vain; a second part does not try again."""
    for part in "12":
        variables = {"DRY_RUN": "0", "INDEX_CODE": "1", "PIP_FIND_LINKS": links}
        started(tmp_path, part, root=repository, **variables).communicate()
    assert sum("pip index" in line for line in noted(tmp_path)) == 1
    assert sum("pip install" in line for line in noted(tmp_path)) == bool(links)
    said = (tmp_path / "work" / "logs" / "install.log").read_text()
    assert "no package index answers" in said
    assert ("nothing to install from" in said) != bool(links)
    assert results(tmp_path / "work")["modules"].endswith("left out or fails: trl")


def test_tests_share_the_processors(tmp_path, dry):
    (tmp_path / "commands").mkdir()
    for count, spread in (("2", " -n 2"), ("16", " -n 12")):
        nproc = tmp_path / "commands" / "nproc"
        nproc.write_text(f"#!/bin/sh\necho {count}\n")
        nproc.chmod(0o755)
        asked = [line for line in dry("1") if line.startswith("-m pytest")]
        assert asked[-1] == f"-m pytest -q -rs -W default -p no:cacheprovider{spread} tests/test_gpu.py"
    assert "-n" not in next(line for line in reversed(dry("1", NO_XDIST="xdist")) if "-m pytest" in line).split()


def test_an_interpreter_that_does_not_go_with_numpy(tmp_path, dry):
    """What needs it is left out of the dry run, and said so."""
    asked = dry(INTERPRETER_CODE="1")
    left = {name: result for name, result in results(tmp_path / "work").items() if "left out: " in result}
    assert list(left) == ["parity", "kernel-tests", "autotune", "tuned"]
    assert set(left.values()) == {"left out: Triton's interpreter does not go with this NumPy"}
    assert sum(line.startswith("-m pytest") for line in asked) == 2


def test_a_dry_run_leaves_the_repository_s_rows(dry, tmp_path):
    before = sorted((ROOT / "bench_results").rglob("*"))
    dry(OUT="")
    assert sorted((ROOT / "bench_results").rglob("*")) == before


# --- what it starts


def tiny(module: str, out: Path, *arguments: str) -> list[dict]:
    """The rows of a run at tiny size, kernels interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{module}", str(out), "--tiny", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["about"]["sources"] for row in rows)
    return rows


@pytest.mark.interpreter
def test_the_probe_at_tiny_size(tmp_path):
    rows = tiny("gpu_probe", tmp_path / "probe.jsonl", "--models", "Llama-3.2-1B")
    by_stage = {
        stage: {row["name"]: row for row in rows if row["stage"] == stage} for stage in (r["stage"] for r in rows)
    }
    assert list(by_stage) == ["ceilings", "products", "calls", "tiles", "peers", "kernels", "graphs", "one"]
    assert not [row for row in rows if "failed" in row]
    for work in ("no gradient", "frozen head", "trainable head"):
        row = by_stage["calls"][f"asft_kernels triton, {work}"]
        assert row["wrong"] == ""
        assert row["x_bare"] == pytest.approx(row["ms"] / by_stage["calls"][f"bare products, {work}"]["ms"])
        assert by_stage["peers"][f"plain torch, {work}"]["wrong"] == ""
        assert by_stage["kernels"][f"asft_kernels triton, {work}"]["kernels"] > 0
    reason = by_stage["peers"]["cut-cross-entropy cce"].get("left_out", "needs cuda")
    assert "needs cuda" in reason or reason == "cut-cross-entropy is not installed"
    assert all(row["ms"] > 0 for name, row in by_stage["products"].items() if name != "the stage")
    assert by_stage["tiles"]["32x32x32 4 warps 2 stages (GROUP 16)"]["ms"] > 0
    assert by_stage["one"]["32x32x32 4 warps 2 stages"]["agreed"]


@pytest.mark.interpreter
def test_a_training_step_at_tiny_size(tmp_path):
    """Losses agree as far as plain torch's bf16 does: 2**-9 of a log-probability, log(256), and of a logit below 1, in
    two averages, which the loss follows with a slope of beta = 0.1 at most."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    rows = tiny("gpu_train", tmp_path / "train.jsonl")
    ours, plain, *_ = rows
    assert (ours["name"], plain["name"]) == ("asft_kernels triton", "plain torch")
    assert len(ours["losses"]) == len(ours["all_seconds"]) == 3
    assert ours["losses"] == pytest.approx(plain["losses"], rel=0, abs=0.1 * 2 * (math.log(256) + 1) * 2**-9)
    assert not [row for row in rows if "failed" in row]
