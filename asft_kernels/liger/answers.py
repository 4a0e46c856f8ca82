"""What the adapters share: answers from hidden states in Liger's layout, and mean logits."""

import torch
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.functional import fused_linear_logps
from asft_kernels.objectives.base import require_number


def answers(
    weight: Tensor,
    hidden: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    nll_target: Tensor | None = None,
) -> Logps:
    """Log-probabilities of the answers: sums (R,) and lengths.

    hidden: (R, T, H). target: (R, T), already shifted. nll_target: (R, T), whose first half of rows the likelihood is
    over, in the place of target's; where both have a label it is the same one, or ValueError.
    """
    labels = target
    if nll_target is not None:
        labels, nll_target = _joined(target, nll_target, ignore_index)
    logps = fused_linear_logps(hidden, (weight, bias), labels, shift=False, ignore_index=ignore_index).double()
    sums, length = _over(logps, target != ignore_index)
    if nll_target is None:
        return Logps(sums, length)
    return Logps(sums, length, *_over(logps, nll_target != ignore_index))


def _over(logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(mask, logps, 0).sum(dim=1), mask.sum(dim=1)


def _joined(target: Tensor, nll_target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The labels of either, and nll_target without the rejected rows, which Liger does not read."""
    if nll_target.shape != target.shape:
        raise ValueError(f"nll_target: got {tuple(nll_target.shape)}, need {tuple(target.shape)}, the shape of target")
    rejected = torch.arange(len(target), device=target.device) >= len(target) // 2
    nll_target = nll_target.masked_fill(rejected[:, None], ignore_index)
    missing = target == ignore_index
    if not (missing | (nll_target == ignore_index) | (nll_target == target)).all():
        raise ValueError("nll_target: got another label than target in the same place, need equal ones")
    return torch.where(missing, nll_target, target), nll_target


def reference_answers(
    use_ref_model: bool,
    ref_weight: Tensor | None,
    ref_hidden: Tensor | None,
    target: Tensor,
    ref_bias: Tensor | None,
    ignore_index: int,
) -> Logps | None:
    """The same under the reference, without gradients; None without one."""
    if not use_ref_model:
        if ref_hidden is not None or ref_weight is not None:
            raise ValueError(
                "ref_input: got a reference with use_ref_model=False, need use_ref_model=True; Liger drops it"
            )
        return None
    if ref_hidden is None or ref_weight is None:
        raise ValueError("ref_input, ref_weight: got none with use_ref_model=True, need both, or use_ref_model=False")
    with torch.no_grad():
        return answers(ref_weight, ref_hidden, target, ref_bias, ignore_index)


@torch.no_grad()
def logit_means(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean logit of each row, (R,), over all its places and the vocabulary: mean(h) . mean(W), with no logits made."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    means = hidden.mean(dim=1, dtype=dtype) @ weight.mean(dim=0, dtype=dtype)
    return means if bias is None else means + bias.mean(dtype=dtype)


def require_ignored(name: str, compiled: bool, chunk_size: int) -> None:
    """Of arguments that steer Liger's chunks and change no result here: only that they are what Liger takes."""
    if not isinstance(compiled, bool):
        raise ValueError(f"{name}: compiled: got {compiled!r}, need True or False; it has no effect here")
    require_number(name, "chunk_size", chunk_size, above_zero=True)
