"""The ASFT loss as a module that holds its keywords."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from asft_kernels.core import checks
from asft_kernels.core.heads import Head
from asft_kernels.core.options import Keywords, make_options
from asft_kernels.functional import fused_asft_loss
from asft_kernels.objectives import ASFT
from asft_kernels.outputs import PreferenceOutputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

OF_THE_BATCH = ("cu_seqlens", "num_valid")


class FusedASFTLoss(nn.Module):
    """Holds the keywords of `fused_asft_loss`: same names, defaults, returns and errors.

    Args:
        lam, beta, sft_weight: As there.
        reduction, sequence_group, return_outputs: As there.
        **options: The other keywords; cu_seqlens and num_valid come with each batch, to forward.

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
        reduction: str = "mean",
        sequence_group: Any = None,
        return_outputs: bool = False,
        **options: "Unpack[Keywords]",
    ) -> None:
        super().__init__()
        # A wrong keyword is an error here, not at the first batch.
        ASFT(lam, beta, sft_weight)
        checks.reduction(reduction)
        own = ("lam", "beta", "sft_weight", "reduction", "sequence_group", "return_outputs")
        make_options("FusedASFTLoss", options, own, without=OF_THE_BATCH)
        self.keywords = {
            "lam": lam, "beta": beta, "sft_weight": sft_weight, "reduction": reduction,
            "sequence_group": sequence_group, "return_outputs": return_outputs, **options,
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
