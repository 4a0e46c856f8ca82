"""KTO on pairs: the reference point of every step, from prompts joined to other prompts' answers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from asft_kernels.errors import InputError
from asft_kernels.objectives import Objective, expression_of, kto_kl
from asft_kernels.training.collator import counting_pairs
from asft_kernels.training.hooks import LossInputs, Method

SIDES = ("chosen", "rejected")
ANSWERS = tuple(f"mismatched_{side}_ids" for side in SIDES)
SUMS = tuple(f"mismatched_ref_{side}_logps" for side in SIDES)
OF_MODEL = ("input_ids", "attention_mask", "completion_mask")


def other_prompts(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each row the number of one with another prompt: half the data set away, or the next such."""
    count = len(prompts)
    found = []
    for row, prompt in enumerate(prompts):
        away = ((row + count // 2 + step) % count for step in range(count))
        other = next((there for there in away if prompts[there] != prompt), None)
        if other is None:
            raise InputError("kto: got one prompt in all rows, need several: the reference point joins them to others")
        found.append(other)
    return found


class Hooks(Method):
    """Gives the input `kl` (arXiv 2402.01306): mean of S - ref_S over mismatched rows of all ranks, at least 0.

    A mismatched row joins a prompt to an answer of the pair that stands half the data set away: neighbours often share
    a prompt. TRL moves answers on within a batch. The rows take a pass of their own through the policy, without
    gradients, and one through the reference unless precompute_ref_log_probs has it made once.
    """

    name = "kto"
    provides = ("kl",)
    columns = (*ANSWERS, *SUMS)
    live_reference = True

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return "kl" in {**objective.inputs, **objective.optional_inputs}

    def check(self, config: Any, objective: Objective) -> None:
        if not self.serves(objective):
            got = expression_of(objective)
            raise InputError(f"method: got 'kto' with {got}, need an objective that reads kl, such as kto")

    def start(self, trainer: Any) -> None:
        self.rows_to_batch = trainer.collator.of_trl

    def dataset(self, trainer: Any, dataset: Any, label: str) -> Any:
        from datasets import Dataset, concatenate_datasets

        if not isinstance(dataset, Dataset) or "prompt_ids" not in dataset.column_names:
            got = type(dataset).__name__ if not isinstance(dataset, Dataset) else "rows with images"
            raise InputError(f"kto: got {got} for {label}, need a datasets.Dataset of text, which has prompt_ids")
        count = len(dataset)
        if count < 2:
            raise InputError(
                f"kto: got 1 pair for {label}, need at least 2: the reference point joins prompts to other prompts' "
                "answers"
            )
        moved = dataset.select(other_prompts(dataset["prompt_ids"][:]))
        moved = moved.select_columns([f"{side}_ids" for side in SIDES])
        further = [moved.rename_columns({f"{side}_ids": name for side, name in zip(SIDES, ANSWERS, strict=True)})]
        if trainer.args.precompute_ref_log_probs:
            rows = concatenate_datasets([dataset.select_columns("prompt_ids"), moved], axis=1)
            size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_eval_batch_size
            scored = trainer._precompute_ref_logps(rows, f"{label} (mismatched answers)", size)
            names = {f"ref_{side}_logps": name for side, name in zip(SIDES, SUMS, strict=True)}
            further.append(scored.select_columns(list(names)).rename_columns(names))
        return concatenate_datasets([dataset, *further], axis=1)

    def collate(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if ANSWERS[0] not in rows[0]:  # while the reference's log-probabilities are precomputed
            return {}
        joined = [
            {"prompt_ids": row["prompt_ids"], **{f"{s}_ids": row[a] for s, a in zip(SIDES, ANSWERS, strict=True)}}
            for row in rows
        ]
        entries = {f"mismatched_{name}": tensor for name, tensor in self.rows_to_batch(joined).items()}
        if SUMS[0] in rows[0]:
            entries["mismatched_ref_logps"] = torch.tensor([row[name] for name in SUMS for row in rows])
        return entries

    @contextmanager
    def at_head(
        self, trainer: Any, model: Any, inputs: Mapping[str, Tensor], entries: Mapping[str, Tensor]
    ) -> Iterator[LossInputs]:
        if "mismatched_input_ids" not in entries:
            raise InputError(
                "kto: got rows without other pairs' answers, need a data set that the trainer was made with"
            )
        rows = {name: entries[f"mismatched_{name}"] for name in OF_MODEL}
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
        ref_sums = entries.get("mismatched_ref_logps")
        if ref_sums is None:
            ref_sums = trainer.reference_token_logps(trainer.ref_model or model, rows, labels).double().sum(dim=1)
        sums = trainer.token_logps(model, rows, labels).double().sum(dim=1)
        counts = counting_pairs(inputs["completion_mask"]).repeat(2)  # no pairs that fill the last batch
        kl = kto_kl(sums[counts], ref_sums[counts])
        yield lambda: {"objective_inputs": {"kl": kl}}
