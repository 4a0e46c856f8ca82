"""The folder of a run: what it holds, what it goes on from, and whether that is the same run."""

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from asft_kernels.errors import InputError
from asft_kernels.train.arguments import JobArguments, RunArguments
from asft_kernels.train.metrics import MetricsFile

# A resumed run that changed one of these would go on as another experiment, without a word.
SAME_ON_RESUME = (
    "model", "data", "eval_data", "eval_every_nth", "objective",
    "nll_on_prompt", "ref_scores", "sae", "sae_layer", "max_length",
    "max_prompt_length", "dtype", "learning_rate", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed", "world_size", "logit_scale", "softcap", "num_train_epochs",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args",
    "weight_decay", "max_grad_norm",
)  # fmt: skip  # not max_steps: a run may go on for more steps, and says so

RESUME = ("--resume", "--resume-from-checkpoint", "--resume_from_checkpoint")


def find_checkpoint(job: JobArguments, args: RunArguments, folder: Path) -> Path | None:
    """The checkpoint to go on from; the newest complete one for --resume without a path."""
    wanted = job.resume or args.resume_from_checkpoint
    if wanted is None:
        if _holds_run(folder):
            raise InputError(
                f"--output-dir: {folder} holds a run already; add --resume to go on with it, or name another folder"
            )
        return None
    if wanted != "last":
        if not _complete(Path(wanted)):
            raise InputError(f"--resume: {wanted} is no complete checkpoint (trainer_state.json is missing)")
        if not same_folder(Path(wanted).parent, folder) and _holds_run(folder):
            raise InputError(
                f"--output-dir: {folder} holds a run already, and {wanted} is of another; "
                "name the folder of that run, or a fresh one"
            )
        return Path(wanted)
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
    )
    complete = [path for path in found if _complete(path)]
    if not complete:
        raise InputError(
            f"--resume: no complete checkpoint in {folder}; leave --resume out and name a fresh --output-dir"
        )
    return complete[-1]


def _holds_run(folder: Path) -> bool:
    """Anything that a new run would overwrite; run.json alone is of one that had not begun."""
    if MetricsFile(folder / "metrics.jsonl").rows():
        return True
    left = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")
    return (folder / "run.json").is_file() and any(any(folder.glob(pattern)) for pattern in left)


def same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _complete(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last: a killed save lacks it or leaves half of it."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def last_step(args: RunArguments, state: dict[str, Any]) -> int:
    return args.max_steps if args.max_steps > 0 else state["max_steps"]


def require_same_settings(path: Path, settings: dict[str, Any], say: Any) -> None:
    if not path.is_file():
        return
    old = json.loads(path.read_text())["settings"]
    for name in SAME_ON_RESUME:
        if name in old and name in settings and old[name] != settings[name]:
            raise InputError(
                f"--resume: --{name.replace('_', '-')} was {old[name]!r} and is {settings[name]!r} "
                "now, need the same; start another run in another --output-dir to change it"
            )
    steps = old.get("max_steps"), settings["max_steps"]
    if None not in steps and steps[0] != steps[1]:
        say(f"--max-steps was {steps[0]} and is {steps[1]} now: the learning rate goes on by the new schedule")


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    partial.replace(path)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def command() -> str:
    """This command without --resume and its value, as the user can type it."""
    given, dropping = [], False
    for word in sys.argv[1:]:
        dropping = word in RESUME or (dropping and not word.startswith("-"))
        if not dropping and not word.startswith(tuple(f"{name}=" for name in RESUME)):
            given.append(word)
    return shlex.join(["asft-train", *given])
