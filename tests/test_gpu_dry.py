"""benchmarks/gpu.sh with an interpreter that only notes what it is asked: the steps, their order, what is reported."""

import os
import signal
import subprocess
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
    *"pip list --format=freeze"*) printf '%s\\n' torch==9.9+cu999 triton==8.8 numpy==1.0 ;;
    "-m benchmarks.run --out"*)
        echo '{}' >> "$4"
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


def started(folder: Path, **variables: str) -> subprocess.Popen[str]:
    """The script with the stub; its notes and the copy of the repository go into the folder."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    own = {"DRY_RUN": "1", "PYTHON": str(stub), "NOTES": str(folder / "notes"), "TMPDIR": str(folder)}
    return subprocess.Popen(
        [ROOT / "benchmarks" / "gpu.sh"],
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
