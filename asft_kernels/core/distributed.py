"""A head's rows on several ranks: `VocabParallelHead`, and the one exchange by which ranks agree on their arguments."""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asft_kernels.core import checks
from asft_kernels.errors import InputError

COLUMNS = 8  # of hidden states, that the ranks compare
FLOATS = ("token_weights", "ref_logps", "objective_inputs")
SUMS = 3  # that the ranks compare of each of them
FACTS = 3 + 2 * COLUMNS + SUMS * len(FLOATS)
NONE = -1  # of a vocab or a length that a rank has not
APART = 0.05  # of a column's norm: one from other data is nearer about once in 20, and 8 are once in 10^10


class Shard:
    """Rows [first, first + rows) of a head over `vocab` labels: what the local `head` begins with; group: whose."""

    def __init__(self, head: Any, group: Any, first: int, rows: int, vocab: int) -> None:
        self.head, self.group, self.first, self.rows, self.vocab = head, group, first, rows, vocab
        self.group_name: str = group.group_name  # here, as torch.compile traces no process group
        self.ranks: int = group.size()

    @property
    def device(self) -> torch.device:
        tensor = self.head[0] if isinstance(self.head, (tuple, list)) else self.head
        return (next(tensor.parameters()) if isinstance(tensor, nn.Module) else tensor).device


class VocabParallelHead(Shard):
    """Says that this rank's head is some rows of one whose vocabulary is sharded over a group.

    Goes wherever a call takes an lm_head. Each rank passes the same hidden states and labels (of the whole
    vocabulary), and has the same results; the gradient of hidden is whole on each, those of the rows stay with them.
    Shards may be of any lengths, 0 too, in the order of the group's ranks.

    Args:
        weight: (V_r, D) tensor, or a local head that the calls take: nn.Linear, also with PEFT's LoRA (the same A and
            dropout on all ranks), or a quantised one.
        bias: (V_r,) tensor; None (default) for none, or a module's own.
        group: The ranks' torch.distributed.ProcessGroup.
        vocab: V of the labels where the rows are padded (Megatron's multiple of 128): rows from it on have no
            probability and gradient 0. Default: all rows count.

    Raises:
        ValueError: For arguments that are none of these, here or on another rank, and for a vocab that ranks differ in.

    The constructor is a collective: one all-gather of the lengths.
    """

    def __init__(
        self, weight: Tensor | nn.Module, bias: Tensor | None = None, *, group: Any, vocab: int | None = None
    ) -> None:
        if not isinstance(group, dist.ProcessGroup):
            need = "a torch.distributed.ProcessGroup that this rank is in: mesh.get_group('tp'), or dist.group.WORLD"
            checks.refuse("group", type(group).__name__, need)
        try:
            own, refusal = _length(weight), None
            if vocab is not None and not isinstance(vocab, int):
                checks.refuse("vocab", repr(vocab), "an integer, or None")
        except ValueError as error:
            own, refusal = NONE, error  # once the others have heard of it, as they wait for this rank's length
        super().__init__(weight if bias is None else (weight, bias), group, 0, own, 0)
        place = self.device if refusal is None else _device_of(group)
        gathered = torch.zeros(dist.get_world_size(group), 2, dtype=torch.int64, device=place)
        dist.all_gather(
            list(gathered), gathered.new_tensor([own, NONE if vocab is None or refusal else vocab]), group=group
        )
        if refusal is not None:
            raise refusal
        lengths, vocabs = map(list, zip(*gathered.tolist(), strict=True))
        if refusing := [rank for rank, length in enumerate(lengths) if length < 0]:
            need = "this rank's rows (V_r, D) and an integer vocab or None on all ranks"
            checks.refuse("weight, vocab", f"what rank {refusing[0]} of the group refuses", need)
        if len(set(vocabs)) > 1:
            checks.refuse("vocab", f"{vocabs} on the ranks of the group ({NONE}: none)", "the same on all")
        total = sum(lengths)
        if vocab is not None and not 1 <= vocab <= total:
            checks.refuse("vocab", vocab, f"1 to {total}, the rows of all ranks together")
        self.vocab = total if vocab is None else vocab
        self.first = sum(lengths[: dist.get_rank(group)])
        self.rows = max(0, min(own, self.vocab - self.first))


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where its collectives take tensors."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _length(weight: Tensor | nn.Module) -> int:
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0]
    for name in ("out_features", "num_embeddings"):
        if isinstance(weight, nn.Module) and isinstance(getattr(weight, name, None), int):
            return getattr(weight, name)
    return checks.refuse("weight", type(weight).__name__, "this rank's rows (V_r, D), or an nn.Linear of them")


def _mixed(x: Tensor, salt: int) -> Tensor:
    """A checksum of (n,) integers and their order."""
    places = torch.arange(len(x), device=x.device) + salt * 2**20
    return ((x + 1) * (places * 2 + 1) * 0x9E3779B1).sum()


