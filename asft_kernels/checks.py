"""Every ValueError about what a caller passed: which argument, what it was, what it must be, what to do."""

from numbers import Integral, Real

import torch
from torch import Tensor, nn

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def head_tensors(lm_head: nn.Linear | Tensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(weight (V, D), bias (V,) or None) of a plain head; anything that computes more is refused."""
    if isinstance(lm_head, Tensor):
        weight, bias = lm_head, None
    elif isinstance(lm_head, (tuple, list)) and len(lm_head) == 2:
        weight, bias = lm_head
    elif isinstance(lm_head, nn.Linear) and type(lm_head).forward is nn.Linear.forward:
        weight, bias = lm_head.weight, lm_head.bias
    elif hasattr(lm_head, "weight"):
        raise ValueError(
            f"lm_head: got {type(lm_head).__module__}.{type(lm_head).__qualname__}, need an nn.Linear, a (V, D) tensor or a "
            "(weight, bias) pair: its .weight alone would silently drop what the wrapper adds (adapter, quantisation); "
            "merge the adapter or leave lm_head out of the target modules, dequantise the head, or pass the weight itself"
        )
    else:
        raise ValueError(
            f"lm_head: got {type(lm_head).__name__}, need an nn.Linear, a (V, D) tensor or a (weight, bias) pair of tensors"
        )
    _plain_tensor("lm_head weight", weight)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"lm_head: got a weight of shape {tuple(weight.shape)}, need (V, D) with both at least 1; "
            "gather a flattened or sharded parameter first"
        )
    if bias is not None:
        _plain_tensor("lm_head bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"lm_head: got a bias of shape {tuple(bias.shape)}, need ({weight.shape[0]},), one entry a row of the weight")
    return weight, bias


def _plain_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, need a tensor")
    if hasattr(tensor, "ds_id"):
        raise ValueError(f"{name}: got a DeepSpeed ZeRO parameter, need it whole; wrap the call in deepspeed.zero.GatheredParameters")
    if type(tensor) not in _PLAIN_TENSORS and not torch.compiler.is_compiling():
        raise ValueError(
            f"{name}: got a {type(tensor).__name__}, need a plain tensor; call .full_tensor() on a DTensor, dequantise a quantised one"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: got a tensor on the meta device, need a loaded one; materialise or un-offload the head first")
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, need one of {', '.join(map(str, FLOATING))}")


def hidden_states(hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(hidden, Tensor):
        raise ValueError(f"hidden: got {type(hidden).__name__}, need a tensor (2B, T, D), or packed (M, D) with cu_seqlens")
    if hidden.dtype not in FLOATING:
        raise ValueError(f"hidden: got dtype {hidden.dtype}, need one of {', '.join(map(str, FLOATING))}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, need (2B, T, D), or packed (M, D) with cu_seqlens")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden: got size {hidden.shape[-1]} in its last dimension, need {weight.shape[1]}, that of lm_head's weight")


def same_place(**tensors: Tensor | None) -> None:
    """All on the device of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, need {first.device}, where {first_name} is; move one with .to()")


def same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("lm_head weight", weight), ("lm_head bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name}: got {tensor.dtype}, need {hidden.dtype}, the dtype of hidden; cast one, or call under torch.autocast"
            )


def label_layout(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name}: got {type(labels).__name__}, need an integer tensor of shape {tuple(hidden.shape[:-1])}")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name}: got dtype {labels.dtype}, need an integer one (torch.int64)")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, need {tuple(hidden.shape[:-1])}, that of hidden without its last dimension")
    if cu_seqlens is None and hidden.dim() == 2:
        raise ValueError("cu_seqlens: got None with packed hidden (M, D), need the borders of its sequences, (2B+1,) integers from 0 to M")
    if cu_seqlens is not None:
        if hidden.dim() == 3:
            raise ValueError(f"cu_seqlens: got borders with padded hidden {tuple(hidden.shape)}, need packed hidden (M, D), or drop cu_seqlens")
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise ValueError(f"cu_seqlens: got {got}, need a tensor (2B+1,) of int32 or int64")


def even_rows(rows: int) -> None:
    if rows % 2:
        raise ValueError(f"hidden: got {rows} rows (sequences), need an even number: B chosen rows, then their B rejected rows")


def weights_like_labels(token_weights: Tensor, labels: Tensor) -> None:
    if not isinstance(token_weights, Tensor) or not token_weights.is_floating_point() or token_weights.shape != labels.shape:
        got = f"{tuple(token_weights.shape)} {token_weights.dtype}" if isinstance(token_weights, Tensor) else type(token_weights).__name__
        raise ValueError(f"token_weights: got {got}, need a floating tensor of shape {tuple(labels.shape)}, one weight a label")


def nll_layout(nll_labels: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("nll_labels: got a second label set with packed hidden, need padded hidden (2B, T, D)")
    need = (labels.shape[0] // 2, labels.shape[1])
    if not isinstance(nll_labels, Tensor) or nll_labels.is_floating_point() or tuple(nll_labels.shape) != need:
        got = f"{tuple(nll_labels.shape)} {nll_labels.dtype}" if isinstance(nll_labels, Tensor) else type(nll_labels).__name__
        raise ValueError(f"nll_labels: got {got}, need integers of shape {need}, one row a chosen row")


def reference_logps(ref_logps: Tensor | None, rows: int, objective: str, needed: bool) -> None:
    if needed and ref_logps is None:
        raise ValueError(f"ref_logps: got None, need sums of log-probabilities per row, ({rows},) or (K, {rows}): {objective} compares with a reference")
    if not needed and ref_logps is not None:
        raise ValueError(f"ref_logps: got a tensor, need None: {objective} has no reference; drop it, or choose another objective")
    if ref_logps is not None and (ref_logps.dim() not in (1, 2) or ref_logps.shape[-1] != rows):
        raise ValueError(f"ref_logps: got shape {tuple(ref_logps.shape)}, need ({rows},) or (K, {rows}), one sum a row of hidden")


def options(
    *, reduction: str, logit_scale: float, softcap: float | None, cache_bytes: int | None, chunk_size: int | None,
    num_valid: int | None, ignore_index: int,
) -> None:  # fmt: skip
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, need one of {', '.join(map(repr, REDUCTIONS))}")
    if not (isinstance(logit_scale, Real) and 0 < abs(logit_scale) < float("inf")):
        raise ValueError(f"logit_scale: got {logit_scale!r}, need a finite number other than 0")
    if softcap is not None and not (isinstance(softcap, Real) and 0 < softcap < float("inf")):
        raise ValueError(f"softcap: got {softcap!r}, need a finite number > 0, or None for no cap")
    for name, value, least in (("cache_bytes", cache_bytes, 0), ("chunk_size", chunk_size, 1), ("num_valid", num_valid, 0)):
        if value is not None and not (isinstance(value, Integral) and not isinstance(value, bool) and value >= least):
            raise ValueError(f"{name}: got {value!r}, need an integer >= {least}, or None for the default")
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise ValueError(f"ignore_index: got {ignore_index!r}, need an integer")
