"""Schemes for the lm_head's step on several ranks: its collectives, its time and its memory a rank. All predicted.

The step: bf16 hidden states and head to log-probabilities, and back to both gradients, for the tokens of a
data-parallel rank or of a tensor-parallel group. Products and passes are those of gpu_model.py, collectives those of
collectives.py. Nothing of the body's step hides a collective here. Streaming hides its own behind its products, and the
reduction of dH goes on during the product for dW.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from asft_kernels.backends.plan import traced_chunk
from asft_kernels.backends.streamed_order import StreamedOrder
from benchmarks.cases import TRAINABLE
from benchmarks.collectives import NODE, Collective, Group, packed
from benchmarks.gpu_model import BANDWIDTH_SHARE, H100, bare, seconds, tile_of
from benchmarks.gpu_schedule import BF16, Call, extra_bytes, schedule

FP32, FP64 = 4, 8
AGREED = 57  # numbers that a vocabulary-parallel call compares: asft_kernels/core/distributed.py
TOKENS = 2048  # of a rank, those that carry loss; a tensor-parallel group has as many for each of its ranks
PESSIMISTIC, OPTIMISTIC = H100.triton  # shares of the peak rate for our one product that is not the library's
TRL_TOKENS, TRL_ROWS = 4096, 32768  # trl.kernels' TOKEN_CHUNK_SIZE, trl.trainer.utils' _CHUNKED_LOGPROB_CHUNK_SIZE


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the peak of the step, by what they hold."""

    weights: int  # the shard that stays, and what is gathered of the others'
    gradient: int  # dW, whole or by chunks, the shard of it that stays, and what a collective copies it to
    exponentials: int  # those kept for dW; Megatron-LM's softmax
    buffers: int  # O, dH, chunks of logits, tiles, vectors

    @property
    def total(self) -> int:
        return self.weights + self.gradient + self.exponentials + self.buffers


@dataclass(frozen=True)
class Step:
    """The head's step of one rank. seconds: products and passes, and the collectives that they do not hide."""

    compute: float
    seconds: float
    collectives: tuple[Collective, ...]
    memory: Memory

    @property
    def wire(self) -> float:
        return sum(c.wire for c in self.collectives)


# --- what is on the wire: the formulas of docs/distributed.md, tests hold the package's collectives against them ------


def gathered_whole(D: int, V: int, group: Group, *, times: int = 1) -> tuple[Collective, ...]:
    """FSDP2: the head all-gathered, once or again for the backward pass, and its gradient reduce-scattered."""
    weight = BF16 * V * D
    return *times * (Collective("all_gather", weight, group, "head"),), Collective(
        "reduce_scatter", weight, group, "dW"
    )


def vocabulary_parallel(N: int, D: int, group: Group, *, sums: int = 0, tops: int = 0) -> tuple[Collective, ...]:
    """N tokens of the group: what ranks agree on, references, sums and label logits, then dH in fp32.

    sums: figures that are sums over the vocabulary (is_top1 counts among them), tops: 1 with is_top1.
    """
    return (
        Collective("all_reduce", FP64 * AGREED, group, "agreement"),
        Collective("all_reduce", FP64 * (1 + tops) * N, group, "references"),
        Collective("all_reduce", FP64 * (2 + sums) * N, group, "sums, label logits"),
        Collective("all_reduce", FP32 * N * D, group, "dH"),
    )


def megatron(N: int, D: int, group: Group) -> tuple[Collective, ...]:
    """megatron/core/tensor_parallel/cross_entropy.py, and dH as its column-parallel head reduces it, in bf16."""
    vectors = [Collective("all_reduce", FP32 * N, group, of) for of in ("maxima", "label logits", "sums")]
    return *vectors, Collective("all_reduce", BF16 * N * D, group, "dH")


class Streamed(NamedTuple):
    """The collectives of a streamed head by what they carry; a chunk's head and dW in pieces, one for each owner."""

    agreement: tuple[Collective, ...]  # one a phase
    labels: tuple[Collective, ...]  # how many, which, and their rows, in each phase
    head: list[Collective]  # by chunk; in phase 2 those whose exponentials were not kept
    again: list[Collective]
    dw: list[Collective]


