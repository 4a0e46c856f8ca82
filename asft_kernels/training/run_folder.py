"""The folder of a run: what it goes on from, and whether that is the same run."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from asft_kernels.errors import InputError
from asft_kernels.training.callbacks import MetricsFile

METRICS, SETTINGS, SUMMARY, CURVES = "metrics.jsonl", "run.json", "summary.json", "curves.png"
# A resumed run that changed one of these would go on as another experiment, without a word.
SAME_ON_RESUME = (
    "model", "training_pairs", "evaluation_pairs", "objective", "method", "method_arguments", "nll_on_prompt",
    "max_length", "truncation_mode", "dtype", "learning_rate", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed", "world_size", "logit_scale", "softcap", "num_train_epochs",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args", "weight_decay",
    "max_grad_norm", "bf16", "fp16", "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit", "disable_dropout", "ref_scores",
)  # fmt: skip  # not max_steps: a run may go on for more steps, and says so
RESUME = ("--resume", "--resume_from_checkpoint")


def find_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """Returns the checkpoint to go on from; the newest complete one in folder for "last".

    Raises:
        InputError: where there is none, or folder holds another run.
    """
    if wanted is None:
        if _holds_run(folder):
            raise InputError(
                f"output_dir: {folder} holds a run already; add --resume to go on with it, or name another folder"
            )
        return None
    if wanted != "last":
        checkpoint = Path(wanted)
        if not _complete(checkpoint):
            raise InputError(f"resume: {wanted} is no complete checkpoint ({_lacks(checkpoint)} is missing)")
        if checkpoint.resolve().parent != folder.resolve():
            raise InputError(
                f"output_dir: got {folder}, need {checkpoint.parent}, the folder of the run that {wanted} is of"
            )
        return checkpoint
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
    )
    complete = [path for path in found if _complete(path)]
    if not complete:
        why = f"; {found[-1]} has no {_lacks(found[-1])} (save_only_model keeps none)" if found else ""
        raise InputError(
            f"resume: no complete checkpoint in {folder}{why}; leave --resume out and name a fresh --output_dir"
        )
    return complete[-1]


def _holds_run(folder: Path) -> bool:
    """Anything that a new run would overwrite; run.json alone is of one that had not begun."""
    if MetricsFile(folder / METRICS).rows():
        return True
    left = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")
    return (folder / SETTINGS).is_file() and any(any(folder.glob(pattern)) for pattern in left)


def _complete(checkpoint: Path) -> bool:
    return not _lacks(checkpoint)


def _lacks(checkpoint: Path) -> str:
    """The Trainer writes trainer_state.json last: a killed save lacks it or leaves half of it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return "trainer_state.json"
    sharded = any(checkpoint.glob("optimizer_*")) or any(checkpoint.glob("global_step*"))  # FSDP, DeepSpeed
    names = () if sharded else ("optimizer.pt", "scheduler.pt")
    return next((name for name in names if not (checkpoint / name).is_file()), "")


def require_same_settings(path: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Raises InputError where the run's settings are others than those in its run.json."""
    if not path.is_file():
        return
    old = json.loads(path.read_text())["settings"]
    settings = json.loads(json.dumps(settings, default=str))
    for name in SAME_ON_RESUME:
        if name in old and name in settings and old[name] != settings[name]:
            shown = "others" if name.endswith("_pairs") else f"{old[name]!r} then and {settings[name]!r} now"
            raise InputError(
                f"resume: {name}: {shown}, need the same; start another run in another --output_dir to change it"
            )
    steps = old.get("max_steps"), settings.get("max_steps")
    if None not in steps and steps[0] != steps[1]:
        say(f"max_steps was {steps[0]} and is {steps[1]} now: the learning rate goes on by the new schedule")


def digest_of_pairs(dataset: Any) -> str | None:
    """Of what the pairs say and their order; None for no dataset, or for one without ids."""
    if dataset is None or "id" not in dataset.column_names:
        return None
    return hashlib.sha256("".join(dataset["id"][:]).encode()).hexdigest()


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }


def command() -> str:
    """This command without --resume and its value, as the user can type it."""
    given, dropping = [], False
    for word in sys.argv[1:]:
        dropping = word in RESUME or (dropping and not word.startswith("-"))
        if not dropping and not word.startswith(tuple(f"{name}=" for name in RESUME)):
            given.append(word)
    return shlex.join([Path(sys.argv[0]).name, *given])
