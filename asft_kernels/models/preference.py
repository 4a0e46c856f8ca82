"""`PreferenceModel`: a causal LM whose forward is a preference loss.

DistributedDataParallel and FSDP prepare gradient synchronisation in the forward of the module that they wrap: a loss
computed beside it, from hidden states taken out, trains every rank on its own gradients without a word. Wrap
PreferenceModel, not the language model inside it.
"""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from asft_kernels.core.checks import objective_object
from asft_kernels.functional import fused_linear_logps, fused_preference_loss
from asft_kernels.models.arguments import argument_names, refuse_unknown
from asft_kernels.models.fused import aux_loss_coefficient, fuse, refuse_replicas
from asft_kernels.models.head import FusedHead
from asft_kernels.models.positions import check_labels, last_positions
from asft_kernels.models.seam import causal_lm
from asft_kernels.objectives import Objective, get_objective

LOSS_ENTRIES = ("ref_logps", "token_weights", "nll_labels")


class PreferenceModel(nn.Module):
    """A causal or image-text model whose forward is the preference loss of a padded batch.

    The model is fused (`asft_kernels.models.fuse`): its own forward runs, the loss is computed at its head, and the
    first batch is held against its own logits.

    Args:
        model: a Hugging Face model with get_output_embeddings(), PEFT-wrapped or not.
        objective: a name or an object, as `fused_preference_loss` takes. One with state (lmpo) is a submodule: its
            buffers move and are saved with it.
        logit_scale, softcap, check, backend, cache_bytes, chunk_size: as in `fuse`; the same in check, loss and
            scoring.
        sequence_group: as in `fused_preference_loss`: the ranks whose batches are pieces of the same sequences; default
            None. Batches then have shift_labels, and position_ids where the model needs them.

    Raises:
        UnsupportedHead: for encoder-decoders, masked language models and models without an output head.
        ValueError: for an objective or an option that is none.
        TypeError: for a keyword that is none of these; an objective's own go to `get_objective`.
    """

    # A Trainer would hand the number of tokens to the forward, which is no number of pairs.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        objective: str | Objective = "asft",
        *,
        logit_scale: float | None = None,
        softcap: float | None = None,
        check: bool = True,
        backend: str | None = None,
        cache_bytes: int | None = None,
        chunk_size: int | None = None,
        sequence_group: Any = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            call = f"get_objective({objective!r}, {next(iter(unknown))}=...)"
            raise TypeError(
                f"PreferenceModel() got an unexpected keyword argument {next(iter(unknown))!r}; for an option of the "
                f"objective give {call if isinstance(objective, str) else 'it to the object'}"
            )
        made: Any = get_objective(objective) if isinstance(objective, str) else objective
        objective_object(made)
        fuse(
            model, logit_scale=logit_scale, softcap=softcap, check=check, backend=backend, cache_bytes=cache_bytes,
            chunk_size=chunk_size,
        )  # fmt: skip
        self.model: Any = model
        self.config = causal_lm(model).config
        # Its own, so that a later fuse() or unfuse() of the model changes no loss.
        self.fused_head: FusedHead = vars(causal_lm(model))["forward"].head
        self.objective: Any = made
        self.sequence_group = sequence_group
        self._known = argument_names(model)
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)

    @property
    def lm_head(self) -> Any:
        return causal_lm(self.model).get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_pairs: Tensor | float | None = None,
        objective_inputs: Mapping[str, Tensor] | None = None,
        **batch: Any,
    ) -> dict[str, Any]:
        """Computes the loss of a batch.

        Args:
            input_ids: (2B, T), chosen rows first; (R, T) for unpaired objectives. inputs_embeds may take its place.
            attention_mask: (2B, T).
            labels: (2B, T), -100 at prompts and padding; needed, unless there are shift_labels.
            shift_labels: (2B, T), that of position t + 1 at t, in the place of labels; so are all entries per label.
            num_pairs: None (default): the loss is the mean over the pairs (rows, of unpaired objectives) of this batch
                that count. A number: their sum divided by it, so that micro-batches and ranks whose number is the total
                of all add up to the mean over all, whatever their sizes. DDP and FSDP average gradients: there it is
                the total divided by the number of their ranks.
            objective_inputs: as in `fused_preference_loss`; its entries may also be given by their own names.
            batch: ref_logps, token_weights, nll_labels go to the loss, all else (pixel_values, position_ids, ...) to
                the model; names that nobody knows are refused.

        Returns:
            "loss", differentiable; detached "pair_losses" (B,), or "row_losses" (R,) of unpaired objectives, and every
            field of `PreferenceOutputs` or `SequenceOutputs`; "aux_loss" if the model made one, which is in the loss.

        Raises:
            ValueError: for labels of another shape than input_ids, missing entries, names that nobody knows.
            UnsupportedHead: as `fuse` says.
        """
        if "num_items_in_batch" in batch:
            raise ValueError(
                "num_items_in_batch: got a number of tokens, need num_pairs, the pairs of the whole step; leave it out "
                "for the mean over this batch"
            )
        if input_ids is None and batch.get("inputs_embeds") is None:
            raise ValueError("input_ids: got None, need (R, T) token ids, chosen rows first; give them")
        shift = shift_labels is None
        if labels is not None and not shift:
            raise ValueError("shift_labels: got labels as well, need one of the two; leave one out")
        if self.sequence_group is not None and shift:
            raise ValueError(
                "labels: got labels with sequence_group, need shift_labels: that of a piece's last position stands on "
                "another rank; shift them before they are cut"
            )
        targets = check_labels(
            labels if shift else shift_labels, {"input_ids": input_ids, **batch}, "labels" if shift else "shift_labels"
        )
        of_loss = {name: batch.pop(name) for name in LOSS_ENTRIES if name in batch}
        known = {**self.objective.inputs, **self.objective.optional_inputs}
        inputs = {**(objective_inputs or {}), **{name: batch.pop(name) for name in known if name in batch}}
        name = type(causal_lm(self.model)).__name__
        refuse_unknown(batch, self._known, (*LOSS_ENTRIES, *known), name)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **batch}
        out: Any = None

        def compute(hidden: Tensor, lm_head: Any) -> Tensor:
            nonlocal out
            hidden = last_positions(hidden, targets, name)
            losses, out = fused_preference_loss(
                hidden, lm_head, targets.to(hidden.device), self.objective, objective_inputs=inputs,
                reduction="none", sequence_group=self.sequence_group, return_outputs=True, shift=shift, **of_loss,
                **self.fused_head.keywords,
            )  # fmt: skip
            return losses[:, None, None]

        result, output = self.fused_head.run(self.model, self.model, compute, targets, batch, shift=shift)
        losses = result[:, 0, 0]
        count = out.num_pairs if self.objective.paired else out.num_sequences
        total = losses.sum()
        figures = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
        if isinstance(output, Mapping) and output.get("aux_loss") is not None:
            aux_loss = output["aux_loss"].to(losses.device)
            figures["aux_loss"] = aux_loss.detach()
            total = total + count * aux_loss_coefficient(causal_lm(self.model)) * aux_loss
        of = torch.as_tensor(count if num_pairs is None else num_pairs, dtype=losses.dtype, device=losses.device)
        loss = total / of.where(of > 0, 1)  # a share of a rank may be below 1
        return {"loss": loss, "pair_losses" if self.objective.paired else "row_losses": losses.detach(), **figures}

    def token_logps(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Computes the log-probability of every label.

        Args:
            labels: (R, T), -100 where none is wanted.
            inputs: what the model's forward takes: input_ids, attention_mask, ...

        Returns:
            (R, T) fp32 (float64 for float64 models): that of label t + 1 at t, 0 at masked places; differentiable.
        """
        name = type(causal_lm(self.model)).__name__
        refuse_unknown(inputs, self._known, (), name)
        labels = check_labels(labels, inputs, "labels")

        def compute(hidden: Tensor, lm_head: Any) -> Tensor:
            here = labels.to(hidden.device)
            logps = fused_linear_logps(last_positions(hidden, labels, name), lm_head, here, **self.fused_head.keywords)
            return logps[..., None]

        return self.fused_head.run(self.model, self.model, compute, labels, inputs)[0].squeeze(-1)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Computes what the model feeds to its head.

        Args:
            input_ids, attention_mask: (R, T) each.

        Returns:
            (R, T, D), differentiable.
        """
        name = type(causal_lm(self.model)).__name__
        labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -100)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.fused_head.run(
            self.model, self.model, lambda hidden, _: last_positions(hidden, labels, name), labels, inputs
        )[0]

    def check_head(self, batch: Mapping[str, Tensor]) -> float:
        """Holds the fused log-probabilities of a batch against the model's own now, instead of at the first batch.

        Args:
            batch: labels and what the model's forward takes.

        Returns:
            The largest difference; 0.0 if check=False or if it was held before.

        Raises:
            UnsupportedHead: as `fuse` says.
        """
        with torch.no_grad():
            self.token_logps(**batch)
        return self.fused_head.difference or 0.0

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Saves the model inside, config included, as its own save_pretrained does: from_pretrained reads the folder.

        Args:
            folder: where to.
            options: the model's own, as safe_serialization or max_shard_size.
        """
        self.model.save_pretrained(folder, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_replicas(type(causal_lm(self.model)).__name__)


def _tied(module: PreferenceModel) -> dict[str, str]:
    """Names of parameters that stand for one of another name, which comes first in the module."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in module.named_parameters(remove_duplicate=False)]
    return {name: kept for name, kept in names if name != kept}


def _without_tied(module: PreferenceModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """safetensors, with which a Trainer saves, refuses tensors that share memory."""
    for name in _tied(module):
        state.pop(prefix + name, None)


def _with_tied(module: PreferenceModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, kept in _tied(module).items():
        if prefix + kept in state:
            state.setdefault(prefix + name, state[prefix + kept])