def streamed(N: int, D: int, V: int, chunk: int, cached: int, group: Group) -> Streamed:
    """N tokens of each rank, chunks of so many rows, of which so many keep their exponentials."""
    order = StreamedOrder.of(V, group.ranks, chunk)
    gathered = [group.ranks * (last - first) for first, last in map(order.of_shard, range(len(order.slices)))]
    head = [Collective("all_gather", BF16 * D * n, group, "head") for n in gathered]
    dw = [Collective("reduce_scatter", FP32 * D * n, group, "dW") for n in gathered]
    asked = [
        Collective("all_to_all", bytes_, group, of)
        for bytes_, of in ((8 * group.ranks, "how many labels"), (8 * N, "labels"), (BF16 * N * D, "label rows"))
    ]
    agreement = Collective("all_gather", 16 * group.ranks, group, "agreement")
    return Streamed((agreement, agreement), (*asked, *asked), head, head[cached:], dw)


# --- one rank's step --------------------------------------------------------------------------------------------------


def ours(
    N: int, D: int, V: int, *, ranks: int = 1, chunk: int | None = None, share: float = PESSIMISTIC
) -> tuple[Call, list[float]]:
    """The Triton backend's call for the head's rows of one of so many ranks, and the time of its two phases."""
    call = Call(N, ceil(V / ranks), D, TRAINABLE, distinct=1 / ranks, chunk_size=chunk)
    phases = [0.0, 0.0]
    for step in schedule(call, tile_of(H100)):
        phases[step.phase - 1] += seconds(step, H100, share)
    return call, phases


def working(call: Call) -> tuple[int, int]:
    """Bytes of the kept exponentials, and of everything else but dW."""
    kept = BF16 * call.N * sum(stop - start for start, stop in call.plan.slices[: call.plan.cached])
    return kept, extra_bytes(call) - BF16 * call.V * call.D - kept


def passes(entries: float, moved: float) -> float:
    """Seconds of elementwise kernels that read and write so many bytes an entry."""
    return entries * moved / (H100.bandwidth * BANDWIDTH_SHARE)


def finish(compute: float, collectives: tuple[Collective, ...], memory: Memory, *, hidden: float = 0.0) -> Step:
    """hidden: seconds of collectives that products hide. One rank has nobody to talk to."""
    there = tuple(c for c in collectives if c.group.ranks > 1)
    return Step(compute, compute + sum(c.seconds for c in there) - hidden, there, memory)


def replicated(D: int, V: int, ranks: int) -> Step:
    call, phases = ours(TOKENS, D, V)
    weight = BF16 * V * D
    bucket = weight if ranks > 1 else 0  # DistributedDataParallel's, a copy unless gradient_as_bucket_view=True
    reduced = (Collective("all_reduce", weight, packed(ranks), "dW"),)
    return finish(sum(phases), reduced, Memory(weight, weight + bucket, *working(call)))


def gathered(D: int, V: int, ranks: int, *, times: int) -> Step:
    if ranks == 1:
        return replicated(D, V, 1)
    call, phases = ours(TOKENS, D, V)
    # What the reduce-scatter reads is a copy, too, but the gathered head is freed before it is made.
    held = BF16 * V * D + BF16 * ceil(V / ranks) * D
    return finish(sum(phases), gathered_whole(D, V, packed(ranks), times=times), Memory(held, held, *working(call)))


def overlapped(moving: list[float], product: float) -> float:
    """Seconds of chunks that come while the one before is multiplied; of leaving ones, while the next is, reversed."""
    return moving[0] + sum(max(product, t) for t in moving[1:]) + product


