"""What fpo and kto read at every step beside the answers' log-probabilities, made inside PreferenceModel's forward."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from asft_kernels.train.arguments import fpo_of
from torch import Tensor, nn

from asft_kernels.errors import InputError
from asft_kernels.methods.fpo.autoencoder import SparseAutoencoder
from asft_kernels.methods.fpo.features import fpo_inputs
from asft_kernels.methods.fpo.files import read_sae
from asft_kernels.methods.fpo.hidden import check_layer, layer_output
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import kto_kl

InputsAtHead = Callable[[Tensor], dict[str, Tensor]]  # of the head's input


class FeatureInputs(nn.Module):
    """fpo: distance of the answers' features from the reference's, at one layer of the loss's own pass.

    layer, top_k: as `asft_kernels.methods.fpo.hidden` and `fpo_inputs` take them. The batch brings ref_pooled (2B, F).
    """

    batch_entries = ("ref_pooled",)

    def __init__(self, sae: SparseAutoencoder, layer: int, top_k: int):
        super().__init__()
        self.sae, self.layer, self.top_k = sae, layer, top_k

    @contextmanager
    def forward(self, model: PreferenceModel, labels: Tensor, ref_pooled: Tensor) -> Iterator[InputsAtHead]:
        with layer_output(model.model, self.layer) as kept:
            yield lambda hidden: fpo_inputs(self.sae, kept[-1] if kept else hidden, labels, ref_pooled, self.top_k)


class MismatchInputs(nn.Module):
    """kto: the reference point, from prompts joined to other prompts' answers, over the batches of all ranks.

    The batch brings these rows and their sums under the reference (`asft_kernels.train.reference`). They take a pass
    of their own through the model, without gradients.
    """

    batch_entries = ("mismatched_input_ids", "mismatched_attention_mask", "mismatched_labels", "mismatched_ref_logps")

    @contextmanager
    def forward(self, model: PreferenceModel, labels: Tensor, **mismatched: Tensor) -> Iterator[InputsAtHead]:
        rows, mask, answers, ref_logps = (mismatched[name] for name in self.batch_entries)
        with torch.no_grad():
            logps = model.token_logps(answers, input_ids=rows, attention_mask=mask)
            kl = kto_kl(logps.double().sum(dim=-1), ref_logps)  # masked places are 0
        yield lambda _: {"kl": kl}


def step_inputs_for(objective: Any, sae: str | os.PathLike[str] | None, layer: int, model: Any) -> nn.Module | None:
    """The module that objective needs, None for one without inputs of each step.

    sae, layer: of --sae and --sae-layer. InputError where they do not fit model.
    """
    if "kl" in {**objective.inputs, **objective.optional_inputs}:
        return MismatchInputs()
    fpo = fpo_of(objective)
    if fpo is None or sae is None:
        return None
    try:
        autoencoder = read_sae(sae)
    except ValueError as error:
        raise InputError(f"--sae: {error}") from error
    try:
        check_layer(model, layer)
    except ValueError as error:
        raise InputError(f"--sae-layer: {error}") from error
    size = model.config.get_text_config().hidden_size
    if autoencoder.hidden_size != size:
        raise InputError(
            f"--sae: {sae} is of hidden size {autoencoder.hidden_size}, need {size}, --model's; was it trained on it?"
        )
    if fpo.top_k > autoencoder.features:
        raise InputError(
            f"--objective-args: top_k: got {fpo.top_k}, need at most {autoencoder.features}, the features of {sae}"
        )
    return FeatureInputs(autoencoder, layer, fpo.top_k)
