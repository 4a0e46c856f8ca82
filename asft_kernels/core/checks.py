"""Every ValueError about what a caller passed: the argument, what it was, what it must be, what to do."""

from collections.abc import Collection, Mapping
from itertools import pairwise
from math import inf
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("torch", "triton")
REDUCTIONS = ("mean", "sum", "none")
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
# GRPOTrainer's with cast_lm_head_to_fp32: input and weight to fp32, as heads.py has it for an fp32 head.
_TRL_CAST = "cast_forward_to_fp32"
_HEADS = "an nn.Linear or nn.Embedding, a (V, D) tensor or a (weight, bias) pair"


def refuse(name: str, got: object, need: str) -> NoReturn:
    raise ValueError(f"{name}: got {got}, need {need}")


def own_class(x: object) -> type:
    """The class of a module; under FSDP2, which derives one of its own, that from before."""
    cls = type(x)
    return cls.__mro__[2] if len(cls.__mro__) > 2 and cls.__mro__[1].__name__ == "FSDPModule" else cls


def class_of(x: object) -> str:
    return f"{own_class(x).__module__}.{own_class(x).__qualname__}"


def _what(x: object) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else "None" if x is None else type(x).__name__


def head_pair(lm_head: object, name: str) -> tuple[Tensor, Tensor | None]:
    """(weight, bias or None) of a tensor or a pair; anything that is no module either is refused."""
    if isinstance(lm_head, Tensor):
        return lm_head, None
    if isinstance(lm_head, (tuple, list)) and len(lm_head) == 2:
        return lm_head[0], lm_head[1]
    return refuse(name, type(lm_head).__name__, f"{_HEADS} of tensors")


def plain_module(module: nn.Module, name: str) -> None:
    """An nn.Linear or nn.Embedding that multiplies by its weight and does nothing else."""
    linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if linear or isinstance(module, nn.Embedding):  # a tied embedding's own forward is not the head's
        if linear:
            unpatched(module, name)
        return
    if hasattr(module, "get_output_embeddings"):
        refuse(name, type(module).__name__, f"{_HEADS} of tensors; pass the model's .lm_head")
    refuse(
        name,
        class_of(module),
        f"{_HEADS}, or PEFT's LoRA, DoRA, modules_to_save or trainable_token_indices, or bitsandbytes' 4 or 8 bits: "
        "its .weight alone would silently drop what the wrapper adds; merge or dequantise it, or pass the weight",
    )


