"""Tiny models of several architectures, a batch, and log-probabilities from a model's own logits."""

from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, LENGTH = 61, 12
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
# class, changes of its config, scale and cap of its head
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[float, float | None]]] = {
    "Llama": ("LlamaForCausalLM", {}, (1.0, None)),
    "Qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, (1.0, None)),
    "Gemma2": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "Cohere": ("CohereForCausalLM", {"logit_scale": 0.3}, (0.3, None)),
    "Granite": ("GraniteForCausalLM", {"logits_scaling": 4.0}, (0.25, None)),
    "MiniCPM3": (  # logits_scaling = hidden_size / dim_model_base is of the head's input
        "MiniCPM3ForCausalLM",
        {"dim_model_base": 4, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 8, "v_head_dim": 8},
        (1.0, None),
    ),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "output_router_logits": True}, (1.0, None)),
}  # fmt: skip


def built(name: str, **changes: Any) -> Any:
    """The tiny model of ARCHITECTURES, with logits that a cap bends."""
    class_name, own, _ = ARCHITECTURES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SMALL, **own, **changes})).float().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    return model


def batch(pairs: int = 2, length: int = LENGTH, vocab: int = VOCAB, seed: int = 0) -> dict[str, Tensor]:
    """(2 pairs, length): the first four labels masked, two rows shorter than the rest."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab, (2 * pairs, length), generator=gen)
    mask = torch.ones_like(ids)
    mask[0, 9:] = mask[-1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_logps(model: Any, data: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """(R, T - 1) float64 from the model's own logits at the last T positions, 0 where there is no label."""
    inputs = {name: tensor for name, tensor in data.items() if name != "labels"}
    labels = data["labels"]
    logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :].double() / temperature
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return logps.where(labels[:, 1:] != -100, 0)


# fp32: two sums of 16 products of size up to 30 in other orders, 2 * sqrt(16) * 30 * 2^-24, and log_softmax's own.
FP32 = 5e-5
