"""One rank of 8 to 1024 without the others: what it sends is what benchmarks/distributed_schemes.py says.

torch's fake process group answers every collective at once, with whatever stands in its buffers: shapes and schedules
are those of a run, values are not.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from asft_kernels import fused_linear_logps
from asft_kernels.backends import Logits, plan
from asft_kernels.backends.head_rows import HeadRows, stream_text
from asft_kernels.backends.streamed_order import StreamedOrder
from asft_kernels.core.distributed import VocabParallelHead
from asft_kernels.core.linear_logps import linear_logps
from benchmarks.collectives import Collective, packed
from benchmarks.distributed_schemes import streamed, vocabulary_parallel
from cases import gemms

SIZES = (8, 64, 1024)
RENAMED = hasattr(dist, "all_gather_single")  # as torch 2.13 has it
KINDS = {  # of torch.distributed: which argument has the bytes of a Collective
    "all_reduce": 0, "all_gather": 0, "all_to_all_single": 1,
    "all_gather_single" if RENAMED else "all_gather_into_tensor": 0,
    "reduce_scatter_single" if RENAMED else "reduce_scatter_tensor": 1,
}  # fmt: skip


@pytest.fixture
def fake_group(request):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield dist.group.WORLD
    dist.destroy_process_group()


@contextmanager
def sent():
    """Counts collectives by kind, operation and bytes."""
    seen: Counter[tuple[str, str, int]] = Counter()

    def counted(name, call):
        def wrapper(*args, **kwargs):
            tensors = args[KINDS[name]]
            tensors = tensors if isinstance(tensors, list) else [tensors]
            op = kwargs.get("op", dist.ReduceOp.SUM) if "reduce" in name else None
            operation = {None: "", dist.ReduceOp.SUM: "SUM", dist.ReduceOp.MAX: "MAX"}[op]
            kind = name.removesuffix("_into_tensor").removesuffix("_tensor").removesuffix("_single")
            seen[kind, operation, sum(x.numel() * x.element_size() for x in tensors)] += 1
            work = call(*args, **kwargs)
            if name == "all_to_all_single" and not RENAMED:  # the group of 2.13 has each rank answer as it was asked
                args[0].copy_(args[1])
            return work

        return wrapper

    with ExitStack() as stack:
        for name in KINDS:
            stack.enter_context(mock.patch.object(dist, name, counted(name, getattr(dist, name))))
        yield seen


def tally(collectives: Iterable[Collective], references: frozenset[str] = frozenset()) -> Counter[tuple[str, str, int]]:
    """As sent() counts. references: which all-reduces take the largest."""
    found: Counter[tuple[str, str, int]] = Counter()
    for c in collectives:
        operation = "" if "reduce" not in c.kind else "MAX" if c.of in references else "SUM"
        found[c.kind, operation, c.bytes] += 1
    return found


@pytest.mark.parametrize("fake_group", SIZES, indirect=True, ids=lambda size: f"{size} ranks")
@pytest.mark.parametrize(
    ("sums", "outputs"), [(0, ["lse"]), (3, ["lse", "entropy", "mean_logits", "log_sum_sq_probs"]), (1, ["is_top1"])]
)
def test_vocabulary_parallel(fake_group, sums, outputs):
    """Three all-reduces and the agreement's, a product of this rank's rows alone, everything of one device's shape."""
    N, D, rows, size = 6, 16, 3, fake_group.size()
    hidden, weight = torch.randn(1, N + 1, D, requires_grad=True), torch.randn(rows, D, requires_grad=True)
    labels = torch.arange(-1, N).remainder(rows * size)[None]
    head = VocabParallelHead(weight, group=fake_group)
    assert head.vocab == rows * size

    def call():
        stats = fused_linear_logps(hidden, head, labels, return_stats=outputs)
        assert stats.logps.shape == (1, N + 1)
        stats.logps.sum().backward()

    with sent() as seen:
        call()
    model = vocabulary_parallel(N, D, packed(size), sums=sums, tops=int("is_top1" in outputs))
    assert seen == tally(model, frozenset({"agreement", "references"}))
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == (rows, D)
    # Three products of the size of this rank's rows, and so 1 / size of one device's.
    assert gemms(call, N, rows * size, D) == pytest.approx(3 / size, rel=1e-9)


@pytest.mark.parametrize("fake_group", SIZES, indirect=True, ids=lambda size: f"{size} ranks")
@pytest.mark.parametrize("cached", [True, False], ids=["all kept", "none kept"])
def test_streamed(fake_group, cached, monkeypatch):
    """One all-gather of rows and one reduce-scatter of dW a chunk; shards of the last ranks may be empty.

    All tokens take a chunk of rows at once, however many they are.
    """
    monkeypatch.setitem(plan.TOKEN_BLOCK, "cpu", 4)
    N, D, V, chunk, size = 6, 8, 2000, 600, fake_group.size()
    shard = -(-V // size)
    hidden = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(shard, D, dtype=torch.bfloat16, requires_grad=True)
    head = HeadRows(weight, placement=stream_text(fake_group.group_name, V))
    cache_bytes = 2**30 if cached else 0
    labels = torch.arange(N) % shard
    with sent() as seen:
        logps, _ = linear_logps(
            hidden, head, None, torch.arange(N), labels, backend="torch", logits=Logits(), chunk_size=chunk,
            cache_bytes=cache_bytes, padded=False,
        )  # fmt: skip
        logps.sum().backward()
    kept = len(StreamedOrder.of(V, size, chunk).slices) if cached else 0
    model = streamed(N, D, V, chunk, kept, packed(size))
    assert seen == tally([*model.agreement, *model.labels, *model.head, *model.again, *model.dw])
    assert logps.shape == (N,)
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape
