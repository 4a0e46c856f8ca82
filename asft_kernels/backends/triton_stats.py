"""Figures of tokens on the Triton backend (token_stats.py has their formulas): phase 1's sums, phase 2's factors.

Logits of a call that wants more than lse are made by the library, strip by strip: each strip is read twice, for E' and
for the figures, and no tile of logits_exp has to hold their registers.
"""

import torch
from torch import Tensor

from asft_kernels.backends import Logits, Saved, exp_dtype
from asft_kernels.backends.plan import Plan
from asft_kernels.backends.token_stats import RowFactors, Stats, StatsGrads, Sums, Wanted, close, row_factors
from asft_kernels.kernels.configs import STRIPS, Strips
from asft_kernels.kernels.exp_epilogue import TileSums, empty_exps
from asft_kernels.kernels.logit_stats import LOGITS, LOGS, SQUARES, TOPS, ChunkStats, empty_planes
from asft_kernels.kernels.logit_strips import logits_exp_in_strips
from asft_kernels.kernels.products import add_product
from asft_kernels.kernels.settle_stats import settle_stats
from asft_kernels.kernels.weighed_exps import weigh_exps, weigh_logits

FLAG = {"mean_logits": LOGITS, "is_top1": TOPS, "entropy": LOGS, "log_sum_sq_probs": SQUARES}


def strips_for(wanted: Wanted | None) -> Strips | None:
    """How logits are made where figures are summed beside their exponentials; None where none is."""
    return None if wanted is None or wanted.names <= {"lse"} else STRIPS[0]