def _sums(columns: Tensor, frequencies: Tensor | int = 1) -> Tensor:
    """(n, C) -> (C,) sums along fixed waves over each column's norm: alike where columns differ by rounding alone."""
    places = torch.arange(len(columns), device=columns.device).double()[:, None]
    columns = columns.double()
    return (columns * (places * frequencies).cos()).sum(dim=0) / columns.norm(dim=0)


class Agreement:
    """What the ranks of a sharded head tell each other once in a call, with its one read of the device.

    A rank that refuses its arguments tells it in place of that, so that none waits for it; what is not the same on all
    ranks is refused on all. Other heads than sharded ones need no exchange. Nor is there one while torch.compile
    traces, nor after `num_valid`, which spares the read: ranks are then taken at their word.

    Args:
        lm_head: the call's.
        reads: whether the call reads the device: without `num_valid`.
    """

    def __init__(self, lm_head: object, *, reads: bool) -> None:
        tells = reads and not torch.compiler.is_compiling()
        self.shard = lm_head if isinstance(lm_head, Shard) and tells else None
        self.told = False
        self.about = ""  # what else is compared: the objective's text
        self.floats: Mapping[str, Sequence[Tensor | None]] = {}  # and these, by the names of FLOATS
        self.facts: list[tuple[str, Tensor]] = []

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self.refuse(error)

    def compare(self, hidden: Tensor, labels: Tensor, others: Sequence[Tensor | None], options: object) -> None:
        """Has the next read compare them; others (borders, a second label set) beside labels, options by their text."""
        given = [None if x is None else x.reshape(-1).long() for x in (labels, *others)]
        mixed = torch.stack([_mixed(x, salt) for salt, x in enumerate(given) if x is not None]).sum() & 2**50 - 1
        text = repr((self.about, [None if x is None else len(x) for x in given], options))
        sizes = labels.new_tensor([labels.numel(), crc32(text.encode())], dtype=torch.int64)
        columns = hidden.detach().reshape(-1, hidden.shape[-1])[:, :COLUMNS]
        # Waves alone know no scale: each has the norm beside it.
        facts = torch.stack([_sums(columns), columns.double().norm(dim=0).log()])
        sums = torch.nn.functional.pad(facts, (0, COLUMNS - columns.shape[1]))
        self.facts = [("labels", torch.stack([sizes[0], mixed])), ("options", sizes[1]), ("hidden", sums)]
        for name in FLOATS:
            given = [x.detach().reshape(-1).double() for x in self.floats.get(name, ()) if x is not None]
            every = torch.cat(given) if given else sizes.new_zeros(1).double()
            powers = torch.arange(1, SUMS, device=every.device)
            waves = _sums(every[:, None].expand(-1, SUMS - 1), powers)
            self.facts.append((name, torch.cat([waves, every.norm().log()[None]])))

    def read(self, own: Tensor) -> list[int]:
        """own.tolist(), once the ranks have agreed.

        Raises:
            ValueError: Naming what differs, or the rank that has refused and its reason.
        """
        if self.shard is None or self.told:
            return own.tolist()
        values = torch.cat([x.reshape(-1).double() for _, x in self.facts]).nan_to_num(0)
        told = self._tell(torch.cat([values.new_zeros(1), values, -values]))
        read = torch.cat([told, own.double()]).tolist()
        if read[0]:
            self._hear(None)
        highest, lowest = read[1 : FACTS + 1], read[FACTS + 1 : 2 * FACTS + 1]
        apart = [high + low > APART for high, low in zip(highest, lowest, strict=True)]
        for name, x in self.facts:
            of_name, apart = apart[: x.numel()], apart[x.numel() :]
            if any(of_name):
                need = "the same on all ranks of lm_head's group; the vocabulary is sharded over it, not the batch"
                checks.refuse(name, "what differs between ranks", need)
        return [int(x) for x in read[2 * FACTS + 1 :]]

    def refuse(self, error: Exception) -> None:
        """Tells the others that this rank raises an error, unless it has read already."""
        if self.shard is not None and not self.told:
            told = torch.zeros(1 + 2 * FACTS, dtype=torch.float64, device=self.shard.device)
            told[0] = 1
            self._tell(told)
            self._hear(error)

    def _tell(self, told: Tensor) -> Tensor:
        assert self.shard is not None, "bug: nobody to tell"
        self.told = True
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.shard.group)
        return told

    def _hear(self, own: Exception | None) -> None:
        """After a refusal somewhere: every rank hears all reasons; one with none of its own raises the first."""
        assert self.shard is not None, "bug: nobody to hear"
        reasons: list[Any] = [None] * dist.get_world_size(self.shard.group)
        text = None if own is None else f"{type(own).__name__}: {own}"
        dist.all_gather_object(reasons, text, group=self.shard.group)
        if own is None:
            rank, reason = next((i, x) for i, x in enumerate(reasons) if x is not None)
            raise InputError(f"rank {rank} of lm_head's group refuses its arguments: {reason}")
