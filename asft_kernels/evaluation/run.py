"""One command: for each model its tokenizer, the pairs, scores and answers; then one report."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from asft_kernels import __version__
from asft_kernels.data import load_pairs
from asft_kernels.errors import InputError
from asft_kernels.evaluation import answers, figures
from asft_kernels.evaluation.report import write_report
from asft_kernels.models.loading import digest_of_model, fitted_length, load_tokenizer
from asft_kernels.score.run import score_path
from asft_kernels.score.table import tokenizer_fingerprint


def run(args: Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Evaluates args.model on args.data and writes the report into args.output.

    Args:
        args: of `asft eval`.
        say: takes lines of text for the user.

    Returns:
        model -> summary, as `figures.summary` gives it.

    Raises:
        InputError: for what was given and cannot be used.
    """
    folder = Path(args.output)
    rooms = {model: folder / score_path("", model).stem for model in args.model}
    if len(set(rooms.values())) < len(args.model):
        raise InputError(f"--model: got {args.model}, two of one name; need names that differ")
    _check_report(folder / "report.json", args.model)
    tokenizers, configs = {}, {}
    for model in args.model:  # what is wrong with the last one is said before the first is evaluated
        tokenizers[model], config = load_tokenizer(model)
        args.max_length = fitted_length(config, args.max_length)
        configs[model] = config.get_text_config()
    settings = answers.Settings(args.dtype, args.batch_size, args.max_new_tokens if args.generate else None)
    numbers, ids, remarks = {}, {}, []
    for model, tokenizer in tokenizers.items():
        say(f"{model}:")
        pairs, report = load_pairs(
            args.data, tokenizer, split=args.split, max_length=args.max_length, vocab_size=configs[model].vocab_size
        )
        say(str(report))
        if args.max_pairs is not None:
            pairs = pairs.select(range(min(args.max_pairs, len(pairs))))
        ids[model] = pairs["id"][:]
        about = {
            "model": model, "dtype": args.dtype, "tokenizer": tokenizer_fingerprint(tokenizer),
            "pairs": hashlib.sha256("".join(ids[model]).encode()).hexdigest(), "max_length": args.max_length,
            "model_files": digest_of_model(model), "version": __version__,
        }  # fmt: skip
        rows = answers.fill(model, tokenizer, pairs, rooms[model], about, settings)
        positions = getattr(configs[model], "max_position_embeddings", None)
        if args.generate and (remark := answers.without_room(pairs, rows, positions, args.max_new_tokens)):
            remarks.append(f"{model}: {remark}")
        chosen = tokenizer.batch_decode(pairs["chosen_ids"][:], skip_special_tokens=True)
        numbers[model] = figures.of_pairs(rows, [text.strip() for text in chosen])
    if len({str(sorted(tokenizer.get_vocab().items())) for tokenizer in tokenizers.values()}) > 1:
        remarks.append("the tokenizers differ: means per token and lengths are of other tokens, sums and texts compare")
    models = {model: figures.summary(of_model) for model, of_model in numbers.items()}
    comparisons = []
    for earlier, later in combinations(numbers, 2):  # in this order, an improvement is positive
        both = [_rows_of(numbers[model], ids[model], set(ids[earlier]) & set(ids[later])) for model in (later, earlier)]
        comparisons.append({"models": [later, earlier], "difference": figures.comparison(*both)})
    shown = {name: value for name, value in vars(args).items() if name not in ("model", "output")}
    tables = write_report(folder, {**shown, "version": __version__}, models, comparisons, numbers, remarks)
    say("\n".join(["", *tables]))
    say(f"{folder / 'report.md'}: {len(models)} models, {max(map(len, ids.values()))} pairs")
    return models


def _check_report(path: Path, models: list[str]) -> None:
    """A report of other models is not replaced; one of the same is, by what a run that goes on adds."""
    if not path.is_file():
        return
    try:
        there = list(json.loads(path.read_text(encoding="utf-8"))["models"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output_dir: {path} is not a report of asft eval; name another folder") from error
    if set(there) != set(models):
        raise InputError(f"--output_dir: {path} is of {there}, got {models}; name another folder, or delete that file")


def _rows_of(numbers: dict[str, Any], ids: list[str], wanted: set[str]) -> dict[str, Any]:
    """The numbers of the wanted pairs, each once, in the order of their ids."""
    place = {pair: row for row, pair in enumerate(ids)}
    index = [place[pair] for pair in sorted(wanted)]
    return {name: values[index] for name, values in numbers.items()}