def streaming(D: int, V: int, ranks: int) -> Step:
    if ranks == 1:
        return replicated(D, V, 1)
    call, phases = ours(TOKENS, D, V, chunk=traced_chunk(D, exp_bytes=BF16, device_type="cuda"))
    plan = call.plan
    chunks = len(StreamedOrder.of(V, ranks, plan.chunk).slices)
    cached = min(plan.cached, chunks)
    sent = streamed(TOKENS, D, V, plan.chunk, cached, packed(ranks))
    time = sum(c.seconds for c in (*sent.agreement, *sent.labels))
    come, again, leave = ([c.seconds for c in of] for of in (sent.head, sent.again, sent.dw))
    leave = [t + extra for t, extra in zip(leave, [0.0] * cached + again, strict=True)]
    time += overlapped(come, phases[0] / chunks) + overlapped(leave[::-1], phases[1] / chunks)
    shard, buffer = BF16 * ceil(V / ranks) * D, plan.chunk * D
    # Two chunks of rows, two of dW, and two sums of this rank's part of one.
    memory = Memory(shard + 2 * BF16 * buffer, shard + 2 * FP32 * (buffer + buffer // ranks), *working(call))
    return Step(sum(phases), time, (*sent.agreement, *sent.labels, *sent.head, *sent.again, *sent.dw), memory)


def behind(dh: Collective, product: float) -> float:
    """Seconds of the reduction of dH that the product for dW hides."""
    return min(dh.seconds, product)


def vocabulary(N: int, D: int, V: int, group: Group, replicas: Group, *, share: float = PESSIMISTIC) -> Step:
    """N tokens of a group, whose shards' gradients are summed over their replicas."""
    call, phases = ours(N, D, V, ranks=group.ranks, share=share)
    shard, (kept, buffers) = BF16 * call.V * D, working(call)
    buffers += (FP32 - BF16) * N * D if group.ranks > 1 else 0  # dH is not rounded before it is reduced
    reduced = Collective("all_reduce", shard, replicas, "dW of the shard")
    bucket = shard if replicas.ranks > 1 else 0
    *vectors, dh = vocabulary_parallel(N, D, group)
    memory = Memory(shard, shard + bucket, kept, buffers)
    return finish(sum(phases), (*vectors, dh, reduced), memory, hidden=behind(dh, phases[1]))


def megatron_lm(N: int, D: int, V: int, group: Group, replicas: Group) -> Step:
    rows = ceil(V / group.ranks)
    shard, products = BF16 * rows * D, bare(Call(N, rows, D, TRAINABLE), H100)
    # Logits to fp32, maxima, less them, exponentials, sums, normalised; in the backward pass scaled and to bf16.
    moved = 6 + 4 + 8 + 8 + 4 + 8 + 8 + 6
    reduced = Collective("all_reduce", shard, replicas, "dW of the shard")
    bucket = shard if replicas.ranks > 1 else 0
    # The softmax stays in fp32; the bf16 logits stand beside it at first, and their gradient at last.
    memory = Memory(shard, shard + bucket, FP32 * N * rows, BF16 * N * rows + BF16 * N * D)
    *vectors, dh = megatron(N, D, group)
    compute = products + passes(N * rows, moved)
    return finish(compute, (*vectors, dh, reduced), memory, hidden=behind(dh, products / 3))


def trl(D: int, V: int, ranks: int) -> Step:
    """The fused head of TRL 1.16 (trl/kernels/chunked_logprob.py), which FSDP2 gathers with its root unit."""
    N, weight, shard = TOKENS, BF16 * V * D, BF16 * ceil(V / ranks) * D if ranks > 1 else 0
    compute = 4 / 3 * bare(Call(N, V, D, TRAINABLE), H100)  # the logits are multiplied once more in the backward pass
    compute += passes(N * V, 2 + 4) + passes(V * D, 4 + 8 * ceil(N / TRL_TOKENS) + 6)  # tiles; dW summed in fp32
    buffers = BF16 * min(N, TRL_TOKENS) * TRL_ROWS + (FP32 + BF16) * N * D
    memory = Memory(weight + shard, FP32 * V * D + weight + shard, 0, buffers)
    return finish(compute, gathered_whole(D, V, packed(ranks)), memory)


def tensor_parallel(ranks: int) -> tuple[int, Group, Group]:
    """The tokens of the group of one node, that group, and that of a shard's replicas, one in each node."""
    size = min(ranks, NODE)
    return TOKENS * size, Group(size, size), Group(ranks // size, 1)


def with_node(step: Callable[[int, int, int, Group, Group], Step]) -> Callable[[int, int, int], Step]:
    """The vocabulary over the ranks of a node, data-parallel between nodes."""

    def of_ranks(D: int, V: int, ranks: int) -> Step:
        N, group, replicas = tensor_parallel(ranks)
        return step(N, D, V, group, replicas)

    return of_ranks


VOCABULARY, MEGATRON, TWICE = "vocabulary parallel", "Megatron-LM", "gathered twice (FSDP2)"
SCHEMES: dict[str, Callable[[int, int, int], Step]] = {
    "replicated (DDP)": replicated,
    "gathered once (FSDP2)": lambda D, V, ranks: gathered(D, V, ranks, times=1),
    TWICE: lambda D, V, ranks: gathered(D, V, ranks, times=2),
    "streamed": streaming,
    VOCABULARY: with_node(vocabulary),
    MEGATRON: with_node(megatron_lm),
    "TRL 1.16 on FSDP2": trl,
}
