"""Per-token log-probabilities -> sums, lengths and averages of each sequence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asft_kernels.core.batch import TokenBatch


@dataclass(frozen=True)
class Logps:
    """What an objective sees of a batch: one entry a sequence, float64 (R numbers cost nothing).

    sum: sum of logp over the valid tokens (token-weighted if weights were given), 0 for none.
    length: (R,) int64, valid tokens. nll_sum, nll_length: the same over nll_labels where given.
    terms: sums over each sequence of what the objective's `per_token` gave, by its names.
    copies: ranks that hold these same sequences (sequence_group), for what an objective adds over all ranks.
    """

    sum: Tensor
    length: Tensor
    nll_sum: Tensor | None = None
    nll_length: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    copies: int = 1

    @property
    def avg(self) -> Tensor:
        """Mean log-probability per token, 0 for an empty sequence."""
        return self.sum / self.length.clamp(min=1)

    @property
    def nll_avg(self) -> Tensor:
        """Mean over the nll tokens; that of the labels themselves where there are no nll_labels."""
        if self.nll_sum is None or self.nll_length is None:
            return self.avg
        return self.nll_sum / self.nll_length.clamp(min=1)

    @property
    def chosen(self) -> "Logps":
        """The first half of the rows."""
        return self._map(lambda x: x.chunk(2)[0])

    @property
    def rejected(self) -> "Logps":
        """The second half of the rows."""
        return self._map(lambda x: x.chunk(2)[1])

    def detach(self) -> "Logps":
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Logps":
        nll_sum, nll_length = (None if x is None else change(x) for x in (self.nll_sum, self.nll_length))
        terms = {name: change(x) for name, x in self.terms.items()}
        return Logps(change(self.sum), change(self.length), nll_sum, nll_length, terms, self.copies)


def reduce(logps: Tensor, batch: TokenBatch, weights: Tensor | None = None) -> Tensor:
    """Sums of (N,) logps over each sequence, (R,) float64, in a fixed order; weights (N,) are detached."""
    terms = logps.double()
    if weights is not None:
        terms = terms * weights.detach().double()
    return torch.segment_reduce(terms, "sum", offsets=batch.offsets, initial=0, unsafe=True)
