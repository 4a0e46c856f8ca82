"""What an objective needs beside policy and labels: as columns of the pairs, once, and from there into batches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asft_kernels.data import PairCollator
from asft_kernels.data.pairs import IGNORE_INDEX
from asft_kernels.errors import InputError
from asft_kernels.methods.bmc.diff_marks import diff_marks
from asft_kernels.methods.fpo.cache import ReferenceFeatures
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import BMC, weighted_reference
from asft_kernels.score.scoring import reference_logps, score_pairs
from asft_kernels.score.table import SIDES, load_scores, load_token_logps, mean_avg_logps
from asft_kernels.train.step_inputs import MismatchInputs

if TYPE_CHECKING:
    from datasets import Dataset

TokenLogps = tuple[list[Tensor], list[Tensor]]  # of chosen and rejected answers, n tensors (length,) each


def with_reference(
    pairs: "Dataset",
    model: PreferenceModel,
    *,
    scores: Sequence[str],
    tokenizer: Any,
    batch_size: int,
    label: str,
    max_length: int,
) -> "Dataset":
    """pairs with the columns that `ObjectiveCollator` hands to the model's objective and step_inputs.

    scores: files of asft-score, one a reference model; none: the model as it is now is the reference, scored here
    under a progress bar named label. max_length: of the pairs, in tokens. InputError for files that do not fit them.
    """
    objective = model.objective
    live: dict[str, Any] = {"batch_size": batch_size, "progress": label}
    if isinstance(objective, BMC):
        return _with_marks(pairs, model, objective, scores, tokenizer, live)
    if not objective.needs_reference:
        return pairs
    if objective.ref_per_token:
        tokens = load_token_logps(scores[0], pairs, tokenizer) if scores else _token_logps(model, pairs, live)
        for side, of_side in zip(SIDES, tokens, strict=True):
            column = [values.tolist() for values in of_side]
            pairs = pairs.add_column(f"ref_{side}_token_logps", column)  # pyright: ignore[reportCallIssue]
        return pairs
    if objective.reference_kind == "mean":
        if scores:
            values = mean_avg_logps(scores, pairs)[None]
        else:
            lengths = [[max(len(answer), 1) for answer in pairs[side]] for side in SIDES]
            values = reference_logps(model, pairs, PairCollator(0), **live) / torch.tensor(lengths)
    elif scores:
        values = load_scores(scores, pairs, tokenizer)
    else:
        values = reference_logps(model, pairs, PairCollator(0), **live)
    for side, of_side in zip(SIDES, values.unbind(dim=1), strict=True):
        pairs = pairs.add_column(f"ref_{side}_logps", of_side.T.tolist())  # pyright: ignore[reportCallIssue]
    return _with_mismatched(pairs, model, max_length, live) if isinstance(model.step_inputs, MismatchInputs) else pairs


def _with_mismatched(pairs: "Dataset", model: PreferenceModel, max_length: int, live: dict[str, Any]) -> "Dataset":
    """pairs with the answers of another pair, cut so that prompt and answer fit, and their sums under the model.

    The other pair stands half the dataset away: neighbours often share a prompt. TRL moves answers on within a batch.
    """
    count = len(pairs)
    if count < 2:
        raise InputError(
            "kto: got 1 pair, need at least 2: the reference point joins prompts to other prompts' answers"
        )
    room = [max_length - len(prompt) for prompt in pairs["prompt"]]
    moved = pairs.select([(row + count // 2) % count for row in range(count)])
    answers = {side: [answer[:left] for answer, left in zip(moved[side], room, strict=True)] for side in SIDES}
    mismatched = pairs
    for side in SIDES:
        mismatched = mismatched.remove_columns(side).add_column(side, answers[side])  # pyright: ignore[reportCallIssue]
        pairs = pairs.add_column(f"mismatched_{side}", answers[side])  # pyright: ignore[reportCallIssue]
    live = {**live, "progress": f"{live['progress']}, mismatched answers"}
    for side, sums in zip(SIDES, reference_logps(model, mismatched, PairCollator(0), **live)[0], strict=True):
        pairs = pairs.add_column(f"mismatched_ref_{side}_logps", sums.tolist())  # pyright: ignore[reportCallIssue]
    return pairs


def _with_marks(
    pairs: "Dataset",
    model: PreferenceModel,
    objective: BMC,
    scores: Sequence[str],
    tokenizer: Any,
    live: dict[str, Any],
) -> "Dataset":
    marks = [diff_marks(chosen, rejected) for chosen, rejected in zip(pairs["chosen"], pairs["rejected"], strict=True)]
    columns: dict[str, list[Any]] = {f"{side}_marks": [m[i] for m in marks] for i, side in enumerate(SIDES)}
    if objective.needs_reference:
        tokens = load_token_logps(scores[0], pairs, tokenizer) if scores else _token_logps(model, pairs, live)
        for i, side in enumerate(SIDES):
            if objective.ref_per_token:
                columns[f"ref_{side}_token_logps"] = [values.tolist() for values in tokens[i]]
            else:
                columns[f"ref_{side}_logps"] = [
                    weighted_reference(values[None], torch.tensor([m[i]]), objective.delta, shift=False).tolist()
                    for values, m in zip(tokens[i], marks, strict=True)
                ]
    for name, values in columns.items():
        pairs = pairs.add_column(name, values)  # pyright: ignore[reportCallIssue]
    return pairs


def _token_logps(model: PreferenceModel, pairs: "Dataset", live: dict[str, Any]) -> TokenLogps:
    tokens: TokenLogps = ([torch.empty(0)] * len(pairs), [torch.empty(0)] * len(pairs))
    for batch in score_pairs(model, pairs, PairCollator(0), **live):
        for of_side, scored in zip(tokens, batch.token_logps, strict=True):
            for row, values in zip(batch.rows.tolist(), scored, strict=True):
                of_side[row] = values
    return tokens


class ObjectiveCollator(PairCollator):
    """Batches with what the columns of `with_reference` hold: ref_logps, token_weights; and nll_labels.

    nll_on_prompt: the likelihood term over prompt and answer of the chosen rows. unweighted_nll: over the answer, its
    tokens unweighted (bmc). features: the reference's, for fpo.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        nll_on_prompt: bool = False,
        unweighted_nll: bool = False,
        features: ReferenceFeatures | None = None,
    ):
        super().__init__(pad_token_id)
        self.nll_on_prompt, self.unweighted_nll, self.features = nll_on_prompt, unweighted_nll, features

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(pairs)
        labels = batch["labels"]
        if self.nll_on_prompt:
            chosen = slice(len(pairs))
            batch["nll_labels"] = batch["input_ids"][chosen].masked_fill(
                batch["attention_mask"][chosen] == 0, IGNORE_INDEX
            )
        elif self.unweighted_nll:
            batch["nll_labels"] = labels[: len(pairs)]
        if "ref_chosen_logps" in pairs[0]:
            sums = [pair[f"ref_{side}_logps"] for side in SIDES for pair in pairs]
            ref = torch.tensor(sums, dtype=torch.float64).T  # (K, 2B)
            batch["ref_logps"] = ref[0] if len(ref) == 1 else ref
        if "mismatched_chosen" in pairs[0]:
            rows = [{"prompt": pair["prompt"], **{s: pair[f"mismatched_{s}"] for s in SIDES}} for pair in pairs]
            batch |= {f"mismatched_{name}": tensor for name, tensor in super().__call__(rows).items()}
            sums = [pair[f"mismatched_ref_{side}_logps"] for side in SIDES for pair in pairs]
            batch["mismatched_ref_logps"] = torch.tensor(sums, dtype=torch.float64)
        if self.features is not None:
            batch["ref_pooled"] = self.features.pooled([pair["id"] for pair in pairs])
        if "chosen_marks" in pairs[0]:
            batch["token_weights"] = _at_labels(labels, [pair[f"{s}_marks"] for s in SIDES for pair in pairs])
        if "ref_chosen_token_logps" in pairs[0]:
            at_labels = _at_labels(labels, [pair[f"ref_{s}_token_logps"] for s in SIDES for pair in pairs])
            batch["ref_logps"] = at_labels.roll(-1, dims=1)  # where fused_linear_logps has them; a prompt comes first
        return batch


def _at_labels(labels: Tensor, values: list[Any]) -> Tensor:
    """(2B, T) fp32: each row's values where its labels are, 0 elsewhere."""
    spread = torch.zeros(labels.shape)
    for row, of_row in enumerate(values):
        spread[row, labels[row] != IGNORE_INDEX] = torch.tensor(of_row, dtype=torch.float32)
    return spread
