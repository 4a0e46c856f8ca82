"""The torch backend's chunks as token_stats.py wants them: sums in phase 1, E's rows with their factors in phase 2.

Exponents L = z - r are needed beside E, which takes their place: phase 1 copies them first (so does phase 2 where it
recomputes), and a cached E gives them back as its logarithm.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from asft_kernels.backends import Logits
from asft_kernels.backends.token_stats import RowFactors, Sums, Wanted
from asft_kernels.backends.torch_products import accumulate

if TYPE_CHECKING:
    from asft_kernels.backends.torch_chunked import Unit

LOWEST = -1e4  # instead of -inf: E L is then 0, as exp of it is 0 in float64, too
SHRINK = 2.0**-32  # E may be 1e20: its square passes fp32's range, that of E * SHRINK does not; and E is 1 somewhere


class _Labels(Protocol):
    def take(self, E: Tensor, k: int, out: Tensor) -> None: ...


class StatsRoom:
    """The accumulators of all tokens, and a chunk of room that their blocks share."""

    def __init__(self, wanted: Wanted, H: Tensor, chunk_elements: int, logits: Logits, *, needs_acc: bool) -> None:
        self.wanted = wanted
        needs_scratch = not wanted.names.isdisjoint(("entropy", "log_sum_sq_probs"))
        self.scratch = H.new_empty(chunk_elements if needs_scratch else 0)
        needs_logs = needs_acc and "entropy" in wanted.differentiable
        needs_slopes = needs_acc and "mean_logits" in wanted.differentiable
        self.log_acc = H.new_empty(H.shape if needs_logs else 0)
        self.of_each = logits.softcap is not None  # else sum W is the same for every token
        self.slope_acc = H.new_empty((len(H) if self.of_each else 1, H.shape[1]) if needs_slopes else 0)

    def block(self, tokens: slice, z_y: Tensor, labels: "_Labels") -> "BlockStats":
        slopes = self.slope_acc[tokens] if self.of_each else self.slope_acc
        wants_slopes = slopes.dim() == 2 and (self.of_each or tokens.start == 0)
        return BlockStats(
            self.wanted, z_y, labels, self.scratch,
            self.log_acc[tokens] if self.log_acc.dim() == 2 else None, slopes if wants_slopes else None,
        )  # fmt: skip


class BlockStats:
    """Sums over the chunks of one block of tokens.

    For each chunk: logits before the label's entry is taken out, move if r moves, exponentials.
    log_acc, slope_acc: the block's rows of Stats; slope_acc without a softcap only for one block of all.
    """

    def __init__(
        self, wanted: Wanted, z_y: Tensor, labels: _Labels, scratch: Tensor, log_acc: Tensor | None,
        slope_acc: Tensor | None,
    ) -> None:  # fmt: skip
        self.names, self.z_y, self.labels = wanted.names, z_y, labels
        self.scratch, self.log_acc, self.slope_acc = scratch, log_acc, slope_acc
        self.restart()

    def restart(self) -> None:
        self.entries = 0
        self.sum, self.logs, self.squares = (torch.zeros_like(self.z_y) for _ in range(3))
        self.top = torch.full_like(self.z_y, -torch.inf)
        self.own = torch.zeros_like(self.z_y)

    def logits(self, z: Tensor, k: int) -> None:
        """z (n, rows) is z - r of chunk k, the label's own entry included."""
        self.entries += z.shape[1]
        if "mean_logits" in self.names:
            self.sum += z.sum(dim=1)
        if "is_top1" in self.names:
            torch.maximum(self.top, z.amax(dim=1), out=self.top)
            self.labels.take(z, k, out=self.own)
        if "entropy" in self.names:
            self.exponents = torch.clamp(z, min=LOWEST, out=_room(self.scratch, z))

    def move(self, by: Tensor, shrink: Tensor, others: Tensor, acc: Tensor | None) -> None:
        """r becomes r + by, exp(-by) being shrink; others and acc (None before the first product) are still at r."""
        self.sum -= by * self.entries
        self.top.sub_(by)
        self.own.sub_(by)
        if "entropy" in self.names:
            self.logs.addcmul_(by, others, value=-1).mul_(shrink)
            self.exponents.sub_(by[:, None])
        if "log_sum_sq_probs" in self.names:
            self.squares.mul_(shrink).mul_(shrink)
        if self.log_acc is not None and acc is not None:
            self.log_acc.addcmul_(acc, by[:, None], value=-1).mul_(shrink[:, None])

    def exponentials(self, E: Tensor, slope: Tensor | None, weight_k: Tensor, k: int) -> None:
        if "entropy" in self.names:
            products = self.exponents.mul_(E)
            self.logs += products.sum(dim=1)
            if self.log_acc is not None:
                if slope is not None:
                    products.mul_(slope)
                accumulate(self.log_acc, products, weight_k, k)
        if "log_sum_sq_probs" in self.names:
            self.squares += torch.mul(E, SHRINK, out=_room(self.scratch, E)).square_().sum(dim=1)
        if self.slope_acc is not None and slope is not None:
            accumulate(self.slope_acc, slope, weight_k, k)
        elif self.slope_acc is not None:
            of_chunk = weight_k.sum(dim=0)
            self.slope_acc.copy_(of_chunk) if k == 0 else self.slope_acc.add_(of_chunk)

    def sums(self, ref: Tensor, total: Tensor, nats: float) -> Sums:
        """nats: one unit of logits."""
        return Sums(
            mean_logits=(ref + self.sum / self.entries) * nats if "mean_logits" in self.names else None,
            logs=self.logs * nats if "entropy" in self.names else None,
            squares=self.squares / (total * SHRINK).square() if "log_sum_sq_probs" in self.names else None,
            is_top1=self.own >= self.top if "is_top1" in self.names else None,
        )

    def largest(self, ref: Tensor) -> Tensor:
        """(n,) largest logit, or (0,) where nothing asks for it."""
        return ref + self.top if "is_top1" in self.names else ref.new_empty(0)


