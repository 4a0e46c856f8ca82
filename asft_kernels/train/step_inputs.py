"""What fpo and kto read at every step beside the answers' log-probabilities, made inside PreferenceModel's forward."""

import os
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels.functional import fused_linear_logps
from asft_kernels.integrations.hf_model import PreferenceModel
from asft_kernels.objectives import kto_kl
from asft_kernels.sae.autoencoder import SparseAutoencoder
from asft_kernels.sae.features import fpo_inputs
from asft_kernels.sae.files import read_sae
from asft_kernels.sae.hidden import check_layer, hidden_states
from asft_kernels.train.arguments import ArgumentProblem, fpo_of


class FeatureInputs(nn.Module):
    """fpo: distance of the answers' features from the reference's, at one layer of the loss's own pass.

    layer, top_k: as `asft_kernels.sae.hidden` and `fpo_inputs` take them. The batch brings ref_pooled (2B, F).
    """

    batch_entries = ("ref_pooled",)

    def __init__(self, sae: SparseAutoencoder, layer: int, top_k: int):
        super().__init__()
        self.sae, self.layer, self.top_k = sae, layer, top_k

    def forward(
        self, model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, ref_pooled: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        last, hidden = hidden_states(model.model, input_ids, attention_mask, self.layer)
        return last, fpo_inputs(self.sae, hidden, labels, ref_pooled, self.top_k)


class MismatchInputs(nn.Module):
    """kto: the reference point, from prompts joined to other prompts' answers, over the batches of all ranks.

    The batch brings these rows and their sums under the reference (`asft_kernels.train.reference`). They take a pass
    of their own through the model, without gradients.
    """

    batch_entries = ("mismatched_input_ids", "mismatched_attention_mask", "mismatched_labels", "mismatched_ref_logps")

    def forward(
        self, model: PreferenceModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **mismatched: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows, mask, answers, ref_logps = (mismatched[name] for name in self.batch_entries)
        with torch.no_grad():
            logps = fused_linear_logps(
                model.hidden_states(rows, mask),
                model.lm_head,
                answers,
                logit_scale=model.logit_scale,
                softcap=model.softcap,
            )
            kl = kto_kl(logps.double().sum(dim=-1), ref_logps)  # masked places are 0
        return model.hidden_states(input_ids, attention_mask), {"kl": kl}


def step_inputs_for(objective: Any, sae: str | os.PathLike[str] | None, layer: int, model: Any) -> nn.Module | None:
    """The module that objective needs, None for one without inputs of each step.

    sae, layer: of --sae and --sae-layer. ArgumentProblem where they do not fit model.
    """
    if "kl" in {**objective.inputs, **objective.optional_inputs}:
        return MismatchInputs()
    fpo = fpo_of(objective)
    if fpo is None or sae is None:
        return None
    try:
        autoencoder = read_sae(sae)
    except ValueError as error:
        raise ArgumentProblem(f"--sae: {error}") from error
    try:
        check_layer(model, layer)
    except ValueError as error:
        raise ArgumentProblem(f"--sae-layer: {error}") from error
    size = model.config.get_text_config().hidden_size
    if autoencoder.hidden_size != size:
        raise ArgumentProblem(
            f"--sae: {sae} is of hidden size {autoencoder.hidden_size}, need {size}, --model's; was it trained on it?"
        )
    if fpo.top_k > autoencoder.features:
        raise ArgumentProblem(
            f"--objective-args: top_k: got {fpo.top_k}, need at most {autoencoder.features}, the features of {sae}"
        )
    return FeatureInputs(autoencoder, layer, fpo.top_k)
