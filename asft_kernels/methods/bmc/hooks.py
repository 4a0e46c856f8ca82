"""BMC in training: marks of the tokens in which two answers differ, and the reference weighed by them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from asft_kernels.errors import InputError
from asft_kernels.methods.bmc.diff_marks import diff_marks
from asft_kernels.objectives import BMC, Objective, expression_of, weighted_reference
from asft_kernels.training.collator import at_labels
from asft_kernels.training.hooks import LossInputs, Method


class Hooks(Method):
    """Gives token_weights (arXiv 2408.07471, Eq. 4 to 6): 1 on the tokens in which chosen and rejected answer differ.

    Answers are compared as they are trained, cut ones as cut. The likelihood term of a base that has one is
    unweighted, as in the authors' code for ORPO.
    """

    name = "bmc"
    provides = ("token_weights",)
    ref_tokens = True

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return isinstance(objective, BMC)

    def check(self, config: Any, objective: Objective) -> None:
        if not isinstance(objective, BMC):
            raise InputError(f"method: got 'bmc' with {expression_of(objective)}, need the objective bmc")
        self.objective = objective
        self.likelihood_of_answers = objective.uses_nll_labels and not config.nll_on_prompt

    def collate(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        of_answers = batch["completion_mask"].bool()
        answers = [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], of_answers, strict=True)]
        chosen, rejected = answers[: len(rows)], answers[len(rows) :]
        marks = [diff_marks(c, r) for c, r in zip(chosen, rejected, strict=True)]
        spread = at_labels(batch["completion_mask"], [pair[side] for side in (0, 1) for pair in marks])
        entries = {"token_weights": spread}
        if self.likelihood_of_answers:
            labels = batch["input_ids"].masked_fill(~of_answers, -100)
            entries["nll_labels"] = labels[: len(rows)]
        return entries

    @contextmanager
    def at_head(
        self, trainer: Any, model: Any, inputs: Mapping[str, Tensor], entries: Mapping[str, Tensor]
    ) -> Iterator[LossInputs]:
        yield lambda: {"token_weights": entries["token_weights"]}

    def ref_logps(self, tokens: Tensor, labels: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        if self.objective.ref_per_token:
            return tokens
        return weighted_reference(pad(tokens, (0, 1)), entries["token_weights"], self.objective.delta)
