"""benchmarks/gpu.sh with an interpreter that only notes what it is asked: the steps, their order, what is reported."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Notes its arguments. `python - NAMES` answers that a module is missing; benchmarks.run writes a row;
# pip lists a torch of the machine's own.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$NOTES"
case "$*" in
    "- torch") exit 0 ;;
    "- "*trl*) exit 1 ;;
    *"device_slug"*) echo a-gpu ;;
    "-m pytest"*) echo "checks: ${ASFT_BENCHMARK_FAILED_CHECKS:-}" >> "$NOTES"; exit "${PYTEST_CODE:-0}" ;;
    *"pip list --format=freeze"*) printf '%s\\n' torch==9.9+cu999 triton==8.8 numpy==1.0 ;;
    "-m benchmarks.run --out"*)
        echo '{}' >> "$4"; echo "checks: ${ASFT_BENCHMARK_FAILED_CHECKS:-}" >> "$NOTES"
        [ -z "${HANG:-}" ] || { echo $$ > "$HANG.new"; mv "$HANG.new" "$HANG"; sleep 60; } ;;
esac
"""


@pytest.fixture
def dry(tmp_path):
    """Runs the script and returns the commands that it gave to Python."""

    def run(**variables: str) -> list[str]:
        process = started(tmp_path, **variables)
        printed, _ = process.communicate()
        assert "== report" in printed
        return (tmp_path / "notes").read_text().splitlines()

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


def steps(printed: str) -> dict[str, int]:
    """Their names in order, and the limit of each."""
    return {name: int(limit) for name, limit in re.findall(r"^== (\S+) \(at most (\d+) s\)", printed, re.M)}


