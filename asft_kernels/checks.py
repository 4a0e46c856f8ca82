"""Every ValueError about what a caller passed: the argument, what it was, what it must be, what to do."""

from collections.abc import Mapping
from itertools import pairwise
from math import inf
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor, nn

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_HEADS = "an nn.Linear, a (V, D) tensor or a (weight, bias) pair"


def _refuse(name: str, got: object, need: str) -> NoReturn:
    raise ValueError(f"{name}: got {got}, need {need}")


def _what(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else "None" if x is None else type(x).__name__


def head_tensors(lm_head: nn.Linear | Tensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(weight (V, D), bias (V,) or None) of a plain head; anything that computes more is refused."""
    if isinstance(lm_head, Tensor):
        weight, bias = lm_head, None
    elif isinstance(lm_head, (tuple, list)) and len(lm_head) == 2:
        weight, bias = lm_head
    elif isinstance(lm_head, nn.Linear) and type(lm_head).forward is nn.Linear.forward:
        _unpatched(lm_head)
        weight, bias = lm_head.weight, lm_head.bias
    elif hasattr(lm_head, "weight"):
        _refuse(
            "lm_head",
            f"{type(lm_head).__module__}.{type(lm_head).__qualname__}",
            f"{_HEADS}: its .weight alone would silently drop what the wrapper adds (adapter, quantisation); "
            "merge the adapter or leave lm_head out of its target modules, dequantise the head, or pass the weight",
        )
    else:
        its_head = "; pass the model's .lm_head" if hasattr(lm_head, "get_output_embeddings") else ""
        _refuse("lm_head", type(lm_head).__name__, f"{_HEADS} of tensors{its_head}")
    _plain_tensor("lm_head weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        need = "(V, D) with both at least 1; gather a flattened or sharded parameter first"
        _refuse("lm_head", f"a weight of shape {tuple(weight.shape)}", need)
    if bias is not None:
        _plain_tensor("lm_head bias", bias)
        if bias.shape != weight.shape[:1]:
            need = f"({weight.shape[0]},), one entry a row of the weight {tuple(weight.shape)}, which is to be (V, D)"
            _refuse("lm_head", f"a bias of shape {tuple(bias.shape)}", need)
    return weight, bias


def _unpatched(linear: nn.Linear) -> None:
    forward, hooked = vars(linear).get("forward"), bool(linear._forward_hooks or linear._forward_pre_hooks)
    if getattr(forward, "is_seam", False):  # models.seam has put us in its place: the hooks run around us
        forward, hooked = vars(forward)["own"], False
    replaced = forward is not None and not hasattr(linear, "_hf_hook")  # accelerate's only moves tensors
    if replaced or hooked:
        got = "an nn.Linear with " + ("a forward of its own" if replaced else "forward hooks")
        _refuse(
            "lm_head", got, "a plain one, as they would not run; remove them, or pass lm_head.weight if it is whole"
        )


def _plain_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        _refuse(name, type(tensor).__name__, "a tensor")
    if hasattr(tensor, "ds_id"):
        need = "it whole; wrap the call in deepspeed.zero.GatheredParameters"
        _refuse(name, "a DeepSpeed ZeRO parameter", need)
    if type(tensor) not in _PLAIN_TENSORS and not torch.compiler.is_compiling():
        need = "a plain tensor; call .full_tensor() on a DTensor, dequantise a quantised one"
        _refuse(name, f"a {type(tensor).__name__}", need)
    if tensor.device.type == "meta":
        _refuse(name, "a tensor on the meta device", "a loaded one; materialise or un-offload the head first")
    if tensor.dtype not in FLOATING:
        _refuse(name, f"dtype {tensor.dtype}", f"one of {', '.join(map(str, FLOATING))}")


def hidden_layout(hidden: Tensor) -> None:
    layout = "(R, T, D), R rows of T positions, or packed (M, D) with cu_seqlens"
    if not isinstance(hidden, Tensor):
        _refuse("hidden", type(hidden).__name__, f"a tensor {layout}")
    if hidden.dtype not in FLOATING:
        _refuse("hidden", f"dtype {hidden.dtype}", f"one of {', '.join(map(str, FLOATING))}")
    if hidden.device.type == "meta":
        _refuse("hidden", "a tensor on the meta device", "one with data")
    if hidden.dim() not in (2, 3):
        _refuse("hidden", f"shape {tuple(hidden.shape)}", layout)


def hidden_size(hidden: Tensor, weight: Tensor) -> None:
    size = hidden.shape[-1]
    if size != weight.shape[1] and size == weight.shape[0]:
        need = (
            f"the hidden states that go into the head, of size {weight.shape[1]}: these look like its logits; or, if "
            f"your head is (D, V), transpose it with .t()"
        )
        _refuse("hidden", f"size {size} in its last dimension, with a head (V, D) of {tuple(weight.shape)}", need)
    if size != weight.shape[1]:
        need = f"{weight.shape[1]}, that of lm_head's weight"
        _refuse("hidden", f"size {size} in its last dimension", need)


def same_place(**tensors: Tensor | None) -> None:
    """All on the device of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and first is not None and tensor.device != first.device:
            need = f"{first.device}, where {first_name} is; move one with .to()"
            _refuse(name, f"a tensor on {tensor.device}", need)


def same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("lm_head weight", weight), ("lm_head bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            need = f"{hidden.dtype}, the dtype of hidden; cast one, or call under torch.autocast"
            _refuse(name, tensor.dtype, need)


def label_layout(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> None:
    shape = tuple(hidden.shape[:-1])
    if not isinstance(labels, Tensor):
        _refuse("labels", type(labels).__name__, f"an integer tensor of shape {shape}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        _refuse("labels", f"dtype {labels.dtype}", "an integer one (torch.int64)")
    if labels.shape != hidden.shape[:-1]:
        _refuse("labels", f"shape {tuple(labels.shape)}", f"{shape}, that of hidden without its last dimension")
    if cu_seqlens is None:
        if hidden.dim() == 2:
            need = "the borders of its R sequences, (R+1,) integers from 0 to M"
            _refuse("cu_seqlens", "None with packed hidden (M, D)", need)
        return
    if hidden.dim() == 3:
        got = f"borders with padded hidden {tuple(hidden.shape)}"
        _refuse("cu_seqlens", got, "packed hidden (M, D), or drop cu_seqlens")
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integer or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        _refuse("cu_seqlens", _what(cu_seqlens), "a tensor (R+1,) of int32 or int64, the borders of R sequences")


def even_rows(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    need = "an even number: B chosen ones, then their B rejected ones"
    if cu_seqlens is None and hidden.shape[0] % 2:
        _refuse("hidden", f"{hidden.shape[0]} rows", need)
    if cu_seqlens is not None and cu_seqlens.numel() % 2 == 0:
        # Pairs have an even number of lengths: are these borders at all? An error is certain, so the read is free.
        if not torch.compiler.is_compiling():
            values = cu_seqlens.tolist()
            ordered = values[0] == 0 and all(a <= b for a, b in pairwise(values))
            borders(ordered, values[-1], hidden.shape[0])
        _refuse("cu_seqlens", f"{cu_seqlens.numel() - 1} sequences", need)


def borders(ordered: bool, end: int, positions: int) -> None:
    """What was read of cu_seqlens: whether it starts at 0 and never decreases, and its last entry."""
    if not ordered or end != positions:
        raise ValueError(
            f"cu_seqlens: got borders {'in order' if ordered else 'out of order or not from 0'} up to {end}, "
            f"need 0 first, never decreasing, and {positions} (the packed tokens) last; of lengths: "
            "torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        )


def objective_object(objective: object) -> None:
    if isinstance(objective, type):
        _refuse("objective", f"the class {objective.__name__}", f"an object: {objective.__name__}(...)")
    lacks = [x for x in ("paired", "needs_reference", "uses_nll_labels") if not hasattr(objective, x)]
    if lacks or not callable(objective):
        need = "a name or an object such as asft_kernels.objectives.ASFT()"
        _refuse("objective", type(objective).__name__ + (f" without {', '.join(lacks)}" if lacks else ""), need)


def weights_like_labels(token_weights: object, labels: Tensor) -> None:
    given = token_weights if isinstance(token_weights, Tensor) else None
    if given is None or not given.is_floating_point() or given.shape != labels.shape:
        need = f"a floating tensor of shape {tuple(labels.shape)}, one weight a label"
        _refuse("token_weights", _what(token_weights), need)


def nll_layout(nll_labels: Tensor, labels: Tensor, cu_seqlens: Tensor | None, objective: str, used: bool) -> None:
    if not used:
        _refuse("nll_labels", "labels", f"None: {objective} has no separate likelihood term; drop them")
    if cu_seqlens is not None:
        _refuse("nll_labels", "a second label set with packed hidden", "padded hidden (2B, T, D)")
    shape = (labels.shape[0] // 2, labels.shape[1])
    integer = isinstance(nll_labels, Tensor) and not nll_labels.is_floating_point()
    if not integer or nll_labels.dtype == torch.bool or tuple(nll_labels.shape) != shape:
        _refuse("nll_labels", _what(nll_labels), f"integers of shape {shape}, one row a chosen row")


def reference_logps(ref_logps: Tensor | None, like: int | Tensor, objective: str, needed: bool) -> None:
    """like: the number of rows, or labels where the values are per token."""
    per_token = isinstance(like, Tensor)
    several = f"({like},), or (K, {like}) where the objective takes several references"
    layout = f"{tuple(like.shape)} as fused_linear_logps returns" if per_token else several
    if needed and ref_logps is None:
        what = "log-probabilities per token" if per_token else "sums of log-probabilities per row"
        how = "fused_linear_logps of a frozen model" + ("" if per_token else ", summed over the last dimension")
        _refuse("ref_logps", None, f"{what}, {layout}: {objective} compares with a reference; take {how}")
    if not needed and ref_logps is not None:
        need = f"None: {objective} has no reference; drop it, or choose another objective"
        _refuse("ref_logps", "a tensor", need)
    if ref_logps is None:
        return
    fits = isinstance(ref_logps, Tensor) and ref_logps.is_floating_point()
    if fits and per_token:
        fits = ref_logps.shape == like.shape
    elif fits:
        fits = ref_logps.dim() in (1, 2) and ref_logps.shape[-1] == like
    if not fits:
        each = "one value a label" if per_token else "one sum a row of hidden"
        _refuse("ref_logps", _what(ref_logps), f"a floating tensor {layout}, {each}")


def objective_inputs(objective: object, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What was given, if it is all that the objective needs and nothing that it does not know."""
    inputs = dict(given or {})
    needed, optional = (getattr(objective, name, {}) for name in ("inputs", "optional_inputs"))
    name = type(objective).__name__
    for key, what in needed.items():
        if inputs.get(key) is None:
            _refuse("objective_inputs", f"no {key!r}", f"{key}: {what}, which {name} needs")
    for key in inputs:
        if key not in needed and key not in optional:
            known = ", ".join(map(repr, [*needed, *optional])) or "none"
            _refuse("objective_inputs", repr(key), f"what {name} knows: {known}")
        if not isinstance(inputs[key], Tensor):
            _refuse(f"objective_inputs[{key!r}]", type(inputs[key]).__name__, "a tensor")
    return inputs


def options(
    *,
    reduction: str,
    shift: bool,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    cache_bytes: int | None,
    chunk_size: int | None,
    num_valid: int | None,
) -> None:
    if reduction not in REDUCTIONS:
        _refuse("reduction", repr(reduction), f"one of {', '.join(map(repr, REDUCTIONS))}")
    if not isinstance(shift, bool):
        _refuse("shift", repr(shift), "True (labels aligned with input_ids) or False (already shifted)")
    if not (_real(logit_scale) and 0 < abs(logit_scale) < inf):
        _refuse("logit_scale", repr(logit_scale), "a finite number other than 0")
    if softcap is not None and not (_real(softcap) and 0 < softcap < inf):
        _refuse("softcap", repr(softcap), "a finite number > 0, or None for no cap")
    for name, value, least in (
        ("cache_bytes", cache_bytes, 0),
        ("chunk_size", chunk_size, 1),
        ("num_valid", num_valid, 0),
    ):
        if value is not None and not (_integer(value) and value >= least):
            _refuse(name, repr(value), f"an integer >= {least}, or None for the default")
    if not _integer(ignore_index):
        _refuse("ignore_index", repr(ignore_index), "an integer")


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
