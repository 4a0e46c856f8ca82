"""One command: for each model in turn its tokenizer, the data, the scores, a file."""

import hashlib
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from asft_kernels import __version__
from asft_kernels.data import load_pairs, with_labels
from asft_kernels.errors import InputError
from asft_kernels.locks import only_writer
from asft_kernels.models import PreferenceModel
from asft_kernels.models.loading import digest_of_model, fitted_length, load_causal_lm, load_tokenizer
from asft_kernels.score.scoring import ScoredBatch, score_pairs
from asft_kernels.score.table import SIDES, read_metadata, tokenizer_fingerprint, write_scores
from asft_kernels.score.unfinished import UnfinishedScores

# Rows of runs that differ in one of these do not belong into one file.
SAME_TO_GO_ON = ("model", "model_files", "dtype", "tokenizer", "ids", "max_length", "token_logps")


def run(args: Namespace, say: Callable[[str], None] = print) -> list[Path]:
    """Scores args.data under each of args.model; the files. InputError on bad input."""
    paths = [score_path(args.output, model) for model in args.model]
    Path(args.output).mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(paths):
        if path in paths[:index]:
            both = f"{args.model[paths.index(path)]!r} and {args.model[index]!r}"
            raise InputError(f"--model: {both} would both be written to {path}; need names that differ")
    tokenizers = []
    for model in args.model:  # what is wrong with the last one is said before the first is scored
        tokenizer, config = load_tokenizer(model)
        args.max_length = fitted_length(config, args.max_length)
        tokenizers.append((tokenizer, config.get_text_config().vocab_size))
    for model, (tokenizer, vocab_size), path in zip(args.model, tokenizers, paths, strict=True):
        with only_writer(path.with_suffix(".lock"), "--output_dir", path):
            _score_under(model, tokenizer, vocab_size, path, args, say)
    return paths


def score_path(folder: str | Path, model: str) -> Path:
    """The model's file: its name, with -- for what a file's name cannot hold."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", model).strip("-.")
    return Path(folder) / f"{slug[-200:] or 'model'}.parquet"


def _listed(data: str | list[str]) -> list[str]:
    return [data] if isinstance(data, str) else data


def _score_under(
    model: str, tokenizer: Any, vocab_size: int, path: Path, args: Namespace, say: Callable[[str], None]
) -> None:
    say(f"{model}:")
    pairs, report = load_pairs(args.data, tokenizer, max_length=args.max_length, vocab_size=vocab_size)
    say(str(report))
    metadata = {
        "model": model,
        "model_files": digest_of_model(model),
        "dtype": args.dtype,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": ", ".join(Path(name).name for name in _listed(args.data)),
        "pairs": len(pairs),
        "ids": hashlib.sha256("".join(pairs["id"]).encode()).hexdigest(),
        "max_length": args.max_length,
        "token_logps": args.token_logps,
        "version": __version__,
    }
    if path.exists():
        _same_command(path, read_metadata(path), metadata)
        say(f"{path}: complete already, left as it is")
        return
    unfinished = UnfinishedScores(path.with_suffix(".unfinished.jsonl"))
    if unfinished.metadata is not None:
        _same_command(unfinished.path, unfinished.metadata, metadata)
        say(f"{len(unfinished.rows)} of {len(pairs)} pairs are scored already")
    unfinished.start(metadata)
    left = pairs.select([index for index, line in enumerate(pairs["line"]) if line not in unfinished.rows])
    if len(left):
        _score_rest(model, tokenizer, left, unfinished, args, say)
    write_scores(path, (unfinished.rows[line] for line in pairs["line"]), metadata)
    unfinished.path.unlink()
    say(f"{path}: {len(pairs)} pairs")


def _score_rest(
    name: str, tokenizer: Any, pairs: Any, unfinished: UnfinishedScores, args: Namespace, say: Callable[[str], None]
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = PreferenceModel(load_causal_lm(name, args.dtype).to(device))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    collator = DataCollatorForPreference(pad_token_id=pad)
    batch = with_labels(collator([pairs[0]]))
    worst = model.check_head({name: tensor.to(device) for name, tensor in batch.items()})
    say(f"output head checked: fused and own log-probabilities differ by at most {worst:.1e}")
    for scored in score_pairs(model, pairs, collator, batch_size=args.batch_size, progress=Path(name).name):
        unfinished.add(_rows(scored, pairs, args.token_logps))


def _rows(scored: ScoredBatch, pairs: Any, token_logps: bool) -> Iterator[dict[str, Any]]:
    for column, index in enumerate(scored.rows.tolist()):
        row = {"id": pairs[index]["id"], "line": pairs[index]["line"]}
        for number, side in enumerate(SIDES):
            row[f"{side}_logps"] = scored.logps[number, column].item()
            row[f"{side}_length"] = scored.lengths[number, column].item()
            if token_logps:
                row[f"{side}_token_logps"] = scored.token_logps[number][column].tolist()
        yield row


def _same_command(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in SAME_TO_GO_ON:
        if old.get(name) != new[name]:
            what = "pairs" if name == "ids" else name.replace("_", "-")
            shown = (
                "others" if name in ("ids", "tokenizer", "model_files") else f"{old[name]!r} then and {new[name]!r} now"
            )
            if name == "ids":
                shown += ", as with another file or --max_length"
            raise InputError(
                f"--output: {path} is of another command (its {what}: {shown}); "
                "delete that file, or name another folder"
            )
