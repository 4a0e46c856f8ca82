"""Values and gradients against float64 on the same inputs: every dtype, odd shapes, peaked softmaxes."""

import pytest
import torch

from asft_kernels import fused_asft_loss, fused_linear_logps, reference
from asft_kernels.backends import plan, torch_chunked
from asft_kernels.backends.torch_chunked import BIT, NAT
from bounds import fp32_bound, relative_error, rounded_once
from cases import IGNORE, Case, make_case, one_label_far_below

LOW = [torch.bfloat16, torch.float16]
# The torch backend rounds a low-precision gradient once; its fp32 interior adds 1e-6, and 1.1 covers the draw.
TORCH_FACTOR = 1.1


@pytest.fixture(autouse=True, params=["on a CPU", "as on a GPU", "in blocks of tokens", "in the other unit"])
def _every_branch(request, monkeypatch):
    if request.param == "as on a GPU":
        request.getfixturevalue("as_on_a_gpu")
    if request.param == "in blocks of tokens":
        monkeypatch.setitem(plan.TOKEN_BLOCK, "cpu", 5)
    if request.param == "in the other unit":
        monkeypatch.setattr(torch_chunked, "UNIT", {NAT: BIT, BIT: NAT}[torch_chunked.UNIT])


def plain_logps(case: Case, *, scale=1.0, softcap=None) -> torch.Tensor:
    """(rows, T) log-softmax of the full logits in the case's dtype, 0 where masked."""
    logits = scale * torch.nn.functional.linear(case.hidden, case.weight, case.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    target = torch.nn.functional.pad(case.labels[:, 1:], (0, 1), value=IGNORE)
    own = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.where(target == IGNORE, 0, own)


def plain_loss(case: Case, **transform) -> torch.Tensor:
    """ASFT at beta = 1 in closed form: -2 avg_w - log(1 - p_l)."""
    logps = plain_logps(case, **transform)
    avg = logps.sum(1) / (case.labels[:, 1:] != IGNORE).sum(1)
    chosen, rejected = avg.chunk(2)
    return (-2 * chosen - torch.log(-torch.expm1(rejected))).mean()


def max_logit(case: Case) -> float:
    return (case.hidden.double() @ case.weight.double().T).abs().max().item()


SHAPES = [
    dict(rows=8, T=64, D=123, V=507),
    dict(rows=2, T=126, D=507, V=1001),
    dict(rows=2, T=2, D=1, V=2, valid=1.0),
    dict(rows=64, T=19, D=16, V=700, valid=0.97),  # more tokens than a block has
]


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32(shape, peaked):
    case = make_case(**shape, bias=True, peaked=peaked, spread=3.0 if peaked else 1.0)
    exact, plain = case.to(torch.float64), case.to(torch.float32)
    fused = fused_asft_loss(case.hidden, case.head, case.labels, chunk_size=min(200, shape["V"]))
    losses = [fused, plain_loss(plain), plain_loss(exact)]
    grads = [torch.autograd.grad(x, c.leaves) for x, c in zip(losses, (case, plain, exact), strict=True)]
    for mine, naive, truth in zip((fused, *grads[0]), (losses[1], *grads[1]), (losses[2], *grads[2]), strict=True):
        allowed = max(fp32_bound(max_logit(case)), 1.1 * relative_error(naive, truth))
        assert relative_error(mine, truth) <= allowed


@pytest.mark.parametrize("peaked", [False, True])
def test_fp32_logps(peaked):
    case = make_case(rows=8, T=64, D=123, V=507, peaked=peaked, spread=3.0)
    exact = plain_logps(case.to(torch.float64))
    assert relative_error(fused_linear_logps(case.hidden, case.head, case.labels), exact) <= fp32_bound(max_logit(case))


@pytest.mark.parametrize("peaked", [False, True])
def test_fp32_large_vocabulary(peaked):
    case = make_case(rows=2, T=9, D=16, V=152_001, valid=0.97, peaked=peaked, spread=3.0)
    exact = case.to(torch.float64)
    mine = fused_asft_loss(case.hidden, case.head, case.labels)
    truth = plain_loss(exact)
    assert relative_error(mine, truth) <= fp32_bound(max_logit(case))
    for got, right in zip(
        torch.autograd.grad(mine, case.leaves), torch.autograd.grad(truth, exact.leaves), strict=True
    ):
        assert relative_error(got, right) <= fp32_bound(max_logit(case))


@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens_and_many_chunks(tokens):
    """The gradient to hidden is a sum over 297 chunks, and must not lose digits on the way.

    Which numbers of tokens would, depends on the BLAS and its threads; 1 and 3 do with any number of them.
    """
    case = make_case(rows=1, T=tokens + 1, D=48, V=152_001, valid=1.0, spread=3.0)
    exact = case.to(torch.float64)
    (grad,) = torch.autograd.grad(
        fused_linear_logps(case.hidden, case.head, case.labels, chunk_size=512).sum(), case.hidden
    )
    (truth,) = torch.autograd.grad(plain_logps(exact).sum(), exact.hidden)
    assert relative_error(grad, truth) <= fp32_bound(max_logit(case))


def test_confident_tokens_keep_their_bits():
    """A margin of 40 nats: plain fp32 gives logp = 0 and no gradient; 1 - p = exp(-40) is what ASFT needs."""
    hidden = torch.tensor([[[1.0], [1.0]]])
    weight = torch.tensor([[40.0], [0.0]], requires_grad=True)
    logp = fused_linear_logps(hidden, weight, torch.tensor([[0, 0]]))[0, 0]
    exact = -torch.tensor(-40.0, dtype=torch.float64).exp().log1p()
    assert relative_error(logp, exact) <= fp32_bound(40)
    (grad,) = torch.autograd.grad(logp, weight)
    assert relative_error(grad, torch.tensor([[1.0], [-1.0]]) * exact.exp() * 4.248354255291589e-18) <= fp32_bound(40)


@pytest.mark.parametrize("pairs", [1, 4, 32])
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision(dtype, peaked, pairs):
    """One rounding of the exact gradient, however many pairs and chunks; exact log-probabilities."""
    case = make_case(rows=2 * pairs, T=20, D=123, V=507, dtype=dtype, peaked=peaked, bias=True)
    exact = case.to(torch.float64)
    logps = fused_linear_logps(case.hidden, case.head, case.labels)
    assert (logps.double() - plain_logps(exact)).abs().max() <= 1e-4
    for cache_bytes, chunk_size in ((None, None), (0, 50)):
        mine = fused_asft_loss(case.hidden, case.head, case.labels, cache_bytes=cache_bytes, chunk_size=chunk_size)
        grads = torch.autograd.grad(mine, case.leaves)
        truths = torch.autograd.grad(plain_loss(exact), exact.leaves)
        for got, truth in zip(grads, truths, strict=True):
            assert got.dtype == dtype
            assert relative_error(got, truth) <= TORCH_FACTOR * rounded_once(truth, dtype)


@pytest.mark.parametrize(
    ("bias", "softcap", "cache_bytes"), [(False, None, None), (False, 5.0, 0), (True, None, 0), (True, 5.0, 300)]
)
def test_gradcheck(bias, softcap, cache_bytes):
    """Nothing, one of three chunks and everything kept."""
    case = make_case(rows=4, T=4, D=2, V=9, valid=0.7, dtype=torch.float64, bias=bias)

    def loss(hidden, weight, *bias):
        return fused_asft_loss(
            hidden, (weight, *bias) if bias else weight, case.labels, lam=0.7, beta=0.3, sft_weight=0.5,
            logit_scale=1.3, softcap=softcap, chunk_size=4, cache_bytes=cache_bytes, reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, tuple(case.leaves))


@pytest.mark.parametrize("jump", [35.0, 200.0, 3e4])
@pytest.mark.parametrize("cache_bytes", [0, None])
def test_reference_moves_between_chunks(jump, cache_bytes):
    """Logits far above the label's, in a later chunk and a later one still: nothing overflows, nothing is lost."""
    case = make_case(rows=4, T=9, D=12, V=60, bias=True)
    with torch.no_grad():
        case.bias[[25, 41, 58]] = torch.tensor([jump / 2, jump, jump - 3])
    exact = case.to(torch.float64)
    bound = fp32_bound(jump + 10)
    mine = fused_linear_logps(case.hidden, case.head, case.labels, chunk_size=10, cache_bytes=cache_bytes)
    truth = plain_logps(exact)
    assert relative_error(mine, truth) <= bound
    weights = torch.randn_like(mine)
    grads = torch.autograd.grad((mine * weights).sum(), case.leaves)
    truths = torch.autograd.grad((truth * weights.double()).sum(), exact.leaves)
    for got, right in zip(grads, truths, strict=True):
        assert relative_error(got, right) <= bound


@pytest.mark.parametrize("cache_bytes", [0, 2000, None])  # 2000: some chunks
@pytest.mark.parametrize("high", [2, 32, 60, 96])
def test_nothing_stays_of_a_first_attempt(high, cache_bytes):
    """One logit 60 above one label in a later chunk: by then O and the cache hold finite numbers of every token."""
    case = one_label_far_below(make_case(rows=4, T=13, D=24, V=97), 60.0, torch.tensor([high]))
    exact = case.to(torch.float64)
    mine = fused_linear_logps(case.hidden, case.head, case.labels, chunk_size=5, cache_bytes=cache_bytes)
    truth = plain_logps(exact)
    weights = torch.randn_like(mine)
    grads = torch.autograd.grad((mine * weights).sum(), case.leaves)
    truths = torch.autograd.grad((truth * weights.double()).sum(), exact.leaves)
    for got, right in zip((mine, *grads), (truth, *truths), strict=True):
        assert relative_error(got, right) <= fp32_bound(60)


@pytest.mark.parametrize("over", [0.5, 3.0, 6.0, 8.0])
def test_saturated_softcap(over):
    """Where tanh is 1 to the last bit its slope is exp(-2 over) * 4 and must keep its digits."""
    case = make_case(rows=4, T=9, D=12, V=60, bias=True)
    with torch.no_grad():
        case.bias.copy_(30.0 * over * case.bias.sign())
    exact = case.to(torch.float64)
    mine = fused_linear_logps(case.hidden, case.head, case.labels, softcap=30.0, chunk_size=17, cache_bytes=3000)
    truth = plain_logps(exact, softcap=30.0)
    # u, before the cap, is wrong by 30 * over * 2**-24; the slope's exponential makes 2 * over * 2**-24 of it.
    bound = fp32_bound(30 * max(over, 2))
    assert relative_error(mine, truth) <= bound
    grads = torch.autograd.grad(mine.sum(), case.leaves)
    for got, right in zip(grads, torch.autograd.grad(truth.sum(), exact.leaves), strict=True):
        assert relative_error(got, right) <= bound


def test_nan_of_one_token_leaves_the_others_exact():
    """Another token's reference moves in the same chunk: a maximum over NaN must not hide that."""
    case = make_case(rows=2, T=4, D=12, V=60)
    hidden, weight = case.hidden.detach().clone(), case.weight.detach().clone()
    labels = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]])
    hidden[0, 1], weight[1], weight[50] = 0.0, 0.0, 0.0
    hidden[0, 1, 0], weight[50, 0] = 10.0, 20.0  # entry 50 stands 200 above the label: exp overflows
    hidden[1, 0] = torch.nan
    logps = fused_linear_logps(hidden, weight, labels, chunk_size=20)
    truth = plain_logps(Case(hidden.double(), weight.double(), None, labels))
    assert logps[1, 0].isnan()
    assert relative_error(logps[0], truth[0]) <= fp32_bound(200)