def started(folder: Path, root: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """The script with the stub; its notes and the copy of the repository go into the folder."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    own = {"DRY_RUN": "1", "PYTHON": str(stub), "NOTES": str(folder / "notes"), "TMPDIR": str(folder)}
    return subprocess.Popen(
        [root / "benchmarks" / "gpu.sh"],
        cwd=folder,
        env=os.environ | own | variables,
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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_running_step_and_the_script(tmp_path, sent):
    hangs, out = tmp_path / "hangs", tmp_path / "out"
    process = started(tmp_path, OUT=str(out), HANG=str(hangs))
    until(hangs.exists)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    (rows,) = out.glob("*-a-gpu.jsonl")
    assert f"rows in {rows}, logs in {out / 'gpu-logs'}" in printed
    *_, last = (out / "gpu-logs" / "summary.txt").read_text().splitlines()
    assert (last.split()[0], last.split()[-1]) == ("headline", "interrupted")
    assert last in printed
    assert "== device-tests" not in printed
    until(lambda: not Path(f"/proc/{hangs.read_text().strip()}").exists())
    assert not list(tmp_path.glob("tmp.*"))  # the copy is removed


def test_rows_elsewhere_leave_the_readme(dry, tmp_path):
    """Its figures would link a file that is not in bench_results/; a folder with a space stays whole."""
    out = tmp_path / "an out"
    (asked,) = [line for line in dry(OUT=str(out)) if "benchmarks.report" in line]
    (rows,) = out.glob("*-a-gpu.jsonl")
    assert asked.startswith(f"-m benchmarks.report --out {out} {rows} ")


STEPS = [
    "environment", "install", "parity", "headline", "device-tests", "accuracy", "kernel-tests", "autotune", "tuned",
    "suite", "report",
]  # fmt: skip


def test_all_steps_in_the_order_of_their_worth(tmp_path, repository):
    """The headline ends within 8 minutes: every limit until then, what follows an interrupt, and the looks between."""
    process = started(tmp_path, repository, DRY_RUN="0")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    limits = steps(printed)
    assert list(limits) == STEPS
    script = (repository / "benchmarks" / "gpu.sh").read_text()
    grace, look = (int(re.findall(rf"^{name}=(\d+)", script, re.M)[0]) for name in ("GRACE", "LOOK"))
    before = STEPS[: STEPS.index("headline") + 1]
    looks = 3  # for modules before and after the installation, for the device's name
    assert sum(limits[step] + grace for step in before) + looks * (look + 1) <= 480
    assert script.count('timeout -k 1 "$LOOK"') == 2  # of `have` and of the name
    assert 'timeout -s INT -k "$GRACE" "$limit"' in script
    asked = (tmp_path / "notes").read_text().splitlines()
    (rows,) = (repository / "bench_results").glob("*-a-gpu.jsonl")  # tuned ones are among them
    assert f"-m benchmarks.run --out {rows} --limit 120 --contestants triton, tuned -- headline" in asked
    assert f"-m benchmarks.accuracy --random-only --limit 120 --out {rows}" in asked
    assert asked[-1] == "-m benchmarks.report --write"
    assert not any(line.removeprefix("checks: ") for line in asked if line.startswith("checks: "))


def test_after_a_failed_parity_everything_goes_on_and_nothing_is_published(tmp_path, repository):
    process = started(tmp_path, repository, DRY_RUN="", PYTEST_CODE="1")
    printed, _ = process.communicate()
    assert process.returncode == 1
    assert list(steps(printed)) == STEPS
    logs = repository / "bench_results" / "gpu-logs"
    results = {line.split()[0]: line.split(maxsplit=3)[3] for line in (logs / "summary.txt").read_text().splitlines()}
    assert [name for name in STEPS if results[name] != "ok"] == ["parity", "device-tests", "kernel-tests"]
    assert results["parity"] == "FAILED with code 1"
    asked = (tmp_path / "notes").read_text().splitlines()
    assert not any("--write" in line for line in asked)
    assert asked[-1].startswith(f"-m benchmarks.report --out {logs / 'unchecked'} ")
    assert "README.md is left as it was: not ok: parity, device-tests, kernel-tests; drawn: --out" in printed
    headline = next(i for i, line in enumerate(asked) if line.endswith("headline"))
    assert asked[headline + 1] == "checks: parity"  # its rows will say so
    assert "checks: parity, device-tests, kernel-tests" in asked


def test_a_relative_folder_is_the_caller_s(dry, tmp_path):
    dry(OUT="here")
    assert list((tmp_path / "here").glob("*-a-gpu.jsonl"))


def test_an_old_torch_is_named(tmp_path, repository):
    """The step itself, by this interpreter, with a torch that says it is 2.10."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("__version__ = '2.10.1+cu126'\n")
    script = (repository / "benchmarks" / "gpu.sh").read_text()
    function = script[script.index("have() {") : script.index("tests() {")]
    environment = os.environ | {"PYTHONPATH": str(fake), "PYTHON": sys.executable, "LOOK": "10"}
    done = subprocess.run(["bash", "-c", f"{function}\nenvironment"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch 2.10.1+cu126 is here, asft_kernels needs 2.11 or newer" in done.stderr
    assert "Traceback" not in done.stderr


def test_installing_keeps_the_machine_s_torch(dry, tmp_path):
    asked = dry(OUT=str(tmp_path / "out"))
    installs = [line.split()[-1] for line in asked if "pip install" in line]
    assert installs == ["trl"]  # what is missing, and nothing else
    pins = (tmp_path / "out" / "gpu-logs" / "pins.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith(("torch==", "triton=="))] == ["torch==9.9+cu999", "triton==8.8"]
    assert not any(pin.startswith("numpy==1.0") for pin in pins)
    assert any(pin.startswith("trl==") for pin in pins)


def test_a_dry_run_leaves_the_repository_s_rows(dry, tmp_path):
    before = sorted((ROOT / "bench_results").rglob("*"))
    environment = {"OUT": "", "TMPDIR": str(tmp_path)}
    dry(**environment)
    assert sorted((ROOT / "bench_results").rglob("*")) == before
