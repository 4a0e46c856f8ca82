"""Schemes for the lm_head's step on several ranks: its collectives, its time and its memory a rank. All predicted.

The step: bf16 hidden states and head to log-probabilities, and back to both gradients, for the tokens of a data-parallel
rank or of a tensor-parallel group. Products and passes are those of gpu_model.py, collectives those of collectives.py.
Nothing of the body's step hides a collective here; only streaming hides its own behind its products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from benchmarks.cases import TRAINABLE
from benchmarks.collectives import NODE, Collective, Group, packed
from benchmarks.gpu_model import BANDWIDTH_SHARE, H100, bare, seconds, tile_of
from benchmarks.gpu_schedule import BF16, Call, extra_bytes, schedule

FP32, FP64 = 4, 8
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


# --- what is on the wire: the formulas of docs/distributed.md, which tests hold the package's own collectives against --


def gathered_whole(D: int, V: int, group: Group, *, times: int = 1) -> tuple[Collective, ...]:
    """FSDP2: the head all-gathered, once or again for the backward pass, and its gradient reduce-scattered."""
    weight = BF16 * V * D
    return *times * (Collective("all_gather", weight, group, "head"),), Collective("reduce_scatter", weight, group, "dW")


def vocabulary_parallel(N: int, D: int, group: Group, *, figures: int = 0) -> tuple[Collective, ...]:
    """N tokens of the group: references, then sums and label logits with what the figures need, then dH in fp32."""
    return (
        Collective("all_reduce", FP64 * N, group, "references"),
        Collective("all_reduce", FP64 * (2 + figures) * N, group, "sums, label logits"),
        Collective("all_reduce", FP32 * N * D, group, "dH"),
    )


def megatron(N: int, D: int, group: Group) -> tuple[Collective, ...]:
    """megatron/core/tensor_parallel/cross_entropy.py, and dH as its column-parallel head reduces it, in bf16."""
    vectors = ("maxima", "label logits", "sums")
    return *(Collective("all_reduce", FP32 * N, group, of) for of in vectors), Collective(
        "all_reduce", BF16 * N * D, group, "dH"
    )


def streamed(D: int, V: int, rows: int, group: Group, *, again: bool) -> tuple[list[Collective], list[Collective]]:
    """Chunk by chunk: the head's rows to all ranks (again: for phase 2, too), and dW's rows to the rank they belong to."""
    widths = [min(rows, V - start) for start in range(0, V, rows)]
    head = [Collective("all_gather", BF16 * D * width, group, "a chunk of the head") for width in widths]
    return head * (1 + again), [Collective("reduce_scatter", c.bytes, group, "a chunk of dW") for c in head]


# --- one rank's step --------------------------------------------------------------------------------------------------


def ours(N: int, D: int, V: int, *, ranks: int = 1, share: float = PESSIMISTIC) -> tuple[Call, float]:
    """The Triton backend's call for the head's rows of one of so many ranks, and its time."""
    call = Call(N, ceil(V / ranks), D, TRAINABLE, distinct=1 / ranks)
    return call, sum(seconds(step, H100, share) for step in schedule(call, tile_of(H100)))


def working(call: Call) -> tuple[int, int]:
    """Bytes of the kept exponentials, and of everything else but dW."""
    kept = BF16 * call.N * sum(stop - start for start, stop in call.plan.slices[: call.plan.cached])
    return kept, extra_bytes(call) - BF16 * call.V * call.D - kept


def passes(entries: float, moved: float) -> float:
    """Seconds of elementwise kernels that read and write so many bytes an entry."""
    return entries * moved / (H100.bandwidth * BANDWIDTH_SHARE)


def finish(compute: float, collectives: tuple[Collective, ...], memory: Memory) -> Step:
    """Nothing is hidden, and one rank has nobody to talk to."""
    there = tuple(c for c in collectives if c.group.ranks > 1)
    return Step(compute, compute + sum(c.seconds for c in there), there, memory)


def replicated(D: int, V: int, ranks: int) -> Step:
    call, compute = ours(TOKENS, D, V)
    weight = BF16 * V * D
    bucket = weight if ranks > 1 else 0  # DistributedDataParallel's, a copy unless gradient_as_bucket_view=True
    reduced = (Collective("all_reduce", weight, packed(ranks), "dW"),)
    return finish(compute, reduced, Memory(weight, weight + bucket, *working(call)))


def gathered(D: int, V: int, ranks: int, *, times: int) -> Step:
    if ranks == 1:
        return replicated(D, V, 1)
    call, compute = ours(TOKENS, D, V)
    # What the reduce-scatter reads is a copy, too, but the gathered head is freed before it is made.
    held = BF16 * V * D + BF16 * ceil(V / ranks) * D
    return finish(compute, gathered_whole(D, V, packed(ranks), times=times), Memory(held, held, *working(call)))


def streaming(D: int, V: int, ranks: int) -> Step:
    if ranks == 1:
        return replicated(D, V, 1)
    call, compute = ours(TOKENS, D, V)
    chunks = len(call.plan.slices)
    head, dw = streamed(D, V, call.plan.chunk, packed(ranks), again=call.plan.cached < chunks)
    of_chunk = {1: 0.0, 2: 0.0}  # by phase
    for step in schedule(call, tile_of(H100)):
        of_chunk[step.phase] += seconds(step, H100, PESSIMISTIC) / chunks
    # Phase 1: a chunk comes while the one before is multiplied. Phase 2: one leaves while the next is multiplied.
    come = [c.seconds for c in head[:chunks]]
    leave = [c.seconds for c in dw]
    if len(head) > chunks:
        leave = [out + again.seconds for out, again in zip(leave, head[chunks:], strict=True)]
    time = come[0] + sum(max(of_chunk[1], t) for t in [*come[1:], 0.0])
    time += sum(max(of_chunk[2], t) for t in [0.0, *leave[:-1]]) + leave[-1]
    held = BF16 * ceil(V / ranks) * D + 2 * BF16 * call.plan.chunk * D  # two buffers
    return Step(compute, time, (*head, *dw), Memory(held, held, *working(call)))


def vocabulary(N: int, D: int, V: int, group: Group, replicas: Group, *, share: float = PESSIMISTIC) -> Step:
    """N tokens of a group, whose shards' gradients are summed over their replicas."""
    call, compute = ours(N, D, V, ranks=group.ranks, share=share)
    shard = BF16 * call.V * D
    reduced = Collective("all_reduce", shard, replicas, "dW of the shard")
    bucket = shard if replicas.ranks > 1 else 0
    collectives = (*vocabulary_parallel(N, D, group), reduced)
    return finish(compute, collectives, Memory(shard, shard + bucket, *working(call)))