class RunningStats:
    """Sums over the chunks, and the accumulators that gradients to hidden want."""

    def __init__(self, wanted: Wanted, hidden: Tensor, N: int, plan: Plan, logits: Logits, *, needs_acc: bool) -> None:
        self.wanted, self.logits, self.vocab = wanted, logits, plan.vocab
        self.flags = sum(flag for name, flag in FLAG.items() if name in wanted.names)
        device, D = hidden.device, hidden.shape[1]
        self.running = torch.zeros((len(FLAG), N), dtype=torch.float32, device=device)
        self.running[TOPS.bit_length() - 1] = -torch.inf
        self.own = torch.empty(N, dtype=torch.float32, device=device)
        needs_logs = needs_acc and "entropy" in wanted.differentiable
        needs_slopes = needs_acc and "mean_logits" in wanted.differentiable
        of_each = logits.softcap is not None
        room = (N, plan.chunk, exp_dtype("triton", hidden.dtype), device)
        self.log_exps = empty_exps(*room) if needs_logs else None
        self.slopes = empty_exps(*room) if needs_slopes and of_each else None
        self.log_acc = torch.empty((N, D) if needs_logs else 0, dtype=torch.float32, device=device)
        shape = (N if of_each else 1, D) if needs_slopes else 0
        self.slope_acc = torch.zeros(shape, dtype=torch.float32, device=device)

    def logits_exp(
        self, exps: Tensor | None, tokens: Tensor, weight_k: Tensor, bias_k: Tensor | None, labels: Tensor, ref: Tensor,
        others: Tensor, acc: Tensor | None, *, first: int, strips: Strips,
    ) -> TileSums:  # fmt: skip
        """A chunk's E' and tile sums, its figures added to those before; acc is O of the earlier chunks."""
        N, width = len(tokens), len(weight_k)
        log_exps, slopes = (None if x is None else x[:, :width] for x in (self.log_exps, self.slopes))
        tiles = -(-width // strips.BLOCK_V)
        chunk = ChunkStats(self.flags, empty_planes(tiles, N, tokens.device), self.own, log_exps, slopes)
        sums = logits_exp_in_strips(
            exps, tokens, weight_k, bias_k, labels, ref, first=first, scale=self.logits.scale,
            softcap=self.logits.softcap, sums=True, strips=strips, stats=chunk,
        )  # fmt: skip
        assert sums is not None, "backend bug: asked for sums"
        log_acc = None if acc is None or log_exps is None else self.log_acc
        settle_stats(self.running, chunk, sums, ref, others, exps=exps, log_acc=log_acc, acc=acc)
        if log_exps is not None:
            add_product(log_exps, weight_k, out=self.log_acc, fresh=first == 0)
        if slopes is not None:
            add_product(slopes, weight_k, out=self.slope_acc, fresh=first == 0)
        elif self.slope_acc.dim() == 2:
            self.slope_acc += weight_k.sum(dim=0, dtype=torch.float32)
        return sums

    @property
    def largest(self) -> Tensor:
        """(N,) largest of all u; meaningless where is_top1 is not wanted."""
        return torch.maximum(self.own, self.running[TOPS.bit_length() - 1])


def close_stats(
    wanted: Wanted, stats: RunningStats | None, *, z_y: Tensor, ref: Tensor, logps: Tensor, one_minus_p: Tensor,
    inv_total: Tensor,
) -> Stats:  # fmt: skip
    """stats is None where lse alone is wanted."""
    sums, accumulators = Sums(), [ref.new_empty(0) for _ in range(2)]
    if stats is not None:
        logits, top, logs, squares = stats.running.unbind()
        flags = stats.flags
        sums = Sums(
            mean_logits=(logits + z_y) / stats.vocab if flags & LOGITS else None,
            logs=logs if flags & LOGS else None,
            squares=squares * inv_total.square() if flags & SQUARES else None,
            is_top1=stats.own >= top if flags & TOPS else None,
        )
        accumulators = [stats.log_acc, stats.slope_acc]
    figures = close(
        wanted, sums, ref=ref, log_total=-inv_total.log(), one_minus_p=one_minus_p, inv_total=inv_total, logps=logps
    )
    return Stats._make([*figures, *accumulators])


class Weighing:
    """Phase 2 where gradients come to figures: factors of each token, and chunks of E' with them."""

    def __init__(
        self, grad_logps: Tensor, grads: StatsGrads, saved: Saved, hidden: Tensor, bias: Tensor | None, rows: Tensor,
        labels: Tensor, label_slope: Tensor | None, logits: Logits, plan: Plan,
    ) -> None:  # fmt: skip
        self.saved, self.hidden, self.bias = saved, hidden, bias
        self.rows, self.labels, self.logits, self.plan = rows, labels, logits, plan
        self.factors: RowFactors = row_factors(
            grad_logps, grads, logps=saved.logps, one_minus_p=saved.one_minus_p, inv_total=saved.inv_total,
            entropy=None if saved.stats is None else saved.stats.entropy, label_slope=label_slope, scale=logits.scale,
            vocab=plan.vocab,
        )  # fmt: skip
        self.tokens: Tensor | None = None

    @property
    def pull(self) -> Tensor:
        return self.factors.label

    @property
    def push(self) -> Tensor:
        """The factors are in the chunks and in acc already."""
        return torch.full_like(self.factors.label, -1.0)

    def acc(self) -> Tensor:
        """What dH adds to pull * W_y, (N, D) fp32."""
        acc = self.saved.acc * self.factors.linear[:, None]
        if self.saved.stats is not None and self.factors.log is not None:
            acc.addcmul_(self.saved.stats.log_acc, self.factors.log[:, None])
        if self.saved.stats is not None and self.factors.uniform is not None:
            acc.addcmul_(self.saved.stats.slope_acc, self.factors.uniform[:, None])
        return acc

    def chunk(self, k: int, weight_k: Tensor | None, out: Tensor) -> None:
        """Fills out (N, width). weight_k: None for a kept chunk."""
        _, linear, log, uniform = self.factors
        if k < len(self.saved.exps):
            weigh_exps(out, self.saved.exps[k], linear, log, uniform)
            return
        assert weight_k is not None, "backend bug: a chunk that is not kept needs its rows"
        first = self.plan.slices[k][0]
        if self.tokens is None:
            self.tokens = self.hidden.index_select(0, self.rows)
        weigh_logits(
            out, self.tokens, weight_k, None if self.bias is None else self.bias[first : first + len(weight_k)],
            self.labels, self.saved.ref, linear, log, uniform, first=first, scale=self.logits.scale,
            softcap=self.logits.softcap, strips=STRIPS[0],
        )  # fmt: skip
