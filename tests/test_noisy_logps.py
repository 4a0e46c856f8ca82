"""The noise: Philox's words, normal numbers, and log-probabilities under noisy logits against full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from asft_kernels import fused_linear_logps
from asft_kernels.methods.dnpo.noisy_logps import fused_noisy_linear_logps
from asft_kernels.methods.dnpo.philox import normals, philox
from bounds import fp32_bound, relative_error
from cases import IGNORE, gemms, make_case, packed

# Four roundings in fp32: log, square root, cosine of an angle that is the same to the bit, product; |eps| <= 5.68.
EPS_ROUNDING = 5.68 * 4 * 2**-24


def noise_of(case, *, std=0.7, bias=True, dtype=None):
    """A noise head whose std is about `std` for hidden states of size 1, as leaves."""
    V, D = case.weight.shape
    g = torch.Generator().manual_seed(5)
    weight = std * torch.randn(V, D, generator=g) / D**0.5
    offset = std * torch.randn(V, generator=g)
    dtype = dtype or case.weight.dtype
    return (weight.to(dtype).requires_grad_(), offset.to(dtype).requires_grad_() if bias else None)


def oracle(case, noise, seed, logit_scale=1.0, softcap=None):
    """(logps, power) from full logits in float64; eps is given by the generator that other tests check."""
    hidden = case.hidden.detach().double()[:, :-1]
    labels = case.labels[:, 1:]
    valid = labels != IGNORE
    h = hidden[valid]
    z = logit_scale * F.linear(h, case.weight.double(), None if case.bias is None else case.bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    std = F.linear(h, noise[0].double(), None if noise[1] is None else noise[1].double())
    eps = normals(seed, torch.arange(len(h)), 0, len(case.weight)).double()
    logps = (z.detach() + std * eps).log_softmax(-1).gather(1, labels[valid][:, None])[:, 0]
    return [F.pad(torch.zeros_like(hidden[..., 0]).masked_scatter(valid, x), (0, 1)) for x in (logps, (std**2).mean(1))]


def test_known_words():
    """Philox4x32-10's known answer for counter 0 and key 0, as Random123 lists it."""
    got = philox(0, torch.tensor([0]), torch.tensor([0]))
    assert [int(word) for word in got] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**63 - 1])
