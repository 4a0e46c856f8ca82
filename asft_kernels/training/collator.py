"""TRL's batches with what objective and method read beside them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asft_kernels.training.hooks import Method
from asft_kernels.training.reference import SIDES, TOKENS, of_answer

ENTRIES = "entries"  # the batch's dict of tensors that are no keywords of the model


class Collator:
    """Makes (2B, T) batches of rows by TRL's collator, and puts further tensors into the batch's `entries`.

    Args:
        of_trl: makes input_ids, attention_mask, completion_mask, ... of rows.
        method: its `collate` adds entries.
        nll_on_prompt: the likelihood term is over prompt and answer of the chosen rows.
    """

    def __init__(self, of_trl: Any, method: Method, *, nll_on_prompt: bool = False):
        self.of_trl, self.method, self.nll_on_prompt = of_trl, method, nll_on_prompt

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.of_trl([dict(row) for row in rows]))  # TRL's changes rows with images
        entries = {}
        if self.nll_on_prompt:
            chosen = slice(len(rows))
            entries["nll_labels"] = batch["input_ids"][chosen].masked_fill(batch["attention_mask"][chosen] == 0, -100)
        if TOKENS[0] in rows[0]:
            trained = iter(batch["completion_mask"].sum(dim=1).tolist())
            values = [of_answer(row, side, next(trained)) for side in SIDES for row in rows]
            entries["ref_token_logps"] = at_labels(batch["completion_mask"], values)[:, 1:]
        entries |= self.method.collate(rows, batch)
        return {**batch, ENTRIES: entries} if entries else batch


def at_labels(completion_mask: Tensor, values: Sequence[Sequence[float]]) -> Tensor:
    """(2B, T) fp32: each row's values, one a token of its answer, where these stand; 0 elsewhere.

    An answer that the collator cut takes its first ones.
    """
    spread = torch.zeros(completion_mask.shape)
    for row, of_row in enumerate(values):
        at = completion_mask[row].nonzero().squeeze(1)
        spread[row, at] = torch.as_tensor(of_row, dtype=torch.float32)[: len(at)]
    return spread


def counting_pairs(completion_mask: Tensor) -> Tensor:
    """(B,) bool: which pairs of (2B, T) count, i.e. have a predicted token on both sides."""
    chosen, rejected = completion_mask[:, 1:].bool().any(dim=1).chunk(2)
    return chosen & rejected


def token_counts(pairs: Any) -> np.ndarray:
    """Returns (3, rows): tokens of prompt, chosen and rejected answer of a dataset of `load_pairs`."""
    names = ("prompt", "chosen", "rejected")
    if "prompt_tokens" in pairs.column_names:  # with images
        return np.array([pairs[f"{name}_tokens"][:] for name in names])
    return np.array([[len(ids) for ids in pairs[f"{name}_ids"][:]] for name in names])


def longest_first(pairs: Any) -> np.ndarray:
    """Returns the rows of a dataset of `load_pairs` in falling order of their longer sequence."""
    prompt, chosen, rejected = token_counts(pairs)
    return np.argsort(-(prompt + np.maximum(chosen, rejected)), kind="stable")
