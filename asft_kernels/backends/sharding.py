"""A head whose rows stand on several ranks of a tensor-parallel group, each with the same hidden states and labels.

Rank r holds rows [first, first + V_r). Its backend runs on them as on a head of their own, with a label l that is
here: y where the rank owns it, else a stand-in. ref_r is its reference, S_r its sum of exp(z - ref_r) without y:

    R = max over r of ref_r                                                        all-reduce 1
    S = sum over r of S_r exp(ref_r - R),   d = z_y - R (the owner's)              all-reduce 2, with the figures' sums
    logp = -softplus(ln S - d),   1 - p_y = S / (S + exp(d)),   lse = R + ln(S + exp(d))

in float64 whatever the inputs. What the backend has saved is then put in terms of the whole vocabulary, and its own
phase 2 goes on from there: 1 / total becomes exp(ref_r - lse) and 1 - p_l becomes -p_l where l is a stand-in, the
factor of its row in the gradient. dW, db and the low-rank columns' gradients stay where their rows are; dH is summed
over the ranks in fp32 (float64) once, while dW is multiplied: all-reduce 3, docs/distributed.md counts the bytes.

Figures, h_r being the entropy of rank r's entries without y, and T_r = S_r with y where it is here:

    mean_logits       sum of V_r mean_r / V
    entropy           (1 - p)(Q / S + ln S) - p ln p - (1 - p) ln(1 - p),   Q = sum of S_r (h_r - ln S_r)
    log_sum_sq_probs  ln (sum of T_r^2 sum_sq_r) - 2 ln total
    is_top1           y is top on its rank, and no rank has a larger logit; across ranks a tie is within rounding
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asft_kernels.backends import Backend, Gradients, Logits, Saved, load_backend
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan
from asft_kernels.backends.token_stats import Stats, StatsGrads, Wanted, row_factors, stat_dtype
from asft_kernels.backends.torch_chunked import grad_of_rows, label_logits, set_label_entries, valid_rows

VOCAB = "vocab"
TIE = 4  # roundings: ranks' logits have been relative to references of their own


@dataclass(frozen=True)
class Placement:
    """Where a rank's rows stand: `rows` of them from `first` on, of a vocabulary of `vocab`, over a named group.

    rows may be 0: the tensor then has one row, which counts for nothing.
    """

    first: int
    rows: int
    vocab: int
    group: str

    def text(self) -> str:
        """As HeadRows.placement has it."""
        return f"{VOCAB}/{self.first}/{self.rows}/{self.vocab}/{self.group}"

    @staticmethod
    def parse(text: str) -> "Placement | None":
        """None for rows that are whole here."""
        if not text.startswith(VOCAB + "/"):
            return None
        _, first, rows, vocab, group = text.split("/", 4)
        return Placement(int(first), int(rows), int(vocab), group)


def global_vocab(rows: HeadRows) -> int:
    """V of the whole head."""
    placement = Placement.parse(rows.placement)
    return rows.size[0] if placement is None else placement.vocab


def backend_for(name: str, head: HeadRows) -> Backend:
    """The backend that a head's rows want."""
    placement = Placement.parse(head.placement)
    return load_backend(name) if placement is None else VocabParallel(name, placement)


