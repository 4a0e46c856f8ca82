"""Each kernel alone against float64, with a bound derived beside it: interpreted, emulated, or on a GPU.

u = 2**-24 is one fp32 rounding. Bounds count roundings of the worst path and add 1 % for second-order
terms; `stored(dtype)` is the rounding of the store. Fresh memory is NaN (conftest), so a finite
result is a written one.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from asft_kernels.core.batch import _ends, _find, pack
from asft_kernels.kernels import device_math
from asft_kernels.kernels.asft_sequence import asft_sequence, asft_sequence_grad
from asft_kernels.kernels.configs import Strips, Tile, architecture_of, candidates
from asft_kernels.kernels.exp_epilogue import empty_exps
from asft_kernels.kernels.grad_bias import grad_bias
from asft_kernels.kernels.grad_hidden import grad_hidden
from asft_kernels.kernels.label_gradient import DistinctLabels, LabelGradient
from asft_kernels.kernels.label_logits import label_logits
from asft_kernels.kernels.label_rows import label_rows
from asft_kernels.kernels.logits_exp import logits_exp, operand_rows
from asft_kernels.kernels.pack_labels import pack_labels
from asft_kernels.kernels.products import add_product
from asft_kernels.kernels.row_statistics import close_statistics, row_factors
from asft_kernels.kernels.scaled_hidden import scaled_hidden
from asft_kernels.kernels.settle import resettle, settle
from bounds import unit_roundoff

u = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(interpreted: list, emulated: list) -> list:
    """One table for two processes: the emulator gets its own, smaller rows."""
    as_params = [row if isinstance(row, tuple) else (row,) for row in interpreted]
    emulated = [row if isinstance(row, tuple) else (row,) for row in emulated]
    return [pytest.param(*row, marks=pytest.mark.interpreter) for row in as_params] + [
        pytest.param(*row, marks=pytest.mark.emulated) for row in emulated
    ]


def exp_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def stored(dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.float32 else 1.01 * unit_roundoff(dtype)


def assert_within(got, exact, bound, dtype=torch.float32) -> None:
    got, exact = got.cpu().double(), exact.cpu().double()
    assert got.shape == exact.shape
    assert got.isfinite().all(), "not finite, or never written"
    bound = 1.01 * bound + stored(dtype) * exact.abs() + torch.finfo(dtype).tiny
    excess = (got - exact).abs() - bound
    worst = excess.argmax() if excess.numel() else 0
    assert not (excess > 0).any(), f"{got.flatten()[worst]} should be {exact.flatten()[worst]}"


class Inputs:
    """N tokens scattered over M rows of hidden, whose unused rows are NaN; peaked labels and rivals."""

    def __init__(self, N, V, D, dtype, device, *, bias=False, rivals=True):
        gen = torch.Generator().manual_seed(N * 1000 + V)
        M = N + N // 3 + 1
        self.rows = torch.randperm(M, generator=gen)[:N]
        self.hidden = torch.full((M, D), torch.nan)
        self.hidden[self.rows] = torch.randn(N, D, generator=gen)
        self.weight = torch.randn(V, D, generator=gen) / math.sqrt(D)
        self.labels = torch.randint(V, (N,), generator=gen)
        if rivals and N > 6 and V > 20:
            # Rows of the head parallel to a token's hidden state: logits far above that token's label.
            for t, v, gap in ((1, V // 2, 31.0), (2, V - 1, 45.0), (2, V // 3, 20.0), (5, 3, 205.0)):
                h = self.hidden[self.rows[t]]
                self.weight[v] = h * gap / h.square().sum()
            self.labels[[1, 2, 5]] = V // 4
            self.labels[3] = V - 1
        self.bias = torch.randn(V, generator=gen).to(dtype).to(device) if bias else None
        self.hidden, self.weight = (x.to(dtype).to(device) for x in (self.hidden, self.weight))
        self.rows, self.labels = self.rows.to(device), self.labels.to(device)

    def exact_logits(self, scale=1.0, softcap=None):
        """(z, dz): float64 logits of all tokens, and what fp32 summation in any order may add to them.

        A sum of D products, a bias and a scale: D + 2 roundings of at most u * sum |h w|. The softcap
        does not magnify it (slope <= 1) and adds some 8 roundings of z.
        """
        h, w = self.hidden.cpu().double()[self.rows.cpu()], self.weight.cpu().double()
        b = 0.0 if self.bias is None else self.bias.cpu().double()
        z = scale * (h @ w.T + b)
        size = abs(scale) * (h.abs() @ w.abs().T + abs(b))
        dz = (h.shape[1] + 2) * u * size
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
            dz = dz + 8 * u * z.abs()
        return z, dz

    def exact_slopes(self, scale, softcap):
        """(c, dc): an error du of u is a relative one of at most 2 du / softcap of c, next to slope_error."""
        z, dz = self.exact_logits(scale)
        c = 1 / torch.cosh(z / softcap).square()
        return c, c * (2 * dz / softcap + slope_error(z, softcap))


# --- device_math


def slope_error(x, cap):
    """Relative error of c: exp within 4 roundings, its argument's 2 magnified by 2 |x| / cap; 8 more."""
    return u * (12 + 4 * x.abs().clamp(max=50 * cap) / cap)


