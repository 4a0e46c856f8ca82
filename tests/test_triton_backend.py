"""The Triton backend whole, both phases, against float64: interpreted, emulated, or on a GPU."""

from itertools import product

import pytest
import torch

from asft_kernels.backends import Logits, triton_fused, triton_runs_on_cpu
from asft_kernels.backends.head_rows import HeadRows
from asft_kernels.backends.plan import Plan
from bounds import fp32_bound, relative_error, rounded_once
from test_kernels import both

PLAIN = Logits()
GEMMA = Logits(scale=0.5, softcap=20.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or triton_runs_on_cpu()), reason="Triton has nothing to run on here"
)


class Problem:
    """Tokens scattered over hidden, half with peaked rows in the head, some with the same label.

    Rivals: a token whose label is beaten by more than 30 in the first chunk, one in the last, and one
    by more and more from chunk to chunk, up to 200; so references move in tiles and between chunks.
    """

    def __init__(self, dtype, device, *, N=50, V=131, D=43, logits=PLAIN, bias=False, rivals=True):
        gen = torch.Generator().manual_seed(N + V)
        self.logits, M = logits, N + 11
        hidden = torch.randn(M, D, generator=gen)
        weight = torch.randn(V, D, generator=gen) / D**0.5
        self.rows = torch.randperm(M, generator=gen)[:N]
        self.labels = torch.randint(V, (N,), generator=gen)
        if rivals:
            self.labels[: N // 3] = torch.arange(N // 3) % 3 + 5
            places = [(0, 3, 35), (1, V - 2, 40), (2, 1, 33), (2, V // 2, 70), (2, V - 1, 200)]
            places += [(t, int(self.labels[t]), 12) for t in range(N // 3 + 1, N, 2)]  # right and sure
            for t, v, z in places:
                h = hidden[self.rows[t]]
                weight[v] = h * z / logits.scale / h.square().sum()
        self.hidden, self.weight = hidden.to(dtype).to(device), weight.to(dtype).to(device)
        offset = torch.randn(V, generator=gen) if bias is True else bias
        self.bias = None if offset is False else offset.to(dtype).to(device)
        self.g = torch.randn(N, generator=gen).to(device)
        self.rows, self.labels = self.rows.to(device), self.labels.to(device)

    @property
    def inputs(self):
        return self.hidden, HeadRows(self.weight), self.bias, self.rows, self.labels

    def forward(self, plan, needs_acc=True, needs_exps=True):
        return triton_fused.forward(*self.inputs, self.logits, plan, needs_acc=needs_acc, needs_exps=needs_exps)

    def backward(self, saved, plan, hidden=True, weight=True, bias=None):
        bias = self.bias is not None if bias is None else bias
        grads = triton_fused.backward(
            self.g, *self.inputs, saved, self.logits, plan,
            needs_hidden=hidden, needs_weight=weight, needs_low_rank=False, needs_bias=bias,
        )  # fmt: skip
        return grads.hidden, grads.weight, grads.bias

    def exact(self):
        """(logps, gradients, max|z|) in float64 by autograd over the whole logits."""
        leaves = [
            None if x is None else x.cpu().double().requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        hidden, weight, bias = leaves
        rows, labels, softcap = self.rows.cpu(), self.labels.cpu(), self.logits.softcap
        z = self.logits.scale * (hidden[rows] @ weight.T + (0 if bias is None else bias))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        logps = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
        grads = torch.autograd.grad(logps, [x for x in leaves if x is not None], self.g.cpu().double())
        grads = [*grads, None][:3]
        return logps.detach(), grads, z.abs().max().item()


@pytest.fixture(autouse=True)
def _slices_of_64_rows(monkeypatch):
    """As the 32 MiB of dW that are summed at a time cut a real head: these tests' chunks fall into up to 4."""
    monkeypatch.setattr("asft_kernels.backends.plan.SLICE_BYTES", 1)


def many(dtype) -> float:
    """How many times the error of rounding the exact gradient once.

    fp16's E and Hs are fp32: the final rounding is the only one. In bf16 E and Hs are rounded once each
    beside the result, but averaged by sums over many tokens.
    """
    return 1.1 if dtype == torch.float16 else 1.5


def few(dtype) -> float:
    """The same for the rivals: each row of dW that they dominate is a single product of E, near 1, with a
    row of Hs, so nothing is averaged. Three independent roundings are sqrt(3) times one, and 10 % for the
    spread of so small a sample."""
    return 1.1 if dtype == torch.float16 else 1.9


def check(problem, saved, grads, factor=many, largest=0.0) -> None:
    """largest: of the logits before a softcap, where its slope depends on them more than on max|z|."""
    dtype = problem.hidden.dtype
    logps, exact, max_logit = problem.exact()
    max_logit = max(max_logit, largest)
    # An fp32 logit of 200 is known to 1e-5 and so is a log-probability of -200.
    assert (saved.logps.cpu() - logps).abs().max() <= 1e-4 * max(1.0, max_logit / 32)
    assert relative_error(saved.logps, logps) <= fp32_bound(max_logit)
    for got, want in zip(grads, exact, strict=True):
        if got is None:
            continue
        bound = fp32_bound(max_logit)
        if dtype != torch.float32:
            assert got.dtype == dtype
            bound = max(bound, factor(dtype) * rounded_once(want, dtype))
        assert relative_error(got, want) <= bound


# What differs between the plans: chunks that divide V or not, larger than a slice and smaller than a tile, exponentials
# of none, some and all of them kept.
PLANS = [Plan(131, 131, 0), Plan(131, 131, 1), Plan(131, 32, 2), Plan(131, 70, 2), Plan(131, 19, 5)]
WAYS = [
    *((PLAIN, False, plan) for plan in PLANS),
    *((GEMMA, True, plan) for plan in PLANS[2:4]),
    (Logits(scale=1.7), True, PLANS[3]),
]


# Both ways to round dW: rows of a multiple of 16 elements, where bf16 takes it whole, and others, in slices. fp32 and
# fp16 know slices alone. Types differ in operands and rounding, whatever the plan: fp32 goes every way, others some.
ROUNDED = [(torch.float32, 43), (torch.bfloat16, 43), (torch.bfloat16, 48)]
SLICES_AND_WHOLE = ROUNDED[::2]
SOME = {
    (torch.bfloat16, 43): (2, 4, 6),
    (torch.bfloat16, 48): (2, 5),
    (torch.float16, 43): (1, 4),
    (torch.float16, 48): (6,),
}
BOTH_PHASES = [(torch.float32, 43, *way) for way in WAYS]
BOTH_PHASES += [(dtype, D, *WAYS[i]) for (dtype, D), ways in SOME.items() for i in ways]


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "D", "logits", "bias", "plan"), BOTH_PHASES, ids=str)
def test_both_phases(dtype, D, logits, bias, plan, device):
    problem = Problem(dtype, device, logits=logits, bias=bias, D=D)
    saved = problem.forward(plan)
    check(problem, saved, problem.backward(saved, plan), few)


SMALL = Plan(75, 75, 0), Plan(75, 40, 1), Plan(75, 32, 3)
EMULATED = [  # each value twice; fp16 is slow (conftest.py)
    (torch.float32, 43, PLAIN, False, SMALL[1]),
    (torch.float32, 48, GEMMA, True, SMALL[0]),
    (torch.bfloat16, 43, GEMMA, True, SMALL[2]),
    (torch.bfloat16, 48, PLAIN, False, SMALL[1]),
]
GRID = product(DTYPES, (43, 48), ((PLAIN, False), (GEMMA, True)), SMALL)
GRID = [row for d, D, way, plan in GRID if (row := (d, D, *way, plan)) not in EMULATED]


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("dtype", "D", "logits", "bias", "plan"),
    [*EMULATED, *(pytest.param(*row, marks=pytest.mark.slow) for row in GRID)],
    ids=str,
)
def test_both_phases_emulated(dtype, D, logits, bias, plan, device):
    problem = Problem(dtype, device, logits=logits, bias=bias, N=20, V=75, D=D)
    saved = problem.forward(plan)
    check(problem, saved, problem.backward(saved, plan), few)


@pytest.mark.parametrize("over", both([8.0], [8.0]))
def test_saturated_softcap(over, device):
    """Logits of +-over softcaps: their slopes, down to 4.5e-7, keep their relative accuracy. exp(-2 |u| / cap)
    magnifies the roundings of u as exp(z - r) does those of z, and twice as much."""
    N, V, D, cap = 20, 75, 33, 30.0
    signs = (torch.arange(V) * 7 % 5 < 2).float() * 2 - 1
    problem = Problem(
        torch.float32, device, N=N, V=V, D=D, logits=Logits(softcap=cap), bias=signs * cap * over, rivals=False
    )
    for plan in (Plan(V, 40, 1), Plan(V, 40, 2)):
        saved = problem.forward(plan)
        check(problem, saved, problem.backward(saved, plan), largest=cap * max(over, 2))


@pytest.mark.parametrize("logits", both([PLAIN, GEMMA], [PLAIN]), ids=str)
def test_biases_of_minus_infinity(logits, device):
    """A whole chunk of them, and single ones; labels among them and not. Without a softcap a label that is -inf
    has logp = -inf and finite gradients, and all other tokens are as if the entries were not there."""
    N, V, D = 20, 75, 33
    bias = torch.randn(V)
    bias[:40] = bias[70] = -torch.inf
    problem = Problem(torch.float32, device, N=N, V=V, D=D, logits=logits, bias=bias, rivals=False)
    problem.labels[:] = torch.arange(N) * 5 % V  # 0, 5, ... 70
    _, exact, _ = problem.exact()
    logps = problem.exact()[0]
    infinite = logps == -torch.inf
    assert infinite.any() == (logits is PLAIN)
    assert not infinite.all()
    for plan in (Plan(V, V, 1), Plan(V, 40, 0), Plan(V, 20, 2)):
        saved = problem.forward(plan)
        got = saved.logps.cpu().double()
        assert torch.equal(got == -torch.inf, infinite)
        assert relative_error(got[~infinite], logps[~infinite]) <= fp32_bound(1)
        for grad, want in zip(problem.backward(saved, plan), exact, strict=True):
            assert relative_error(grad, want) <= fp32_bound(1)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_references_moved_in_the_problem(dtype, device):
    """Else rescaling above would be tested by nothing: three tokens move, one of them thrice."""
    problem = Problem(dtype, device)
    plan = Plan(131, 34, 4)
    saved = problem.forward(plan)
    hidden, weight, *others = problem.inputs
    z_y = triton_fused.label_logits(hidden, weight.weight, *others, scale=1.0, softcap=None)
    gap = (saved.ref - z_y).cpu()
    assert (gap[:3] > 30).all()
    assert gap[2] > 150
    assert (gap == 0).float().mean() > 0.5  # as for nearly all tokens of real text


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "D"), ROUNDED, ids=str)
def test_more_tokens_than_entries(dtype, D, device):
    problem = Problem(dtype, device, N=97, V=75, D=D, bias=True, rivals=False)
    plan = Plan(75, 50, 1)
    saved = problem.forward(plan)
    check(problem, saved, problem.backward(saved, plan))


@pytest.mark.interpreter
@pytest.mark.parametrize(("N", "V", "D"), [(1, 1, 1), (3, 1, 5), (1, 7, 3), (5, 2, 1)])
def test_smallest_shapes(N, V, D, device):
    problem = Problem(torch.float32, device, N=N, V=V, D=D, bias=True, rivals=False)
    plan = Plan(V, V, 1)
    saved = problem.forward(plan)
    grads = problem.backward(saved, plan)
    check(problem, saved, grads)
    if V == 1:
        assert (saved.logps == 0).all()
        assert all((x == 0).all() for x in grads)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(dtype, device):
    problem = Problem(dtype, device, N=3, rivals=False, bias=True)
    problem.rows, problem.labels, problem.g = problem.rows[:0], problem.labels[:0], problem.g[:0]
    plan = Plan(131, 50, 2)
    saved = problem.forward(plan)
    assert saved.logps.shape == (0,)
    assert [tuple(x.shape) for x in saved.exps] == [(0, 50), (0, 50)]
    for got, like in zip(problem.backward(saved, plan), (problem.hidden, problem.weight, problem.bias), strict=True):
        assert got.shape == like.shape
        assert (got == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "D"), SLICES_AND_WHOLE, ids=str)