class VocabParallel:
    """A backend that runs another one on this rank's rows."""

    def __init__(self, name: str, placement: Placement) -> None:
        self.local, self.placement = load_backend(name), placement
        self.keeps_label_entries = name == "torch"
        group: Any = placement.group
        self.group = dist.distributed_c10d._resolve_process_group(group)

    def logit_unit(self) -> float:
        return self.local.logit_unit()

    def _labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(whether each label's row is here, the local row of it or of a stand-in)."""
        first, rows = self.placement.first, self.placement.rows
        mine = (labels >= first) & (labels < first + rows)
        return mine, torch.where(mine, labels - first, labels % max(rows, 1))

    def forward(
        self, hidden: Tensor, weight: HeadRows, bias: Tensor | None, rows: Tensor, labels: Tensor, logits: Logits,
        plan: Plan, *, needs_acc: bool, needs_exps: bool, wanted: Wanted | None = None,
    ) -> Saved:  # fmt: skip
        mine, own = self._labels(labels)
        saved = self.local.forward(
            hidden, weight, bias, rows, own, logits, plan, needs_acc=needs_acc, needs_exps=needs_exps, wanted=wanted
        )
        saved = self._of_all(saved, mine, wanted)
        if saved.exps and self.keeps_label_entries:
            set_label_entries(saved, own, self._label_slope(hidden, weight, bias, rows, own, logits), plan)
        return saved

    def _of_all(self, saved: Saved, mine: Tensor, wanted: Wanted | None) -> Saved:
        """What one rank's backend has saved, in terms of the whole vocabulary."""
        assert saved.label_logits is not None, "backend bug: no label logits"
        unit, dtype, names = self.logit_unit(), saved.logps.dtype, wanted.names if wanted else frozenset()
        total = saved.inv_total.double().reciprocal()
        # All logits here are -inf; Triton's sums are then NaN.
        z = saved.label_logits
        none = (total == 0) | (total.isnan() & (z == -torch.inf))
        none = torch.ones_like(none) if self.placement.rows == 0 else none
        ref, z = (x.double().mul(unit).masked_fill(none, -torch.inf) for x in (saved.ref, z))
        others = torch.where(mine, saved.one_minus_p.double() * total, total).masked_fill(none, 0)

        highest = [ref]
        if "is_top1" in names and saved.largest is not None:
            largest = saved.largest.double()
            highest.append(torch.full_like(largest, -torch.inf) if self.placement.rows == 0 else largest)
        R, *top = self._reduced(highest, dist.ReduceOp.MAX)
        shrink = (ref - R).exp()
        others = others * shrink
        parts = {"others": others, "d": torch.where(mine, z - R, 0)}
        if saved.stats is not None:
            T = total.masked_fill(none, 0) * shrink
            parts |= self._parts(saved, saved.stats, names, mine, others, T, highest, top)
        parts = dict(zip(parts, self._reduced(list(parts.values()), dist.ReduceOp.SUM), strict=True))

        others, d = parts["others"], parts["d"]
        sums = others + d.exp()
        x = others.log() - d
        logps = -(x.clamp(min=0) + torch.exp(-x.abs()).log1p())
        one_minus_p, lse = others / sums, R + sums.log()
        of_labels = torch.where(mine, one_minus_p, -(z - lse).exp())
        # 1 - p over it stays finite, and h times it keeps its digits; E reaches 1e20, so below it all is 0.
        least = torch.finfo(dtype).tiny ** 0.8
        inv_total = (ref - lse).exp().clamp(min=least)
        stats = None
        if saved.stats is not None:
            figures = self._figures(parts, sums, logps, one_minus_p) | {"lse": lse}
            stats = saved.stats._replace(**{name: figures[name].to(stat_dtype(name, dtype)) for name in names})
        return saved._replace(
            logps=logps.to(dtype), one_minus_p=of_labels.to(dtype), inv_total=inv_total.to(dtype), stats=stats
        )

    def _parts(
        self, saved: Saved, stats: Stats, names: frozenset[str], mine: Tensor, others: Tensor, T: Tensor,
        highest: list[Tensor], top: list[Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """What the figures take from this rank, to be summed; others and T relative to R."""
        parts = {}
        if "mean_logits" in names:
            parts["mean_logits"] = stats.mean_logits.double() * self.placement.rows
        if "entropy" in names:
            not_p, logps = saved.one_minus_p.double(), saved.logps.double()
            of_label = logps.exp() * _finite(logps) + not_p.xlogy(not_p)
            entropy = stats.entropy.double()
            entropy = torch.where(mine, ((entropy + of_label) / not_p).clamp(min=0), entropy)
            parts["entropy"] = torch.where(others == 0, 0, others * entropy) - others.xlogy(others)
        if "log_sum_sq_probs" in names:
            parts["squares"] = torch.where(T == 0, 0, (2 * T.log() + stats.log_sum_sq_probs).exp())
        if "is_top1" in names:
            slack = TIE * torch.finfo(saved.logps.dtype).eps * top[0].abs().nan_to_num(0, 0, 0)
            parts["is_top1"] = (mine & stats.is_top1 & (highest[1] >= top[0] - slack)).double()
        return parts

    def _figures(
        self, parts: dict[str, Tensor], total: Tensor, logps: Tensor, one_minus_p: Tensor
    ) -> dict[str, Tensor]:
        others, figures = parts["others"], {}
        if "mean_logits" in parts:
            figures["mean_logits"] = parts["mean_logits"] / self.placement.vocab
        if "entropy" in parts:
            of_others = torch.where(others == 0, 0, parts["entropy"] / others + others.log())
            of_label = logps.exp() * _finite(logps) + one_minus_p.xlogy(one_minus_p)
            figures["entropy"] = (one_minus_p * of_others - of_label).clamp(min=0)
        if "squares" in parts:
            figures["log_sum_sq_probs"] = (parts["squares"].log() - 2 * total.log()).clamp(max=0)
        if "is_top1" in parts:
            figures["is_top1"] = parts["is_top1"] > 0
        return figures

    def _reduced(self, parts: list[Tensor], op: dist.ReduceOp.RedOpType) -> tuple[Tensor, ...]:
        buffer = torch.stack(parts)
        dist.all_reduce(buffer, op=op, group=self.group)
        return buffer.unbind()

    def _label_slope(
        self, hidden: Tensor, weight: HeadRows, bias: Tensor | None, rows: Tensor, own: Tensor, logits: Logits
    ) -> Tensor | None:
        if logits.softcap is None:
            return None
        return label_logits(valid_rows(hidden, rows), weight, bias, own, logits)[1]

    def backward(
        self, grad_logps: Tensor, hidden: Tensor, weight: HeadRows, bias: Tensor | None, rows: Tensor, labels: Tensor,
        saved: Saved, logits: Logits, plan: Plan, *, needs_hidden: bool, needs_weight: bool, needs_low_rank: bool,
        needs_bias: bool, stats_grads: StatsGrads | None = None,
    ) -> Gradients:  # fmt: skip
        mine, own = self._labels(labels)
        saved = saved._replace(logps=torch.where(mine, saved.logps, (-saved.one_minus_p).log()))
        if stats_grads is not None and stats_grads.mean_logits is not None:  # to be divided by the rows here
            share = self.placement.rows / self.placement.vocab
            stats_grads = stats_grads._replace(mean_logits=stats_grads.mean_logits * share)
        grad_rows = reduced = None
        if needs_hidden:
            factors = row_factors(
                grad_logps, stats_grads, logps=saved.logps, one_minus_p=saved.one_minus_p, inv_total=saved.inv_total,
                entropy=None if saved.stats is None else saved.stats.entropy,
                label_slope=self._label_slope(hidden, weight, bias, rows, own, logits), scale=logits.scale,
                vocab=plan.vocab,
            )  # fmt: skip
            grad_rows = grad_of_rows(weight, own, saved, factors, self.logit_unit())
            reduced = dist.all_reduce(grad_rows, group=self.group, async_op=True)
        grads = Gradients()
        if needs_weight or needs_low_rank or needs_bias:
            grads = self.local.backward(
                grad_logps, hidden, weight, bias, rows, own, saved, logits, plan, needs_hidden=False,
                needs_weight=needs_weight, needs_low_rank=needs_low_rank, needs_bias=needs_bias,
                stats_grads=stats_grads,
            )  # fmt: skip
        if grad_rows is None or reduced is None:
            return grads
        reduced.wait()
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        return grads._replace(hidden=grad_hidden.index_copy_(0, rows, grad_rows.to(hidden.dtype)))


def _finite(logps: Tensor) -> Tensor:
    return logps.clamp(min=torch.finfo(logps.dtype).min)