@triton.jit
def _apply_kernel(out_ptr, x_ptr, n, cap, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if WHICH == "log1p":
        y = device_math.log1p(x)
    elif WHICH == "expm1":
        y = device_math.expm1(x)
    elif WHICH == "softplus":
        y = device_math.softplus(x)
    elif WHICH == "sigmoid":
        y = device_math.sigmoid(x)
    elif WHICH == "softcap_logits":
        y = device_math.softcap_logits(x, cap)
    else:
        y = device_math.softcap_slope(x, cap)
    tl.store(out_ptr + i, y, mask=i < n)


TINY_TO_HUGE = 10.0 ** torch.linspace(-28, 30, 200, dtype=torch.float64)
AROUND_HALF = torch.linspace(0.45, 0.55, 33, dtype=torch.float64)


@pytest.mark.parametrize(
    "which", both(*[["log1p", "expm1", "softplus", "sigmoid", "softcap_logits", "softcap_slope"]] * 2)
)
def test_device_math(which, device):
    """Relative errors: a series or quotient of some 8 operations, or exp and log, which chips round
    within 4 units and whose argument's rounding exp magnifies by |x|; 1 - exp magnifies by 2.6."""
    grid = torch.cat([TINY_TO_HUGE, AROUND_HALF, torch.linspace(0.6, 60, 99, dtype=torch.float64)])
    both_signs = torch.cat([-grid, torch.zeros(1, dtype=torch.float64), grid])
    if which == "log1p":
        x = torch.cat([grid, -AROUND_HALF[:16], -TINY_TO_HUGE[:100]])
        x = x[x > -0.5].float()
        exact, bound = torch.log1p(x.double()), 10 * u
    elif which == "expm1":
        x = both_signs[both_signs < 80].float()
        exact, bound = torch.expm1(x.double()), 8 * u + 2.6 * u * (4 + x.double().clamp(-40).abs())
    elif which == "softplus":
        x = both_signs.float()
        exact = torch.nn.functional.softplus(x.double(), threshold=1000)
        bound = 14 * u + u * x.double().clamp(-100, 0).abs()
    elif which == "sigmoid":
        x = both_signs.float()
        exact, bound = torch.sigmoid(x.double()), 8 * u + u * x.double().clamp(-100, 0).abs()
    elif which == "softcap_logits":
        x = both_signs.float()
        exact, bound = 30 * torch.tanh(x.double() / 30), 20 * u
    else:
        x = both_signs.float()
        exact = 1 / torch.cosh(x.double() / 30).square()  # down to where fp32 has no such small numbers
        bound = slope_error(x.double(), 30)
    out = torch.full_like(x, torch.nan).to(device)
    _apply_kernel[(triton.cdiv(len(x), 512),)](out, x.to(device), len(x), 30.0, WHICH=which, BLOCK=512)
    assert_within(out, exact, bound * exact.abs())


# --- label_logits and logits_exp


class TwoTiles(Strips):
    """Strips of two tiles, however few tokens there are."""

    def rows(self, n_tokens, width):
        return min(2 * self.BLOCK_V, width)


TWO_TILES = TwoTiles(0, 4, 16, 4, "a test's")
LOGIT_OPTIONS = [(1.0, None, False), (0.7, None, True), (1.3, 8.0, True), (0.5, 30.0, False)]
SHAPES = [(1, 1, 1), (7, 33, 5), (40, 123, 67)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap", "bias"), LOGIT_OPTIONS)
@pytest.mark.parametrize(("N", "V", "D"), both([*SHAPES, (11, 21, 1030)], [(9, 33, 67)]))
def test_label_logits(N, V, D, scale, softcap, bias, dtype, device):
    x = Inputs(N, V, D, dtype, device, bias=bias)
    got = label_logits(x.hidden, x.weight, x.bias, x.rows, x.labels, scale=scale, softcap=softcap)
    own = x.labels.cpu()[:, None]
    z, dz = (a.gather(1, own)[:, 0] for a in x.exact_logits(scale, softcap))
    assert_within(got, z, dz)
    if softcap is not None:
        got = label_logits(x.hidden, x.weight, x.bias, x.rows, x.labels, scale=scale, softcap=softcap, slope=True)
        c, dc = (a.gather(1, own)[:, 0] for a in x.exact_slopes(scale, softcap))
        assert_within(got, c, dc)


@pytest.mark.interpreter
def test_label_logits_reads_a_transposed_head(device):
    x = Inputs(9, 33, 20, torch.float32, device)
    columns = x.weight.t().contiguous().t()
    assert columns.stride(1) != 1
    arguments = (None, x.rows, x.labels)
    z, dz = (a.gather(1, x.labels.cpu()[:, None])[:, 0] for a in x.exact_logits())
    assert_within(label_logits(x.hidden, columns, *arguments, scale=1.0, softcap=None), z, dz)


@pytest.mark.parametrize("sums", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("store", [True, False], ids=["store", "no store"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (1.3, 40.0, True)])
@pytest.mark.parametrize(
    ("N", "V", "D", "first", "stop"),
    both([(1, 1, 1, 0, 1), (7, 33, 5, 0, 33), (70, 251, 37, 100, 251), (33, 123, 67, 64, 97)], [(9, 75, 40, 20, 75)]),
)
def test_logits_exp(N, V, D, first, stop, scale, softcap, bias, dtype, store, sums, device):
    """E' = exp(z - q) c: exp turns an absolute error of its argument into a relative one, dz of z
    and u |z - q| of the difference, and is itself within 4 roundings; c is off by dc. A tile's
    sum adds at most BLOCK_V of its roundings, all positive."""
    if not store and not sums:
        return
    tile = candidates("other", dtype, softcap=softcap is not None)[0]
    check_logits_exp(Inputs(N, V, D, dtype, device, bias=bias), first, stop, scale, softcap, store, sums, tile)


@pytest.mark.parametrize(("store", "sums"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (1.3, 40.0, True)])
@pytest.mark.parametrize(("N", "V", "D", "first", "stop"), both([(11, 105, 37, 30, 105)], [(9, 75, 40, 20, 75)]))
def test_logits_exp_in_strips(N, V, D, first, stop, scale, softcap, bias, dtype, store, sums, device):
    """Strips of 32 columns, two tiles each, the last one partial."""
    check_logits_exp(Inputs(N, V, D, dtype, device, bias=bias), first, stop, scale, softcap, store, sums, TWO_TILES)


def tiles_for(device, dtype, softcap) -> list[Tile | Strips]:
    """Every candidate of the device's own table; interpreted, small ones that take the same ways."""
    if device == "cuda":
        return list(candidates(architecture_of(torch.device(device)), dtype, softcap=softcap is not None))
    small = Tile(32, 16, 16, 4, 2, "a test's", GROUP=2, descriptors=True)
    return [
        small,
        replace(small, persistent=True),
        replace(small, one_loop=True),
        Strips(0, 8, 64, 4, "a test's: strips of 64 columns"),
    ]


@pytest.mark.interpreter
@pytest.mark.parametrize("sums", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (1.3, 40.0, True)])
def test_logits_exp_with_each_tile(scale, softcap, bias, dtype, sums, device):
    """With descriptors and programs that take several tiles, too; the last tiles and the last step of D are partial."""
    N, V, D, first, stop = (500, 30000, 264, 1000, 25000) if device == "cuda" else (70, 131, 40, 50, 130)
    for tile in tiles_for(device, dtype, softcap):
        x = Inputs(N, V, D, dtype, device, bias=bias)
        for store in (True, False) if sums else (True,):
            check_logits_exp(x, first, stop, scale, softcap, store, sums, tile)


def check_logits_exp(x, first, stop, scale, softcap, store, sums, tile):
    N, device, dtype = len(x.rows), x.hidden.device, x.hidden.dtype
    z, dz = (a[:, first:stop] for a in x.exact_logits(scale, softcap))
    own = x.labels.cpu()
    z_y = x.exact_logits(scale, softcap)[0].gather(1, own[:, None])[:, 0]
    # Without sums, as in phase 2, r is final: nothing passes it by more than 30.
    ref = z_y.float() if sums else torch.maximum(z_y, z.amax(1) - 29).float()
    exps = empty_exps(N, stop - first, exp_dtype(dtype), device).fill_(torch.nan) if store else None
    result = logits_exp(
        exps, operand_rows(x.hidden, x.rows, tile), x.weight[first:stop],
        None if x.bias is None else x.bias[first:stop], x.rows, x.labels, ref.to(device),
        first=first, scale=scale, softcap=softcap, sums=sums, tile=tile,
    )  # fmt: skip

    columns = torch.arange(first, stop)
    counted = columns[None, :] != own[:, None]
    q = ref.double()[:, None].expand_as(z)
    if sums:
        tile_sums, tile_refs, width = result
        tiles = triton.cdiv(stop - first, width)
        tile_of = (columns - first) // width
        assert tile_refs.shape == tile_sums.shape == (tiles, N)
        q = tile_refs.cpu().double()[tile_of].T
        for i in range(tiles):
            inside = counted & (tile_of == i)
            top, at = z.masked_fill(~inside, -torch.inf).max(1)
            moved = top > ref.double() + 30
            same = tile_refs[i].cpu() == ref
            near = (tile_refs[i].cpu().double() - top).abs() <= 1.01 * dz.gather(1, at[:, None])[:, 0]
            assert torch.where(moved, near, same).all()
    else:
        assert result is None
    error = dz + u * (z - q).abs() + 5 * u
    e = torch.exp(z - q) * counted
    if sums:
        for i in range(tiles):
            part = tile_of == i
            bound = (e * (error + width * u))[:, part].sum(1)
            assert_within(tile_sums[i], e[:, part].sum(1), bound)
    if store:
        if softcap is not None:
            c, dc = (a[:, first:stop] for a in x.exact_slopes(scale, softcap))
            bound = e * (c * error + dc)
            e = e * c
        else:
            bound = e * error
        assert_within(exps, e, bound + 1e-37, exps.dtype)
        assert (exps.cpu()[~counted] == 0).all()


@pytest.mark.interpreter
def test_logits_exp_moves_the_reference_only_where_needed(device):
    """The cases that the table above relies on do occur: tiles that stay, and tiles that move."""
    x = Inputs(70, 251, 37, torch.float32, device)
    z_y = label_logits(x.hidden, x.weight, None, x.rows, x.labels, scale=1.0, softcap=None)
    _, refs, _ = logits_exp(
        None,
        x.hidden,
        x.weight,
        None,
        x.rows,
        x.labels,
        z_y,
        first=0,
        scale=1.0,
        softcap=None,
        sums=True,
        tile=candidates("other", torch.float32, softcap=False)[0],
    )
    moved = (refs != z_y).cpu()
    assert moved.any(0)[[1, 2, 5]].all()  # the rivals' tokens
    assert not moved.all(0).any()  # never in all tiles
    assert moved.float().mean() < 0.1  # and hardly ever elsewhere
    assert (refs - z_y).max() > 200


@pytest.mark.parametrize("softcap", both([None, 20.0], [None, 20.0]))
def test_logits_exp_of_infinite_logits(softcap, device):
    """Biases of -inf: in a tile of nothing else the reference of a token whose label is -inf stays -inf and
    its sums are 0; where a finite logit is, that is the reference. A softcap makes -softcap of -inf."""
    N, V = 9, 75
    x = Inputs(N, V, 13, torch.float32, device, bias=True, rivals=False)
    x.bias[:64] = -torch.inf
    x.labels[:] = torch.tensor([1, 40, 70, 1, 70, 1, 74, 63, 64])
    z = x.exact_logits(1.0, softcap)[0]
    ref = z.gather(1, x.labels.cpu()[:, None])[:, 0].float()
    exps = empty_exps(N, V, torch.float32, device).fill_(torch.nan)
    sums, refs, width = logits_exp(
        exps, x.hidden, x.weight, x.bias, x.rows, x.labels, ref.to(device),
        first=0, scale=1.0, softcap=softcap, sums=True,
        tile=candidates("other", torch.float32, softcap=softcap is not None)[0],
    )  # fmt: skip
    counted = torch.arange(V)[None, :] != x.labels.cpu()[:, None]
    for i, part in enumerate(z.split(width, 1)):
        mask = counted.split(width, 1)[i]
        q = refs[i].cpu().double()
        top = part.masked_fill(~mask, -torch.inf).amax(1)
        assert torch.equal(q == -torch.inf, torch.maximum(ref.double(), top) == -torch.inf)
        base = q.masked_fill(q == -torch.inf, 0)
        e = torch.exp(part - base[:, None]) * mask
        assert_within(sums[i], e.sum(1), 1e-5 * e.sum(1))
        c = torch.ones(()) if softcap is None else x.exact_slopes(1.0, softcap)[0].split(width, 1)[i]
        assert_within(exps[:, i * width : i * width + part.shape[1]], e * c, 1e-5 * e * c)


# --- between chunks


class Settled:
    """Tile sums and references of N tokens, of which some have moved: E' and O go along."""

    def __init__(self, N, tiles, tile_width, width, D, dtype, device):
        gen = torch.Generator().manual_seed(N)
        self.ref, self.others = torch.randn(N, generator=gen), torch.rand(N, generator=gen) * 1e3
        jumps = torch.rand(tiles, N, generator=gen)
        stays = torch.rand(N, generator=gen) > 0.5
        self.refs = self.ref + torch.where((jumps > 0.8) & ~stays, 30 + 200 * (jumps - 0.8), 0.0)
        self.sums = torch.rand(tiles, N, generator=gen) * 100
        self.exps = torch.randn(N, width, generator=gen).to(dtype)
        self.acc = torch.randn(N, D, generator=gen)
        self.tile_of = torch.arange(width) // tile_width
        exps = empty_exps(N, width, dtype, device)
        exps.copy_(self.exps)
        acc, self.others_out = self.acc.clone().to(device), self.others.clone().to(device)
        self.got = settle(
            self.sums.to(device), self.refs.to(device), self.ref.to(device), self.others_out,
            exps=exps, acc=acc, tile_width=tile_width,
        ), exps.cpu(), acc.cpu()  # fmt: skip


def check_rescaled(got, x, change, dtype):
    """A product with exp(old - new): 5 roundings, and those of its argument, of the difference and of log2(e) times it.
    Rows that did not move keep every bit."""
    assert torch.equal(got[change == 0], x[change == 0])
    exact = x.double() * torch.exp(change)
    assert_within(got, exact, exact.abs() * u * (5 + 2 * change.abs()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("N", "tiles", "tile_width", "width", "D"),
    both([(1, 1, 1, 1, 1), (33, 5, 32, 150, 300), (70, 70, 2, 139, 20), (5, 3, 256, 700, 1)], [(33, 5, 16, 70, 40)]),
)
def test_settle(N, tiles, tile_width, width, D, dtype, device):
    """All terms of s are positive: each carries 4 roundings of exp and product, u |q - r'| of the exponent,
    and at most one for every later addition or rescaling (5 a block of 32 tiles, plus 40)."""
    x = Settled(N, tiles, tile_width, width, D, dtype, device)
    ref, exps, acc = x.got
    sums, refs, before, others = (a.double() for a in (x.sums, x.refs, x.ref, x.others))
    top = torch.maximum(before, refs.amax(0))
    assert torch.equal(ref.cpu().double(), top)
    logs = torch.cat([before[None], refs]) - top
    terms = torch.cat([others[None], sums]) * torch.exp(logs)
    assert_within(x.others_out, terms.sum(0), (terms * u * (44 + 5 * (tiles / 32 + 1) + 2 * logs.abs())).sum(0))
    check_rescaled(exps, x.exps, (refs - top)[x.tile_of].T, dtype)
    check_rescaled(acc, x.acc, (before - top)[:, None].expand(N, D), torch.float32)


@pytest.mark.parametrize("tiles", both([1, 40], [40]))
def test_settle_of_infinite_references(tiles, device):
    """All -inf: nothing counted yet, and no NaN. One finite tile: its sum is the sum. Entries of tiles that saw
    nothing but -inf are 0 and stay 0."""
    ref, others = torch.tensor([-torch.inf, -torch.inf, -3.0, 2.0]), torch.tensor([0.0, 0.0, 5.0, 0.0])
    refs, sums = torch.maximum(torch.full((tiles, 4), -torch.inf), ref), torch.zeros(tiles, 4)
    refs[-1, 1], sums[-1, 1] = 7.0, 2.5
    exps = empty_exps(4, 2 * tiles, torch.float32, device).copy_(torch.tensor([0.0, 0.0, 3.0, 1.0])[:, None])
    exps[1, -2:] = 1.25
    before = exps.clone()
    changed, acc = others.to(device), exps.clone()
    acc[1] = 0
    got = settle(sums.to(device), refs.to(device), ref.to(device), changed, exps=exps, acc=acc, tile_width=2)
    assert got.tolist() == [-torch.inf, 7.0, -3.0, 2.0]
    assert changed.tolist() == [0.0, 2.5, 5.0, 0.0]
    assert torch.equal(exps, before)
    assert (acc[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "width"), both([(1, 1), (40, 123), (33, 300)], [(20, 70)]))
def test_resettle(N, width, dtype, device):
    gen = torch.Generator().manual_seed(N)
    old, x = torch.randn(N, generator=gen), torch.randn(N, width, generator=gen).to(dtype)
    new = old + torch.where(torch.rand(N, generator=gen) > 0.5, 3.0, 0.0)
    old[0], new[0], x[0] = -torch.inf, (200.0 if N > 1 else -torch.inf), 0.0
    exps = empty_exps(N, width, dtype, device)
    exps.copy_(x)
    resettle(exps, old.to(device), new.to(device))
    assert (exps[0] == 0).all()
    check_rescaled(exps.cpu()[1:], x[1:], (old - new).double()[1:, None].expand(N - 1, width), dtype)


# --- row statistics


def closed(z_y, ref, others, device):
    inputs = [torch.tensor(x, dtype=torch.float32) for x in (z_y, ref, others)]
    got = close_statistics(*(x.to(device) for x in inputs))
    z_y, ref, others = (x.double() for x in inputs)
    return got, z_y, ref, others


@pytest.mark.parametrize("shift", both([0.0, -37.0, 250.0], [-37.0]))
def test_close_statistics(shift, device):
    """x = (r - z_y) + log s is off by dx = u (|r - z_y| + 4 |log s| + |x|); softplus' is at most softplus
    itself, so logp is off by logp (dx + 14 u + u |x|)."""
    s = [1e-30, 1e-12, 1e-7, 0.3, 1.0, 1.5, 77.0, 1e5, 1e13, 3e20]
    gaps = [0.0, 31.0, 80.0, 300.0]
    z_y = [shift for _ in gaps for _ in s]
    ref = [shift + gap for gap in gaps for _ in s]
    (logps, one_minus_p, inv_total), z_y, ref, s = closed(z_y, ref, s * len(gaps), device)
    x = (ref - z_y) + s.log()
    logp = -torch.nn.functional.softplus(x, threshold=1000)
    dx = u * ((ref - z_y).abs() + 4 * s.log().abs() + x.abs())
    assert_within(logps, logp, logp.abs() * (dx + 14 * u + u * x.abs()))
    total = s + torch.exp(z_y - ref)
    relative = 8 * u + u * (z_y - ref).abs() * torch.exp(z_y - ref) / total
    assert_within(one_minus_p, s / total, relative * s / total)
    assert_within(inv_total, 1 / total, relative / total)


@pytest.mark.parametrize("label", both([0.0, -1e4, 80.0], [80.0]))
def test_close_statistics_of_a_vocabulary_of_one(label, device):
    (logps, one_minus_p, inv_total), *_ = closed([label], [label], [0.0], device)
    assert (logps.item(), one_minus_p.item(), inv_total.item()) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("with_slopes", both([False, True], [True]))
def test_row_factors(with_slopes, device):
    """Two products, and with a softcap a third with c."""
    gen = torch.Generator().manual_seed(0)
    g, q, i = torch.rand(3, 300, generator=gen) - 0.5
    c = torch.rand(300, generator=gen) if with_slopes else None
    inputs = [None if x is None else x.to(device) for x in (g, q, i, c)]
    pull, push = row_factors(*inputs, scale=0.3)
    g, q, i = 0.3 * g.double(), q.double(), i.double()
    c = c.double() if with_slopes else torch.ones(300, dtype=torch.float64)
    assert_within(pull, g * q * c, (g * q).abs() * c * 4 * u)
    assert_within(push, g * i, 3 * u * (g * i).abs())


# --- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(("N", "V", "D"), both([*SHAPES, (4, 33, 1025)], [(9, 33, 67)]))
def test_grad_hidden(N, V, D, layout, dtype, device):
    """fp32 rounds each path twice (product, difference): |error| <= 2 u * size; then one store."""
    x = Inputs(N, V, D, dtype, device)
    weight = x.weight if layout == "rows" else x.weight.t().contiguous().t()
    acc, (pull, push) = torch.randn(N, D), torch.randn(2, N)
    arguments = (acc, weight, x.rows, x.labels, pull, push)
    got = grad_hidden(x.hidden, *(a.to(device) for a in arguments))
    acc, weight, rows, labels, pull, push = (a.cpu() for a in arguments)
    own = pull[:, None].double() * weight.double()[labels]
    other = push[:, None].double() * acc.double()
    exact, bound = (torch.zeros(got.shape, dtype=torch.float64) for _ in range(2))
    exact[rows], bound[rows] = own - other, 2 * u * (own.abs() + other.abs())
    assert got.dtype == dtype
    assert_within(got, exact, bound, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V", "D"), both([*SHAPES, (4, 33, 1025)], [(9, 33, 67)]))
def test_scaled_hidden(N, V, D, dtype, device):
    x = Inputs(N, V, D, dtype, device)
    push = torch.randn(N)
    got = scaled_hidden(x.hidden, x.rows, push.to(device), dtype=exp_dtype(dtype))
    exact = -push.double()[:, None] * x.hidden.cpu().double()[x.rows.cpu()]
    assert_within(got, exact, u * exact.abs(), exp_dtype(dtype))


@pytest.mark.parametrize(
    ("N", "D", "first", "stop", "dtype"),
    both(
        [*((*shape, dtype) for shape in [(1, 1, 0, 9), (40, 67, 0, 9), (40, 1030, 3, 7), (23, 5, 9, 12)]
           for dtype in DTYPES), (600, 5, 1, 9, torch.bfloat16)],
        [(20, 67, 3, 9, dtype) for dtype in DTYPES],
    ),
)  # fmt: skip
def test_label_rows(N, D, first, stop, dtype, device):
    """A run of m tokens with one label: m products and m additions onto what is there already.
    Labels are few, so runs have every length up to 12 and cross the kernel's blocks; 600 are more than its programs."""
    gen = torch.Generator().manual_seed(N)
    x = Inputs(N, 9, D, dtype, device)
    labels = torch.randint(9, (N,), generator=gen)
    labels[: N // 2] = labels[: N // 2].clamp(max=4)
    sorted_labels, order = torch.sort(labels, stable=True)
    pull, there = torch.randn(N, generator=gen), torch.randn(stop - first, D, generator=gen)
    results = []
    for _ in range(2):
        out = there.clone().to(device)
        bounds = torch.searchsorted(sorted_labels, torch.tensor([first, stop]))
        arguments = (x.rows, sorted_labels, order, pull, bounds)
        label_rows(out, x.hidden, *(a.to(device) for a in arguments), first=first)
        results.append(out.cpu())
    assert torch.equal(*results), "the order of the sums is fixed"
    terms = pull.double()[:, None] * x.hidden.cpu().double()[x.rows.cpu()]
    member = (labels[None, :] == torch.arange(first, stop)[:, None]).double()
    exact = there.double() + member @ terms
    size = there.double().abs() + member @ terms.abs()
    assert_within(results[0], exact, (member.sum(1)[:, None] + 2) * u * size)


def labels_of_every_length(N, V, gen) -> torch.Tensor:
    """Runs of 1 to some dozens in a sort, and entries that are nobody's."""
    labels = torch.randint(V, (N,), generator=gen)
    labels[: N // 2] = labels[: N // 2] % max(V // 6, 1)
    return labels


@pytest.mark.interpreter
@pytest.mark.parametrize(("N", "V", "chunk"), [(1, 1, 1), (1, 9, 4), (50, 97, 20), (200, 40, 64), (30, 3000, 999)])
def test_distinct_labels(N, V, chunk, device):
    labels = labels_of_every_length(N, V, torch.Generator().manual_seed(N))
    found = DistinctLabels(labels.to(device), V, chunk)
    values = labels.unique()
    count = len(values)
    assert found.values.tolist() == values.tolist() + [V] * (N + 1 - count)
    assert found.bounds[-1] == count
    assert torch.equal(found.values[found.index].cpu(), labels.sort().values)
    assert found.starts[:count].tolist() == [int((labels < v).sum()) for v in values]
    assert (found.starts[count:] == N).all()
    for k, first in enumerate(range(0, V, chunk)):
        begin, end = found.bounds[k : k + 2].tolist()
        assert values[begin:end].tolist() == [v for v in values.tolist() if first <= v < first + chunk]


@pytest.mark.parametrize(
    ("N", "V", "D", "chunk"),
    both(
        [(1, 1, 1, 1), (40, 123, 67, 50), (200, 140, 150, 140), (150, 700, 20, 300), (200, 200, 16, 200)],
        [(40, 70, 50, 40)],
    ),
)
def test_label_gradient(N, V, D, chunk, device):
    """N products of E' and Hs, exact in fp32 and summed, then those of a run of m tokens with each part of pull
    (three bf16 numbers hold it to 2**-24): at most N + 3 m roundings of the sum of sizes, and one store."""
    gen = torch.Generator().manual_seed(N)
    x = Inputs(N, V, D, torch.bfloat16, device)
    labels = torch.arange(N) if N == V else labels_of_every_length(N, V, gen)  # more of them than a program takes
    E = torch.rand(N, V, generator=gen).bfloat16()
    scaled, pull = torch.randn(N, D, generator=gen).bfloat16(), torch.randn(N, generator=gen)
    results = []
    for _ in range(2):
        out = torch.full((V, D), torch.nan, dtype=torch.bfloat16, device=device)
        gradient = LabelGradient(labels.to(device), V, chunk)
        gradient.columns.fill_(torch.nan)
        for k, start in enumerate(range(0, V, chunk)):
            part = E[:, start : start + chunk]
            gradient.gather(k, empty_exps(N, part.shape[1], E.dtype, device).copy_(part), start)
        gradient.write(out, *(a.to(device) for a in (scaled, x.hidden, x.rows, pull)))
        results.append(out.cpu())
    written = labels.unique()
    others = torch.ones(V, dtype=torch.bool)
    others[written] = False
    assert results[0][others].isnan().all(), "only the labels' rows are written"
    results = [result[written] for result in results]
    assert torch.equal(*results), "the order of the sums is fixed"
    member = (labels[None, :] == written[:, None]).double()
    own = pull.double()[:, None] * x.hidden.cpu().double()[x.rows.cpu()]
    other = E.double()[:, written].T
    exact = other @ scaled.double() + member @ own
    size = other @ scaled.double().abs() + member @ own.abs()
    roundings = N + 3 * member.sum(1)[:, None] + 4
    assert_within(results[0], exact, roundings * u * size, torch.bfloat16)


@pytest.mark.interpreter
def test_label_gradient_keeps_24_bits_of_pull(device):
    """The softmax part, exact in bf16, is the label part's leading 8 bits: what is left shows its last."""
    N, V, D = 16, 16, 16
    labels, one = torch.arange(N), torch.eye(N).bfloat16()
    pull = 1 + torch.arange(N) * 2.0**-23 + 2.0**-12  # 24 bits
    hidden = torch.full((N, D), 1.5).bfloat16()
    gradient = LabelGradient(labels.to(device), V, V)
    gradient.gather(0, empty_exps(N, V, torch.bfloat16, device).copy_(one), 0)
    out = torch.full((V, D), torch.nan, dtype=torch.bfloat16, device=device)
    scaled = torch.full((N, D), -1.5).bfloat16()  # minus pull's first part times h
    gradient.write(out, *(a.to(device) for a in (scaled, hidden, labels, pull)))
    exact = (1.5 * (pull.double() - 1))[:, None].expand(V, D)
    assert_within(out, exact, 1e-9, torch.bfloat16)  # fp32 sums of 1.5: an ulp is 1.2e-7, but all of these are exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V", "first"), both([(1, 1, 0), (40, 123, 0), (70, 300, 57)], [(40, 140, 57)]))
def test_grad_bias(N, V, first, dtype, device):
    """2 N terms, a product each, summed in fp32: at most 2 N + 2 roundings of the sum of sizes; one store."""
    gen = torch.Generator().manual_seed(N)
    E = empty_exps(N, V, exp_dtype(dtype), "cpu").copy_(torch.rand(N, V, generator=gen))
    labels = torch.randint(first + V + 20, (N,), generator=gen)
    pull, push = torch.randn(2, N, generator=gen)
    out = torch.full((V,), torch.nan, dtype=dtype, device=device)
    grad_bias(out, *(x.to(device) for x in (E, labels, pull, push)), first=first)
    own = (labels[:, None] == first + torch.arange(V)[None, :]) * pull.double()[:, None]
    other = push.double()[:, None] * E.double()
    assert_within(out, (own - other).sum(0), (2 * N + 2) * u * (own.abs() + other.abs()).sum(0), dtype)


# --- the ASFT sequence kernel


def exact_asft(avg_w, avg_l, lam, beta, sft_weight):
    """Loss parts and their derivatives by avg in float64, with autograd where the formula is plain and
    the linear continuation above -1e-6 written out."""
    parts = []
    for sign, avg in ((-1.0, avg_w), (1.0, avg_l)):
        a = avg.clamp(max=-1e-6).requires_grad_()
        odds = a - torch.log(-torch.expm1(a))
        value = torch.nn.functional.softplus(sign * beta * odds, threshold=1000)
        (slope,) = torch.autograd.grad(value.sum(), a)
        a, value = a.detach(), value.detach()
        parts.append((value + slope * (avg - a), slope, (sign * beta * odds).detach().abs()))
    return parts


EXTREMES = [0.0, -1e-9, -3e-7, -1e-6, -2e-6, -1e-4, -0.1, -0.7, -3.0, -20.0, -90.0, -1e4]


@pytest.mark.parametrize("beta", both([0.001, 10.0], [1.0]))
def test_asft_sequence_over_extreme_averages(beta, device):
    """Single-token sequences, so avg is exact. f = a - log(1 - p) is off by u (|a| + 2 |f| + 12); times
    beta that is the error dx of softplus' argument, a relative error of at most dx + 14 u + u |x| of
    softplus and sigmoid; the slope divides by 1 - p, off by 10 u. The last product and sum add 4 u."""
    lam, sft_weight = 0.8, 0.3
    pairs = [(w, r) for w in EXTREMES for r in EXTREMES]
    avg = torch.tensor([w for w, _ in pairs] + [r for _, r in pairs], dtype=torch.float32)
    B = len(pairs)
    offsets = torch.arange(2 * B + 1)
    got = asft_sequence(avg.to(device), offsets.to(device), lam=lam, beta=beta, sft_weight=sft_weight)
    assert torch.equal(got.sums.cpu(), avg)
    assert torch.equal(got.avgs.cpu(), avg)
    avg_w, avg_l = avg.double().split(B)
    assert_within(got.sft, -avg_w, 0.0)
    parts = exact_asft(avg_w, avg_l, lam, beta, sft_weight)
    errors = []
    for (_, _, x), a in zip(parts, (avg_w, avg_l), strict=True):
        dx = beta * u * (a.abs() + 12) + 3 * u * x
        errors.append(dx + 28 * u + u * x)
    align = parts[0][0] + parts[1][0]
    d_align = parts[0][0] * errors[0] + parts[1][0] * errors[1]
    # Beyond the floor the slope times at most 1e-6 is subtracted or added.
    d_align += 1e-6 * (parts[0][1].abs() * errors[0] + parts[1][1].abs() * errors[1]) + 2 * u * align
    assert_within(got.align, align, d_align)
    size = lam * align + sft_weight * avg_w.abs()
    assert_within(got.loss, lam * align - sft_weight * avg_w, lam * d_align + 4 * u * size)
    slopes = torch.cat([lam * parts[0][1] - sft_weight, lam * parts[1][1]])
    sizes = torch.cat([lam * parts[0][1].abs() + sft_weight, lam * parts[1][1]])
    assert_within(got.coef, slopes, sizes * (torch.cat(errors) + 4 * u))
    assert (got.coef[:B] < 0).all()
    assert (got.coef[B:] >= 0).all()
    worst = torch.tensor([r == 0.0 for _, r in pairs])
    assert (got.coef[B:].cpu()[worst] > 0).all(), "the worst rejected answers keep their gradient"


@pytest.mark.parametrize("lengths", both(
    [[3, 1, 2500, 7, 1024, 40], [0, 5, 0, 4, 0, 0], [1, 1]], [[3, 1100, 0, 7, 40, 2]]
))  # fmt: skip
def test_asft_sequence_over_lengths(lengths, device):
    """Sums of m tokens: m / 1024 blocks added lane by lane and a tree of 10 levels, all of one sign."""
    B, offsets = len(lengths) // 2, torch.tensor([0, *lengths]).cumsum(0)
    logps = -torch.rand(int(offsets[-1])) * 3
    got = asft_sequence(logps.to(device), offsets.to(device), lam=0.7, beta=0.4, sft_weight=0.2)
    m = torch.tensor(lengths).double()
    sums = torch.stack([s.sum() for s in logps.double().split(lengths)])
    avgs = sums / m.clamp(min=1)
    relative = u * (m / 1024 + 12)
    assert_within(got.sums, sums, relative * sums.abs())
    assert_within(got.avgs, avgs, (relative + u) * avgs.abs())
    counts = (m[:B] > 0) & (m[B:] > 0)
    # An error of avg reaches f, and so softplus' argument, times beta / (1 - p).
    (v_w, s_w, _), (v_l, s_l, _) = exact_asft(avgs[:B], avgs[B:], 0.7, 0.4, 0.2)
    align, coef_w, coef_l = v_w + v_l, (0.7 * s_w - 0.2) / m[:B], 0.7 * s_l / m[B:]
    grow = 0.4 * (avgs.abs() * (relative + u) / -torch.expm1(avgs.clamp(max=-1e-6)))
    error = (grow[:B] + grow[B:]) * 2 + 80 * u
    zero = torch.zeros(())
    assert_within(got.align, torch.where(counts, align, zero), error * align)
    assert_within(got.sft, torch.where(counts, -avgs[:B], zero), (relative + u)[:B] * avgs[:B].abs())
    loss = torch.where(counts, 0.7 * align - 0.2 * avgs[:B], zero)
    assert_within(got.loss, loss, error * (0.7 * align + 0.2 * avgs[:B].abs()))
    coef = torch.cat([torch.where(counts, coef_w, zero), torch.where(counts, coef_l, zero)])
    assert_within(got.coef, coef, torch.cat([error, error]) * coef.abs())

    grad_pair = torch.randn(B)
    g = asft_sequence_grad(grad_pair.to(device), got.coef, offsets.to(device), len(logps))
    expected = (grad_pair.repeat(2) * got.coef.cpu()).repeat_interleave(m.long())
    assert torch.equal(g.cpu(), expected)
    longer = asft_sequence_grad(grad_pair.to(device), got.coef, offsets.to(device), len(logps) + 5)
    assert torch.equal(longer.cpu(), torch.cat([expected, torch.zeros(5)]))


@pytest.mark.interpreter
def test_asft_sequence_without_pairs(device):
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    got = asft_sequence(torch.empty(0, device=device), offsets, lam=1.0, beta=1.0, sft_weight=1.0)
    assert all(x.shape == (0,) for x in got)
    assert asft_sequence_grad(got.loss, got.coef, offsets, 0).shape == (0,)


@pytest.mark.parametrize("valid", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("second", [None, "agrees", "differs"])
@pytest.mark.parametrize(
    ("shape", "borders"),
    both(
        [((3, 5), None), ((2, 4500), None), ((2, 1), None), ((9,), [0, 0, 4, 4, 9, 9]), ((9000,), [0, 4096, 9000]),
         ((9,), [1, 4, 9]), ((9,), [0, 5, 4, 9]), ((9,), [0, 4, 12]), ((9,), [0, 4])],
        [((3, 5), None), ((9,), [0, 0, 4, 9])],
    ),
)  # fmt: skip
def test_pack_labels(shape, borders, second, shift, valid, device):
    """As torch's operations find it, broken borders included; masked rows stand behind, each once, with label -1."""
    labels = torch.randint(100, shape, device=device, dtype=torch.int32)
    labels[torch.rand(shape, device=device) >= valid] = -100
    extra = None if second is None else labels.where(torch.rand(shape, device=device) < 0.5, -100).long()
    if second == "differs":
        labels.view(-1)[-1], extra.view(-1)[-1] = 3, 4
    flat, more, M = labels.view(-1), None if extra is None else extra.view(-1), labels.numel()
    length = 0 if borders else shape[1]
    given = torch.tensor(borders, device=device) if borders else torch.arange(0, M + 1, length, device=device)
    ends = _ends(given.clamp(0, M), M) if shift else None
    rows, tokens, running, facts = _find(flat, more, given, ends, -100)
    got = pack_labels(
        flat, more, given if borders else None, ends if borders else None, length=length, shift=shift,
        ignore_index=-100,
    )  # fmt: skip
    count = int(facts[0])
    assert torch.equal(got[3], facts)
    assert torch.equal(got[2], running)
    assert torch.equal(got[0][:count], rows[:count])
    assert torch.equal(got[1], tokens)
    assert torch.equal(got[0].sort().values, torch.arange(M, device=device))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "ignore"),
    [
        (torch.uint8, -100),
        (torch.int16, 70_000),
        (torch.int32, 2**32 + 1),
        (torch.int64, -(2**63)),
        (torch.int8, 0),
        (torch.int64, np.int64(-100)),
    ],
)
def test_an_ignore_index_outside_the_labels_dtype(dtype, ignore, device):
    """The last position of a sequence has no label, whatever ignore_index becomes in the labels' dtype."""
    labels = torch.randint(1, 100, (3, 5), device=device).to(dtype)
    labels[0, 2] = 0
    options = {"vocab": 300, "cu_seqlens": None, "shift": True, "ignore_index": ignore, "num_valid": None}
    for extra in (None, labels):
        one, two = (pack(labels, **options, extra_labels=extra, backend=b) for b in ("torch", "triton"))
        assert len(two.rows) == (11 if ignore == 0 else 12)
        assert torch.equal(one.rows, two.rows)
        assert torch.equal(one.labels, two.labels)


@pytest.mark.interpreter
def test_labels_and_borders_that_are_views(device):
    """Strided, expanded: the kernel walks over plain memory."""
    pairs = torch.randint(100, (4, 6, 2), device=device)
    wide, row = pairs.flatten(1), torch.randint(100, (1, 6), device=device)
    options = {"vocab": 100, "shift": True, "ignore_index": -100, "num_valid": None}
    for labels in (pairs[..., 0], wide[:, ::2], row.expand(4, 6), wide.T):
        one, two = (pack(labels, cu_seqlens=None, **options, backend=backend) for backend in ("torch", "triton"))
        assert torch.equal(one.labels, two.labels)
        one, two = (
            pack(labels, cu_seqlens=None, extra_labels=labels, **options, backend=backend)
            for backend in ("torch", "triton")
        )
        assert torch.equal(one.labels, two.labels)
    borders = torch.tensor([0, 9, 3, 9, 6, 9], device=device)[::2]
    one, two = (pack(row[0], cu_seqlens=borders, **options, backend=backend) for backend in ("torch", "triton"))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.offsets, two.offsets)


@pytest.mark.interpreter
@pytest.mark.parametrize("num_valid", [None, 5])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 0, 3, 8]])
def test_a_batch_packed_by_the_kernel(cu_seqlens, num_valid, device):
    labels = torch.tensor([[1, 2, -100, 3], [-100, 4, -100, -100]], device=device)
    if cu_seqlens is not None:
        labels, cu_seqlens = labels.view(-1), torch.tensor(cu_seqlens, device=device, dtype=torch.int32)
    options = {"vocab": 10, "cu_seqlens": cu_seqlens, "shift": True, "ignore_index": -100, "num_valid": num_valid}
    one, two = (pack(labels, **options, backend=backend) for backend in ("torch", "triton"))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.rows[one.labels >= 0], two.rows[two.labels >= 0])
    assert torch.equal(one.offsets, two.offsets)
    assert two.offsets.is_contiguous()
    assert (one.shape, one.padded, one.rows.shape) == (two.shape, two.padded, two.rows.shape)


@pytest.mark.parametrize("terms", [1, 7, 8, 9, 25])
def test_a_long_sum_is_made_of_shorter_ones(monkeypatch, terms, device):
    """Integers that fp32 adds exactly: nothing of out is read where it is fresh, all of it is kept where it is not."""
    monkeypatch.setattr("asft_kernels.kernels.products.TERMS", 8)
    a = torch.randint(-50, 50, (3, terms), device=device).bfloat16()
    b = torch.randint(-50, 50, (terms, 5), device=device).bfloat16()
    out = torch.full((3, 5), math.nan, device=device)
    pieces, addmm = [], torch.addmm

    def counted(acc, x, y, *, beta, **options):
        pieces.append((x.shape[1], beta))
        return addmm(acc, x, y, beta=beta, **options)

    monkeypatch.setattr(torch, "addmm", counted)
    for times, fresh in ((1, True), (2, False)):
        pieces.clear()
        add_product(a, b, out=out, fresh=fresh)
        lengths = [8] * (terms // 8) + [terms % 8] * (terms % 8 > 0)
        assert pieces == [(n, int(not fresh or i > 0)) for i, n in enumerate(lengths)]
        assert torch.equal(out.cpu(), times * (a.cpu().float() @ b.cpu().float()))