def head_tensors(weight: Tensor, bias: Tensor | None, name: str) -> None:
    """weight (V, D), bias (V,) or None: plain, loaded, whole."""
    _plain_tensor(f"{name} weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        need = "(V, D) with both at least 1; gather a flattened or sharded parameter first"
        refuse(name, f"a weight of shape {tuple(weight.shape)}", need)
    if bias is not None:
        _plain_tensor(f"{name} bias", bias)
        if bias.shape != weight.shape[:1]:
            need = f"({weight.shape[0]},), one entry a row of the weight {tuple(weight.shape)}, which is to be (V, D)"
            refuse(name, f"a bias of shape {tuple(bias.shape)}", need)


def unpatched(module: nn.Module, name: str) -> None:
    """Refuses a head with hooks or a forward of its own, which would not run."""
    forward, hooked = vars(module).get("forward"), bool(module._forward_hooks or module._forward_pre_hooks)
    if getattr(forward, "is_seam", False):  # models.seam has put us in its place: the hooks run around us
        forward, hooked = vars(forward)["own"], False
    if getattr(forward, "__name__", "") == _TRL_CAST and str(getattr(forward, "__module__", "")).startswith("trl."):
        forward = None
    replaced = forward is not None and not hasattr(module, "_hf_hook")  # accelerate's only moves tensors
    if replaced or hooked:
        kind = "an nn.Linear" if own_class(module) is nn.Linear else class_of(module)
        got = f"{kind} with " + ("a forward of its own" if replaced else "forward hooks")
        refuse(name, got, "a plain one, as they would not run; remove them, or pass its weight if that is whole")


def _plain_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        refuse(name, type(tensor).__name__, "a tensor")
    # DeepSpeed's parameters say whether they are whole: in GatheredParameters they are.
    if hasattr(tensor, "ds_id") and getattr(getattr(tensor, "ds_status", None), "name", "") != "AVAILABLE":
        need = "it whole; wrap the call and its backward in deepspeed.zero.GatheredParameters([lm_head.weight])"
        refuse(name, "a DeepSpeed ZeRO-3 parameter that is partitioned", need)
    if type(tensor) not in PLAIN_TENSORS and not torch.compiler.is_compiling():
        refuse(name, f"a {type(tensor).__name__}", "a plain tensor; dequantise a quantised one")
    if tensor.device.type == "meta":
        refuse(name, "a tensor on the meta device", "a loaded one; materialise or un-offload the head first")
    if tensor.dtype not in FLOATING:
        refuse(name, f"dtype {tensor.dtype}", f"one of {', '.join(map(str, FLOATING))}")


NO_TRANSFORM = (
    "asft_kernels: torch.func transforms and vmap (grad, vmap, jacrev, jvp, is_grads_batched=True) are not supported "
    "by the fused log-probabilities; use loss.backward() or torch.autograd.grad, more rows in place of vmap, or "
    "asft_kernels.reference, which is plain torch"
)


def no_transform() -> None:
    """RuntimeError inside torch.func's grad, vmap, jvp and their like, whose own errors name nothing of ours."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.compiler.is_compiling() and functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(NO_TRANSFORM)


def is_eager() -> bool:
    """Whether neither torch.compile traces nor a dispatch mode looks on, which is shown operators and not what is in
    them: fake tensors, selective checkpointing, make_fx, counters."""
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def hidden_layout(hidden: Tensor) -> None:
    layout = "(R, T, D), R rows of T positions, or packed (M, D) with cu_seqlens"
    if not isinstance(hidden, Tensor):
        refuse("hidden", type(hidden).__name__, f"a tensor {layout}")
    if hidden.dtype not in FLOATING:
        refuse("hidden", f"dtype {hidden.dtype}", f"one of {', '.join(map(str, FLOATING))}")
    if hidden.device.type == "meta":
        refuse("hidden", "a tensor on the meta device", "one with data")
    if hidden.dim() not in (2, 3):
        refuse("hidden", f"shape {tuple(hidden.shape)}", layout)


def hidden_size(hidden: Tensor, vocab: int, columns: int) -> None:
    size = hidden.shape[-1]
    if size != columns and size == vocab:
        need = (
            f"the hidden states that go into the head, of size {columns}: these look like its logits; or, if "
            f"your head is (D, V), transpose it with .t()"
        )
        refuse("hidden", f"size {size} in its last dimension, with a head (V, D) of {(vocab, columns)}", need)
    if size != columns:
        need = f"{columns}, that of lm_head's weight"
        refuse("hidden", f"size {size} in its last dimension", need)


def same_place(**tensors: Tensor | None) -> None:
    """All on the device of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and first is not None and tensor.device != first.device:
            need = f"{first.device}, where {first_name} is; move one with .to()"
            refuse(name, f"a tensor on {tensor.device}", need)


def same_dtype(hidden: Tensor, tensor: Tensor, name: str) -> None:
    if tensor.dtype != hidden.dtype:
        need = f"{hidden.dtype}, the dtype of hidden (or float32); cast one, or call under torch.autocast"
        refuse(name, tensor.dtype, need)


def label_layout(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> None:
    shape = tuple(hidden.shape[:-1])
    if not isinstance(labels, Tensor):
        refuse("labels", type(labels).__name__, f"an integer tensor of shape {shape}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        refuse("labels", f"dtype {labels.dtype}", "an integer one (torch.int64)")
    if labels.shape != hidden.shape[:-1]:
        refuse("labels", f"shape {tuple(labels.shape)}", f"{shape}, that of hidden without its last dimension")
    if cu_seqlens is None:
        if hidden.dim() == 2:
            need = "the borders of its R sequences, (R+1,) integers from 0 to M"
            refuse("cu_seqlens", "None with packed hidden (M, D)", need)
        return
    if hidden.dim() == 3:
        got = f"borders with padded hidden {tuple(hidden.shape)}"
        refuse("cu_seqlens", got, "packed hidden (M, D), or drop cu_seqlens")
    integer = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integer or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        refuse("cu_seqlens", _what(cu_seqlens), "a tensor (R+1,) of int32 or int64, the borders of R sequences")


def even_rows(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    need = "an even number: B chosen ones, then their B rejected ones"
    if cu_seqlens is None and hidden.shape[0] % 2:
        refuse("hidden", f"{hidden.shape[0]} rows", need)
    if cu_seqlens is not None and cu_seqlens.numel() % 2 == 0:
        # Pairs have an even number of lengths: are these borders at all? An error is certain, so the read is free.
        if not torch.compiler.is_compiling():
            values = cu_seqlens.tolist()
            ordered = values[0] == 0 and all(a <= b for a, b in pairwise(values))
            borders(ordered, values[-1], hidden.shape[0])
        refuse("cu_seqlens", f"{cu_seqlens.numel() - 1} sequences", need)


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
        refuse("objective", f"the class {objective.__name__}", f"an object: {objective.__name__}(...)")
    lacks = [x for x in ("paired", "needs_reference", "uses_nll_labels") if not hasattr(objective, x)]
    if lacks or not callable(objective):
        need = "a name or an object such as asft_kernels.objectives.ASFT()"
        refuse("objective", type(objective).__name__ + (f" without {', '.join(lacks)}" if lacks else ""), need)


def loss_terms(terms: object, objective: str) -> None:
    if not hasattr(terms, "loss") or not hasattr(terms, "align"):
        need = "asft_kernels.objectives.LossTerms(loss, sft, align): (B,) of pairs or (R,) of rows each"
        refuse("objective", f"{_what(terms)} from {objective}", need)


def weights_like_labels(token_weights: object, labels: Tensor) -> None:
    given = token_weights if isinstance(token_weights, Tensor) else None
    if given is None or not given.is_floating_point() or given.shape != labels.shape:
        need = f"a floating tensor of shape {tuple(labels.shape)}, one weight a label"
        refuse("token_weights", _what(token_weights), need)


def nll_layout(nll_labels: Tensor, labels: Tensor, cu_seqlens: Tensor | None, objective: str, used: bool) -> None:
    if not used:
        refuse("nll_labels", "labels", f"None: {objective} has no separate likelihood term; drop them")
    if cu_seqlens is not None:
        refuse("nll_labels", "a second label set with packed hidden", "padded hidden (2B, T, D)")
    shape = (labels.shape[0] // 2, labels.shape[1])
    integer = isinstance(nll_labels, Tensor) and not nll_labels.is_floating_point()
    if not integer or nll_labels.dtype == torch.bool or tuple(nll_labels.shape) != shape:
        refuse("nll_labels", _what(nll_labels), f"integers of shape {shape}, one row a chosen row")


def reference_logps(ref_logps: Tensor | None, like: int | Tensor, objective: str, needed: bool) -> None:
    """like: the number of rows, or labels where the values are per token."""
    per_token = isinstance(like, Tensor)
    several = f"({like},), or (K, {like}) where the objective takes several references"
    layout = f"{tuple(like.shape)} as fused_linear_logps returns" if per_token else several
    if needed and ref_logps is None:
        what = "log-probabilities per token" if per_token else "sums of log-probabilities per row"
        how = "fused_linear_logps of a frozen model" + ("" if per_token else ", summed over the last dimension")
        refuse("ref_logps", None, f"{what}, {layout}: {objective} compares with a reference; take {how}")
    if not needed and ref_logps is not None:
        need = f"None: {objective} has no reference; drop it, or choose another objective"
        refuse("ref_logps", "a tensor", need)
    if ref_logps is None:
        return
    fits = isinstance(ref_logps, Tensor) and ref_logps.is_floating_point()
    if fits and per_token:
        fits = ref_logps.shape == like.shape
    elif fits:
        fits = ref_logps.dim() in (1, 2) and ref_logps.shape[-1] == like
    if not fits:
        each = "one value a label" if per_token else "one sum a row of hidden"
        refuse("ref_logps", _what(ref_logps), f"a floating tensor {layout}, {each}")


def objective_inputs(objective: object, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What was given, if it is all that the objective needs and nothing that it does not know."""
    inputs = dict(given or {})
    needed, optional = (getattr(objective, name, {}) for name in ("inputs", "optional_inputs"))
    name = type(objective).__name__
    for key, what in needed.items():
        if inputs.get(key) is None:
            refuse("objective_inputs", f"no {key!r}", f"{key}: {what}, which {name} needs")
    for key in inputs:
        if key not in needed and key not in optional:
            known = ", ".join(map(repr, [*needed, *optional])) or "none"
            refuse("objective_inputs", repr(key), f"what {name} knows: {known}")
        if not isinstance(inputs[key], Tensor):
            refuse(f"objective_inputs[{key!r}]", type(inputs[key]).__name__, "a tensor")
    return inputs


def reduction(given: object) -> None:
    if given not in REDUCTIONS:
        refuse("reduction", repr(given), f"one of {', '.join(map(repr, REDUCTIONS))}")


def options(
    *,
    shift: bool,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    backend: str | None,
    cache_bytes: int | None,
    chunk_size: int | None,
    num_valid: int | None,
) -> None:
    if not isinstance(shift, bool):
        refuse("shift", repr(shift), "True (labels aligned with input_ids) or False (already shifted)")
    if not (_real(logit_scale) and 0 < abs(logit_scale) < inf):
        refuse("logit_scale", repr(logit_scale), "a finite number other than 0")
    if softcap is not None and not (_real(softcap) and 0 < softcap < inf):
        refuse("softcap", repr(softcap), "a finite number > 0, or None for no cap")
    for name, value, least in (
        ("cache_bytes", cache_bytes, 0),
        ("chunk_size", chunk_size, 1),
        ("num_valid", num_valid, 0),
    ):
        if value is not None and not (_integer(value) and value >= least):
            refuse(name, repr(value), f"an integer >= {least}, or None for the default")
    if not (_integer(ignore_index) and -(2**63) <= ignore_index < 2**63):
        refuse("ignore_index", repr(ignore_index), "an integer of 64 bits")
    if backend is not None and backend not in BACKENDS:
        refuse("backend", repr(backend), f"one of {', '.join(map(repr, BACKENDS))} or None (choose by device)")


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def stat_names(
    return_stats: object, differentiable: object, names: Collection[str], can_be_differentiable: Collection[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """What a call wants of `names`, and what of that gradients go through."""
    known = ", ".join(map(repr, names))
    asked = (names if return_stats else ()) if isinstance(return_stats, bool) else return_stats
    if isinstance(asked, str) or not isinstance(asked, Collection):
        need = f"True, False or a list of names out of {known}"
        refuse("return_stats", repr(asked), need + (f"; write [{asked!r}]" if asked in names else ""))
    for name in asked:
        if name not in names:
            refuse("return_stats", f"the name {name!r}", f"names out of {known}; drop it or correct its spelling")
    if isinstance(differentiable, str) or not isinstance(differentiable, Collection):
        refuse("differentiable", repr(differentiable), "a list of names; write ['lse'], or [] to detach all")
    for name in differentiable:
        if name not in can_be_differentiable:
            need = f"names out of {', '.join(map(repr, can_be_differentiable))}; the other figures have no gradient"
            refuse("differentiable", f"the name {name!r}", f"{need}, drop it")
        if name not in asked and name != "lse":  # the default names it
            refuse("differentiable", f"the name {name!r}", f"one that return_stats asks for; add {name!r} there")
    return frozenset(asked), frozenset(differentiable) & frozenset(asked)
