"""Figures beside the log-probabilities: values and gradients against float64 on whole logits, and what they cost."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from asft_kernels import TokenStats, fused_linear_logps
from asft_kernels.backends.token_stats import DIFFERENTIABLE, NAMES
from asft_kernels.kernels.configs import Strips
from bounds import fp32_bound, relative_error, rounded_once
from cases import IGNORE, Case, gemms, make_case, one_label_far_below

MARK = pytest.mark.interpreter
BACKENDS = ["torch", pytest.param("triton", marks=MARK)]
CAPPED = {"softcap": 20.0, "logit_scale": 0.5}


@pytest.fixture(autouse=True)
def _strips_and_tiles_of_a_few_rows(monkeypatch):
    """As those of a GPU cut a real chunk: two strips of 64 vocabulary rows, in two tiles each."""
    small = Strips(0, 32, 32, 1, "for tests")
    monkeypatch.setattr(Strips, "rows", lambda self, n_tokens, width: min(2 * self.BLOCK_V, width))
    monkeypatch.setattr("asft_kernels.backends.triton_stats.STRIPS", (small,))


def oracle(case: Case, *, softcap: float | None = None, logit_scale: float = 1.0) -> tuple[dict[str, Tensor], float]:
    """The figures in float64, in the labels' shape with labels shifted, and the largest |z|."""
    exact = case.to(torch.float64)
    z = exact.hidden[:, :-1] @ exact.weight.T + (0 if exact.bias is None else exact.bias)
    z = logit_scale * z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    labels = case.labels[:, 1:]
    valid = labels != IGNORE
    logp = z.log_softmax(-1)
    p = logp.exp()
    own = labels.clamp(min=0)[..., None]
    figures = {
        "logps": logp.gather(-1, own)[..., 0],
        "lse": z.logsumexp(-1),
        "mean_logits": z.mean(-1),
        "entropy": -(p * logp.clamp(min=-1e300)).sum(-1),
        "is_top1": (z <= z.gather(-1, own)).all(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
    }
    case.exact = exact
    padded = {k: torch.nn.functional.pad(x.masked_fill(~valid, 0), (0, 1)) for k, x in figures.items()}
    return padded, z.detach().masked_fill(z.detach() == -torch.inf, 0).abs().max().item()


def stats_of(case: Case, **options) -> TokenStats:
    stats = fused_linear_logps(case.hidden, case.head, case.labels, return_stats=True, **options)
    assert isinstance(stats, TokenStats)
    return stats


CASES = {
    "plain": dict(),
    "odd": dict(rows=2, T=20, D=43, V=131, bias=True),
    "peaked": dict(rows=3, T=30, D=32, V=130, peaked=True, spread=2.0),  # logits of 60 nats, for the label and others
}


@pytest.mark.parametrize("options", [{}, CAPPED, {"logit_scale": 1.7}], ids=["plain", "capped", "scaled"])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(backend, kind, options):
    """fp32. The entropy is a sum of p ln p: an error dz of the logits makes at most 2 dz of it where all p are alike,
    and log sum p^2 errs by 2 dz."""
    case = make_case(**CASES[kind])
    exact, largest = oracle(case, **options)
    got = stats_of(case, backend=backend, chunk_size=40, **options)
    for name in ("logps", *NAMES):
        value = getattr(got, name)
        assert value.shape == case.labels.shape
        if name == "is_top1":
            assert value.dtype == torch.bool
            assert torch.equal(value, exact[name])
        else:
            assert value.dtype == torch.float32
            assert relative_error(value, exact[name]) <= 2 * fp32_bound(largest)


WEIGHTS = {"logps": 1.0, "lse": 0.3, "mean_logits": 4.0, "entropy": -0.7}  # of each figure's part of a loss


def loss_of(figures, names) -> Tensor:
    """Each token's figures with factors of their own, so that no two rows are treated alike."""
    total = 0.0
    for name in names:
        x = figures[name] if isinstance(figures, dict) else getattr(figures, name)
        gen = torch.Generator().manual_seed(len(name))
        total = total + WEIGHTS[name] * (x * torch.randn(x.shape, generator=gen).to(x)).sum()
    return total


def subsets(names):
    return [part for size in range(1, len(names) + 1) for part in combinations(names, size)]


def exact_gradients(case: Case, names, **options) -> tuple[list[Tensor], float]:
    figures, largest = oracle(case, **options)
    return list(torch.autograd.grad(loss_of(figures, names), case.exact.leaves)), largest


def gradients(case: Case, names, **options) -> list[Tensor]:
    asked = [name for name in names if name != "logps"]
    stats = fused_linear_logps(
        case.hidden, case.head, case.labels, return_stats=asked or True, differentiable=asked, **options
    )
    return list(torch.autograd.grad(loss_of(stats, names), case.leaves))


ALL = ("logps", *DIFFERENTIABLE)
CACHES = {"cached": None, "recomputed": 0, "some cached": 8_000}  # one of two chunks
WAYS = [("torch", names, cache) for names in subsets(ALL) for cache in CACHES]
WAYS += [("triton", ALL, cache) for cache in CACHES] + [("triton", (name,), "some cached") for name in DIFFERENTIABLE]


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("backend", "names", "cache"),
    [
        pytest.param(*way, id="-".join([way[0], "+".join(way[1]), way[2]]), marks=[MARK] if way[0] == "triton" else [])
        for way in WAYS
    ],
)
def test_gradients(backend, names, options, cache):
    case = make_case(rows=2, T=20, D=43, V=131, bias=True)
    exact, largest = exact_gradients(case, names, **options)
    got = gradients(case, names, backend=backend, chunk_size=70, cache_bytes=CACHES[cache], **options)
    for g, want in zip(got, exact, strict=True):
        assert relative_error(g, want) <= 2 * fp32_bound(largest)


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_peaked_rows(backend, options):
    """Logits of 60 nats, for the label and against it. Exponents relative to the label's logit meet ln(total), of the
    same size, in the entropy's gradient: beside the logits' error, that of those exponents, as large."""
    case = make_case(rows=3, T=30, D=32, V=130, bias=True, peaked=True, spread=2.0)
    exact, largest = exact_gradients(case, ALL, **options)
    got = gradients(case, ALL, backend=backend, chunk_size=40, cache_bytes=20_000, **options)
    for g, want in zip(got, exact, strict=True):
        assert relative_error(g, want) <= 2 * fp32_bound(largest)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["looks", "without a look"])