def test_parts_that_are_not_asked_for(dtype, D, device):
    """Every combination of frozen inputs gives what the full call gives, and None elsewhere."""
    problem = Problem(dtype, device, N=20, V=75, D=D, bias=True)
    plan = Plan(75, 40, 1)
    saved = problem.forward(plan)
    for hidden in (False, True):
        for weight, bias in ((False, False), (True, False), (False, True)):
            part = problem.forward(plan, needs_acc=hidden, needs_exps=weight or bias)
            assert part.acc.shape == (saved.acc.shape if hidden else (0,))
            assert len(part.exps) == (1 if weight or bias else 0)
            grads = problem.backward(part, plan, hidden, weight, bias)
            assert [x is not None for x in grads] == [hidden, weight, bias]
            check(problem, part, grads)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype, device):
    """A transposed head, a strided one, hidden with a gap between rows or transposed."""
    problem = Problem(dtype, device, N=20, V=75, D=33, bias=True)
    plan = Plan(75, 40, 1)
    hidden, weight, bias = problem.hidden, problem.weight, problem.bias
    wide = torch.full((hidden.shape[0], 60), torch.nan, dtype=dtype, device=device)
    wide[:, 5 : 5 + hidden.shape[1]] = hidden
    for h, w, b in (
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), bias),
        (wide[:, 5 : 5 + hidden.shape[1]], weight.repeat(1, 2)[:, : weight.shape[1]], bias),
        (hidden, weight.repeat_interleave(2, 1)[:, ::2], torch.stack([bias, bias], 1)[:, 1]),
    ):
        problem.hidden, problem.weight, problem.bias = h, w, b
        saved = problem.forward(plan)
        grads = problem.backward(saved, plan)
        assert all(g.is_contiguous() for g in grads)
        check(problem, saved, grads)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "D"), SLICES_AND_WHOLE, ids=str)
