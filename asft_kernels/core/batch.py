"""Labels of a batch -> the tokens that carry loss, and back to the caller's layout.

One place for the shift, sequence borders, masks and compaction; padded and packed batches differ
here and nowhere after.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asft_kernels.core import checks

BY_KERNEL = 2**17  # positions at most that one program of a kernel walks over


@dataclass(frozen=True)
class TokenBatch:
    """The valid tokens of a batch, compacted, in the order of the batch.

    rows: (N,) int64, index of each token's row in hidden.flatten(0, -2): the position that predicts it.
    labels: (N,) int64, its label; -1 in the last slots where N is a bound and not the exact count.
    offsets: (R+1,) int64, where each sequence's tokens start among the N.
    shape: of the caller's labels. shift: whether the label stands one position after its row.
    padded: whether N may exceed the number of valid tokens.
    """

    rows: Tensor
    labels: Tensor
    offsets: Tensor
    shape: torch.Size
    shift: bool
    padded: bool

    @property
    def lengths(self) -> Tensor:
        """(R,) int64: valid tokens per sequence."""
        return self.offsets.diff()

    def spread(self, values: Tensor) -> Tensor:
        """(N,) per-token values -> the shape of the labels, 0 at masked places; differentiable."""
        return values.new_zeros(self.shape.numel()).index_copy(0, self.rows, values).view(self.shape)

    def take_at_rows(self, values: Tensor) -> Tensor:
        """What `spread` made, (N,) again."""
        return values.reshape(-1).index_select(0, self.rows)

    def take_at_labels(self, values: Tensor) -> Tensor:
        """Values aligned with the caller's labels -> (N,), one for each token's label."""
        at = self.rows + 1 if self.shift else self.rows
        return values.reshape(-1).index_select(0, at.clamp(max=self.shape.numel() - 1))


def pack(
    labels: Tensor,
    *,
    vocab: int,
    cu_seqlens: Tensor | None,
    shift: bool,
    ignore_index: int,
    num_valid: int | None,
    extra_labels: Tensor | None = None,
    read: Callable[[Tensor], list[int]] | None = None,
    backend: str = "torch",
) -> TokenBatch:
    """Finds the valid tokens. Padded labels (R, T), or packed (M,) with cu_seqlens (R+1,).

    extra_labels: a second label set of the same shape; a token is valid if either set has it.
    read: takes the facts to the host where ranks agree first; None for tolist().
    Reads the device once: count, label range, borders. num_valid (a bound on the count) spares the
    read, as does tracing by torch.compile, which takes every position; both check on the device.
    backend: "triton" spares the host some forty launches.
    """
    flat, extra = labels.reshape(-1), None if extra_labels is None else extra_labels.reshape(-1)
    positions, traced = flat.numel(), torch.compiler.is_compiling()
    length = labels.shape[1] if cu_seqlens is None else 0
    borders = None if cu_seqlens is None else cu_seqlens.long()
    by_kernel = backend == "triton" and not traced and 0 < positions <= BY_KERNEL
    if borders is None and not by_kernel:
        borders = torch.arange(0, positions + 1, length or 1, device=labels.device)
        borders = borders if length else borders.new_zeros(labels.shape[0] + 1)
    # What lies outside is reported below, once the facts are read.
    inside = None if borders is None else borders.clamp(0, positions)
    ends = None if inside is None or not shift else _ends(inside, positions)
    if by_kernel:
        from asft_kernels.kernels.pack_labels import pack_labels  # here, as it needs triton

        rows, tokens, running, facts = pack_labels(
            flat, extra, borders, ends, length=length, shift=shift, ignore_index=ignore_index
        )
    else:
        assert borders is not None, "bug: sequences of one length"
        rows, tokens, running, facts = _find(flat, extra, borders, ends, ignore_index)

    padded = True
    if num_valid is None and not traced:
        size, padded = _check_on_host(facts.tolist() if read is None else read(facts), vocab, positions), False
    else:
        size = positions if num_valid is None else min(num_valid, positions)
        _assert_on_device(facts, vocab, positions, size)
    # Valid rows first, in order; what a bound leaves over are masked rows, all distinct.
    offsets = running[::length].contiguous() if inside is None else running.index_select(0, inside)
    return TokenBatch(rows[:size], tokens[:size], offsets, labels.shape, shift, padded)


def _ends(inside: Tensor, positions: int) -> Tensor:
    """(positions,) bool: where a sequence ends."""
    ends = torch.zeros(positions + 1, dtype=torch.bool, device=inside.device)
    return ends.index_fill(0, inside[1:], True)[1:]


def _find(
    flat: Tensor, extra: Tensor | None, borders: Tensor, ends: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What kernels/pack_labels.py finds, but for the order of masked rows. ends: None without a shift."""
    flat, agree = flat.long(), torch.ones((), dtype=torch.bool, device=flat.device)
    if extra is not None:
        extra = extra.long()
        agree = ((flat == ignore_index) | (extra == ignore_index) | (flat == extra)).all()
        flat = torch.where(flat == ignore_index, extra, flat)
    if ends is not None:  # position t takes label t + 1
        following = torch.nn.functional.pad(flat[1:], (0, min(flat.numel(), 1)), value=ignore_index)
        flat = torch.where(ends, ignore_index, following)
    valid = flat != ignore_index
    running = torch.nn.functional.pad(valid.cumsum(0), (1, 0))
    facts = _facts(flat, valid, running, borders, agree)
    rows = torch.sort((~valid).to(torch.uint8), stable=True).indices
    tokens = torch.where(valid, flat, -1).index_select(0, rows)
    return rows, tokens, running, facts


def _facts(flat: Tensor, valid: Tensor, running: Tensor, borders: Tensor, agree: Tensor) -> Tensor:
    """(6,) int64: count, smallest and largest valid label, borders ordered from 0, their end, labels agree."""
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    low = torch.cat([torch.where(valid, flat, most), flat.new_full((1,), most)]).min()
    high = torch.cat([torch.where(valid, flat, least), flat.new_full((1,), least)]).max()
    ordered = (borders[0] == 0) & (borders.diff() >= 0).all()
    return torch.stack([running[-1], low, high, ordered.long(), borders[-1], agree.long()])


def _check_on_host(facts: list[int], vocab: int, positions: int) -> int:
    count, low, high, ordered, end, agree = facts
    if count and not 0 <= low <= high < vocab:
        raise ValueError(
            f"labels: got values from {low} to {high}, need 0 to {vocab - 1} (the rows of lm_head) or ignore_index; "
            "mask everything else with ignore_index"
        )
    checks.borders(bool(ordered), end, positions)
    if not agree:
        raise ValueError(
            "nll_labels: got another label than labels at the same position, need equal ones where both are valid"
        )
    return count


def _assert_on_device(facts: Tensor, vocab: int, positions: int, bound: int) -> None:
    """The same checks without a read; a GPU reports them when it gets there. No traced size stands in a text."""
    count, low, high, ordered, end, agree = facts.unbind()
    in_range = (count == 0) | ((low >= 0) & (high < vocab))
    borders = (ordered == 1) & (end == positions)
    for ok, message in (
        (count <= bound, "num_valid: got a bound below the number of valid labels (of both label sets together)"),
        (in_range, f"labels: got a value outside 0 to {vocab - 1} that is not ignore_index"),
        (borders, "cu_seqlens: got borders that do not go in order from 0 to the number of packed tokens"),
        (agree == 1, "nll_labels: got another label than labels at the same position"),
    ):
        torch._assert_async(ok, message)