def test_triton_draws_the_same_numbers(seed, device):
    """tl.randint4x to the bit and tl.randn4x to a few roundings, at token numbers that make offsets pass 2^31."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    tl = triton.language

    @triton.jit
    def draw(words_ptr, normals_ptr, offsets_ptr, seed):
        at = tl.arange(0, 64)
        offsets = tl.load(offsets_ptr + at)
        w0, w1, w2, w3 = tl.randint4x(seed, offsets)
        n0, n1, n2, n3 = tl.randn4x(seed, offsets)
        tl.store(words_ptr + at * 4, w0)
        tl.store(words_ptr + at * 4 + 1, w1)
        tl.store(words_ptr + at * 4 + 2, w2)
        tl.store(words_ptr + at * 4 + 3, w3)
        tl.store(normals_ptr + at * 4, n0)
        tl.store(normals_ptr + at * 4 + 1, n1)
        tl.store(normals_ptr + at * 4 + 2, n2)
        tl.store(normals_ptr + at * 4 + 3, n3)

    tokens, groups = torch.tensor([0, 1, 7, 2**20 + 3]), torch.arange(16)
    offsets = ((tokens[:, None] << 32) + groups).reshape(-1).to(device)
    words = torch.empty(64, 4, dtype=torch.uint32, device=device)
    drawn = torch.full((64, 4), float("nan"), device=device)
    draw[(1,)](words, drawn, offsets, seed)
    own = torch.stack(philox(seed, groups[None, :], tokens[:, None]), dim=-1).view(64, 4)
    assert torch.equal(words.cpu().long(), own)
    assert (drawn.cpu() - normals(seed, tokens, 0, 64).reshape(64, 4)).abs().max() <= EPS_ROUNDING


def test_numbers_are_standard_normal_and_independent():
    """Moments within 5 standard errors of n draws; neighbours in token, vocabulary and seed are uncorrelated."""
    tokens = torch.arange(1000)
    eps = normals(3, tokens, 0, 1000).double()
    n = eps.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((eps**power).mean() - moment) <= 5 * math.sqrt(variance / n)
    others = [eps[:, lag:] * eps[:, :-lag] for lag in (1, 2, 3, 4)]
    others += [eps[1:] * eps[:-1], eps * normals(4, tokens, 0, 1000)]
    assert all(abs(products.mean()) <= 5 / math.sqrt(products.numel()) for products in others)
    assert len(eps.unique()) > 0.9 * n  # nothing repeats but what fp32 rounds together


@pytest.mark.parametrize("width", [1, 3, 4, 37, 100])
def test_chunks_of_the_vocabulary_do_not_matter_to_the_numbers(width):
    tokens = torch.tensor([0, 5, 2**31])
    whole = normals(11, tokens, 0, 101)
    parts = [normals(11, tokens, at, min(at + width, 101)) for at in range(0, 101, width)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= EPS_ROUNDING


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity_with_full_logits(dtype, options):
    """Values and gradients of both results; the noise head in fp32 below it, as an optimiser wants it."""
    case = make_case(rows=5, T=15, D=23, V=101, bias=True, dtype=dtype)
    case.labels[1] = IGNORE
    noise = noise_of(case, dtype=dtype if dtype == torch.float64 else torch.float32)
    exact_noise = [x.detach().double().requires_grad_() for x in noise]
    g, q = torch.randn(2, *case.labels.shape, dtype=torch.float64)

    def loss(logps, power):
        return (g * logps).sum() + 30 * (q * power).sum()

    got = fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, seed=9, chunk_size=37, **options)
    exact = oracle(case, exact_noise, 9, **options)
    # Logits and noise stay below 32 here; low-precision inputs are read as they are and computed in fp32.
    bound = 1e-13 if dtype == torch.float64 else fp32_bound(32)
    assert got.logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) <= bound
    grads, truths = torch.autograd.grad(loss(*got), noise), torch.autograd.grad(loss(*exact), exact_noise)
    for a, b in zip(grads, truths, strict=True):
        assert relative_error(a, b) <= bound
    assert case.hidden.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}], ids=["plain", "capped"])
def test_no_noise_is_the_plain_primitive(dtype, options):
    case = make_case(rows=6, V=207, bias=True, peaked=True, dtype=dtype)
    silent = torch.zeros_like(case.weight)
    got = fused_noisy_linear_logps(case.hidden, case.head, silent, case.labels, seed=1, **options)
    plain = fused_linear_logps(case.hidden, case.head, case.labels, **options)
    assert relative_error(got.logps, plain) <= 2 * fp32_bound(60)  # peaked logits reach 60 here; both sides round
    assert (got.noise_power == 0).all()
    assert (got.logps[plain == 0] == 0).all()


def test_gradcheck():
    case = make_case(rows=2, T=4, D=5, V=7, valid=0.9, dtype=torch.float64, bias=True)
    noise = noise_of(case)

    def call(weight, bias):
        return tuple(
            fused_noisy_linear_logps(case.hidden, case.head, (weight, bias), case.labels, seed=2, chunk_size=3)
        )

    assert torch.autograd.gradcheck(call, noise)


def test_sure_labels_keep_their_digits():
    """logp = -1e-9 and 1 - p of its gradient to a relative error, where fp32 of p itself has none of their digits.

    One token, so that nothing cancels in the gradient's sum.
    """
    case = make_case(rows=1, T=2, D=8, V=16, dtype=torch.float64)
    case.hidden.data.fill_(1 / 8)
    case.weight.data.zero_()
    case.weight.data[3] = 24.0
    case.labels.fill_(3)
    single = case.to(torch.float32)
    low_noise = torch.full((16, 8), 0.1, requires_grad=True)
    exact_noise = low_noise.detach().double().requires_grad_()
    exact = oracle(case, (exact_noise, None), 4)[0]
    got = fused_noisy_linear_logps(single.hidden, single.head, low_noise, case.labels, seed=4).logps
    assert 0 < exact.abs().max() < 1e-8
    assert relative_error(got, exact) <= fp32_bound(32)
    grads = torch.autograd.grad(got.sum(), low_noise)[0], torch.autograd.grad(exact.sum(), exact_noise)[0]
    assert relative_error(*grads) <= fp32_bound(32)


def test_masked_vocabulary_and_one_word():
    """A bias of -inf takes an entry out, noise or not; with one word left its probability is 1."""
    case = make_case(rows=2, V=9, dtype=torch.float64)
    case.labels[case.labels >= 4] = IGNORE
    noise = noise_of(case)
    bias = torch.zeros(9, dtype=torch.float64)
    bias[4:] = -torch.inf
    got = fused_noisy_linear_logps(case.hidden, (case.weight, bias), noise, case.labels, seed=1, chunk_size=2)
    few = [x[:4] for x in noise]
    kept = fused_noisy_linear_logps(case.hidden, case.weight[:4], few, case.labels, seed=1)
    assert relative_error(got.logps, kept.logps) <= 1e-14
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(got.logps.sum(), noise))
    one = fused_noisy_linear_logps(case.hidden, case.weight[:1], noise[0][:1], case.labels * 0, seed=1)
    assert (one.logps == 0).all()


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 1000])
def test_chunk_size_does_not_matter(chunk_size):
    case, seed = make_case(bias=True), 6
    noise = noise_of(case)
    results = []
    for size in (chunk_size, None):
        logps, power = fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, seed=seed, chunk_size=size)
        results.append([logps, power, *torch.autograd.grad((logps + power).sum(), noise)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 2 * fp32_bound(32)  # either rounds


def test_layouts_agree():
    """Padded, more padding, packed, already shifted, a bound on the count: the same tokens, the same noise."""
    case = make_case(bias=True)
    noise = noise_of(case)
    args = {"seed": 6}
    padded = fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, **args)
    valid = case.labels[:, 1:] != IGNORE
    wanted = [x[:, :-1][valid] for x in padded]

    wide = fused_noisy_linear_logps(
        F.pad(case.hidden, (0, 0, 0, 5), value=float("nan")), case.head, noise,
        F.pad(case.labels, (0, 5), value=IGNORE), **args,
    )  # fmt: skip
    shifted = fused_noisy_linear_logps(
        case.hidden[:, :-1], case.head, noise, case.labels[:, 1:], shift=False, num_valid=case.labels.numel(), **args
    )
    hidden, labels, borders = packed(case)
    ends = fused_noisy_linear_logps(hidden, case.head, noise, labels, cu_seqlens=borders, **args)
    flat = torch.cat([row[1:] for row in labels.split(borders.diff().tolist()) if len(row)]) != IGNORE
    inner = [torch.cat([row[:-1] for row in x.split(borders.diff().tolist()) if len(row)])[flat] for x in ends]
    for k in (0, 1):
        for other in (wide[k][:, : valid.shape[1]][valid], shifted[k][valid], inner[k]):
            assert relative_error(other, wanted[k]) <= 2 * fp32_bound(32)
    assert sum(x.sum() for x in wide).isfinite()


@pytest.mark.interpreter
def test_tokens_are_found_by_the_kernel_where_the_core_does(monkeypatch):
    """One call for each of: the core, DNPO, FPO."""
    pytest.importorskip("triton", reason="needs Triton")
    from asft_kernels.kernels import pack_labels
    from asft_kernels.methods.fpo import features

    calls, find = [], pack_labels.pack_labels
    monkeypatch.setattr(pack_labels, "pack_labels", lambda *args, **more: calls.append(1) or find(*args, **more))
    monkeypatch.setattr(features, "choose_backend", lambda *_: "triton")  # as on a GPU
    case = make_case()
    fused_linear_logps(case.hidden, case.head, case.labels, backend="triton")
    fused_noisy_linear_logps(case.hidden, case.head, case.head, case.labels, seed=1, backend="triton")
    size = case.hidden.shape[-1]
    encoder = features.SparseAutoencoder(torch.ones(size, 4), torch.zeros(4), torch.ones(4, size), torch.zeros(size))
    features.pooled_features(encoder, case.hidden, case.labels)
    assert len(calls) == 3


def test_nothing_is_read_that_carries_no_label():
    case = make_case()
    noise = noise_of(case)
    args = {"seed": 6, "num_valid": case.labels.numel()}
    clean = fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, **args)
    poisoned = case.hidden.detach().clone()
    poisoned[:, :-1][case.labels[:, 1:] == IGNORE] = float("nan")
    poisoned[:, -1] = float("nan")
    got = fused_noisy_linear_logps(poisoned, case.head, noise, case.labels, **args)
    assert torch.equal(got.logps, clean.logps)
    grads = torch.autograd.grad((got.logps + got.noise_power).sum(), noise)
    assert all(torch.equal(a, b) for a, b in zip(
        grads, torch.autograd.grad((clean.logps + clean.noise_power).sum(), noise), strict=True
    ))  # fmt: skip


def test_seeds_differ_and_repeat():
    case = make_case()
    noise = noise_of(case)
    draws = [fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, seed=s).logps for s in (1, 2, 1)]
    assert torch.equal(draws[0], draws[2])
    valid = draws[0] != 0
    assert (draws[0][valid] != draws[1][valid]).all()


def test_noise_lowers_the_mean_by_the_second_order_term():
    """E[logp~_y] - logp_y = -1/2 sum_v p_v (1 - p_v) std_v^2, for any label, up to the fourth order in std."""
    N, V, std = 60_000, 12, 0.2
    weight = torch.randn(V, 4)
    hidden = torch.randn(1, 1, 4).expand(N, 1, 4)
    each = std * torch.rand(V)
    p = (hidden[0, 0] @ weight.T).softmax(-1)
    expected = -0.5 * (p * (1 - p) * each**2).sum()
    for label in (int(p.argmax()), int(p.argmin())):
        labels = torch.full((N, 1), label)
        noisy = fused_noisy_linear_logps(
            hidden, weight, (torch.zeros(V, 4), each), labels, seed=label, shift=False
        ).logps.double()
        # The first order, with mean 0, is taken off draw by draw: what is left has a spread of the second order.
        eps = normals(label, torch.arange(N), 0, V)
        first = each[label] * eps[:, label] - (p * each * eps).sum(1)
        shift = noisy[:, 0] - p[label].log() - first
        assert abs(shift.mean() - expected) <= 5 * shift.std() / N**0.5 + std**4
        assert abs(expected) > 20 * (shift.std() / N**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemm_count(dtype):
    """2 forward, 3 more backward; 2 where nothing asks for gradients."""
    case = make_case(rows=8, T=33, D=64, V=1024, valid=0.3, dtype=dtype)
    noise = noise_of(case)
    n = int((case.labels[:, 1:] != IGNORE).sum())

    def forward():
        return fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, seed=1, chunk_size=100)

    assert gemms(forward, n, 1024, 64) == pytest.approx(2, rel=1e-9)
    assert gemms(lambda: sum(forward()).sum().backward(), n, 1024, 64) == pytest.approx(5, rel=1e-9)


def test_double_backward_is_refused():
    case = make_case()
    noise = noise_of(case)
    logps = fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, seed=1).logps
    (grad,) = torch.autograd.grad(logps.square().sum(), noise[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.interpreter
@pytest.mark.parametrize("num_valid", [None, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_agree(dtype, num_valid, device):
    """Masked tokens, slots without a token, a softcap, the default chunks and small ones: either rounds in fp32."""
    pytest.importorskip("triton", reason="needs Triton")
    case = make_case(bias=True, dtype=dtype).on(device)
    case.labels[1] = IGNORE
    noise = [x.detach().to(device).requires_grad_() for x in noise_of(case, dtype=torch.float32)]
    options = {"seed": 2**50, "num_valid": num_valid, "logit_scale": 0.5, "softcap": 6.0}
    results = []
    for backend, chunk_size in (("torch", None), ("triton", None), ("triton", 50)):
        logps, power = fused_noisy_linear_logps(
            case.hidden, case.head, noise, case.labels, backend=backend, chunk_size=chunk_size, **options
        )
        grads = torch.autograd.grad((logps + 30 * power).sum(), noise)
        assert logps[1].eq(0).all()
        results.append([logps, power, *grads])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert relative_error(a, b) <= 2 * fp32_bound(32)


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_keeps_it_whole(backend, device):
    case = make_case().on(device)
    noise = [x.detach().to(device).requires_grad_() for x in noise_of(case)]

    def step(weight, bias):
        out = fused_noisy_linear_logps(case.hidden, case.head, (weight, bias), case.labels, seed=3, backend=backend)
        return (out.logps + out.noise_power).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*noise), noise)
    for a, b in zip(grads, torch.autograd.grad(step(*noise), noise), strict=True):
        assert relative_error(a, b) <= 2 * fp32_bound(32)


def test_autocast_leaves_the_noise_head_in_fp32():
    case = make_case()
    noise = noise_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused_noisy_linear_logps(case.hidden, case.head, noise, case.labels, seed=1)
    low = case.to(torch.bfloat16)
    expected = fused_noisy_linear_logps(low.hidden, low.head, noise, case.labels, seed=1)
    assert torch.equal(got.logps, expected.logps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed: got -1, need an integer from 0 to 2\*\*63 - 1"),
        ({"seed": 1.0}, "seed: got 1.0, need an integer"),
        ({"seed": 2**63}, "seed: got 9223372036854775808, need"),
        ({"noise_head": torch.zeros(96, 24)}, r"noise_head: got a weight of shape \(96, 24\), need \(97, 24\)"),
        ({"noise_head": nn.Conv1d(97, 24, 1)}, "noise_head: got torch.nn.modules.conv.Conv1d, need an nn.Linear"),
        ({"noise_head": (torch.zeros(97, 24), torch.zeros(4))}, r"noise_head: got a bias of shape \(4,\)"),
        ({"lm_head": torch.zeros(97, 24, dtype=torch.bfloat16)}, "lm_head weight: got torch.bfloat16, need"),
        ({"chunk_size": 0}, "chunk_size: got 0, need an integer >= 1"),
        ({"backend": "cuda"}, "backend: got 'cuda', need one of 'torch', 'triton' or None"),
    ],
)
def test_errors(changes, message):
    case = make_case()
    arguments = {"lm_head": case.weight, "noise_head": noise_of(case), "labels": case.labels, "seed": 1, **changes}
    with pytest.raises(ValueError, match=message):
        fused_noisy_linear_logps(case.hidden, **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_draws_and_computes_what_a_cpu_does(dtype, backend):
    case = make_case(rows=4, T=130, D=136, V=5003, dtype=dtype)
    there = case.on("cuda")
    noise = noise_of(case, dtype=torch.float32)
    moved = [x.detach().cuda().requires_grad_() for x in noise]
    runs = []
    for _ in range(2):
        got = fused_noisy_linear_logps(there.hidden, there.head, moved, there.labels, seed=5, backend=backend)
        runs.append([*got, *torch.autograd.grad((got.logps + got.noise_power).sum(), moved)])
    exact_noise = [x.detach().double().requires_grad_() for x in noise]
    exact = oracle(case, exact_noise, 5)
    truths = torch.autograd.grad((exact[0] + exact[1]).sum(), exact_noise)
    for a, again, b in zip(*runs, [*exact, *truths], strict=True):
        assert torch.equal(a, again)
        assert relative_error(a, b) <= fp32_bound(32)