@pytest.mark.parametrize(("gap", "high"), [(20.0, 130), (45.9, 299), (60.0, 130), (200.0, 290)])
def test_a_label_far_below(gap, high, on_gpu, request):
    """20: nothing moves; one logit of 45.9: E = 9e19, whose square passes fp32's range; then the reference moves."""
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    case = one_label_far_below(make_case(rows=4, T=17, D=32, V=300), gap, torch.arange(high, 300))
    exact, largest = oracle(case)
    got = stats_of(case, chunk_size=25)
    # A mean of numbers z - r of the gap's size, r added: its error is as large as theirs, however small it comes out.
    shrinks = {"mean_logits": max(1.0, gap / exact["mean_logits"].square().mean().sqrt().item())}
    for name in ("logps", "lse", "mean_logits", "entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(got, name), exact[name]) <= 2 * fp32_bound(largest) * shrinks.get(name, 1.0)
    assert torch.equal(got.is_top1, exact["is_top1"])
    for g, want in zip(gradients(case, ALL, chunk_size=25), exact_gradients(case, ALL)[0], strict=True):
        assert relative_error(g, want) <= 2 * fp32_bound(largest)


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_blocks_of_tokens(options, monkeypatch):
    """As more than 1024 tokens walk over the vocabulary on a CPU; of 13 and 14, for which O2 takes its other way."""
    monkeypatch.setattr("asft_kernels.backends.plan.TOKEN_BLOCK", {"cpu": 14})
    case = make_case(rows=2, T=40, D=43, V=251, bias=True)
    exact, largest = exact_gradients(case, ALL, **options)
    got = gradients(case, ALL, chunk_size=100, cache_bytes=20_000, **options)
    for g, want in zip(got, exact, strict=True):
        assert relative_error(g, want) <= 2 * fp32_bound(largest)


def with_rivals(case: Case, scale: float = 1.0) -> Case:
    """Logits far above the labels' of three tokens: in one chunk's tiles, in the last chunk, and more and more."""
    V, valid = len(case.weight), (case.labels[:, 1:] != IGNORE).nonzero().tolist()
    hidden, weight = case.hidden.detach().clone(), case.weight.detach().clone()
    for t, v, z in (
        (0, 3, 35),
        (1, V - 2, 40),
        (2, 1, 33),
        (2, V // 2, 70),
        (2, V - 1, 200),
        (3, 90, 50),
        (4, min(150, V - 3), 31.5),
    ):
        h = hidden[tuple(valid[t])]
        weight[v] = h * z / scale / h.square().sum()
    return Case(hidden.requires_grad_(), weight.requires_grad_(), case.bias, case.labels)


@pytest.mark.parametrize("options", [{}, {"softcap": 150.0, "logit_scale": 0.5}], ids=["plain", "capped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_references_that_move(backend, options, as_on_a_gpu):
    case = with_rivals(make_case(rows=2, T=20, D=43, V=251, bias=True), options.get("logit_scale", 1.0))
    exact, largest = oracle(case, **options)
    got = stats_of(case, backend=backend, chunk_size=100, **options)
    for name in ("logps", "lse", "mean_logits", "entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(got, name), exact[name]) <= 2 * fp32_bound(largest)
    assert torch.equal(got.is_top1, exact["is_top1"])
    grads = gradients(case, ALL, backend=backend, chunk_size=100, cache_bytes=10_000, **options)
    for g, want in zip(grads, exact_gradients(case, ALL, **options)[0], strict=True):
        assert relative_error(g, want) <= 2 * fp32_bound(largest)


def rounded_exponents(case: Case, *, softcap: float | None = None, logit_scale: float = 1.0) -> float:
    """The share of dH's norm that rounding E and E L to bf16 makes of an entropy's gradient: e p (ln(total) - L) W_v
    from parts that are rounded by 2^-9 at most each, of signs that vary. |L| and ln(total) as r leaves them, which
    moves for 30."""
    exact = case.to(torch.float64)
    z = logit_scale * (exact.hidden[:, :-1] @ exact.weight.T + (0 if exact.bias is None else exact.bias))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)).detach()
    labels = case.labels[:, 1:]
    L = z - z.gather(-1, labels.clamp(min=0)[..., None])
    log_total = L.logsumexp(-1, keepdim=True).clamp(max=30)
    parts = z.softmax(-1) * (L.clamp(-30, 30).square() + log_total.square()).sqrt() * exact.weight.detach().norm(dim=1)
    gen = torch.Generator().manual_seed(len("entropy"))
    e = WEIGHTS["entropy"] * torch.randn(case.labels.shape, generator=gen)[:, :-1].to(z) * (labels != IGNORE)
    error = 2**-9 * logit_scale * (e[..., None] * parts).norm()
    (dH, *_), _ = exact_gradients(case, ALL, softcap=softcap, logit_scale=logit_scale)
    return (error / dH.norm()).item()


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision(backend, dtype, options):
    """Values are fp32's; gradients are rounded once on the torch backend. Triton keeps E and du in bf16 for bf16: each
    is rounded once beside the result, as for logp alone (tests/test_triton_backend.py); for dH E L, too."""
    case = make_case(rows=2, T=20, D=48, V=131, bias=True, dtype=dtype)
    exact, largest = oracle(case, **options)
    got = stats_of(case, backend=backend, chunk_size=70, **options)
    for name in ("logps", "lse", "mean_logits", "entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(got, name), exact[name]) <= 2 * fp32_bound(largest)
    got = gradients(case, ALL, backend=backend, chunk_size=70, **options)
    low = backend == "triton" and dtype == torch.bfloat16
    others = [rounded_exponents(case, **options) if low else 0.0, 0.0, 0.0]
    for g, want, other in zip(got, exact_gradients(case, ALL, **options)[0], others, strict=True):
        assert g.dtype == dtype
        assert relative_error(g, want) <= (1.9 if low else 1.1) * rounded_once(want, dtype) + other


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {"softcap": 150.0, "logit_scale": 0.5}), (torch.bfloat16, {})], ids=str
)
def test_emulated(dtype, options):
    """Figures and gradients by the compiled kernels, some references moving; bounds as above."""
    case = with_rivals(make_case(rows=1, T=17, D=33, V=107, bias=True, valid=0.7), options.get("logit_scale", 1.0))
    case = case.to(dtype)
    exact, largest = oracle(case, **options)
    got = stats_of(case, backend="triton", chunk_size=80, **options)
    for name in ("logps", "lse", "mean_logits", "entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(got, name), exact[name]) <= 2 * fp32_bound(largest)
    assert torch.equal(got.is_top1, exact["is_top1"])
    grads = gradients(case, ALL, backend="triton", chunk_size=80, cache_bytes=4000, **options)
    others = [rounded_exponents(case, **options), 0.0, 0.0]
    for g, want, other in zip(grads, exact_gradients(case, ALL, **options)[0], others, strict=True):
        rounding = 0.0 if dtype == torch.float32 else 1.9 * rounded_once(want, dtype) + other
        assert relative_error(g, want) <= max(2 * fp32_bound(largest), rounding)


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_gradcheck(options):
    """Against differences, in float64, for all three at once and with num_valid, where slots carry no token."""
    case = make_case(rows=2, T=6, D=5, V=11, bias=True, dtype=torch.float64)

    def call(hidden, weight, bias):
        stats = fused_linear_logps(
            hidden, (weight, bias), case.labels, return_stats=True, differentiable=DIFFERENTIABLE, chunk_size=4,
            num_valid=9, **options,
        )  # fmt: skip
        return tuple(getattr(stats, name) for name in ALL)

    assert torch.autograd.gradcheck(call, case.leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_without_a_token(backend):
    """The same figures and gradients when a bound on the number of tokens leaves slots over."""
    case = make_case(bias=True)
    results = []
    for num_valid in (None, 40):
        stats = stats_of(case, backend=backend, num_valid=num_valid, differentiable=DIFFERENTIABLE)
        results.append([*vars(stats).values(), *torch.autograd.grad(loss_of(stats, ALL), case.leaves)])
    for exact, padded in zip(*results, strict=True):
        assert relative_error(padded, exact) <= 2 * fp32_bound(1)
        assert torch.equal(padded == 0, exact == 0)


def test_references_that_move_in_float64(as_on_a_gpu):
    """What stood there before is e^-31 times smaller then: fp32 does not see it, and must not be what hides a mistake.
    1e-13: 400 roundings of 2^-53 of exponents of up to 200."""
    case = with_rivals(make_case(rows=2, T=20, D=43, V=251, bias=True)).to(torch.float64)
    exact, _ = oracle(case)
    got = stats_of(case, chunk_size=100)
    for name in ("entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(got, name), exact[name]) <= 1e-13
    grads = gradients(case, ("entropy",), chunk_size=100)
    for g, want in zip(grads, exact_gradients(case, ("entropy",))[0], strict=True):
        assert relative_error(g, want) <= 1e-13


@pytest.mark.parametrize("cache_bytes", [None, 0], ids=["cached", "recomputed"])
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity(backend, options, cache_bytes):
    """Masked vocabulary: without a softcap it has probability 0 and makes the mean -inf; so one label's logp is."""
    case = make_case(rows=2, T=30, D=24, V=157, bias=True)
    options = {**options, "backend": backend, "chunk_size": 75}
    plain = {key: value for key, value in options.items() if key in CAPPED}
    with torch.no_grad():
        case.bias[:45] = case.bias[70] = -torch.inf
        case.labels[(case.labels != IGNORE) & (case.bias[case.labels.clamp(min=0)] == -torch.inf)] = 50
        row, t = (case.labels[:, 1:] != IGNORE).nonzero()[0].tolist()
        case.labels[row, t + 1] = 3
    exact, largest = oracle(case, **plain)
    got = stats_of(case, **options)
    assert torch.equal(got.logps == -torch.inf, exact["logps"] == -torch.inf)
    assert (got.logps[row, t] == -torch.inf) == (not plain)
    for name in ("lse", "entropy", "log_sum_sq_probs"):
        assert relative_error(getattr(got, name), exact[name]) <= 2 * fp32_bound(largest)
    assert torch.equal(got.is_top1, exact["is_top1"])
    assert torch.equal(got.mean_logits == -torch.inf, exact["mean_logits"] == -torch.inf)
    names = ("lse", "entropy")
    for g, want in zip(
        gradients(case, names, cache_bytes=cache_bytes, **options),
        exact_gradients(case, names, **plain)[0],
        strict=True,
    ):
        assert relative_error(g, want) <= 2 * fp32_bound(largest)


@pytest.mark.parametrize(
    ("differentiable", "softcap", "frozen_head", "cached", "recomputed"),
    [
        ((), None, 2, 3, 4),
        (("lse",), None, 2, 3, 4),
        (("mean_logits",), None, 2, 3, 4),
        (("entropy",), None, 3, 4, 5),
        (DIFFERENTIABLE, None, 3, 4, 5),
        (("lse",), 20.0, 2, 3, 4),
        (("mean_logits",), 20.0, 3, 5, 5),  # c W, and for the head c anew
        (("entropy",), 20.0, 3, 5, 5),
        (DIFFERENTIABLE, 20.0, 4, 6, 6),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products(backend, differentiable, softcap, frozen_head, cached, recomputed):
    """All figures are asked for each time: their values cost no product."""
    case = make_case(rows=2, T=9, D=32, V=64)
    n = int((case.labels[:, 1:] != IGNORE).sum())

    def call(cache_bytes=None):
        stats = stats_of(
            case, backend=backend, differentiable=differentiable, softcap=softcap, chunk_size=32,
            cache_bytes=cache_bytes,
        )  # fmt: skip
        loss_of(stats, ("logps", *differentiable)).backward()

    def count(*args):
        return gemms(lambda: call(*args), n, 64, 32)

    if backend == "triton" and not differentiable:
        recomputed -= 1  # by logits_exp, whose products are NumPy's in the interpreter: not counted
    assert count() == pytest.approx(cached, rel=1e-9)
    assert count(0) == pytest.approx(recomputed, rel=1e-9)
    case.weight.requires_grad_(False)
    assert count() == pytest.approx(frozen_head, rel=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_product_without_gradients(mode):
    case = make_case(rows=4, T=17, D=16, V=256)
    n = int((case.labels[:, 1:] != IGNORE).sum())
    with mode():
        products = gemms(lambda: stats_of(case, differentiable=DIFFERENTIABLE, softcap=9.0), n, 256, 16)
    assert products == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    """Names alone, detached but for lse, and log-probabilities as a call without figures gives them: to the bit, but
    on Triton, where other figures than lse are summed from logits that the library made."""
    case = make_case(bias=True)
    plain = fused_linear_logps(case.hidden, case.head, case.labels, backend=backend)
    everything = stats_of(case, backend=backend)
    for name in NAMES:
        one = fused_linear_logps(case.hidden, case.head, case.labels, backend=backend, return_stats=[name])
        assert [key for key, value in vars(one).items() if value is not None] == ["logps", name]
        assert getattr(one, name).requires_grad == (name == "lse")
        error = 0.0 if backend == "torch" else 2 * fp32_bound(1)
        assert relative_error(getattr(one, name), getattr(everything, name)) <= error * (name != "is_top1")
        assert relative_error(one.logps, plain) <= error
    detached = stats_of(case, backend=backend, differentiable=[])
    assert [name for name in ALL if getattr(detached, name).requires_grad] == ["logps"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_are_a_tie(backend):
    """Rows of the head that are the label's own, and a head of zeros: the label is no worse than any."""
    case = make_case(rows=2, T=20, D=24, V=60, valid=1.0)
    with torch.no_grad():
        case.weight[30:] = case.weight[:30]
    exact, _ = oracle(case)
    assert 0 < exact["is_top1"].sum() < 38
    assert torch.equal(stats_of(case, backend=backend, chunk_size=30).is_top1, exact["is_top1"])
    with torch.no_grad():
        case.weight.zero_()
    is_top1 = stats_of(case, backend=backend).is_top1
    assert is_top1[:, :-1].all()
    assert not is_top1[:, -1].any()


def test_no_tokens():
    case = make_case(valid=0.0)
    stats = stats_of(case, differentiable=DIFFERENTIABLE)
    assert all((value == 0).all() for value in vars(stats).values())
    assert all((g == 0).all() for g in torch.autograd.grad(loss_of(stats, ALL), case.leaves))


@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_traced(options):
    """torch.compile keeps the operators whole, whose fakes say what comes out."""
    case = make_case(bias=True)

    def call(hidden, head, labels):
        stats = fused_linear_logps(
            hidden, head, labels, return_stats=True, differentiable=DIFFERENTIABLE, chunk_size=30, **options
        )
        return [getattr(stats, name) for name in ("logps", *NAMES)]

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for run in (call, traced):
        figures = dict(zip(("logps", *NAMES), run(case.hidden, case.head, case.labels), strict=True))
        results.append([*figures.values(), *torch.autograd.grad(loss_of(figures, ALL), case.leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 2 * fp32_bound(1)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_and_their_fakes_agree(backend, softcap):
    case = make_case(rows=1, T=9, D=16, V=37, valid=1.0)
    rows, labels = torch.arange(9), case.labels[0].clamp(min=0)
    inputs = (case.hidden[0].detach(), case.weight.detach(), None, None, "", "", [], rows, labels)
    options = (backend, 1.0, softcap, 20, 2**20, False)
    utils = {"test_utils": ("test_schema", "test_faketensor")}
    arguments = [*inputs, *options, True, True, " ".join(NAMES), " ".join(DIFFERENTIABLE)]
    torch.library.opcheck(torch.ops.asft_kernels.linear_logps.default, arguments, **utils)
    *of_rows, exps, stats = torch.ops.asft_kernels.linear_logps(*arguments)
    g = torch.randn(9)
    arguments = [g, *inputs, *of_rows, exps, stats, *options, True, True, False, False, g, g, g]
    torch.library.opcheck(torch.ops.asft_kernels.linear_logps_backward.default, arguments, **utils)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_stats": "entropy"}, r"return_stats: got 'entropy', need .* write \['entropy'\]"),
        ({"return_stats": 1}, "return_stats: got 1, need True, False or a list of names"),
        ({"return_stats": ["entrop"]}, "return_stats: got the name 'entrop', need names out of 'lse'"),
        ({"return_stats": True, "differentiable": "lse"}, "differentiable: got 'lse', need a list"),
        ({"return_stats": True, "differentiable": ["is_top1"]}, "differentiable: got the name 'is_top1'"),
        ({"return_stats": ["lse"], "differentiable": ["entropy"]}, "differentiable: got the name 'entropy', need one"),
        ({"differentiable": ["entropy"]}, "differentiable: got the name 'entropy', need one"),
    ],
)
def test_refusals(options, message):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        fused_linear_logps(case.hidden, case.head, case.labels, **options)
