"""What a model's head takes at a typical batch: for `asft doctor`."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from asft_kernels.core.heads import ResolvedHead
from asft_kernels.core.options import Options
from asft_kernels.cost import Estimate, of_head
from asft_kernels.memory import in_units

TOKENS, POSITIONS = 4096, 8192  # of 8 pairs of 512 positions each way, half of them answers
RANK = 16


def head_lines(
    head: ResolvedHead, dtype: torch.dtype, device: torch.device, softcap: float | None
) -> Iterator[tuple[str, str, bool]]:
    """Says what a batch takes with the head frozen, with LoRA on it, and trained; of the first all terms.

    Args:
        head: the model's, of which sizes are looked at.
        dtype: of its hidden states.
        device: where it runs.
        softcap: of its logits.

    Yields:
        (what, finding, True), as `doctor.lines` does.
    """
    frozen = as_if(head, dtype, device, softcap)
    yield "typical batch", frozen.what, True
    kinds = {"frozen head": frozen}
    if head.rows.low_rank is None:
        kinds[f"LoRA of rank {RANK} on it"] = as_if(head, dtype, device, softcap, rank=RANK)
    else:
        kinds["its adapter trained"] = as_if(head, dtype, device, softcap, rank=head.rows.low_rank.shape[1])
    if head.rows.is_plain:
        kinds["trainable head"] = as_if(head, dtype, device, softcap, trained=True)
    for kind, said in kinds.items():
        yield f"  {kind}", f"{sum(said.products.values()):.2f} products, {in_units(said.peak)}; {said.advice}", True
    yield "terms, frozen head", "\n" + str(frozen), True


def as_if(
    head: ResolvedHead, dtype: torch.dtype, device: torch.device, softcap: float | None, *, rank: int = 0,
    trained: bool = False,
) -> Estimate:  # fmt: skip
    """The estimate as if the head were trained, or an adapter of a rank on it: no tensor is made."""
    rows = head.rows
    weight = torch.empty_like(rows.weight, device="meta")
    low_rank = rows.low_rank
    if low_rank is not None:
        low_rank = torch.empty_like(low_rank, device="meta", requires_grad=rank > 0)
    elif rank:
        low_rank = torch.empty(rows.size[0], rank, device="meta", requires_grad=True)
    sizes = replace(
        head,
        rows=rows._replace(weight=weight.requires_grad_(trained), low_rank=low_rank),
        bias=None if head.bias is None else torch.empty_like(head.bias, device="meta", requires_grad=trained),
    )
    return of_head(sizes, TOKENS, POSITIONS, dtype, device, Options(softcap=softcap), hidden_grad=True)
