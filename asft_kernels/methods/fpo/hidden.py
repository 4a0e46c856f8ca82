"""Hidden states of a Hugging Face causal LM at the layer that an autoencoder was trained on.

Layer -1 is what the head sees, after the final norm. Layer l >= 0 is the output of block l, the residual stream:
Gemma Scope's numbering. transformers' own hidden_states cannot give the last block's, only its norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from asft_kernels.errors import InputError
from asft_kernels.models.seam import causal_lm, output_head

HEAD_INPUT = -1


def hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, layer: int = HEAD_INPUT
) -> tuple[Tensor, Tensor]:
    """(what the head sees, the hidden states at `layer`), (R, T, D) each, from one pass; both differentiable."""
    decoder = causal_lm(model).get_decoder()
    with layer_output(model, layer) as kept:
        last = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return last, kept[0] if kept else last


@contextmanager
def layer_output(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """Gives a list that holds the hidden states at `layer` of the model's last forward, once there was one.

    The head's input is taken where the head is called: by the model's own forward, fused or not.
    """
    check_layer(model, layer)
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        kept[:] = [hidden]

    if layer == HEAD_INPUT:
        handle = output_head(model).register_forward_pre_hook(lambda _module, inputs: keep(inputs[0]))
    else:
        block = causal_lm(model).get_decoder().layers[layer]
        handle = block.register_forward_hook(
            lambda _module, _inputs, output: keep(output if isinstance(output, Tensor) else output[0])
        )
    try:
        yield kept
    finally:
        handle.remove()


def check_layer(model: Any, layer: int) -> None:
    """ValueError for a layer that the model does not have."""
    inner = causal_lm(model)
    blocks = getattr(inner.get_decoder(), "layers", None)
    count = 0 if blocks is None else len(blocks)
    if not -1 <= layer < count:
        need = f"-1 (the head's input) or 0 to {count - 1}, a block of {type(inner).__name__}"
        raise InputError(f"layer: got {layer}, need {need if count else '-1: this model has no list of layers'}")
