"""The folder of a run: what it goes on from, and whether that is the same run."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from asft_kernels.errors import InputError
from asft_kernels.training.callbacks import MetricsFile

METRICS, SETTINGS, SUMMARY, CURVES = "metrics.jsonl", "run.json", "summary.json", "curves.png"
# What a resumed run may have otherwise (beginnings of names); with anything else it would be another experiment.
# Where model and data lie may change, their digests not. max_steps: a run may go on for more steps, and says so.
FREE_ON_RESUME = (
    "output_dir", "overwrite", "logging_", "log_", "save_", "eval_", "per_device_eval_", "disable_tqdm", "report_to",
    "run_name", "push_to_hub", "hub_", "resume", "max_steps", "strict", "dry_run", "dataset_name", "dataset_config",
    "dataset_train_split", "dataset_test_split", "dataset_num_proc", "model_name_or_path", "model_init_kwargs",
    "dataloader_num_workers", "dataloader_pin", "dataloader_prefetch", "dataloader_persistent", "local_rank", "backend",
    "cache_bytes", "chunk_size", "tf32", "torch_empty_cache", "include_", "do_", "metric_for_best_model",
    "greater_is_better", "load_best_model_at_end", "project", "trackio", "ref_scores",
    "precompute_ref_batch_size", "skip_memory_metrics", "ddp_", "use_cpu", "deepspeed", "fsdp", "accelerator_config",
)  # fmt: skip
DIGESTS = ("training_pairs", "evaluation_pairs", "tokenizer", "files")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
RESUME = ("--resume", "--resume_from_checkpoint")


def find_checkpoint(wanted: str | None, folder: Path, ranks: int = 1) -> Path | None:
    """Returns the checkpoint to go on from; None to begin.

    Args:
        wanted: its folder; "last" for the newest complete one in folder; "auto" for the same, and to begin where there
            is none, so that one command begins a run and goes on with it; None to begin.
        ranks: how many processes write a checkpoint.

    Raises:
        InputError: where there is none, or folder holds another run.
    """
    if wanted is None:
        if _holds_run(folder):
            raise InputError(
                f"output_dir: {folder} holds a run already; add --resume to go on with it, or name another folder"
            )
        return None
    if wanted not in ("last", "auto"):
        checkpoint = Path(wanted)
        if _lacks(checkpoint, ranks):
            raise InputError(f"resume: {wanted} is no complete checkpoint ({_lacks(checkpoint, ranks)} is missing)")
        if checkpoint.resolve().parent != folder.resolve():
            raise InputError(
                f"output_dir: got {folder}, need {checkpoint.parent}, the folder of the run that {wanted} is of"
            )
        return checkpoint
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()),
        key=lambda path: int(path.name.split("-")[-1]),
    )
    complete = [path for path in found if not _lacks(path, ranks)]
    if not complete and wanted == "auto" and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        return None
    if not complete:
        why = f"; {found[-1]} has no {_lacks(found[-1], ranks)} (save_only_model keeps none)" if found else ""
        raise InputError(
            f"resume: no complete checkpoint in {folder}{why}; leave --resume out and name a fresh --output_dir"
        )
    return complete[-1]


def _holds_run(folder: Path) -> bool:
    """Anything that a new run would overwrite; run.json alone is of one that had not begun."""
    if MetricsFile(folder / METRICS).rows():
        return True
    return (folder / SETTINGS).is_file() and any(any(folder.glob(x)) for x in ("checkpoint-*", *WEIGHTS))


def _lacks(checkpoint: Path, ranks: int) -> str:
    """The first rank writes trainer_state.json last: a killed save lacks it or leaves half of it.

    Other ranks may not have written the state of their generators by then.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, json.JSONDecodeError):
        return "trainer_state.json"
    # FSDP's in shards and whole, DeepSpeed's
    sharded = any(any(checkpoint.glob(name)) for name in ("optimizer_*", "optimizer.bin", "global_step*"))
    names = () if sharded else ("optimizer.pt", "scheduler.pt")
    names = (*names, *(f"rng_state_{rank}.pth" for rank in range(ranks) if ranks > 1))
    return next((name for name in names if not (checkpoint / name).is_file()), "")


def require_same_settings(path: Path, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Raises InputError where the run's settings are others than those in its run.json."""
    if not path.is_file():
        return
    old = json.loads(path.read_text())["settings"]
    settings = json.loads(json.dumps(settings, default=str))
    for name in settings:
        if name in old and old[name] != settings[name] and not name.startswith(FREE_ON_RESUME):
            shown = "others" if name in DIGESTS else f"{old[name]!r} then and {settings[name]!r} now"
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


def digest_of_files(paths: Iterable[str]) -> list[str]:
    """Of the contents of those that are files."""
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths if Path(path).is_file()]


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
    program = Path(sys.argv[0]).name
    return shlex.join(["asft" if program == "__main__.py" else program, *given])