@pytest.mark.parametrize("cache_bytes", [0, None])
def test_vocabulary_entries_switched_off(cache_bytes):
    """Bias -inf for padded entries: a chunk of nothing else, and a label among them (logp -inf, as plain torch)."""
    case = make_case(rows=4, T=9, D=12, V=60, bias=True)
    with torch.no_grad():
        case.bias[:20] = -torch.inf
        case.labels[case.labels >= 0] = case.labels[case.labels >= 0].clamp(min=20)
    exact = case.to(torch.float64)
    mine = fused_linear_logps(case.hidden, case.head, case.labels, chunk_size=10, cache_bytes=cache_bytes)
    truth = plain_logps(exact)
    assert relative_error(mine, truth) <= fp32_bound(32)
    for got, right in zip(
        torch.autograd.grad(mine.sum(), case.leaves[:2]),
        torch.autograd.grad(truth.sum(), exact.leaves[:2]),
        strict=True,
    ):
        assert relative_error(got, right) <= fp32_bound(32)
    case.labels[0, 3] = 3
    logps = fused_linear_logps(case.hidden, case.head, case.labels, chunk_size=10)
    assert logps[0, 2] == -torch.inf
    assert not logps.isnan().any()


LOW_FIRST, HIGH_SECOND, UP_AND_DOWN = (-300.0, -300.0, -300.0), (-300.0, 50.0, 0.0), (40.0, -300.0, 50.0)
NOTHING_FIRST = (-torch.inf, -300.0, -300.0)


