"""A head sharded over data-parallel ranks gives the values and gradients of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


def run_ranks(script: Path, world: int, folder: Path, *arguments: str) -> None:
    """Runs a script on every rank; fails with what they wrote where one fails, or is not done in time."""
    environment = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(folder / "store"), *arguments],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)


def test_streamed_head_gives_one_process_values_and_gradients(tmp_path):
    """61 rows on three ranks, 20 cases; ranks that differ; no tensor of V D elements; bytes on the wire."""
    run_ranks(TESTS / "streamed_worker.py", 3, tmp_path)


@pytest.mark.parametrize("cases", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_models_under_fsdp2_train_as_one_process(tmp_path, cases):
    """Streamed and gathered, LoRA, accumulation, checkpointing, bf16; the head gathered once a step; refusals."""
    pytest.importorskip("peft", reason="needs the train extra: peft")
    run_ranks(TESTS / "sharded_model_worker.py", 2, tmp_path, cases)
