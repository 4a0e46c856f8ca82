"""Hidden states and output head out of any Hugging Face causal LM, and the loss inside its forward.

`PreferenceModel` wraps base model and head in one thin module whose forward returns the loss.
DistributedDataParallel and FSDP prepare gradient synchronisation in the forward of the module that
they wrap: a loss computed beside it, from hidden states taken out, trains every rank on its own
gradients without a word. Wrap PreferenceModel, not the language model inside it.

`verify_head` compares, on a real batch, the fused per-token log-probabilities with those of the
model's own logits, so that a head that does more than scale and cap is refused, by name, before
the first step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels.functional import fused_linear_logps, fused_preference_loss
from asft_kernels.objectives import Objective, get_objective

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # the same config name, the other way round
CHECKED_ROWS, CHECKED_TOKENS = 2, 64  # the check holds (2, 64, V) logits, not the whole batch's


class UnsupportedHead(ValueError):
    """The output head computes something that hidden states, weight and bias do not give."""


def causal_lm(model: Any) -> Any:
    """The causal LM under a PEFT wrapper (its adapters stay injected), or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logit_options(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) as a Hugging Face config names them; (1.0, None) if it has neither."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in FACTORS + DIVISORS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0:
            divides = name in DIVISORS and config.model_type not in MULTIPLIES_BY_DIVISOR
            scale = scale / value if divides else scale * value
    caps = [getattr(config, name, None) for name in CAPS]
    return scale, next((float(cap) for cap in caps if cap), None)