def megatron_lm(N: int, D: int, V: int, group: Group, replicas: Group) -> Step:
    rows = ceil(V / group.ranks)
    shard = BF16 * rows * D
    # Logits to fp32, maxima, less them, exponentials, sums, normalised; in the backward pass scaled and to bf16.
    moved = 6 + 4 + 8 + 8 + 4 + 8 + 8 + 6
    compute = bare(Call(N, rows, D, TRAINABLE), H100) + passes(N * rows, moved)
    reduced = Collective("all_reduce", shard, replicas, "dW of the shard")
    bucket = shard if replicas.ranks > 1 else 0
    # The softmax stays in fp32; the bf16 logits stand beside it at first, and their gradient at last.
    memory = Memory(shard, shard + bucket, FP32 * N * rows, BF16 * N * rows + BF16 * N * D)
    return finish(compute, (*megatron(N, D, group), reduced), memory)


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


VOCABULARY, MEGATRON, TRL = "vocabulary parallel", "Megatron-LM", "TRL 1.16 on FSDP2"
SCHEMES: dict[str, Callable[[int, int, int], Step]] = {
    "replicated (DDP)": replicated,
    "gathered once (FSDP2)": lambda D, V, ranks: gathered(D, V, ranks, times=1),
    "gathered twice (FSDP2)": lambda D, V, ranks: gathered(D, V, ranks, times=2),
    "streamed": streaming,
    VOCABULARY: with_node(vocabulary),
    MEGATRON: with_node(megatron_lm),
    TRL: trl,
}
