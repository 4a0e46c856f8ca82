"""What an output head amounts to: rows, bias and what goes into the low-rank columns; refused if it is something else.

    head                                            rows                                  large products
    nn.Linear, nn.Embedding, tensors                W                                     as ever
    PEFT LoRA, rsLoRA (one or several adapters)     [W | s B], hidden [h ; A drop(h)]     those of a frozen W
    PEFT DoRA                                       m / |W + s B A| (W + s B A), whole    those of a trainable W
    PEFT modules_to_save                            the active copy, or the original      as ever
    PEFT trainable_token_indices                    W with the trained rows, whole        those of a trainable W
    bitsandbytes 4 and 8 bits, with LoRA or not     codes, read chunk by chunk            those of a frozen W
    VocabParallelHead, DTensor of tensor-parallel   this rank's                           1 / ranks of them
    DTensor of data-parallel ranks, ShardedLinear   gathered or streamed; mean gradients  as ever
    ZeRO-3 in GatheredParameters                    W                                     as ever

W is never merged or rounded anew. Below fp32, A h and B go into the product in hidden's dtype; B's gradient stays in
B's own. Adapters are looked up at each call, so `disable_adapter()` and `set_adapter()` work. PEFT and bitsandbytes are
recognised by the modules that they make, and never imported before one is there.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asft_kernels.backends.head_rows import EIGHT_BITS, FOUR_BITS, HeadRows, codes_text, stream_text
from asft_kernels.backends.sharding import Placement
from asft_kernels.core import checks
from asft_kernels.core.distributed import Shard
from asft_kernels.core.options import as_autocast
from asft_kernels.core.sharded_linear import GATHERED_BYTES, ShardedLinear, gathered, is_dtensor
from asft_kernels.core.tensor_parallel import is_tensor_parallel

Head = nn.Module | Tensor | tuple[Tensor, Tensor | None] | Shard
ALIGNED = 16  # the fast products and loads want multiples of 16 columns


@dataclass(frozen=True)
class ResolvedHead:
    """rows of (V, D + r), bias (V,) or None; project: hidden (..., D) -> (..., r), None without low-rank columns."""

    rows: HeadRows
    bias: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None

    def tensors(self) -> dict[str, Tensor | None]:
        """By the names that messages use."""
        return {"lm_head weight": self.rows.weight, "lm_head bias": self.bias}

    def for_product(self, hidden: Tensor) -> tuple[Tensor, HeadRows, Tensor | None]:
        """(hidden, rows, bias) as they go into the product: autocast's dtype, low-rank columns on both sides."""
        rows, bias = self.rows, self.bias
        further = None if self.project is None else self.project(hidden)
        hidden = as_autocast(hidden)
        if not rows.codes:
            rows = rows._replace(weight=as_autocast(rows.weight))
            if rows.weight.dtype == torch.float32 and hidden.dtype in (torch.float16, torch.bfloat16):
                hidden = hidden.float()  # an fp32 head over a body of fewer bits: exact
            checks.same_dtype(hidden, rows.weight, "lm_head weight")
        if bias is not None:
            bias = as_autocast(bias)
            if rows.is_plain:  # LoRA's own bias may be wider; bitsandbytes casts its
                checks.same_dtype(hidden, bias, "lm_head bias")
            bias = bias.to(hidden.dtype)
        if further is not None and rows.low_rank is not None:
            pad = -rows.low_rank.shape[1] % ALIGNED
            hidden = torch.cat([hidden, F.pad(further.to(hidden.dtype), (0, pad))], dim=-1)
            low_rank = rows.low_rank.to(hidden.dtype) if hidden.dtype == torch.float64 else rows.low_rank
            rows = rows._replace(low_rank=F.pad(low_rank, (0, pad)))
        return hidden, rows, bias


def resolve_head(lm_head: Head, name: str = "lm_head") -> ResolvedHead:
    """Reads a head; ValueError that names it, says what is not understood and what to do."""
    if isinstance(lm_head, Shard):
        return _of_shard(lm_head, name)
    if isinstance(lm_head, nn.Module):
        return _of_module(lm_head, name)
    weight, bias = checks.head_pair(lm_head, name)
    return _plain(weight, bias, name)


def _of_module(module: Any, name: str) -> ResolvedHead:
    package = checks.own_class(module).__module__.partition(".")[0]
    if package == "peft":
        return _of_peft(module, name)
    if package == "bitsandbytes":
        return _of_bitsandbytes(module, name)
    if isinstance(module, ShardedLinear):
        return _plain(module.cast_weight(), module.bias, name, module.stream)
    checks.plain_module(module, name)
    return _plain(module.weight, getattr(module, "bias", None), name)


