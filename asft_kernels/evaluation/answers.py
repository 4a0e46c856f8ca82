"""What one model makes of the pairs: log-probabilities of both answers and an answer of its own, kept on disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.trainer.dpo_trainer import DataCollatorForPreference

from asft_kernels.errors import InputError
from asft_kernels.models import PreferenceModel
from asft_kernels.models.generation import TransformersGenerator
from asft_kernels.models.loading import load_causal_lm
from asft_kernels.score.scoring import score_pairs
from asft_kernels.score.unfinished import UnfinishedScores


@dataclass(frozen=True)
class Settings:
    """What the rows of a run depend on beside model and pairs.

    Attributes:
        dtype: of the weights: "float32", "bfloat16", "auto".
        batch_size: pairs scored, and prompts continued, together.
        max_new_tokens: tokens of a generated answer; None: none is generated.
    """

    dtype: str
    batch_size: int
    max_new_tokens: int | None


def fill(name: str, tokenizer: Any, pairs: Any, folder: Path, about: dict[str, Any], settings: Settings) -> list[Any]:
    """Scores and generates what is not on disk yet.

    Args:
        name: folder or hub name of the model.
        tokenizer: its own.
        pairs: dataset of `load_pairs`, with token ids.
        folder: where scores.jsonl and generated.jsonl are, or come to be.
        about: what the rows belong to; a folder of another run is refused.
        settings: how they are made.

    Returns:
        A row a pair, in order: chosen_logps, rejected_logps, chosen_length, rejected_length, and "generated" (text,
        None where prompt and answer do not fit into the model), generated_length, ended with generation.

    Raises:
        InputError: for a folder of another run, and scores that are not finite.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    scores = _opened(folder / "scores.jsonl", about)
    unscored = _missing(pairs, scores)
    generated, unanswered = None, []
    if settings.max_new_tokens is not None:
        generated = _opened(folder / "generated.jsonl", {**about, "max_new_tokens": settings.max_new_tokens})
        unanswered = _missing(pairs, generated)
    if len(unscored) or len(unanswered):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(name, settings.dtype).to(device).eval()
        if len(unscored):
            for row in _scored(PreferenceModel(model), unscored, tokenizer, settings.batch_size, Path(name).name):
                scores.add(row)
        if generated is not None and len(unanswered):
            generator = TransformersGenerator(model, tokenizer, batch_size=settings.batch_size)
            for rows in _answers(generator, unanswered, settings, Path(name).name):
                generated.add(rows)
    further = {} if generated is None else generated.rows
    return [{**scores.rows[line], **further.get(line, {})} for line in pairs["line"]]


def without_room(pairs: Any, rows: list[Any], positions: int | None, max_new_tokens: int) -> str | None:
    """Says which pairs have no generated answer for want of room, and what gives them one.

    Args:
        pairs: as in `fill`.
        rows: what it returned for them.
        positions: of the model.
        max_new_tokens: that were asked for.

    Returns:
        A line; None where every pair has an answer.
    """
    lengths = [len(pair["prompt_ids"]) for pair, row in zip(pairs, rows, strict=True) if row["generated"] is None]
    if not lengths or not positions:
        return None
    room, most = positions - max(lengths), positions - min(lengths)
    todo = "take shorter prompts"
    if most > 0:
        todo = f"--max_new_tokens {room} fits all of them" if room > 0 else f"--max_new_tokens {most} fits the shortest"
    return (
        f"{len(lengths)} of {len(rows)} pairs have no generated answer: prompt and --max_new_tokens {max_new_tokens} "
        f"exceed the model's {positions} positions; {todo}"
    )


def _opened(path: Path, about: dict[str, Any]) -> UnfinishedScores:
    rows = UnfinishedScores(path)
    if rows.metadata is not None and rows.metadata != about:
        names = [key for key in about if rows.metadata.get(key) != about[key]]
        raise InputError(
            f"--output_dir: {path} was made with other {', '.join(names)}; delete that file, or name another folder"
        )
    rows.start(about)
    return rows


def _missing(pairs: Any, rows: UnfinishedScores) -> Any:
    return pairs.select([index for index, line in enumerate(pairs["line"]) if line not in rows.rows])


def _scored(model: Any, pairs: Any, tokenizer: Any, batch_size: int, label: str) -> Iterator[list[dict[str, Any]]]:
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    collator = DataCollatorForPreference(pad_token_id=pad)
    for batch in score_pairs(model, pairs, collator, batch_size=batch_size, progress=f"{label}: scores"):
        yield [
            {
                "line": pairs[index]["line"],
                **{f"{side}_logps": batch.logps[half, at].item() for half, side in enumerate(("chosen", "rejected"))},
                **{
                    f"{side}_length": batch.lengths[half, at].item() for half, side in enumerate(("chosen", "rejected"))
                },
            }
            for at, index in enumerate(batch.rows.tolist())
        ]


def _answers(generator: Any, pairs: Any, settings: Settings, label: str) -> Iterator[list[dict[str, Any]]]:
    """Greedy ones, a batch at a time, the longest prompts first."""
    from tqdm import tqdm

    new_tokens: Any = settings.max_new_tokens
    positions = getattr(generator.model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [len(ids) for ids in pairs["prompt_ids"]]
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    with tqdm(total=len(pairs), desc=f"{label}: answers", unit="pair") as bar:
        for start in range(0, len(order), settings.batch_size):
            batch = [pairs[index] for index in order[start : start + settings.batch_size]]
            fits = [not positions or len(pair["prompt_ids"]) + new_tokens <= positions for pair in batch]
            prompts = [list(pair["prompt_ids"]) for pair, fit in zip(batch, fits, strict=True) if fit]
            made = iter(generator.generate_ids(prompts, max_new_tokens=new_tokens) if prompts else ())
            rows = []
            for pair, fit in zip(batch, fits, strict=True):
                ids = next(made) if fit else []
                text = generator.tokenizer.decode(ids, skip_special_tokens=True) if fit else None
                ended = bool(ids) and ids[-1] in generator.ends()
                rows.append({"line": pair["line"], "generated": text, "generated_length": len(ids), "ended": ended})
            yield rows
            bar.update(len(batch))
