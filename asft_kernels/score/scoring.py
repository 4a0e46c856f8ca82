"""Log-probabilities of the answers under one model, without gradients and without the logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from asft_kernels.data import with_labels
from asft_kernels.errors import InputError
from asft_kernels.models import PreferenceModel

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ScoredBatch:
    """Scores of B pairs, on the CPU; of 2, the first is chosen, the second rejected.

    rows: (B,) int64, where the pairs stand in the dataset.
    logps: (2, B) float64, sums over the tokens of an answer. lengths: (2, B) int64, their number.
    token_logps: chosen and rejected, each B tensors (length,).
    """

    rows: Tensor
    logps: Tensor
    lengths: Tensor
    token_logps: tuple[list[Tensor], list[Tensor]]


def score_pairs(
    model: PreferenceModel,
    pairs: "Dataset",
    collator: Any,
    *,
    batch_size: int = 8,
    progress: str | None = None,
) -> Iterator[ScoredBatch]:
    """Scores every pair of `load_pairs`, at one matrix product with the head per answer token.

    collator: TRL's DataCollatorForPreference.

    Batches are of like length, the longest first: little padding, and too large a batch shows at
    once. Dropout is off meanwhile. progress: label of a progress bar, None for none; it counts tokens,
    so that the time left is right although the short pairs come last.

    Raises InputError for a score that is not finite, naming the line.
    """
    from tqdm import tqdm

    prompt, chosen, rejected = token_counts(pairs)
    order = np.argsort(-(prompt + np.maximum(chosen, rejected)), kind="stable")
    tokens = 2 * prompt + chosen + rejected
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=int(tokens.sum()), unit="tok", unit_scale=True, desc=progress, disable=progress is None) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = with_labels(collator([pairs[int(row)] for row in rows]))
                scored = _score(model, {name: tensor.to(device) for name, tensor in batch.items()}, rows)
                finite = scored.logps.isfinite().all(dim=0)
                if not finite.all():
                    line = pairs[int(scored.rows[~finite][0])]["line"]
                    raise InputError(
                        f"score: the log-probability of line {line} is not a finite number, need one; the model's "
                        "weights are damaged, or it overflows in its dtype: try float32"
                    )
                yield scored
                bar.update(int(tokens[rows].sum()))
    finally:
        model.train(was_training)


@torch.inference_mode()
def _score(model: PreferenceModel, batch: dict[str, Tensor], rows: np.ndarray) -> ScoredBatch:
    logps = model.token_logps(**batch)
    answer = batch["labels"][:, 1:] != -100
    logps, answer = logps[:, :-1].cpu(), answer.cpu()
    lengths = answer.sum(dim=1)
    token_logps = logps[answer].split(lengths.tolist())
    return ScoredBatch(
        torch.from_numpy(rows.copy()),
        logps.double().sum(dim=1).view(2, -1),  # masked places are 0
        lengths.view(2, -1),
        (list(token_logps[: len(rows)]), list(token_logps[len(rows) :])),
    )


def token_counts(pairs: "Dataset") -> np.ndarray:
    """(3, n): tokens of prompt, chosen and rejected of each pair."""
    from pyarrow import compute

    tables = cast(Iterator[Any], pairs.with_format("arrow").iter(1000))
    counts = [
        [
            compute.call_function("list_value_length", [table[name]])
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        ]
        for table in tables
    ]
    return np.concatenate(counts, axis=1).astype(np.int64)
