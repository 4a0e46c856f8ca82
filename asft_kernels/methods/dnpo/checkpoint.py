"""What a run of DNPO needs in order to go on: one file in its folder, and the settings in run.json beside it.

The file holds the trainer's state (model, noise, both optimisers, the noise's generator), the step, which gives the
place in the shuffled pairs, and torch's generators, of which dropout draws. The newest one replaces the one before.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from asft_kernels.errors import InputError
from asft_kernels.methods.dnpo.trainer import DNPOTrainer
from asft_kernels.train import run_folder
from asft_kernels.train.metrics import MetricsFile

FILE = "checkpoint.pt"
SETTINGS = "run.json"
FREE_ON_RESUME = ("resume", "output_dir", "max_steps", "save_steps")


def save(folder: Path, trainer: DNPOTrainer, step: int, pairs: int) -> None:
    """pairs: how many the training data has."""
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    content = {"step": step, "pairs": pairs, "trainer": trainer.state_dict(), "random": random}
    partial = folder / f"{FILE}.partial"
    torch.save(content, partial)
    os.replace(partial, folder / FILE)


def find(folder: Path, settings: dict[str, Any], *, resume: bool) -> Path | None:
    """The checkpoint that a run with these settings goes on from; None for one that begins."""
    file = folder / FILE
    if not resume:
        if MetricsFile(folder / "metrics.jsonl").rows() or file.is_file():
            raise InputError(
                f"--output-dir: {folder} holds a run already; add --resume to go on with it, or name another folder"
            )
        return None
    if not (file.is_file() and (folder / SETTINGS).is_file()):
        raise InputError(
            f"--resume: no {FILE} with its {SETTINGS} in {folder}; leave --resume out and name a fresh --output-dir"
        )
    old = json.loads((folder / SETTINGS).read_text())["settings"]
    for name, value in settings.items():
        if name not in FREE_ON_RESUME and old.get(name) != value:
            raise InputError(
                f"--resume: --{name.replace('_', '-')} was {old.get(name)!r} and is {value!r} now, need the same; "
                "start another run in another --output-dir to change it"
            )
    return file


def load(file: Path, *, pairs: int, last_step: int) -> dict[str, Any]:
    """Its content, for `restore`; InputError if the data or the number of steps do not go with it."""
    content = torch.load(file, map_location="cpu", weights_only=True)
    if content["pairs"] != pairs:
        raise InputError(
            f"--resume: --data had {content['pairs']} pairs for training and has {pairs} now, need the same pairs"
        )
    if content["step"] > last_step:
        raise InputError(f"--max-steps: got {last_step}, need at least {content['step']}, the step of {file}")
    return content


def restore(content: dict[str, Any], trainer: DNPOTrainer) -> None:
    """Last of all before the next step: torch's generators stand as they did."""
    trainer.load_state_dict(content["trainer"])
    torch.set_rng_state(content["random"]["cpu"])
    if len(content["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["random"]["cuda"])


def write_settings(folder: Path, command: str, settings: dict[str, Any]) -> None:
    run_folder.write_json(
        folder / SETTINGS, {"command": command, "versions": run_folder.versions(), "settings": settings}
    )
