"""The cost model of several ranks: closed forms by hand, a page and pictures that are drawn from its rows."""

import pytest

from benchmarks import distributed_model
from benchmarks.collectives import Collective, Group, packed
from benchmarks.distributed_model import HEADS, LARGE, RANKS, steps
from benchmarks.distributed_schemes import (
    MEGATRON,
    SCHEMES,
    TWICE,
    VOCABULARY,
    gathered_whole,
    overlapped,
    streamed,
    vocabulary_parallel,
)

GIB = 2**30
V, D = 128256, 8192  # Llama-3-70B's head: 2,101,346,304 bytes in bf16


@pytest.mark.parametrize(
    ("kind", "bytes_", "group", "expected"),
    [
        # 14 hops; 7/8 of it twice at 370.8 GB/s: 8.4 + 47.6 + 4719.5 us
        ("all_reduce", 10**9, packed(8), 4775.5e-6),
        # LL's ring: 6.6 + 14 * 0.6 us; the tree takes 15.2
        ("all_reduce", 8, packed(8), 15.0e-6),
        # LL's tree: 6.8 + 2 (7 * 0.6 + 7 * 5.0) us; 2046 hops of a ring take 2 ms and more
        ("all_reduce", 8, packed(1024), 85.2e-6),
        # One rank a node, one adapter: LL128's tree, 14 + 2 * 4 * 8.5 us and twice 10^6 bytes at 43.125 GB/s
        ("all_reduce", 10**6, Group(16, 1), (82 + 46.38) * 1e-6),
        # 8.4 + 7 * 3.4 us, 7/8 of it at 370.8 GB/s
        ("all_gather", 10**9, packed(8), 2391.9e-6),
        ("reduce_scatter", 10**9, packed(8), 2391.9e-6),
        # All of it passes each link; 8.4 + 8 * 4 us
        ("broadcast", 10**9, packed(8), 2737.3e-6),
        # 8 of 16 leave the node, through one adapter: 8.4 + 14 us, half of it at 50 GB/s
        ("all_to_all", 10**6, packed(16), 32.4e-6),
        ("all_reduce", 10**9, packed(1), 0.0),
    ],
)
def test_seconds_of_a_collective(kind, bytes_, group, expected):
    assert Collective(kind, bytes_, group).seconds == pytest.approx(expected, rel=1e-4)


def test_bytes_on_the_wire():
    def wire(*collectives):
        return sum(c.wire for c in collectives)

    head = 2 * V * D
    assert wire(*gathered_whole(D, V, packed(8))) == pytest.approx(2 * 7 / 8 * head)
    assert wire(*gathered_whole(D, V, packed(8), times=2)) == pytest.approx(3 * 7 / 8 * head)
    # 41 numbers, 1 and 2 float64 a token, dH in fp32.
    assert wire(*vocabulary_parallel(100, D, packed(4))) == 1.5 * (8 * 57 + 8 * 100 + 16 * 100 + 4 * 100 * D)
    assert wire(*vocabulary_parallel(100, D, packed(4), sums=2, tops=1)) == 1.5 * (456 + 1600 + 3200 + 400 * D)
    sent = streamed(100, D, V, 16384, 8, packed(8))
    assert wire(*sent.head, *sent.again, *sent.dw) == pytest.approx(7 / 8 * (2 + 4) * V * D)  # bf16 rows, dW in fp32
    assert wire(*sent.labels) == 2 * 7 / 8 * (8 * 8 + 8 * 100 + 2 * 100 * D)