class PreferenceModel(nn.Module):
    """A causal LM whose forward is the preference loss of a padded batch of pairs.

    model: a Hugging Face causal LM with `get_output_embeddings()`, PEFT-wrapped or not.
    logit_scale, softcap: what the head does to its product; None: as the config says.
    objective: a name or an object, as `fused_preference_loss` takes; paired (`asft_kernels.train.on_pairs` makes
        one of sft, poft and kto). One with state (lmpo) is a submodule: its buffers move and are saved with it.
    step_inputs: None, or a module that makes objective_inputs at every step (`asft_kernels.train.step_inputs`): called
        with this model, input_ids, attention_mask, labels and, as keywords, the batch's tensors that its
        `batch_entries` name; returns (hidden states for the head, objective_inputs).
    loss_options: further keywords of `fused_preference_loss`: backend, cache_bytes, ...

    Raises UnsupportedHead for encoder-decoders and models without an output head.
    """

    # The Trainer then hands num_items_in_batch to forward, and leaves the scaling to it.
    accepts_loss_kwargs = True

    def __init__(
        self,
        model: nn.Module,
        objective: str | Objective = "asft",
        *,
        step_inputs: nn.Module | None = None,
        logit_scale: float | None = None,
        softcap: float | None = None,
        **loss_options: Any,
    ):
        super().__init__()
        inner = causal_lm(model)
        name = type(inner).__name__
        if not hasattr(inner, "get_output_embeddings"):
            raise UnsupportedHead(f"{name}: has no get_output_embeddings(), need a Hugging Face causal LM")
        if getattr(inner.config, "is_encoder_decoder", False):
            raise UnsupportedHead(f"{name}: is an encoder-decoder, need a decoder-only causal LM")
        if inner.get_output_embeddings() is None:
            raise UnsupportedHead(f"{name}: get_output_embeddings() is None, need a model with an LM head")
        from_config = logit_options(inner.config)
        self.model: Any = model
        self.config = inner.config
        self.logit_scale = from_config[0] if logit_scale is None else logit_scale
        self.softcap = from_config[1] if softcap is None else softcap
        self.objective: Any = get_objective(objective) if isinstance(objective, str) else objective
        self.step_inputs: Any = step_inputs
        self.loss_options = loss_options

    @property
    def lm_head(self) -> Any:
        return causal_lm(self.model).get_output_embeddings()

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(R, T, D): what the model feeds to its head."""
        decoder = causal_lm(self.model).get_decoder()
        return decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def forward(
        self,
        input_ids: Tensor,  # (2B, T), chosen rows first
        attention_mask: Tensor,  # (2B, T)
        labels: Tensor,  # (2B, T), -100 at prompts and padding
        num_items_in_batch: Tensor | int | None = None,
        **batch: Any,
    ) -> dict[str, Any]:
        """{"loss", "pair_losses" (B,), every field of the loss's outputs}, all detached but loss.

        batch: what else of `fused_preference_loss` comes with a batch: ref_logps, token_weights, nll_labels,
        objective_inputs.

        num_items_in_batch: None: the loss is the mean over the pairs of this batch that count. A
        number: their sum divided by it, so that micro-batches and ranks whose number is the total
        of all add up to the mean over all, whatever their sizes.
        """
        if self.step_inputs is None:
            hidden = self.hidden_states(input_ids, attention_mask)
        else:
            own = {name: batch.pop(name) for name in self.step_inputs.batch_entries}
            hidden, batch["objective_inputs"] = self.step_inputs(self, input_ids, attention_mask, labels, **own)
        result: Any = fused_preference_loss(
            hidden,
            self.lm_head,
            labels,
            self.objective,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            reduction="none",
            return_outputs=True,
            **self.loss_options,
            **batch,
        )
        losses, out = result
        total = out.num_pairs if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(total, device=losses.device).clamp(min=1)
        figures = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}
        return {"loss": loss, "pair_losses": losses.detach(), **figures}

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(*args, **kwargs)


@torch.no_grad()
def verify_head(model: PreferenceModel, batch: Mapping[str, Tensor]) -> float:
    """Largest difference of fused log-probabilities from log_softmax of the model's own logits.

    Looks at the first 64 positions of the first chosen and the first rejected row of `batch`, every
    token of them a label: it costs little, however large the batch. Dropout is off meanwhile.

    Raises UnsupportedHead, naming the class, the difference and the way out, where the two differ
    by more than rounding explains, or the head is no plain linear layer (with the loss's reason).
    """
    inner = causal_lm(model.model)
    name = type(inner).__name__
    rows = slice(None, None, max(len(batch["input_ids"]) // CHECKED_ROWS, 1))
    input_ids, mask = (batch[key][rows, :CHECKED_TOKENS] for key in ("input_ids", "attention_mask"))
    labels = input_ids.masked_fill(mask == 0, -100)
    was_training = model.training
    model.eval()
    try:
        logits = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        hidden = model.hidden_states(input_ids, mask)
        try:
            fused = fused_linear_logps(
                hidden, model.lm_head, labels, logit_scale=model.logit_scale, softcap=model.softcap
            )
        except ValueError as error:
            raise UnsupportedHead(f"{name}: its output head cannot be fused: {error}") from error
    finally:
        model.train(was_training)
    targets = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    own = logits[:, :-1].double().log_softmax(-1).gather(-1, targets).squeeze(-1)
    valid = labels[:, 1:] >= 0
    difference = (own - fused[:, :-1].double()).abs()[valid]
    allowed = _rounding(logits, hidden, fused, model)
    worst = difference.max().item() if len(difference) else 0.0
    if not worst <= allowed:  # written so that NaN fails too
        does = f"scale (by {model.logit_scale:g}) and cap (at {model.softcap})"
        raise UnsupportedHead(
            f"{name}: log-probabilities from hidden states and head differ from those of the "
            f"model's own logits by up to {worst:.3g}, rounding explains {allowed:.2g}. Its head "
            f"does more than {does} the output of one linear layer, or its config names these "
            "otherwise: give logit_scale and softcap, or use another model; training on would "
            "optimise what this model does not compute"
        )
    return worst


def _rounding(logits: Tensor, hidden: Tensor, logps: Tensor, model: PreferenceModel) -> float:
    """How far two correct computations of the same log-probability may lie apart.

    logp = z_y - logsumexp(z) moves by at most 2 max|dz|. The model rounds z into its dtype once,
    and up to three times more where it scales and caps: u max|z| each, u = eps / 2. The product's
    own rounding is that of sqrt(D) accumulated fp32 terms (TF32 inputs where the user allows it),
    of size |h| |w|, in either path; the scale magnifies it. The fused path sums V exponentials in
    fp32, a relative error of up to sqrt(V) roundings, and rounds its fp32 result.
    """
    weight = model.lm_head.weight
    steps = 1 if model.logit_scale == 1.0 and model.softcap is None else 4
    fp32_unit = torch.finfo(torch.float32).eps / 2
    product_unit = _product_unit(logits.is_cuda)
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).max() for x in (hidden, weight)]
    width = hidden.shape[-1] ** 0.5 * abs(model.logit_scale) * norms[0] * norms[1]
    logit = torch.finfo(logits.dtype).eps / 2 * steps * logits.abs().max() + 2 * product_unit * width
    summed = fp32_unit * (len(weight) ** 0.5 + 2 * logps.abs().max())
    return (2 * logit + summed).item()


def _product_unit(on_gpu: bool) -> float:
    """Rounding unit of a matrix product's fp32 inputs: TF32's where the user allows it.

    Not `allow_tf32`: reading that raises once anyone (transformers' --tf32) has set fp32_precision.
    """
    if on_gpu and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return 2.0**-11
    return torch.finfo(torch.float32).eps / 2
