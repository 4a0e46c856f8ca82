"""Sparse autoencoders on disk: Gemma Scope's params.npz, and safetensors with the same keys.

W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,), threshold (F,); without threshold: ReLU
"""

import importlib
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from asft_kernels.data.limits import require_ratio
from asft_kernels.errors import InputError
from asft_kernels.files import replacing
from asft_kernels.methods.fpo.autoencoder import SparseAutoencoder

NEEDED = ("W_enc", "b_enc", "W_dec", "b_dec")
KEYS = (*NEEDED, "threshold")
SUFFIXES = (".npz", ".safetensors")


def read_sae(path: str | os.PathLike[str]) -> SparseAutoencoder:
    """The autoencoder in a .npz or .safetensors file.

    Raises InputError, beginning with the path, for another file, a key that is missing or unknown (an
    autoencoder that does more than these five tensors would give other features), a wrong shape, a value that
    is not finite.
    """
    path = Path(path)
    suffix = check_suffix(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, need a file of an autoencoder")
    try:
        tensors = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
        missing = [key for key in NEEDED if key not in tensors]
        unknown = [key for key in tensors if key not in KEYS]
        if missing:
            raise InputError(f"no {', '.join(missing)} among its keys ({', '.join(tensors)}), need {', '.join(NEEDED)}")
        if unknown:
            raise InputError(f"got the key {unknown[0]}, which is not computed here, need only {', '.join(KEYS)}")
        return SparseAutoencoder(**tensors)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def write_sae(sae: SparseAutoencoder, path: str | os.PathLike[str]) -> None:
    """Write it as the file's name ends: .npz or .safetensors. A write that is killed leaves the old file."""
    path = Path(path)
    suffix = check_suffix(path)
    tensors = {name: tensor.detach().cpu() for name, tensor in sae.named_parameters()}
    with replacing(path) as partial:
        if suffix == ".npz":
            numpy = importlib.import_module("numpy")
            with partial.open("wb") as file:
                numpy.savez(file, allow_pickle=False, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            importlib.import_module("safetensors.torch").save_file(tensors, partial)


def check_suffix(path: str | os.PathLike[str]) -> str:
    """.npz or .safetensors, else ValueError."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: got a name that ends in {path.suffix!r}, need {' or '.join(SUFFIXES)}")
    return path.suffix


def _read_npz(path: Path) -> dict[str, Tensor]:
    numpy = importlib.import_module("numpy")
    try:
        with zipfile.ZipFile(path) as parts:
            require_ratio(sum(part.file_size for part in parts.infolist()), path.stat().st_size)
        with path.open("rb") as file, numpy.load(file) as arrays:  # without pickles, which run code
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except (OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot be read as .npz ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = importlib.import_module("safetensors")
    try:
        return importlib.import_module("safetensors.torch").load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"cannot be read as .safetensors ({error})") from error