@pytest.mark.parametrize("ranks", [2, 8, 24, 1000, 1024])
def test_chunks_make_up_the_head(ranks):
    """Each takes as many rows of every shard; shards are padded to one length."""
    sent = streamed(7, 1, V, 5000, 3, packed(ranks))
    rows, shard = 5000 // ranks, -(-V // ranks)
    assert [c.bytes for c in sent.head[:-1]] == [2 * ranks * rows] * (-(-shard // rows) - 1)
    assert sent.again == sent.head[3:]
    assert sum(c.bytes for c in sent.dw) == 4 * ranks * shard
    assert sum(c.bytes for c in sent.head) == 2 * ranks * shard


def test_memory_of_the_large_head():
    def memory(name, ranks):
        return steps()[LARGE, name, ranks].memory

    whole = 2 * V * D
    ddp, fsdp, shard = memory("replicated (DDP)", 8), memory("gathered once (FSDP2)", 8), memory(VOCABULARY, 8)
    assert (ddp.weights, ddp.gradient) == (whole, 2 * whole)  # and the bucket
    assert fsdp.weights == fsdp.gradient == whole + whole // 8
    assert shard.weights == shard.gradient == whole // 8
    # 2048 tokens a rank or 16384 of the group on an eighth of the rows: bf16 exponentials of 2048 V either way.
    assert ddp.exponentials == fsdp.exponentials == shard.exponentials == 2 * 2048 * V
    # A softmax in fp32, and bf16 logits and dH.
    megatron = memory(MEGATRON, 8)
    assert (megatron.exponentials, megatron.buffers) == (4 * 2048 * V, 2 * 2048 * V + 2 * 16384 * D)
    streaming = memory("streamed", 8)  # two chunks of 16384 rows: bf16 ones, of dW fp32 ones, and sums of an eighth
    assert (streaming.weights, streaming.gradient) == (whole // 8 + 4 * 16384 * D, whole // 8 + 9 * 16384 * D)


def test_time_is_that_of_its_parts():
    for (_, name, ranks), step in steps().items():
        talking = sum(c.seconds for c in step.collectives)
        assert step.compute <= step.seconds <= step.compute + talking + 1e-12
        assert (ranks == 1) == (not step.collectives)
        if name in ("replicated (DDP)", "gathered once (FSDP2)", TWICE):  # nothing is hidden
            assert step.seconds == pytest.approx(step.compute + talking)
    alone = {steps()[LARGE, name, 1].seconds for name in SCHEMES if "Megatron" not in name and "TRL" not in name}
    assert len(alone) == 1  # on one rank all of ours are the same call


def test_chunks_move_behind_products():
    assert overlapped([5.0], 2.0) == 7.0  # one chunk hides nothing
    assert overlapped([1.0, 1.0, 1.0], 2.0) == 1 + 2 + 2 + 2
    assert overlapped([3.0, 3.0, 3.0], 2.0) == 3 + 3 + 3 + 2


def test_the_page_has_the_tables_of_the_model():
    text = distributed_model.DOC.read_text()
    assert distributed_model.written(text) == text, "run `python -m benchmarks.distributed_model --write`"
    for name in (distributed_model.MEMORY_PICTURE, distributed_model.TIME_PICTURE):
        assert f"]({name})" in text
        assert (distributed_model.DOC.parent / name).exists()


def test_pictures_are_drawn_from_the_rows():
    pytest.importorskip("matplotlib", reason="needs the test extra: matplotlib")
    (memory,) = distributed_model.memory_picture().axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in memory.get_lines()}
    assert drawn.keys() == SCHEMES.keys() - {TWICE}
    for name, values in drawn.items():
        assert values == [steps()[LARGE, name, ranks].memory.total / GIB for ranks in RANKS]
    panels = distributed_model.time_picture().axes
    assert [panel.get_title() for panel in panels] == list(HEADS)
    for panel in panels:
        for line in panel.get_lines():
            model, name = panel.get_title(), line.get_label()
            assert list(line.get_ydata()) == [1e3 * steps()[model, name, ranks].seconds for ranks in RANKS]


def test_what_the_page_says_of_the_schemes():
    def of(name, ranks, model=LARGE):
        return steps()[model, name, ranks]

    small, ours = "Llama-3-8B", [name for name in SCHEMES if name not in (MEGATRON, "TRL 1.16 on FSDP2")]
    for model in HEADS:
        assert min(ours, key=lambda name: of(name, 8, model).wire) == VOCABULARY
        assert of("streamed", 8, model).seconds == pytest.approx(
            of("gathered once (FSDP2)", 8, model).seconds, rel=0.15
        )
        assert of("streamed", 64, model).seconds == pytest.approx(
            of("gathered once (FSDP2)", 64, model).seconds, rel=0.1
        )
        assert of("streamed", 1024, model).seconds > of("gathered twice (FSDP2)", 1024, model).seconds
    assert of(VOCABULARY, 8).seconds < of(MEGATRON, 8).seconds
    assert of(MEGATRON, 8).memory.total < of(VOCABULARY, 8).memory.total
    assert of(VOCABULARY, 8, small).seconds < of(MEGATRON, 8, small).seconds
    assert of(VOCABULARY, 8, small).memory.total < of(MEGATRON, 8, small).memory.total
    dh, weights = (
        [c.wire for c in made] for made in (vocabulary_parallel(V // 2, D, packed(8)), gathered_whole(D, V, packed(8)))
    )
    assert dh[-1] == pytest.approx(sum(weights))
    # A chunk comes during two products and leaves, in fp32, during one: 4 N R D and 2 N R D operations at 717 TFLOP/s.
    come, leave = 717.3e12 * 2 / (4 * 370.8e9), 717.3e12 * 4 / (2 * 370.8e9)
    assert f"from {come:.0f} tokens" in distributed_model.hidden_from()
    assert f"from {leave:.0f}," in distributed_model.hidden_from()
