"""FPO's feature distance (arXiv 2411.07618, Eq. 8 to 11) from hidden states, without the features of every token.

    cbar_r = 1/m_r * sum over the valid tokens t of sequence r of c_t;   c_t = the autoencoder's features of h_t
    D_r    = 1/k * sum over i in I_r of (cbar_ri - ref_cbar_ri)^2
    I_r    = the k largest of cbar_r, together with the k largest of ref_cbar_r

Position t counts if the label that it predicts is valid, as in the fused calls, so m is the objective's m. The
paper calls it average pooling; the authors' code divides by the padded length instead, and its D then depends
on what else is in the batch. k stays in the denominator though I may hold up to 2k features. I is a constant.

The forward costs one product of (N, D) by (D, F), in chunks of tokens. D's gradient is 0 outside I, so the
backward recomputes and multiplies only the columns of W_enc that some sequence's I holds.
"""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asft_kernels.backends import choose_backend
from asft_kernels.core import checks
from asft_kernels.core.batch import pack
from asft_kernels.methods.fpo.autoencoder import SparseAutoencoder

CHUNK_BYTES = 2**26  # pre-activations held at a time; with their mask and the features 2.25 times that
ANY_LABEL = torch.iinfo(torch.int64).max  # labels only say which tokens are valid


def pooled_features(
    sae: SparseAutoencoder,
    hidden: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """(R, F): mean features of each sequence's valid tokens, 0 for none; differentiable in hidden.

    hidden: (R, T, D), or packed (M, D) with cu_seqlens, in any dtype. labels, keywords: as `fused_asft_loss`.
    In the autoencoder's dtype (fp32); the autoencoder is a constant, whether it asks for gradients or not.
    Reads the device once, and once more in the backward.
    """
    checks.hidden_layout(hidden)
    checks.label_layout(hidden, labels, cu_seqlens)
    if hidden.shape[-1] != sae.hidden_size:
        raise ValueError(
            f"hidden: got size {hidden.shape[-1]} in its last dimension, need {sae.hidden_size}, the autoencoder's; "
            "was it trained on this model?"
        )
    checks.same_place(hidden=hidden, labels=labels, cu_seqlens=cu_seqlens, sae=sae.W_enc)
    batch = pack(
        labels, vocab=ANY_LABEL, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index, num_valid=None,
        backend=choose_backend(None, labels.device, hidden.dtype),
    )  # fmt: skip
    tokens = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.rows)
    return _Pooled.apply(tokens, batch.offsets, sae)  # pyright: ignore[reportReturnType]


def feature_distance(pooled: Tensor, ref_pooled: Tensor, top_k: int = 50, *, union: bool = True) -> Tensor:
    """D (R,), differentiable in pooled (R, F).

    top_k: features of each side, 1 to F. union: False takes the policy's top k alone, as the authors' code does.
    """
    if ref_pooled.shape != pooled.shape:
        raise ValueError(
            f"ref_pooled: got shape {tuple(ref_pooled.shape)}, need {tuple(pooled.shape)}, that of the policy's"
        )
    features = pooled.shape[-1]
    if not (isinstance(top_k, Integral) and 1 <= top_k <= features):
        raise ValueError(f"top_k: got {top_k!r}, need an integer from 1 to {features}, the autoencoder's features")
    ref_pooled = ref_pooled.detach().to(pooled.dtype)
    chosen = torch.zeros_like(pooled, dtype=torch.bool)
    for vector in (pooled, ref_pooled) if union else (pooled,):
        chosen.scatter_(-1, vector.detach().topk(int(top_k), dim=-1).indices, True)
    return torch.where(chosen, pooled - ref_pooled, 0).square().sum(dim=-1) / int(top_k)


def fpo_inputs(
    sae: SparseAutoencoder,
    hidden: Tensor,
    labels: Tensor,
    ref_pooled: Tensor,
    top_k: int = 50,
    *,
    union: bool = True,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """The `objective_inputs` of fused_preference_loss(..., "fpo"): {"feature_distance": D}.

    ref_pooled: (R, F), `pooled_features` of the reference's hidden states, or from a cache of them.
    """
    pooled = pooled_features(sae, hidden, labels, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index)
    return {"feature_distance": feature_distance(pooled, ref_pooled, top_k, union=union)}


class _Pooled(torch.autograd.Function):
    """(N, D) tokens and the (R+1,) offsets of their sequences -> (R, F)."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, offsets: Tensor, sae: SparseAutoencoder) -> Tensor:
        ctx.save_for_backward(tokens, offsets)
        ctx.sae = sae
        pooled = sae.b_enc.new_zeros(offsets.numel() - 1, sae.features)
        for at in _chunks(len(tokens), sae.features):
            pooled.addmm_(_shares(offsets, at, pooled.dtype), sae.encode(tokens[at]))
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        tokens, offsets = ctx.saved_tensors
        sae, grad = ctx.sae, grads[0]
        columns = grad.ne(0).any(dim=0).nonzero().squeeze(1)
        weight, bias, floor, grad = (x.index_select(-1, columns) for x in (sae.W_enc, sae.b_enc, sae.floor, grad))
        grad_tokens = torch.empty_like(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            for at in _chunks(len(tokens), len(columns)):
                pre = torch.addmm(bias, tokens[at].to(weight.dtype), weight)
                grad_pre = _shares(offsets, at, grad.dtype).T @ grad
                grad_tokens[at] = (grad_pre.masked_fill_(pre <= floor, 0) @ weight.T).to(tokens.dtype)
        return grad_tokens, None, None


def _chunks(tokens: int, features: int) -> list[slice]:
    step = max(1, CHUNK_BYTES // (4 * max(features, 1)))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _shares(offsets: Tensor, at: slice, dtype: torch.dtype) -> Tensor:
    """(R, n): 1/m_r where token at.start + j is sequence r's, else 0."""
    token = torch.arange(at.start, at.stop, device=offsets.device)
    inside = (token >= offsets[:-1, None]) & (token < offsets[1:, None])
    return inside.to(dtype) / offsets.diff().clamp(min=1)[:, None].to(dtype)