@pytest.mark.parametrize("levels", [LOW_FIRST, HIGH_SECOND, UP_AND_DOWN, NOTHING_FIRST], ids=str)
@pytest.mark.parametrize("cache_bytes", [0, None])
def test_impossible_labels(levels, cache_bytes):
    """A label of logit -inf lends no reference: the first chunks' own logits do, however low they lie."""
    case = make_case(rows=4, T=9, D=12, V=60, bias=True)
    with torch.no_grad():
        case.bias[:] = torch.tensor(levels).repeat_interleave(20)
        case.bias[7] = -torch.inf
        case.labels[case.labels >= 0] = 7
    exact = case.to(torch.float64)
    mine = fused_linear_logps(case.hidden, case.head, case.labels, chunk_size=20, cache_bytes=cache_bytes)
    truth = plain_logps(exact)
    assert (mine[case.labels[:, 1:].ne(IGNORE).nonzero(as_tuple=True)] == -torch.inf).all()
    grads = torch.autograd.grad(mine, case.leaves, torch.ones_like(mine))
    truths = torch.autograd.grad(truth, exact.leaves, torch.ones_like(truth))
    for got, right in zip(grads, truths, strict=True):
        assert relative_error(got, right) <= fp32_bound(300)


def test_far_references_overflow_nothing():
    """5,000 logits 75 nats above the label: exp(75) is finite in fp32, 5,000 of them times a large head are not."""
    hidden = torch.ones(2, 3, 2, requires_grad=True)
    weight = torch.full((5000, 2), 40.0)
    weight[:, 1] = 35.0
    weight[0] = 0.0
    weight.mul_(1.0).requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.int64)
    exact = Case(hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), None, labels)
    mine = fused_linear_logps(hidden, weight, labels, chunk_size=1000)
    truth = plain_logps(exact)
    bound = fp32_bound(75)
    assert relative_error(mine, truth) <= bound
    scale = torch.full_like(mine, 1e30)
    for got, right in zip(
        torch.autograd.grad(mine, (hidden, weight), scale),
        torch.autograd.grad(truth, exact.leaves, scale.double()), strict=True,
    ):  # fmt: skip
        assert relative_error(got, right) <= bound


def test_reference_agrees_with_the_closed_form():
    """The oracle itself, against the loss written another way."""
    case = make_case(dtype=torch.float64)
    torch.testing.assert_close(
        reference.fused_asft_loss(case.hidden, case.head, case.labels), plain_loss(case), rtol=1e-13, atol=0
    )
