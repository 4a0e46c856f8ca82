"""Starts the processes of a test of several ranks."""

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
LIMIT = 240  # seconds: a rank that waits for ever is killed


def launch(script: str, folder: Path, world: int, what: str, **environment: str) -> list[dict]:
    """What each of `world` processes has found: `python script what rank world folder` saves it there as what{rank}."""
    variables = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    workers = [
        subprocess.Popen(
            [sys.executable, str(TESTS / script), what, str(rank), str(world), str(folder)],
            env=variables | environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=LIMIT)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, errors
    return [torch.load(folder / f"{what}{rank}") for rank in range(world)]
