"""Checkpoints: which one a run goes on from, and whether its files are those that were saved.

A checkpoint is whole when its digests.json, written last, has the digest of every file in it. One without (of TRL, of
an older version, or of a run that was killed between the two) is whole when nothing is missing, each .pt and .pth file
has the CRCs that stand in it, and each .safetensors file its full length.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from asft_kernels.errors import InputError
from asft_kernels.files import digest_of_file, sync, write_json
from asft_kernels.training.run_folder import METRICS, SETTINGS

DIGESTS, STATE = "digests.json", "trainer_state.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def write_digests(checkpoint: Path, trained: str) -> None:
    """Writes digests.json for the files of a checkpoint, which are on the disk before it is.

    Args:
        trained: what trained it, which `what_trained` returns.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != DIGESTS]
    for path in files:
        sync(path)
    digests = {path.relative_to(checkpoint).as_posix(): digest_of_file(path) for path in files}
    write_json(checkpoint / DIGESTS, {"algorithm": "sha256", "files": digests, "trained": trained})


def what_trained(checkpoint: Path) -> str | None:
    """Returns what trained a checkpoint, None where it does not say."""
    try:
        return json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))["trained"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_checkpoint(wanted: str | None, folder: Path, say: Callable[[str], None], ranks: int = 1) -> Path | None:
    """Finds the checkpoint that a run goes on from.

    Args:
        wanted: a checkpoint's folder; "last" for the newest whole one; "auto" for the same, and to begin where there
            is none, so that one command begins a run and goes on with it; None to begin anew.
        folder: of the run.
        say: takes a line for each newer one that is passed over.
        ranks: how many processes write a checkpoint.

    Returns:
        The checkpoint, whose files are those that were saved; None to begin anew.

    Raises:
        InputError: where there is none, folder holds another run, or wanted is damaged; the last names one that is not.
    """
    if wanted is None:
        if holds_run(folder):
            raise InputError(
                f"output_dir: {folder} holds a run already; add --resume auto to go on with it (or, where it has no "
                "whole checkpoint and no model, to begin again), or name another folder"
            )
        return None
    if wanted not in ("last", "auto"):
        checkpoint = Path(wanted)
        if why := what_is_broken(checkpoint, ranks):
            found = _newest_first(checkpoint.parent)
            other = next((path for path in found if not what_is_broken(path, ranks)), None)
            hint = f"; whole is {other}: --resume {other}" if other else ""
            raise InputError(f"resume: {wanted} is no complete checkpoint ({why}){hint}")
        if checkpoint.resolve().parent != folder.resolve():
            raise InputError(
                f"output_dir: got {folder}, need {checkpoint.parent}, the folder of the run that {wanted} is of"
            )
        return checkpoint
    first = ""
    for checkpoint in _newest_first(folder):
        why = what_is_broken(checkpoint, ranks)
        if not why:
            if first:
                say(f"{first}; passed over")
            return checkpoint
        first = first or f"{checkpoint} is no complete checkpoint ({why})"
    trained = any(any(folder.glob(pattern)) for pattern in WEIGHTS)  # a new run would overwrite that model
    if wanted == "auto" and not trained:
        return None
    begin = "" if trained else "begin again with --resume auto, or "
    raise InputError(
        f"resume: no complete checkpoint in {folder}{first and '; '}{first}; {begin}leave --resume out and name "
        "a fresh --output_dir"
    )


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def holds_run(folder: Path) -> bool:
    """Whether a new run would overwrite anything in folder; run.json alone is of one that had not begun."""
    if (folder / METRICS).is_file() and (folder / METRICS).stat().st_size:
        return True
    left = ("checkpoint-*", *WEIGHTS)
    return (folder / SETTINGS).is_file() and any(any(folder.glob(pattern)) for pattern in left)


def what_is_broken(checkpoint: Path, ranks: int = 1) -> str:
    """Says in a few words what a checkpoint lacks or which of its files is damaged; "" for a whole one."""
    if not checkpoint.is_dir():
        return "no such folder"
    try:
        return next(_faults(checkpoint, ranks), "")
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def _faults(checkpoint: Path, ranks: int) -> Iterator[str]:
    state = read_state(checkpoint)
    if state is None:  # the Trainer writes it last: a killed save lacks it or leaves half of it
        yield f"{STATE} is missing or damaged" if (checkpoint / STATE).exists() else f"{STATE} is missing"
    # FSDP's in shards and whole, DeepSpeed's
    sharded = any(any(checkpoint.glob(name)) for name in ("optimizer_*", "optimizer.bin", "global_step*"))
    # Other ranks may not have written the state of their generators when the first is killed.
    of_ranks = [f"rng_state_{rank}.pth" for rank in range(ranks) if ranks > 1]
    yield from (f"{name} is missing" for name in of_ranks if not (checkpoint / name).is_file())
    for name in () if sharded else ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            yield f"{name} is missing; save_only_model keeps none"
    if not sharded and not any(any(checkpoint.glob(pattern)) for pattern in WEIGHTS):
        yield "model.safetensors is missing"
    yield from (_other_than_saved if (checkpoint / DIGESTS).is_file() else _unreadable)(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Returns trainer_state.json, None where it is missing or damaged."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return state if isinstance(state["global_step"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _other_than_saved(checkpoint: Path) -> Iterator[str]:
    try:
        saved = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))["files"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{DIGESTS} is damaged"
        return
    for name, digest in saved:
        if not (checkpoint / name).is_file():
            yield f"{name} is missing"
        elif digest_of_file(checkpoint / name) != digest:
            yield f"{name} is damaged: its digest is another than when it was saved"


def _unreadable(checkpoint: Path) -> Iterator[str]:
    for index in sorted(checkpoint.glob("*.index.json")):
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{index.name} is damaged"
            return
        yield from (f"{part} is missing" for part in sorted(parts) if not (checkpoint / part).is_file())
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "numpy"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as file:
                    if file.testzip() is not None:
                        yield f"{path.name} is damaged"
        except (SafetensorError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            yield f"{path.name} is damaged: {error}"
