"""How the vocabulary is cut: every row once, what is kept within its bytes, sizes that the products like."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from asft_kernels.backends import exp_dtype
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import (
    default_cache_bytes,
    default_chunk,
    filled_chunk,
    make_plan,
    token_blocks,
    traced_chunk,
    weight_slice,
)
from asft_kernels.backends.streamed_order import StreamedOrder
from asft_kernels.backends.token_stats import Wanted
from asft_kernels.core import linear_logps
from asft_kernels.kernels.configs import multiprocessors

DEVICES = st.sampled_from(["cpu", "cuda"])


@given(
    n=st.integers(0, 10_000), vocab=st.integers(1, 300_000), hidden_size=st.integers(1, 8192),
    exp_bytes=st.sampled_from([2, 4, 8]), chunk=st.none() | st.integers(64, 400_000), cache=st.integers(0, 2**34),
    device=DEVICES,
)  # fmt: skip
def test_every_row_once_and_the_cache_within_its_bytes(n, vocab, hidden_size, exp_bytes, chunk, cache, device):
    plan = make_plan(
        n, vocab, hidden_size, exp_bytes=exp_bytes, chunk_size=chunk, cache_bytes=cache, device_type=device
    )
    borders = [0, *(stop for _, stop in plan.slices)]
    assert [start for start, _ in plan.slices] == borders[:-1]
    assert borders[-1] == vocab
    assert all(0 < stop - start <= plan.chunk for start, stop in plan.slices)
    row = exp_bytes * max(n, 1)
    assert row * borders[plan.cached] <= cache
    if plan.cached < len(plan.slices):
        assert row * borders[plan.cached + 1] > cache, "one more chunk would have fitted"


@given(vocab=st.integers(1, 300), ranks=st.integers(1, 12), chunk=st.integers(1, 400), cache=st.integers(0, 3000))
def test_a_streamed_chunk_has_the_same_rows_of_every_shard(vocab, ranks, chunk, cache):
    """torch.chunk's shards; each chunk's rows as an all-gather leaves them, those that are not there last."""
    order = StreamedOrder.of(vocab, ranks, chunk)
    plan = make_plan(3, vocab, 8, exp_bytes=2, chunk_size=chunk, cache_bytes=cache, device_type="cpu", order=order)
    shards = list(torch.arange(vocab).chunk(ranks))
    rows = order.all_rows(torch.device("cpu"))
    for k, (start, stop) in enumerate(plan.slices):
        first, last = order.of_shard(k)
        gathered = torch.full((ranks, last - first), -1)
        for rank, shard in enumerate(shards):
            own = shard[first:last]
            gathered[rank, : len(own)] = own
        assert gathered.flatten()[: stop - start].equal(rows[start:stop])
        assert (gathered.flatten()[stop - start :] == -1).all()
        assert stop - start <= plan.chunk <= max(chunk, ranks)
    assert rows.sort()[0].equal(torch.arange(vocab))
    assert rows[order.all_places(torch.device("cpu"))].equal(torch.arange(vocab))
    borders = plan.borders(torch.device("cpu")).tolist()
    assert borders == [0, *(stop for _, stop in plan.slices)]
    assert 6 * borders[plan.cached] <= cache
    assert plan.cached == len(plan.slices) or 6 * borders[plan.cached + 1] > cache


def test_a_cache_of_exactly_all_exponentials_keeps_them():
    """The last chunk is narrower: it costs what it is, not a whole one."""
    sizes = {"exp_bytes": 4, "chunk_size": 1000, "device_type": "cpu"}
    assert make_plan(512, 2500, 64, cache_bytes=4 * 512 * 2500, **sizes).cached == 3
    assert make_plan(512, 2500, 64, cache_bytes=4 * 512 * 2500 - 1, **sizes).cached == 2


@given(
    n=st.integers(1, 100_000), hidden_size=st.integers(1, 16384), device=DEVICES, intel=st.booleans(),
    copies=st.booleans(),
)  # fmt: skip
def test_chunks_by_default(n, hidden_size, device, intel, copies):
    """Multiples of 64 rows; E and the rows of W (a GPU's where it copies them) within their bytes unless the floor of
    rows is more."""
    rows = default_chunk(n, hidden_size, exp_bytes=4, device_type=device, intel=intel, copies=copies)
    limits = {"cpu": (2**22, 2**23, 1024) if intel else (2**20, 2**21, 512), "cuda": (2**28, 2**29, 4096)}
    exps, weight, floor = limits[device]
    weight = weight if copies or device == "cpu" else 2**62
    assert rows % 64 == 0
    assert rows >= floor
    assert rows == floor or (4 * n * rows <= exps and 4 * hidden_size * rows <= weight)
    wider = rows + 64
    assert 4 * n * wider > exps or 4 * hidden_size * wider > weight, "a wider chunk would have fitted"


def full_turns(rows: int, n: int, vocab: int, multiprocessors: int) -> tuple[int, float]:
    """(turns of all chunks' tiles, those that would do if each were full)."""
    tiles = [-(-n // 128) * -(-min(rows, vocab - k) // 256) for k in range(0, vocab, rows)]
    return sum(-(-t // multiprocessors) for t in tiles), sum(tiles) / multiprocessors


@pytest.mark.parametrize(
    ("n", "vocab", "multiprocessors", "rows", "turns"),
    [
        (8192, 151936, 132, 16896, 288),  # the 288 that 287.99 need; chunks of 16384 take 298
        (2048, 151936, 132, 67584, 72),
        (8192, 128256, 132, 16896, 243),
    ],
)
def test_chunks_that_fill_a_chip(n, vocab, multiprocessors, rows, turns):
    fit = default_chunk(n, 4096, exp_bytes=2, device_type="cuda")
    assert filled_chunk(fit, n, vocab, multiprocessors) == rows
    assert full_turns(rows, n, vocab, multiprocessors)[0] == turns
    plan = {"exp_bytes": 2, "chunk_size": None, "cache_bytes": 0, "device_type": "cuda"}
    assert make_plan(n, vocab, 4096, multiprocessors=multiprocessors, **plan).chunk == rows
    assert make_plan(n, vocab, 4096, **plan).chunk == fit


@pytest.mark.parametrize(
    ("dtype", "backend", "make", "copied"),
    [
        (torch.bfloat16, "triton", HeadRows, False),
        (torch.float32, "triton", HeadRows, False),
        (torch.bfloat16, "torch", HeadRows, True),  # to fp32
        (torch.float16, "triton", HeadRows, True),  # likewise
        (torch.bfloat16, "triton", lambda w: HeadRows(w.t().contiguous().t()), True),  # made row-major
        (torch.bfloat16, "triton", lambda w: HeadRows(w, w.new_empty(len(w), 16)), True),  # LoRA: side by side
    ],
)
def test_a_few_tokens_take_one_chunk_of_a_head_that_is_read_as_it_is(dtype, backend, make, copied):
    """Elsewhere the rows that are made anew have their own limit: 512 MiB in fp32."""
    weight = torch.empty(151_936, 4096, dtype=dtype, device="meta")
    hidden, rows = weight.new_empty(512, 4096), torch.empty(512, device="meta")
    head = make(weight)
    plan = linear_logps._plan(hidden, head, rows, backend, None, 0)
    needs = (True, False, False, False)
    sizes = linear_logps._sizes(hidden, head, None, rows, backend, None, None, 0, needs, Wanted())
    assert sizes.plan == plan  # what an out-of-memory error tells of is the call's own
    by_exps = 2**28 // (512 * exp_dtype(backend, dtype).itemsize)
    by_weight = 2**29 // (4 * head.size[1]) // 64 * 64
    assert plan.chunk == (by_weight if copied else min(151_936, by_exps))


def test_a_call_asks_for_the_multiprocessors_that_are_there(monkeypatch):
    """Unless the caller has said how many rows a chunk has; a fake tensor of a machine without a GPU has none."""
    hidden, weight, rows = (torch.empty(shape, device="meta") for shape in ((9, 64), (200_000, 64), (8192,)))
    head = HeadRows(weight)
    monkeypatch.setattr(linear_logps, "multiprocessors", lambda device: 132)
    fit = default_chunk(8192, 64, exp_bytes=4, device_type="meta")
    asked = filled_chunk(fit, 8192, 200_000, 132)
    assert asked != fit
    assert linear_logps._plan(hidden, head, rows, "triton", None, 0).chunk == asked
    assert linear_logps._plan(hidden, head, rows, "triton", 1000, 0).chunk == 1000
    monkeypatch.undo()
    with FakeTensorMode():
        assert multiprocessors(torch.empty(1, device="cuda").device) == 0 or torch.cuda.is_available()


@given(
    n=st.integers(1, 70_000), vocab=st.integers(1, 300_000), hidden_size=st.integers(1, 8192),
    multiprocessors=st.integers(1, 304),
)  # fmt: skip
def test_a_filled_chunk_is_near_and_never_slower(n, vocab, hidden_size, multiprocessors):
    fit = default_chunk(n, hidden_size, exp_bytes=2, device_type="cuda")
    rows = filled_chunk(fit, n, vocab, multiprocessors)
    if vocab <= fit:
        assert rows == fit
        return
    assert rows % 256 == 0
    assert max(4096, 3 * fit / 4 - 256) <= rows <= fit * 17 / 16
    whole = fit // 256 * 256
    cost = [full_turns(r, n, vocab, multiprocessors)[0] + -(-vocab // r) for r in (rows, whole)]
    assert cost[0] <= cost[1]


@pytest.mark.parametrize(("device", "rows", "on_intel"), [("cpu", 1024, 4096), ("cuda", 2**18, 2**18)])
def test_chunks_follow_the_processor_that_is_here(monkeypatch, device, rows, on_intel):
    """Eager and traced; the process's own answer, which a GPU's chunks do not ask for."""
    sizes = {"exp_bytes": 4, "device_type": device}
    assert default_chunk(256, 512, **sizes) == rows
    assert traced_chunk(64, **sizes) == {"cpu": 512, "cuda": 8192}[device]
    monkeypatch.setattr("asft_kernels.backends.processor.INTEL", True)
    assert default_chunk(256, 512, **sizes) == on_intel
    assert traced_chunk(64, **sizes) == {"cpu": 1024, "cuda": 8192}[device]


@given(n=st.integers(0, 100_000), device=DEVICES)
def test_blocks_of_tokens(n, device):
    """Every token once, in order, in runs that differ by one token at most; on a GPU in one run."""
    blocks = token_blocks(n, device)
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert blocks[-1].stop == n
    lengths = {b.stop - b.start for b in blocks}
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= (1024 if device == "cpu" else n)
    assert len(blocks) == (max(1, -(-n // 1024)) if device == "cpu" else 1)


@given(chunk=st.integers(1, 40_000), hidden_size=st.sampled_from([64, 576, 2560, 3072, 3584, 4096, 5120, 8192, 2**20]))
def test_slices_of_the_weights_gradient(chunk, hidden_size):
    """Within 32 MiB of fp32, or 64 rows; whole chunks or multiples of 64 rows, so that columns of E stay aligned."""
    rows = weight_slice(chunk, hidden_size)
    assert 1 <= rows <= chunk
    assert rows == chunk or rows % 64 == 0
    assert 4 * hidden_size * rows <= 32 * 2**20 or rows <= 64


@pytest.mark.parametrize(("device", "mib"), [("cpu", 1024), ("cuda", 2560), ("hip", 2560)])
def test_default_cache(device, mib):
    assert default_cache_bytes(device) == mib * 2**20
