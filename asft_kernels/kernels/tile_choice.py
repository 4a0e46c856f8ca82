"""Which tile a call uses: the table's first row, or the candidate that autotune measured and stored.

Stored choices are read from one JSON file a device, in $XDG_CACHE_HOME/asft_kernels (~/.cache without
it). They count only for the device, Triton and table that they were measured with, and for the dtype,
softcap, hidden size and number of tokens (to the next power of 2) that were asked for. Set
ASFT_KERNELS_TUNED=0 to ignore them, as the tests do: another tile sums in another order.
"""

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import triton

from asft_kernels.kernels.configs import (
    FORMS,
    LABEL_TILE,
    LABEL_TILES,
    SLICES,
    SOFTCAP_TILES,
    STRIPS,
    TILES,
    Strips,
    Tile,
    architecture_of,
    candidates,
    forms,
)


@dataclass(frozen=True)
class Problem:
    """What a stored choice was measured for."""

    dtype: torch.dtype
    hidden_size: int
    tokens: int
    softcap: bool

    def __str__(self) -> str:
        bucket = triton.next_power_of_2(self.tokens)
        kind = " with softcap" if self.softcap else ""
        return f"{str(self.dtype).removeprefix('torch.')}, hidden size {self.hidden_size}, {bucket} tokens{kind}"

    @property
    def of_gradient(self) -> str:
        """The key of what was measured for dW."""
        return f"{self}, gradient to the head"


_assumed: list[str] = []


def best_form(device: torch.device, problem: Problem, *, aligned: bool) -> str:
    """How a call rounds dW: the default, or what was measured as faster. aligned: as below, of hidden alone."""
    rows = forms(problem.dtype, problem.tokens) if aligned else (SLICES,)
    times = _times(device, problem.of_gradient)
    return min((form for form in rows if form in times), key=lambda form: times[form], default=rows[0])


def label_tile(device: torch.device) -> tuple[int, int, int, int, int]:
    """BLOCK_L, BLOCK_D, BLOCK_T, warps and stages of label_gradient."""
    return LABEL_TILES.get(_architecture(device), LABEL_TILE)


def _architecture(device: torch.device) -> str:
    return _assumed[-1] if _assumed else architecture_of(device)


def _times(device: torch.device, key: str) -> dict[str, float]:
    if device.type != "cuda" or _assumed or os.environ.get("ASFT_KERNELS_TUNED") == "0":
        return {}
    return stored_times(device).get(key, {})


def best_tile(device: torch.device, problem: Problem, *, aligned: bool) -> Tile | Strips:
    """The tile for a call; its `why` says whether it was measured.

    aligned: every row of both operands starts at a multiple of 16 elements and has a multiple of them. Others are
    loaded one by one, which takes the registers of a large tile: they get a softcap's, and were not measured.
    """
    architecture = _architecture(device)
    if not aligned:
        return candidates(architecture, problem.dtype, softcap=True)[0]
    rows = candidates(architecture, problem.dtype, softcap=problem.softcap)
    times = _times(device, str(problem))
    measured = [tile for tile in rows if str(tile) in times]
    if not measured:
        return rows[0]
    fastest = min(measured, key=lambda tile: times[str(tile)])
    return replace(fastest, why=f"measured: {times[str(fastest)]:.3f} ms, the fastest of {len(measured)}")


@contextmanager
def assume_architecture(name: str) -> Iterator[None]:
    """Within it best_tile answers from the table for that architecture, whatever the device: for compile_report."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()


@cache  # one read, and one warning, for each device: every call of the package asks
def stored_times(device: torch.device) -> dict[str, dict[str, float]]:
    """For each problem the milliseconds of each tile that was measured on this device."""
    try:
        path = cache_file(device)
        text = path.read_bytes()
    except (OSError, RuntimeError):  # no file, no home, or a folder that this user may not enter
        return {}
    return _parse(path, text, _identity(device))


def store_times(device: torch.device, problem: Problem | str, milliseconds: dict[str, float]) -> Path:
    """Adds a problem, or what is measured of it besides, to the device's file and returns its path."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        stored_times.cache_clear()  # another process may have stored some since this one looked
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that does not fit: it is replaced here
            problems = {**stored_times(device), str(problem): milliseconds}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({**_identity(device), "milliseconds": problems}, file, indent=1)
        os.replace(file.name, path)  # whole or not at all, whoever reads meanwhile
    stored_times.cache_clear()
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time between reading the file and replacing it; where nothing can be locked, as it comes."""
    with path.with_suffix(".lock").open("w") as lock:
        with suppress(ImportError, OSError):  # no POSIX; a file system without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_file(device: torch.device) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return base / "asft_kernels" / f"tiles-{name}.json"


def _identity(device: torch.device) -> dict[str, str]:
    """What must be the same for measured times to count."""
    tables: list = [(key, [str(tile) for tile in rows]) for t in (TILES, SOFTCAP_TILES) for key, rows in t.items()]
    tables += [[str(strips) for strips in STRIPS], FORMS, LABEL_TILE, LABEL_TILES]
    return {
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture_of(device),
        "triton": triton.__version__,
        "table": hashlib.sha256(repr(tables).encode()).hexdigest()[:12],
    }


def _parse(path: Path, text: bytes, identity: dict[str, str]) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(text)
        other = [f"{key} {found[key]!r}, here {value!r}" for key, value in identity.items() if found[key] != value]
        times = {str(p): {str(t): float(ms) for t, ms in of.items()} for p, of in found["milliseconds"].items()}
        if not other:
            return times
        reason = "measured with " + "; ".join(other)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"not readable as stored tile times ({type(error).__name__}: {error})"
    warnings.warn(
        f"asft_kernels: {path} is ignored: {reason}. Run `python -m asft_kernels.tools.autotune` again, or delete "
        "the file",
        stacklevel=2,
    )
    return {}
