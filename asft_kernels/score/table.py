"""Score files: one Parquet file a model, and what is checked before an objective may use one."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from asft_kernels.data.report import line_numbers
from asft_kernels.errors import InputError
from asft_kernels.files import replacing
from asft_kernels.score.scoring import token_counts

if TYPE_CHECKING:
    from datasets import Dataset

SIDES = ("chosen", "rejected")
NEEDED = ("model", "tokenizer", "data", "max_length", "token_logps")  # of the metadata
METADATA = b"asft_score"  # key of the Parquet schema's metadata; its value is JSON
Paths = str | Path | Sequence[str | Path]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) over vocabulary, special tokens and chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def write_scores(path: Path, rows: Iterable[dict[str, Any]], metadata: dict[str, Any]) -> None:
    """rows: id, line, and logps and length (token_logps if metadata says so) of both sides."""
    import pyarrow as pa
    from pyarrow import parquet

    fields = {"id": pa.string(), "line": pa.int64()}
    fields |= {f"{side}_logps": pa.float64() for side in SIDES} | {f"{side}_length": pa.int64() for side in SIDES}
    if metadata["token_logps"]:
        fields |= {f"{side}_token_logps": pa.list_(pa.float32()) for side in SIDES}
    rows = list(rows)
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in fields.items()}
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(metadata)})
    with replacing(path) as partial:
        parquet.write_table(table, partial, write_page_checksum=True)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_scores` was given. InputError for a file that it did not write."""
    from pyarrow import parquet

    if not Path(path).is_file():
        what = "is a folder; name the files in it" if Path(path).is_dir() else "no such file"
        raise InputError(f"scores: got {str(path)!r}, {what}; need a file that asft score wrote")
    try:
        found = (parquet.read_schema(path).metadata or {}).get(METADATA)
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"scores: {path} is no Parquet file ({error}); need one that asft score wrote") from error
    if found is None:
        raise InputError(f"scores: {path} is a Parquet file without the notes of asft score; need one that it wrote")
    try:
        metadata = json.loads(found)
        missing = [name for name in NEEDED if name not in metadata]
    except (ValueError, TypeError) as error:
        raise InputError(f"scores: {path} has damaged notes ({error}); need them as asft score wrote them") from error
    if missing:
        raise InputError(f"scores: {path} has notes without {', '.join(missing)}; need them as asft score wrote them")
    return metadata


def load_scores(paths: Paths, pairs: "Dataset", tokenizer: Any) -> Tensor:
    """(K, 2, n) float64: log-probability sums under K models, chosen then rejected, in the order of `pairs`.

    paths: one file of asft score or K of them. pairs: what `load_pairs` returned, or a part of it.

    Raises InputError for files of another tokenizer or of other data, and for those whose answers have
    another length here: they were made under other limits.
    """
    return torch.stack(
        [
            torch.from_numpy(np.stack([columns[f"{side}_logps"].to_numpy() for side in SIDES]))
            for columns in _same_tokens(paths, pairs, tokenizer, [f"{side}_logps" for side in SIDES])
        ]
    )


def load_token_logps(path: str | Path, pairs: "Dataset", tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of a file made with --token-logps: for chosen and rejected, n tensors (length,) fp32. Checks as `load_scores`."""
    if not read_metadata(path)["token_logps"]:
        raise InputError(f"scores: {path} has no log-probabilities per token; score again with --token-logps")
    names = [f"{side}_token_logps" for side in SIDES]
    (columns,) = _same_tokens(path, pairs, tokenizer, names)
    chosen, rejected = ([torch.from_numpy(np.array(row.values)) for row in columns[name]] for name in names)
    return chosen, rejected


def mean_avg_logps(paths: Paths, pairs: "Dataset") -> Tensor:
    """(2, n) float64: mean over the models of sum/length, each with its own tokenizer and lengths (PoFT's r̄).

    Raises InputError where a file lacks one of the pairs.
    """
    names = [f"{side}_{what}" for side in SIDES for what in ("logps", "length")]
    averages = []
    for path in _listed(paths):
        columns = _aligned(path, read_metadata(path), pairs, names)
        averages.append(
            [columns[f"{side}_logps"].to_numpy() / columns[f"{side}_length"].to_numpy().clip(min=1) for side in SIDES]
        )
    return torch.from_numpy(np.mean(averages, axis=0))


def _listed(paths: Paths) -> Sequence[str | Path]:
    listed = [paths] if isinstance(paths, str | Path) else paths
    if not listed:
        raise InputError("scores: got no file, need at least one that asft score wrote")
    return listed


def _same_tokens(paths: Paths, pairs: "Dataset", tokenizer: Any, names: list[str]) -> Iterable[Any]:
    """Tables as `_aligned` gives them, of files that scored the very tokens of `pairs`."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    lengths = token_counts(pairs)[1:]
    for path in _listed(paths):
        metadata = read_metadata(path)
        if metadata["tokenizer"] != fingerprint:
            raise InputError(
                f"scores: {path} was made with another tokenizer, that of {metadata['model']!r}; "
                "need the one of the model that is trained: vocabulary, special tokens and chat template the same"
            )
        columns = _aligned(path, metadata, pairs, [*names, *(f"{side}_length" for side in SIDES)])
        scored = np.stack([columns[f"{side}_length"].to_numpy() for side in SIDES])
        other = np.flatnonzero((scored != lengths).any(axis=0))
        if len(other):
            lines = pairs.select(other)["line"][:]
            raise InputError(
                f"scores: {path} has answers of other lengths for {len(other)} of {len(pairs)} pairs "
                f"({line_numbers(lines)}): it was made with {_limits(metadata)}; use the same"
            )
        yield columns


def _aligned(path: str | Path, metadata: dict[str, Any], pairs: "Dataset", names: list[str]) -> Any:
    """The pyarrow.Table of the file's columns `names`, a row for each pair, in their order."""
    import pyarrow as pa
    from pyarrow import parquet
    from pyarrow.compute import call_function

    try:
        table = parquet.read_table(path, columns=["id", *names], page_checksum_verification=True)
        if len(table.column_names) <= len(names):
            raise ValueError(f"columns {', '.join(table.column_names) or 'none'}, need id, {', '.join(names)}")
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"scores: {path} cannot be read ({error}); need it as asft score wrote it") from error
    row_of = {pair: row for row, pair in enumerate(table["id"].to_pylist())}
    ids = pairs["id"][:]
    missing = [index for index, pair in enumerate(ids) if pair not in row_of]
    if missing:
        lines = pairs.select(missing)["line"][:]
        raise InputError(
            f"scores: {path} lacks {len(missing)} of {len(ids)} pairs ({line_numbers(lines)}; first id "
            f"{ids[missing[0]]}): it was made from {metadata['data']!r} with {_limits(metadata)}; score this data "
            "with the same"
        )
    table = table.take([row_of[pair] for pair in ids])
    for name in names:
        column = table[name]
        if pa.types.is_list(column.type):
            column = call_function("list_flatten", [column])
        if not np.isfinite(column.to_numpy()).all():
            raise InputError(f"scores: {path} has a value in {name} that is not a finite number; score again")
    return table


def _limits(metadata: dict[str, Any]) -> str:
    return f"max_length {metadata['max_length']}"
