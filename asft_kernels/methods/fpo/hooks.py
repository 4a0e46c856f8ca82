"""FPO in training: distance of the answers' features from the reference's, at one layer of the policy's own forward."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from asft_kernels.errors import InputError
from asft_kernels.methods.fpo.cache import ReferenceFeatures
from asft_kernels.methods.fpo.features import fpo_inputs, pooled_features
from asft_kernels.methods.fpo.files import read_sae
from asft_kernels.methods.fpo.hidden import HEAD_INPUT, check_layer, layer_output
from asft_kernels.models.positions import last_positions
from asft_kernels.objectives import FPO, Objective, WeightedSum, expression_of
from asft_kernels.training.hooks import LossInputs, Method


@dataclass
class Arguments:
    """What FPO takes beside its loss."""

    sae: str | None = field(
        default=None,
        metadata={"help": "FPO's autoencoder, .npz or .safetensors: asft data sae trains one."},
    )
    sae_layer: int = field(
        default=HEAD_INPUT,
        metadata={"help": "Where it reads hidden states: -1 the head's input, l the output of block l."},
    )
    ref_features: str | None = field(
        default=None,
        metadata={"help": "File of asft data features; without, the reference is asked at every step."},
    )


class Hooks(Method):
    """Gives feature_distance (arXiv 2411.07618, Eq. 8 to 11), of `asft_kernels.methods.fpo.fpo_inputs`.

    The reference's features come from its own pass at every step, which its log-probabilities are taken of as well, or
    from a file of `asft data features`.
    """

    name = "fpo"
    Arguments = Arguments
    provides = ("feature_distance",)
    arguments: Any

    @classmethod
    def serves(cls, objective: Objective) -> bool:
        return bool(_terms(objective))

    def __init__(self, arguments: Any = None):
        super().__init__(arguments)
        self.live_reference = self.arguments.ref_features is None
        self.columns = () if self.live_reference else ("id",)

    def check(self, config: Any, objective: Objective) -> None:
        terms = _terms(objective)
        top_k = {term.top_k for term in terms}
        if len(top_k) != 1:
            got = f"top_k of {', '.join(map(str, sorted(top_k)))}" if terms else expression_of(objective)
            raise InputError(f"objective: got {got} with fpo's features, need fpo by itself or once in a sum")
        (self.top_k,) = top_k
        if self.arguments.sae is None:
            raise InputError("sae: got none, need the file of an autoencoder for fpo; asft data sae trains one")
        if self.live_reference and config.precompute_ref_log_probs:
            raise InputError(
                "precompute_ref_log_probs: got True, need False: fpo reads the reference's features at every step; or "
                "give ref_features"
            )
        if not self.live_reference and config.truncation_mode != "keep_start":
            raise InputError(
                f"truncation_mode: got {config.truncation_mode!r}, need 'keep_start' with ref_features, whose answers "
                "are cut at their ends"
            )

    def start(self, trainer: Any) -> None:
        path, layer = str(self.arguments.sae), self.arguments.sae_layer
        sae = read_sae(path)
        check_layer(trainer.model, layer)
        size = trainer.model.config.get_text_config().hidden_size
        if sae.hidden_size != size:
            raise InputError(
                f"sae: {path} is of hidden size {sae.hidden_size}, need {size}; was it trained on this model?"
            )
        if self.top_k > sae.features:
            raise InputError(f"top_k: got {self.top_k}, need at most {sae.features}, the features of {path}")
        if layer != HEAD_INPUT and (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # A block then runs without gradients, and again in the backward pass.
            raise InputError(
                f"gradient_checkpointing_kwargs: got use_reentrant=True with sae_layer {layer}, need False: no "
                "gradient would reach the hidden states"
            )
        self.sae = sae.to(trainer.args.device)

    def dataset(self, trainer: Any, dataset: Any, label: str) -> Any:
        if not self.live_reference and dataset is not None:
            if "id" not in dataset.column_names:
                raise InputError("ref_features: got rows without ids, need a data set of asft_kernels.data.load_pairs")
            self.features = ReferenceFeatures(
                str(self.arguments.ref_features), self.sae, layer=self.arguments.sae_layer, pairs=dataset,
                max_length=trainer.args.max_length,
            )  # fmt: skip
        return dataset

    def collate(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {} if self.live_reference else {"ref_pooled": self.features.pooled([row["id"] for row in rows])}

    @contextmanager
    def at_head(
        self, trainer: Any, model: Any, inputs: Mapping[str, Tensor], entries: Mapping[str, Tensor]
    ) -> Iterator[LossInputs]:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        layer, name = self.arguments.sae_layer, type(trainer.model).__name__
        given = {}
        if not self.live_reference:
            ref_pooled = entries["ref_pooled"]
        else:
            reference = trainer.ref_model or model
            with layer_output(trainer.accelerator.unwrap_model(reference), layer) as kept:
                tokens = trainer.reference_token_logps(reference, inputs, labels)
            ref_pooled = pooled_features(self.sae, last_positions(kept[0], labels, name), labels)
            given["ref_logps"] = tokens.double().sum(dim=1)
        with layer_output(trainer.accelerator.unwrap_model(model), layer) as kept:
            yield lambda: {
                **given,
                "objective_inputs": fpo_inputs(
                    self.sae, last_positions(kept[0], labels, name), labels, ref_pooled, self.top_k
                ),
            }


def _terms(objective: Objective) -> list[FPO]:
    """The objective if it is fpo, or those terms of a sum that are."""
    terms = [term for _, term in objective.terms] if isinstance(objective, WeightedSum) else [objective]
    return [term for term in terms if isinstance(term, FPO)]