def _of_shard(shard: Shard, name: str) -> ResolvedHead:
    """A local head with the place of its rows; those that do not count are cut off."""
    weight, bias = shard.head if isinstance(shard.head, tuple) else (shard.head, None)
    if isinstance(weight, Tensor):
        head = _plain(_first(weight, shard.rows), None if bias is None else _first(bias, shard.rows), name)
    else:
        head = resolve_head(shard.head, name)
    rows, bias = head.rows, head.bias
    if max(shard.rows, 1) < rows.size[0] or not shard.rows:
        if rows.codes:
            checks.refuse(name, "a quantised shard with rows that do not count", "one of its own rows; cut the padding")
        low_rank = None if rows.low_rank is None else _first(rows.low_rank, shard.rows)
        rows = rows._replace(weight=_first(rows.weight, shard.rows), low_rank=low_rank)
        bias = None if bias is None else _first(bias, shard.rows)
    placement = Placement(shard.first, shard.rows, shard.vocab, shard.group_name)
    return replace(head, rows=rows._replace(placement=placement.text()), bias=bias)


def _first(tensor: Tensor, rows: int) -> Tensor:
    """So many first rows; of none a row of zeros, whose gradient goes nowhere."""
    return tensor[:rows] if rows else F.pad(tensor[:0], (0, 0) * (tensor.dim() - 1) + (0, 1))


def _plain(weight: Tensor, bias: Tensor | None, name: str, stream: bool | None = None) -> ResolvedHead:
    bias = None if bias is None else gathered(bias)
    if is_dtensor(weight) and _streams(weight, stream, name):
        return _streamed(weight, bias, name)
    weight = gathered(weight)
    checks.head_tensors(weight, bias, name)
    return ResolvedHead(HeadRows(weight), bias)


def _streams(weight: Any, stream: bool | None, name: str) -> bool:
    """Whether a DTensor is streamed: as its owner says, else as memory does."""
    one_shard = weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)
    if stream and not one_shard:
        got = (
            f"stream=True with placements {tuple(weight.placements)} on a mesh of {weight.device_mesh.ndim} dimensions"
        )
        checks.refuse(name, got, "Shard(0) on a mesh of one; leave stream out, and the head is gathered")
    if stream is not None or not one_shard:
        return bool(stream)
    return weight.numel() * as_autocast(weight.new_empty(())).element_size() > GATHERED_BYTES


def _streamed(weight: Any, bias: Tensor | None, name: str) -> ResolvedHead:
    from torch.distributed.tensor import Shard

    local = weight.to_local(grad_placements=[Shard(0)])
    checks.head_tensors(local.new_empty(()).expand(weight.shape), bias, name)
    return ResolvedHead(
        HeadRows(local, placement=stream_text(weight.device_mesh.get_group().group_name, len(weight))), bias
    )


def _of_peft(module: Any, name: str) -> ResolvedHead:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    checks.unpatched(module, name)
    if isinstance(module, ModulesToSaveWrapper):
        active = not module.disable_adapters and module.active_adapters
        inner = module.modules_to_save[module.active_adapters[0]] if active else module.original_module
        return resolve_head(inner, name)
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    if isinstance(module, (LoraLayer, TrainableTokensLayer)):
        if module.merged and module.disable_adapters:
            module.unmerge()
        if is_tensor_parallel(module.get_base_layer()):
            checks.refuse(
                name, "PEFT's adapter on a head that tensor-parallel ranks have in parts",
                "the head left out of target_modules, or a VocabParallelHead of this rank's rows with an adapter there",
            )  # fmt: skip
        base = resolve_head(module.get_base_layer(), name)
        if module.merged or module.disable_adapters or not module.active_adapters:
            return base
        if isinstance(module, TrainableTokensLayer):
            # Its own product has no bias.
            return _plain(module.get_merged_weights(module.active_adapters), None, name)
        return _with_lora(module, base, name)
    return checks.refuse(
        name, checks.class_of(module),
        "an nn.Linear, or one with PEFT's LoRA, DoRA, modules_to_save or trainable_token_indices; merge the adapter "
        "or leave the head out of its target modules",
    )  # fmt: skip


