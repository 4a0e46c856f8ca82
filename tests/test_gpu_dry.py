"""benchmarks/gpu.sh with an interpreter that only notes what it is asked: the steps, their order, what is reported."""

import os
import subprocess
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
    "-m benchmarks.run --out"*) echo '{}' >> "$4" ;;
esac
"""


@pytest.fixture
def dry(tmp_path):
    """Runs the script and returns the commands that it gave to Python."""

    def run(**variables: str) -> list[str]:
        stub, notes = tmp_path / "python", tmp_path / "notes"
        stub.write_text(STUB)
        stub.chmod(0o755)
        environment = os.environ | {"DRY_RUN": "1", "PYTHON": str(stub), "NOTES": str(notes)} | variables
        result = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True)
        assert "== report" in result.stdout, result.stdout + result.stderr
        return notes.read_text().splitlines()

    return run


def test_the_report_keeps_what_is_there(dry, tmp_path):
    """Rows elsewhere are named, and the report adds them to what it finds; a folder with a space stays whole."""
    asked = dry(OUT=str(tmp_path / "an out"))
    (rows,) = (tmp_path / "an out").glob("*-a-gpu.jsonl")
    assert f"-m benchmarks.report {rows} --write" in asked


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