class Weighing:
    """A chunk's E -> du but for the labels' entries: what dW multiplies H with."""

    def __init__(self, factors: RowFactors, unit: "Unit", scratch: Tensor) -> None:
        self.unit, self.scratch = unit, scratch
        self.linear = factors.linear[:, None]
        self.log = None if factors.log is None else factors.log[:, None] * unit.nats
        self.uniform = None if factors.uniform is None else factors.uniform[:, None]

    def cached(self, E: Tensor, tokens: slice, out: Tensor) -> None:
        """out = du of a block's kept E (n, rows); the labels' entries, below 0, may become NaN."""
        exponents = None
        if self.log is not None:
            exponents = self.unit.log(E, out=_room(self.scratch, E)).clamp_(min=LOWEST)
        self._weigh(E, exponents, tokens, None, out)

    def recomputed(self, z: Tensor, tokens: slice, slope: Tensor | None) -> None:
        """A block's z - r becomes du."""
        exponents = None if self.log is None else torch.clamp(z, min=LOWEST, out=_room(self.scratch, z))
        self._weigh(self.unit.exp_(z), exponents, tokens, slope, z)

    def _weigh(self, E: Tensor, exponents: Tensor | None, tokens: slice, slope: Tensor | None, out: Tensor) -> None:
        factor = self.linear[tokens]
        if exponents is not None and self.log is not None:
            factor = exponents.mul_(self.log[tokens]).add_(factor)
        torch.mul(E, factor, out=out)
        if self.uniform is not None:
            out.add_(self.uniform[tokens])
        if slope is not None:
            out.mul_(slope)


def _room(scratch: Tensor, like: Tensor) -> Tensor:
    return scratch[: like.numel()].view(like.shape)