def _with_lora(module: Any, base: ResolvedHead, name: str) -> ResolvedHead:
    if any(adapter in module.lora_embedding_A for adapter in module.active_adapters):
        checks.refuse(name, "LoRA on an nn.Embedding", "LoRA on the model's lm_head, or the adapter merged")
    if not hasattr(module, "lora_variant") or not all(isinstance(x, nn.Linear) for x in module.lora_A.values()):
        checks.refuse(name, checks.class_of(module), "PEFT's LoRA, rsLoRA or DoRA; merge it or leave the head out")
    active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    for adapter in active:
        variant = module.lora_variant.get(adapter)
        if variant is not None:
            kind = getattr(variant, "__name__", type(variant).__name__)
            if kind == "DoraLinearVariant" and len(active) == 1:
                return _with_dora(module, base, adapter, name)
            checks.refuse(
                name, f"LoRA's {kind} in {adapter!r}", "plain LoRA or rsLoRA, or DoRA alone; merge the others"
            )
    if not active:
        return base
    bias, low_rank = base.bias, []
    for adapter in active:
        B, scaling = module.lora_B[adapter], module.scaling[adapter]
        low_rank.append(gathered(B.weight) * scaling)
        if B.bias is not None:
            of_adapter = gathered(B.bias) * scaling
            bias = of_adapter if bias is None else bias + of_adapter

    def project(hidden: Tensor) -> Tensor:
        parts = []
        for adapter in active:
            A = module.lora_A[adapter]
            parts.append(A(module.lora_dropout[adapter](hidden.to(A.weight.dtype))))
        return torch.cat(parts, dim=-1)

    return ResolvedHead(base.rows._replace(low_rank=torch.cat(low_rank, dim=1)), bias, project)


def _with_dora(module: Any, base: ResolvedHead, adapter: str, name: str) -> ResolvedHead:
    """m / |W + s B A| (W + s B A) as a weight of its own; the norm is a constant (arXiv 2402.09353, section 4.3)."""
    if base.rows.codes:
        checks.refuse(name, "DoRA on a quantised head", "LoRA there, or the head not quantised")
    if base.rows.is_streamed:
        checks.refuse(name, "DoRA on a streamed head", "LoRA there, or the head gathered: its norms are of whole rows")
    if module.training and isinstance(module.lora_dropout[adapter], nn.Dropout):
        checks.refuse(name, f"DoRA in {adapter!r} with dropout", "lora_dropout=0: a dropped h has no merged weight")
    A, B, scaling = *(gathered(x[adapter].weight) for x in (module.lora_A, module.lora_B)), module.scaling[adapter]
    whole = base.rows.weight + (scaling * B @ A).to(base.rows.weight.dtype)
    magnitude = gathered(module.lora_magnitude_vector[adapter].weight)
    factor = magnitude / torch.linalg.vector_norm(whole.detach(), dim=1)
    return ResolvedHead(HeadRows((whole * factor[:, None]).to(whole.dtype)), base.bias)


def _of_bitsandbytes(module: Any, name: str) -> ResolvedHead:
    checks.unpatched(module, name)
    kind = checks.own_class(module).__name__
    if kind == "Linear4bit":
        return ResolvedHead(_four_bits(module.weight, name), module.bias)
    if kind == "Linear8bitLt":
        return ResolvedHead(_eight_bits(module, name), module.bias)
    return checks.refuse(name, checks.class_of(module), "Linear4bit, Linear8bitLt or a plain head; dequantise it")


def _four_bits(weight: Any, name: str) -> HeadRows:
    data: Tensor = weight.data
    state: Any = weight.quant_state
    if state is None:
        checks.refuse(name, "a Linear4bit that is not quantised yet", "one on its device: call .to(device) first")
    if getattr(state, "packing_format_for_cpu", False):
        # Linear4bit packs its weight anew, in place, in its first forward in evaluation on a CPU with bf16 units.
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

        of_block, state = state.absmax.T.reshape(-1), copy(state)
        state.original_nested = False  # its scales are there already
        data, state = unpack(data, state)  # pyright: ignore[reportGeneralTypeIssues]
    elif state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        of_block: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        of_block = state.absmax
    V, D = state.shape
    if D % 2:
        checks.refuse(name, f"a Linear4bit of {D} columns", "an even number: a byte holds two entries")
    byte = torch.arange(256, device=data.device)
    table = state.code.float()[torch.stack([byte >> 4, byte & 15], dim=1)]
    codes = codes_text(FOUR_BITS, state.blocksize, state.dtype)
    return HeadRows(data.view(torch.uint8).view(V, D // 2), None, codes, (of_block.float(), table))


def _eight_bits(module: Any, name: str) -> HeadRows:
    """The weight that the codes stand for: LLM.int8's own product rounds hidden to 8 bits as well, ours does not."""
    values, scale = (getattr(module.weight, x, None) for x in ("CB", "SCB"))
    values, scale = (module.state.CB, module.state.SCB) if scale is None else (values, scale)
    if values is None or scale is None:
        checks.refuse(name, "a Linear8bitLt that is not quantised yet", "one on its device: call .to(device) first")
    return HeadRows(values, None, codes_text(EIGHT_BITS, 0, torch.float32), (scale.float().view(-1) / 127,))
