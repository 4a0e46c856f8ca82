"""Log-probabilities under a frozen head whose logits carry trainable Gaussian noise: DNPO's primitive.

    stage             formula (one vocabulary chunk of rows k)                        tensor
    logits            z = softcap * tanh(scale * (H W_k^T + b_k) / softcap)           (N, k)
    noise             std = H Wn_k^T + bn_k;  z~ = z + std * eps(seed, t, v)          (N, k)
    forward           r, s: running maximum, and sum of exp(z~ - r), without label y  (N,)
    close             logp = -softplus(r + log s - z~_y);  power = mean over v of std^2
    backward          C = -g * (p~ - onehot(y)) * eps + 2 q / V * std                 (N, k)
    dWn_k, dbn_k      C^T H, sum over t of C                                          (k, D), (k,)

g and q are the gradients to logp and power. Nothing of size N*V exists: eps is computed from its counter
(philox.py), in the backward pass again. GEMMs: 2 forward, 3 backward (the two products again, and
C^T H). Everything between inputs and results is fp32 (fp64 for fp64 hidden), eps fp32 always. What is done chunk by
chunk stands in noisy_torch.py (ATen calls) and noisy_triton.py (two kernels beside the products).
"""

from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asft_kernels.backends import Logits, choose_backend
from asft_kernels.backends.plan import Plan, make_plan, traced_chunk
from asft_kernels.core import checks
from asft_kernels.core.batch import pack
from asft_kernels.core.heads import Head, resolve_head
from asft_kernels.core.linear_logps import exact_products
from asft_kernels.core.options import Keywords, as_autocast, explained, make_options

__all__ = ["fused_noisy_linear_logps"]

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NoisyLogps(NamedTuple):
    """Both in the shape of labels, 0 at masked places, fp32 (fp64 for fp64 hidden); label t+1's stand at t."""

    logps: Tensor  # log-probability of each label under the noisy logits
    noise_power: Tensor  # mean over the vocabulary of std^2


@explained
def fused_noisy_linear_logps(
    hidden: Tensor,
    lm_head: Head,
    noise_head: Head,
    labels: Tensor,
    *,
    seed: int,
    **options: "Unpack[Keywords]",
) -> NoisyLogps:
    """Computes log-probabilities under z + (h.Wn + bn) * eps, and the noise's mean square, without the logits.

    Args:
        hidden, lm_head: Of the frozen reference model, as `fused_linear_logps` takes them; they get no gradient.
        noise_head: nn.Linear, weight (V, D) or (weight, bias), in any floating dtype: the standard deviation of the
            noise on each logit. Its sign does not matter, and 0 gives `fused_linear_logps`.
        labels: (R, T) or (M,) integers, aligned with input_ids.
        seed: 0 to 2^63 - 1. eps is standard normal, a function of the seed, the token's number among the valid ones
            of the batch, and the vocabulary entry; not of padding, dtype or chunk_size.
        {keywords but cache_bytes}

    Returns:
        `NoisyLogps`, differentiable in noise_head.

    Raises:
        ValueError: What the caller got wrong: the argument, what it was, what it must be.
        TypeError: A keyword that does not exist, with the one that was probably meant.
        RuntimeError: On double backward.

    >>> hidden, head, noise = torch.randn(2, 5, 8), nn.Linear(8, 32), nn.Linear(8, 32)
    >>> fused_noisy_linear_logps(hidden, head, noise, torch.randint(32, (2, 5)), seed=1).logps.shape
    torch.Size([2, 5])
    """
    o = make_options("fused_noisy_linear_logps", options, ("seed",), without=("cache_bytes",))
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed!r}, need an integer from 0 to 2**63 - 1; another one for each draw")
    checks.no_transform()
    weight, bias = _tensors(lm_head, "lm_head")
    checks.hidden_layout(hidden)
    checks.hidden_size(hidden, *weight.shape)
    noise_weight, noise_bias = _noise_tensors(noise_head, weight)
    checks.label_layout(hidden, labels, o.cu_seqlens)
    heads = {"lm_head weight": weight, "lm_head bias": bias, "noise_head": noise_weight, "noise_head bias": noise_bias}
    checks.same_place(hidden=hidden, **heads, labels=labels, cu_seqlens=o.cu_seqlens)
    hidden, weight = (as_autocast(x.detach()) for x in (hidden, weight))
    if bias is not None:
        bias = as_autocast(bias.detach())
        checks.same_dtype(hidden, bias, "lm_head bias")
    checks.same_dtype(hidden, weight, "lm_head weight")
    backend = choose_backend(o.backend, hidden.device, hidden.dtype)

    batch = pack(
        labels, vocab=weight.shape[0], cu_seqlens=o.cu_seqlens, shift=o.shift, ignore_index=o.ignore_index,
        num_valid=o.num_valid, backend=backend,
    )  # fmt: skip
    compact = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.rows)
    masked = batch.labels < 0
    if batch.padded:
        compact = compact.masked_fill(masked[:, None], 0.0)
    chunk_size = o.chunk_size
    if chunk_size is None and torch.compiler.is_compiling():
        chunk_size = traced_chunk(weight.shape[1], exp_bytes=_load(backend).ENTRY_BYTES, device_type=hidden.device.type)
    logps, power, _ = _noisy_logps(
        compact, weight, bias, noise_weight, noise_bias, batch.labels.clamp(min=0), backend, seed,
        o.logits.scale, o.logits.softcap, chunk_size,
    )  # fmt: skip
    if batch.padded:
        logps, power = (x.masked_fill(masked, 0.0) for x in (logps, power))
    return NoisyLogps(batch.spread(logps), batch.spread(power))


