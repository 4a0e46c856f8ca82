"""The ASFT loss as a module that holds its keywords."""

from torch import Tensor, nn

from asft_kernels import checks
from asft_kernels.functional import fused_asft_loss
from asft_kernels.objectives import ASFT
from asft_kernels.outputs import PreferenceOutputs
from asft_kernels.token_logps import Head


class FusedASFTLoss(nn.Module):
    """`fused_asft_loss` with its keywords set once; same names, defaults, returns and errors.

    >>> import torch
    >>> loss_fn, head = FusedASFTLoss(lam=0.5), nn.Linear(16, 50)
    >>> loss_fn(torch.randn(4, 7, 16), head, torch.randint(50, (4, 7))).shape
    torch.Size([])
    """

    def __init__(
        self,
        lam: float = 1.0,
        beta: float = 1.0,
        sft_weight: float = 1.0,
        *,
        shift: bool = True,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        return_outputs: bool = False,
        backend: str | None = None,
        cache_bytes: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        ASFT(lam, beta, sft_weight)  # a wrong keyword is an error here, not at the first batch
        checks.options(
            reduction=reduction, shift=shift, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            cache_bytes=cache_bytes, chunk_size=chunk_size, num_valid=None,
        )  # fmt: skip
        self.keywords = {
            "lam": lam, "beta": beta, "sft_weight": sft_weight, "shift": shift, "ignore_index": ignore_index,
            "logit_scale": logit_scale, "softcap": softcap, "reduction": reduction, "return_outputs": return_outputs,
            "backend": backend, "cache_bytes": cache_bytes, "chunk_size": chunk_size,
        }  # fmt: skip

    def forward(
        self,
        hidden: Tensor,
        lm_head: Head,
        labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        num_valid: int | None = None,
    ) -> Tensor | tuple[Tensor, PreferenceOutputs]:
        """The batch's own two keywords come with the batch."""
        return fused_asft_loss(hidden, lm_head, labels, cu_seqlens=cu_seqlens, num_valid=num_valid, **self.keywords)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