def test_backward_changes_nothing_and_repeats(dtype, D, device):
    """retain_graph, and two live graphs: saved tensors and inputs keep their bits, results repeat."""
    problem = Problem(dtype, device, N=33, V=75, bias=True, D=D)
    plan = Plan(75, 32, 2)
    saved = problem.forward(plan)
    watched = [x for x in (*saved[:5], *saved.exps, problem.hidden, problem.weight, problem.bias, problem.g)]
    before = [x.clone() for x in watched]
    first = problem.backward(saved, plan)
    again = problem.forward(plan)
    second = problem.backward(saved, plan)
    assert all(torch.equal(a, b) for a, b in zip(watched, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved[:5], again[:5], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved.exps, again.exps, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [43, 48])
def test_bf16_takes_dw_whole_where_rows_are_aligned(D, device, monkeypatch):
    asked = []

    def chosen(device, problem, *, aligned):
        asked.append(aligned)
        return "whole" if aligned else "slices"

    monkeypatch.setattr(triton_fused, "best_form", chosen)
    problem, plan = Problem(torch.bfloat16, device, N=7, V=21, D=D, rivals=False), Plan(21, 21, 1)
    problem.backward(problem.forward(plan), plan)
    assert asked == [D == 48]


@pytest.mark.interpreter
@pytest.mark.parametrize("D", [16, 15])
def test_one_rounding_where_label_and_softmax_cancel(D, device):
    """Two labels share all tokens' probability, and nearly half of the tokens each: dW's label part of 16.5 h
    (33 tokens) and softmax part of 15.5 h (31) leave h. Hs = h / 2 and E = 1 are exact in bf16 here, so only
    the final rounding is left; one of a part alone would err by up to 16 times as much."""
    N, V = 64, 40
    problem = Problem(torch.bfloat16, device, N=N, V=V, D=D, rivals=False)
    h = problem.hidden[0].clone()
    problem.hidden[:] = h
    problem.weight[:] = 0
    problem.weight[:2] = h * (20 / h.float().square().sum()).item()
    problem.labels = (torch.arange(N, device=device) >= 33).long()
    problem.g = torch.ones(N, device=device)
    plan = Plan(V, V, 1)
    _, dW, _ = problem.backward(problem.forward(plan), plan)
    _, (_, exact, _), _ = problem.exact()
    exact, fp32_sums = exact[:2], 64 * 2**-24 * 16 * h.cpu().double().abs()
    error = (dW[:2].cpu().double() - exact).abs()
    assert (error <= 1.01 * 2**-8 * exact.abs() + fp32_sums).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("V", [37, 5])
def test_the_operators_and_their_fakes_agree(V, device):
    """Shapes, strides (E's rows have room to a multiple of 16) and dtypes, which torch.compile relies on."""
    problem = Problem(torch.bfloat16, device, N=7, V=V, D=16, rivals=False)
    options = ("triton", 1.0, None, 20, 2**20, False)
    tensors = [problem.hidden, problem.weight, None, problem.bias, "", "", [], problem.rows, problem.labels]
    inputs = [*tensors, *options, True, True, "", ""]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.asft_kernels.linear_logps.default, inputs, test_utils=checks)
    outputs = torch.ops.asft_kernels.linear_logps(*inputs)
    torch.library.opcheck(
        torch.ops.asft_kernels.linear_logps_backward.default,
        [problem.g, *tensors, *outputs, *options, True, True, False, False],
        test_utils=checks,
    )