def _noise_tensors(noise_head: Head, lm_weight: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = _tensors(noise_head, "noise_head")
    if weight.shape != lm_weight.shape:
        raise ValueError(
            f"noise_head: got a weight of shape {tuple(weight.shape)}, need {tuple(lm_weight.shape)}, that of lm_head"
        )
    return weight, bias


def _tensors(head: Head, name: str) -> tuple[Tensor, Tensor | None]:
    resolved = resolve_head(head, name)
    if resolved.rows.placement:
        checks.refuse(name, "rows of a head that stands on several ranks", "all of them: DNPO draws noise for each row")
    if not resolved.rows.is_plain:
        checks.refuse(name, "a head with an adapter or of few bits", "a plain one: merge the adapter, dequantise it")
    return resolved.rows.weight, resolved.bias


def _load(backend: str) -> ModuleType:
    if backend == "triton":
        from asft_kernels.methods.dnpo import noisy_triton as module
    else:
        from asft_kernels.methods.dnpo import noisy_torch as module
    return module


@torch.library.custom_op("asft_kernels::noisy_logps", mutates_args=())
def _noisy_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, noise_weight: Tensor, noise_bias: Tensor | None,
    labels: Tensor, backend: str, seed: int, scale: float, softcap: float | None, chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, power, log of the sum of exponentials), (N,) each, of the compacted tokens, labels in [0, V)."""
    with exact_products(hidden.device.type):
        # (N,) each: the label's noisy logit, log of the others' sum of exponentials, sum of std^2
        z_y, log_others, power = _load(backend).forward(
            hidden, weight, bias, noise_weight, noise_bias, labels, seed, Logits(scale, softcap),
            _plan(hidden, weight, backend, chunk_size),
        )  # fmt: skip
    return F.logsigmoid(z_y - log_others), power / len(weight), torch.logaddexp(z_y, log_others)


@_noisy_logps.register_fake
def _(hidden, weight, bias, noise_weight, noise_bias, labels, backend, seed, scale, softcap, chunk_size):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    a, b, c = (hidden.new_empty(labels.shape, dtype=dtype) for _ in range(3))
    return a, b, c


@torch.library.custom_op("asft_kernels::noisy_logps_backward", mutates_args=())
def _noisy_logps_backward(
    grad_logps: Tensor, grad_power: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    noise_weight: Tensor, noise_bias: Tensor | None, labels: Tensor, logps: Tensor, log_total: Tensor,
    backend: str, seed: int, scale: float, softcap: float | None, chunk_size: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dWn (V, D), dbn (V,)); dbn is empty without a bias: an operator returns tensors alone."""
    with exact_products(hidden.device.type):
        grad_weight, grad_bias = _load(backend).backward(
            grad_logps, grad_power, hidden, weight, bias, noise_weight, noise_bias, labels, logps, log_total, seed,
            Logits(scale, softcap), _plan(hidden, weight, backend, chunk_size),
        )  # fmt: skip
    return grad_weight, hidden.new_empty(0) if grad_bias is None else grad_bias


@_noisy_logps_backward.register_fake
def _(grad_logps, grad_power, hidden, weight, bias, noise_weight, noise_bias, labels, logps, log_total,
      backend, seed, scale, softcap, chunk_size):  # fmt: skip
    no_bias = hidden.new_empty(0) if noise_bias is None else torch.empty_like(noise_bias)
    return torch.empty_like(noise_weight, memory_format=torch.contiguous_format), no_bias


def _plan(hidden: Tensor, weight: Tensor, backend: str, chunk_size: int | None) -> Plan:
    return make_plan(
        len(hidden), *weight.shape, exp_bytes=_load(backend).ENTRY_BYTES, chunk_size=chunk_size, cache_bytes=0,
        device_type=hidden.device.type, copies=True,
    )  # fmt: skip


def _save(ctx, inputs, output):
    *tensors, ctx.backend, ctx.seed, ctx.scale, ctx.softcap, ctx.chunk_size = inputs
    logps, _, log_total = output
    ctx.mark_non_differentiable(log_total)
    ctx.save_for_backward(*tensors, logps, log_total)


def _gradients(ctx, grad_logps, grad_power, _):
    grad_weight, grad_bias = _noisy_logps_backward(
        grad_logps, grad_power, *ctx.saved_tensors, ctx.backend, ctx.seed, ctx.scale, ctx.softcap, ctx.chunk_size
    )
    has_bias = ctx.saved_tensors[4] is not None
    return None, None, None, grad_weight, grad_bias if has_bias else None, *(None,) * 6


def _refuse(ctx, *_):
    raise RuntimeError(
        "asft_kernels: double backward is not supported: the gradients of the noisy log-probabilities have no "
        "derivative of their own; drop create_graph=True"
    )


torch.library.register_autograd(_noisy_logps, _gradients, setup_context=_save)
torch.library.register_autograd(_noisy_logps_backward, _refuse, setup_context=lambda ctx, inputs, output: None)
