"""Which keywords the forward of a model knows: a misspelt one vanishes in its **kwargs without a word."""

import difflib
import inspect
from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs

from asft_kernels.models.seam import causal_lm


def argument_names(model: Any) -> frozenset[str]:
    """Returns the names that the model's forward, one of the models in it, transformers or PEFT knows."""
    names = set(TransformersKwargs.__annotations__) | set(FlashAttentionKwargs.__annotations__)
    names |= {"return_dict"}  # of a decorator around the forward
    names |= set(getattr(model, "special_peft_forward_args", ()))
    inner = causal_lm(model)
    for module in [inner, *(x for x in inner.modules() if isinstance(x, PreTrainedModel))]:
        parameters = inspect.signature(type(module).forward).parameters.values()
        names |= {x.name for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)}
    return frozenset(names)


def refuse_unknown(names: Iterable[str], known: frozenset[str], of_loss: Collection[str], model: str) -> None:
    """ValueError with a suggestion for the first name that nobody knows."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), [*of_loss, *sorted(known)], n=1)
            near += [x for x in of_loss if not near and name.lower() in x.split("_")]
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ValueError(
                f"{name}: got an argument that neither the loss nor {model} knows, need one of "
                f"{', '.join(sorted(of_loss))} or of the model's forward; {hint}"
            )
