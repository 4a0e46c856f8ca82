"""Sequences that stand in pieces on the ranks of a group: their sums over the group, and errors that all ranks see.

Every rank has some positions of each sequence, in any order (ring attention's contiguous or head-tail pieces, Ulysses),
and labels that were shifted before they were cut. An objective reads sums over whole sequences, so these are added over
the group first; every rank then has the same loss.

Gradients are those of torch.distributed's functional all_reduce, whose backward adds the ranks' gradients: each rank's
loss counts as one of its own, as in data parallelism. The gradients' MEAN over the group's ranks, which DDP and FSDP
take over all ranks anyway, is that of one process; their sum is the size of the group times as much.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from asft_kernels.core.sequence import Logps
from asft_kernels.errors import InputError


def process_group(group: Any) -> Any:
    """Returns the ProcessGroup of what a caller gave as sequence_group; None for None and for one rank.

    Raises:
        ValueError: for anything but a ProcessGroup that this rank is in, a DeviceMesh of one dimension, or None.
    """
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "sequence_group: got a group where torch.distributed does not run, need None, or a process group; call "
            "init_process_group first"
        )
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"sequence_group: got a DeviceMesh of {group.ndim} dimensions, need one; name it, as in mesh['cp']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"sequence_group: got {type(group).__name__}, need a ProcessGroup of this rank, a DeviceMesh of one "
            "dimension or None; dist.new_group and mesh['cp'] make them"
        )
    return group if group.size() > 1 else None


@dataclass
class Facts:
    """What must be the same on all ranks of a group.

    Attributes:
        rows: the number of sequences.
        about: the objective's text.
        ref_logps: the reference's sums of whole sequences; None where it has none, or pieces.
    """

    rows: int = 0
    about: str = ""
    ref_logps: Tensor | None = None


@contextmanager
def failing_together(group: Any, device: torch.device) -> Iterator[Facts]:
    """Makes an error of one rank an error on all of the group: the others would wait for its sums for ever.

    Yields what takes the facts that must be the same on all ranks. Reads the device once.
    """
    facts = Facts()
    error: Exception | None = None
    try:
        yield facts
    except Exception as caught:  # told to the others first
        error = caught
    failed = 0 if error is None else dist.get_rank() + 1
    own = torch.tensor([facts.rows, crc32(facts.about.encode())], dtype=torch.int64, device=device)
    sums = own.new_zeros(1)
    if error is None and facts.ref_logps is not None:
        bits = facts.ref_logps.detach().double().reshape(-1).view(torch.int64)
        sums = ((bits >> 24) * torch.arange(1, 1 + len(bits), device=device)).sum().view(1) >> 1
    told = torch.cat([own.new_tensor([failed]), own, sums, -own, -sums])
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    if error is not None:
        raise error
    other, *both = told.tolist()
    if other:
        raise InputError(f"sequence_group: got an error on rank {other - 1}, need none; that rank says what it is")
    most, least = both[:3], [-x for x in both[3:]]
    if most[0] != least[0]:
        raise InputError(
            f"sequence_group: got {least[0]} to {most[0]} sequences on its ranks, need a piece of each sequence on "
            "every rank; pieces may be empty"
        )
    for name, high, low in zip(("objective, reduction", "ref_logps"), most[1:], least[1:], strict=True):
        if high != low:
            raise InputError(f"{name}: got another on some ranks of sequence_group, need the same on all of them")


def refuse_what_needs_whole_sequences(objective: Any, shift: bool) -> None:
    """ValueError for labels that are not shifted, and for an objective that weighs tokens by their place."""
    if shift:
        raise ValueError(
            "shift: got True with sequence_group, need False: the label of a piece's last position stands on another "
            "rank; shift the labels before they are cut (shift_labels of accelerate and transformers)"
        )
    if hasattr(objective, "weigh_tokens") and not getattr(objective, "weighs_each_token", False):
        raise ValueError(
            f"sequence_group: got {type(objective).__name__}, which weighs tokens by their place in the sequence, need "
            "an objective that weighs each token by itself; give its base with these weights as token_weights, made "
            "before the labels are cut"
        )


def added(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the group, without gradients."""
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(tensor, "sum", group))


def of_whole_sequences(policy: Logps, ref: Tensor | None, group: Any) -> tuple[Logps, Tensor | None]:
    """Sums of the pieces -> sums of the sequences, in one all_reduce each way; lengths are whole already.

    ref: sums of pieces, (R,), or None where the reference's are whole.
    """
    if group is None:
        return policy, ref
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    parts = {"sum": policy.sum, "ref": ref, "nll_sum": policy.nll_sum, **{(x,): y for x, y in policy.terms.items()}}
    given = {name: x for name, x in parts.items() if x is not None}
    whole = dict(zip(given, wait_tensor(all_reduce(torch.stack(list(given.values())), "sum", group)), strict=True))
    terms = {name: whole[(name,)] for name in policy.terms}
    copies = policy.copies * group.size()
    summed = replace(policy, sum=whole["sum"], nll_sum=whole.get("nll_sum"), terms=terms, copies=copies)
    return summed, whole.get("ref")
