"""The folder of a run: who writes it, and whether what is in it is the same run."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from asft_kernels.data.report import line_numbers
from asft_kernels.errors import InputError
from asft_kernels.files import digest_of_file, write_json
from asft_kernels.locks import only_writer

PAIRS = "pairs.json"
METRICS, SETTINGS, SUMMARY, CURVES = "metrics.jsonl", "run.json", "summary.json", "curves.png"
LOCK = "run.lock"
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
RESUME = ("--resume", "--resume_from_checkpoint")


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps every other run out of it until the block ends.

    A folder that was made here and stays empty goes again.

    Raises:
        InputError: it cannot be made or written, or another run is in it.
    """
    there = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir: {folder} cannot be made ({error.strerror}), need a folder") from error
    try:
        with only_writer(folder / LOCK, "output_dir", folder):
            yield
    finally:
        if not there:
            with suppress(OSError):  # not empty
                folder.rmdir()


def require_same_settings(
    path: Path, settings: Mapping[str, Any], say: Callable[[str], None], datasets: Mapping[str, Any] | None = None
) -> None:
    """Compares a run's settings with those in its run.json.

    Args:
        path: of run.json; `write_pairs` wrote what lies beside it.
        datasets: setting -> the data set of which it is the digest.

    Raises:
        InputError: one is another, of data with the lines of the rows.
    """
    if not path.is_file():
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["settings"]
        old.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"resume: {path} is damaged ({type(error).__name__}: {error}), need that of the run; without it nobody can "
            "say whether this is the same run: start another in another --output_dir"
        ) from error
    settings = json.loads(json.dumps(settings, default=str))
    for name in settings:
        if name in old and old[name] != settings[name] and not name.startswith(FREE_ON_RESUME):
            shown = "others" if name in DIGESTS else f"{old[name]!r} then and {settings[name]!r} now"
            if name == "evaluation_pairs" and None in (old[name], settings[name]):
                shown = _with_and_without(then_none=old[name] is None)
            if rows := _changed_rows(path.with_name(PAIRS), name, datasets or {}):
                shown = f"others ({rows})"
            raise InputError(
                f"resume: {name}: {shown}, need the same; start another run in another --output_dir to change it"
            )
    steps = old.get("max_steps"), settings.get("max_steps")
    if None not in steps and steps[0] != steps[1]:
        say(f"max_steps was {steps[0]} and is {steps[1]} now: the learning rate goes on by the new schedule")


def _with_and_without(*, then_none: bool) -> str:
    if then_none:
        return "none then and some now (leave --eval_dataset_name and --eval_every_nth out as before)"
    return "some then and none now (give --eval_dataset_name or --eval_every_nth as before)"


def write_pairs(folder: Path, datasets: Mapping[str, Any]) -> None:
    """Writes which rows a run has, by setting, line and id, so that a resumed run can name those that changed."""
    write_json(folder / PAIRS, {name: _ids_of_lines(dataset) for name, dataset in datasets.items()})


def _ids_of_lines(dataset: Any) -> dict[str, str]:
    if dataset is None or not {"id", "line"} <= set(dataset.column_names):
        return {}
    return {str(line): pair[:16] for line, pair in zip(dataset["line"][:], _digests(dataset), strict=True)}


def _digests(dataset: Any) -> list[str]:
    """Of each row: its id, which is of its texts, and with it what it says of reference models, where it does."""
    ids, brought = dataset["id"][:], sorted(x for x in dataset.column_names if x.startswith("ref_"))
    if not brought:
        return ids
    columns = [dataset[name][:] for name in brought]
    return [
        hashlib.sha256(json.dumps([pair, brought, values]).encode()).hexdigest()
        for pair, *values in zip(ids, *columns, strict=True)
    ]


def _changed_rows(path: Path, name: str, datasets: Mapping[str, Any]) -> str:
    """Which lines of a data set are in none of those written to path, and the reverse; "" where nobody can say."""
    now = {key: _ids_of_lines(dataset) for key, dataset in datasets.items()}
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        if not (now[name] and then[name]):
            return ""
        said = []
        for one, other, what in ((now, then, "new or changed"), (then, now, "gone or changed")):
            there = {pair for lines in other.values() for pair in lines.values()}  # of any: rows move with the split
            if lines := sorted(int(line) for line, pair in one[name].items() if pair not in there):
                said.append(f"{len(lines)} {what}: {line_numbers(lines)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return "; ".join(said) or "the same rows, but in another order, split or number"


def digest_of_pairs(dataset: Any) -> str | None:
    """Of what the pairs say, log-probabilities of a reference too, and their order; None for no dataset, or for one
    without ids."""
    if dataset is None or "id" not in dataset.column_names:
        return None
    return hashlib.sha256("".join(_digests(dataset)).encode()).hexdigest()


def digest_of_files(paths: Iterable[str]) -> list[str]:
    """Of the contents of those that are files."""
    return [digest_of_file(path) for path in paths if Path(path).is_file()]


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
