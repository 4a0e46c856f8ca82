"""The keywords that all public calls share: checked when made, explained once.

`KEYWORDS` is their text, and `LM_HEAD` the head's, in every docstring (`explained` puts them there) and on docs/api.md.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from asft_kernels.backends import Logits
from asft_kernels.core import checks

LM_HEAD = """\
nn.Linear, nn.Embedding (tied), weight (V, D) or (weight, bias); or a head with PEFT's LoRA, rsLoRA, DoRA,
    modules_to_save or trainable_token_indices, bitsandbytes' 4 or 8 bits, a DTensor (gathered, or streamed
    above 2 GiB), a `VocabParallelHead`, a gathered ZeRO-3 parameter (`asft_kernels.core.heads`). In hidden's dtype or
    fp32; under autocast cast to its dtype."""
KEYWORDS = """\
cu_seqlens: (R+1,) int32 or int64, borders of R packed sequences, from 0 to M; None (default): padded rows.
shift: True (default): labels stand as input_ids do and position t predicts label t+1, as in Hugging Face's
    models. False: labels are shifted already.
ignore_index: Label of the positions that carry no loss; default -100.
logit_scale: Factor on h.W + b; default 1.0. The logits are z = softcap * tanh(logit_scale (h.W + b) / softcap).
softcap: Cap of the logits, as in Gemma 2; None (default): no cap.
backend: "torch", "triton" or None (default): triton on CUDA and ROCm, torch elsewhere and for float64.
cache_bytes: Bytes of exponentials kept for the head's gradient. None (default): 1 GiB on a CPU, 2.5 GiB on a
    GPU. 0 keeps none, and the gradient costs one more matrix product.
chunk_size: Vocabulary rows that are worked on at a time; None (default) chooses.
num_valid: A bound on the number of labels that carry loss (those of nll_labels included), if you know one: spares
    the call's one read of the device. What the read would check is then asserted on the device, as a
    RuntimeError. Under torch.compile without it every position is computed."""


class Keywords(TypedDict, total=False):
    """The same for type checkers."""

    cu_seqlens: Tensor | None
    shift: bool
    ignore_index: int
    logit_scale: float
    softcap: float | None
    backend: str | None
    cache_bytes: int | None
    chunk_size: int | None
    num_valid: int | None


@dataclass(frozen=True)
class Options:
    """How hidden states become log-probabilities: the shared keywords, each checked (ValueError)."""

    cu_seqlens: Tensor | None = None
    shift: bool = True
    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    backend: str | None = None
    cache_bytes: int | None = None
    chunk_size: int | None = None
    num_valid: int | None = None

    def __post_init__(self) -> None:
        checks.options(
            shift=self.shift, ignore_index=self.ignore_index, logit_scale=self.logit_scale, softcap=self.softcap,
            backend=self.backend, cache_bytes=self.cache_bytes, chunk_size=self.chunk_size, num_valid=self.num_valid,
        )  # fmt: skip

    @property
    def logits(self) -> Logits:
        return Logits(float(self.logit_scale), None if self.softcap is None else float(self.softcap))


NAMES = tuple(Options.__dataclass_fields__)
Call = TypeVar("Call", bound=Callable[..., Any])


def make_options(call: str, keywords: Keywords, others: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Options:
    """The options of a public call; TypeError, as Python's own, for a keyword that it does not take.

    others: the call's own keywords, for the suggestion. without: shared ones that it does not take.
    """
    known = [name for name in NAMES if name not in without]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *others], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            taken = ", ".join([*others, *known])
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}, it takes {taken}{hint}")
    return Options(**keywords)


def explained(call: Call) -> Call:
    """Puts texts in the places of {keywords}, {keywords but cache_bytes} and {lm_head}, so that help() tells all."""
    uncached = re.sub(r"cache_bytes: .*?\n(?=\w)", "", KEYWORDS, flags=re.DOTALL)
    texts = {"{keywords}": KEYWORDS, "{keywords but cache_bytes}": uncached, "{lm_head}": LM_HEAD}
    if call.__doc__:  # python -OO drops it
        for place, text in texts.items():
            call.__doc__ = call.__doc__.replace(place, text.replace("\n", "\n        "))
    return call


def as_autocast(tensor: Tensor) -> Tensor:
    """What autocast would hand to a matrix product: its dtype, but float64 as it is."""
    device_type = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))
