"""Heads that are more than a matrix, against their own forward: adapters, quantised and sharded weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from asft_kernels import fused_asft_loss, fused_linear_logps
from asft_kernels.core import heads
from asft_kernels.core.heads import resolve_head
from asft_kernels.core.sharded_linear import ShardedLinear
from bounds import fp32_bound, relative_error
from rank_processes import launch

peft = pytest.importorskip("peft", reason="needs peft, of the test extra")

T, D, V = 9, 64, 97
BOUND = fp32_bound(32)  # two fp32 computations of the same logits, |z| <= 32
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpreter)]


class Model(nn.Module):
    def __init__(self, bias: bool = False, width: int = D):
        super().__init__()
        self.body = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, V, bias=bias)


def adapted(model=None, **config):
    """A PEFT head whose adapters are not 0, as they are at first."""
    wrapped = peft.get_peft_model(model or Model(), peft.LoraConfig(**{"target_modules": ["lm_head"]} | config))
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = torch.randn_like(p) / p.shape[-1] ** 0.5 if "magnitude" not in name else p.data * 1.25
    return wrapped, wrapped.base_model.model.lm_head


def own_logps(head, hidden, labels):
    """By the head's own forward, in its own precision."""
    return head(hidden[:, :-1]).float().log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]


def batch(dtype=torch.float32, width=D):
    return torch.randn(4, T, width, dtype=dtype, requires_grad=True), torch.randint(V, (4, T))


def same(head, hidden, labels, backend, leaves, bound=BOUND):
    """Values and gradients; leaves: what is trained beside hidden."""
    g = torch.randn(4, T - 1)
    fused = fused_linear_logps(hidden, head, labels, backend=backend, chunk_size=40)[:, :-1]
    own = own_logps(head, hidden, labels)
    assert relative_error(fused, own) <= bound
    grads = [torch.autograd.grad(x, [hidden, *leaves], g) for x in (fused, own)]
    for got, right in zip(*grads, strict=True):
        assert got.dtype == right.dtype
        assert relative_error(got, right) <= bound


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 5}], ids=str)
def test_lora(config, bias, backend):
    _, head = adapted(Model(bias), **config)
    assert len(trained(head)) == 2
    same(head, *batch(), backend, trained(head))


def test_lora_with_a_bias_of_its_own():
    _, head = adapted(Model(bias=True), lora_bias=True)
    assert len(trained(head)) == 3
    same(head, *batch(), "torch", trained(head))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_adapters_at_once(backend):
    wrapped, head = adapted()
    wrapped.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=5))
    head.lora_B["other"].weight.data.normal_()
    head.set_adapter(["default", "other"])
    assert len(trained(head)) == 4
    same(head, *batch(), backend, trained(head))
    assert resolve_head(head).rows.low_rank.shape == (V, 11)


def test_dropout_of_lora_is_its_own():
    _, head = adapted(lora_dropout=0.5)
    hidden, labels = batch()
    head.train()
    torch.manual_seed(5)
    own = head(hidden).log_softmax(-1)[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]
    torch.manual_seed(5)
    assert relative_error(fused_linear_logps(hidden, head, labels)[:, :-1], own) <= BOUND
    head.eval()
    same(head, hidden, labels, "torch", trained(head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_of_few_bits_trains_in_fp32(dtype, backend):
    """PEFT keeps adapters of a bf16 model in fp32; their gradient stays so, within roundings of what goes into it."""
    wrapped, head = adapted(Model().to(dtype))
    hidden, labels = batch(dtype)
    A, B = trained(head)
    assert A.dtype == torch.float32
    exact = Model().double()
    exact.load_state_dict({k: v.double() for k, v in wrapped.get_base_model().state_dict().items() if "lora" not in k
                           and "body" in k} | {"lm_head.weight": head.base_layer.weight.double()})  # fmt: skip
    h, A64, B64 = (x.detach().double().requires_grad_() for x in (hidden, A, B))
    z = h @ exact.lm_head.weight.T + head.scaling["default"] * (h @ A64.T) @ B64.T
    right = z[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
    fused = fused_linear_logps(hidden, head, labels, backend=backend)[:, :-1]
    # A h and B go into the product in the model's dtype: u each, of logits of size 8 at most; the softmax doubles it.
    unit = torch.finfo(dtype).eps / 2
    assert (fused - right).abs().max() <= 2 * 2 * unit * 8
    g = torch.randn(4, T - 1)
    for got, want in zip(
        torch.autograd.grad(fused, [A, B], g), torch.autograd.grad(right, [A64, B64], g.double()), strict=True
    ):
        assert got.dtype == torch.float32
        assert relative_error(got, want) <= 4 * 2 * unit * 8  # E and A h, rounded too


def test_lora_needs_two_large_products():
    model = Model(width=256)
    _, head = adapted(model, r=8)
    head.base_layer.weight = nn.Parameter(torch.randn(4096, 256) / 16, requires_grad=False)
    head.lora_B["default"].weight = nn.Parameter(torch.randn(4096, 8))
    hidden, labels = torch.randn(2, 128, 256, requires_grad=True), torch.randint(4096, (2, 128))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as prof:
        fused_asft_loss(hidden, head, labels).backward()
    one = 2 * 254 * 4096 * 256
    flops = sum(e.flops for e in prof.key_averages() if e.key in ("aten::addmm", "aten::mm"))
    # Two of D + 16 columns each, one of 16 for B, and A's three of 256 x 8.
    assert 2 * one < flops < 2.3 * one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
def test_dora(bias, backend):
    _, head = adapted(Model(bias), use_dora=True)
    assert len(trained(head)) == 3
    same(head, *batch(), backend, trained(head))


def test_modules_to_save_and_disable_adapter():
    wrapped, _ = adapted(target_modules=["body"], modules_to_save=["lm_head"])
    head = wrapped.base_model.model.lm_head
    head.modules_to_save["default"].weight.data += 0.3 * torch.randn(V, D)
    hidden, labels = batch()
    same(head, hidden, labels, "torch", trained(head))
    with wrapped.disable_adapter():
        original = fused_linear_logps(hidden, head, labels)
        assert torch.equal(original, fused_linear_logps(hidden, head.original_module, labels))
    assert not torch.equal(original, fused_linear_logps(hidden, head, labels))


@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapter_is_asked_each_call(merged):
    wrapped, head = adapted()
    hidden, labels = batch()
    on = fused_linear_logps(hidden, head, labels)
    if merged:
        head.merge()
        assert relative_error(fused_linear_logps(hidden, head, labels), on) <= BOUND
    with wrapped.disable_adapter():
        off = fused_linear_logps(hidden, head, labels)
    assert relative_error(off, fused_linear_logps(hidden, head.base_layer, labels)) <= BOUND
    assert relative_error(off, on) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainable_token_indices(backend):
    wrapped, _ = adapted(target_modules=["body"], trainable_token_indices={"lm_head": [3, 50, 96]})
    head = wrapped.base_model.model.lm_head
    head.token_adapter.trainable_tokens_delta["default"].data.normal_()
    leaves = trained(head)
    assert [tuple(x.shape) for x in leaves] == [(3, D)]
    same(head, *batch(), backend, leaves)


def test_an_embedding_is_its_weight():
    hidden, labels = batch()
    table = nn.Embedding(V, D, padding_idx=0)
    assert torch.equal(fused_linear_logps(hidden, table, labels), fused_linear_logps(hidden, table.weight, labels))


@pytest.mark.parametrize("body", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_head_over_a_body_of_fewer_bits(body):
    """As a model does that casts the head's input: the product is in fp32."""
    hidden, labels = batch(body)
    head = nn.Linear(D, V)
    wide = hidden.detach().float().requires_grad_()
    fused, right = fused_linear_logps(hidden, head, labels), fused_linear_logps(wide, head, labels)
    assert torch.equal(fused, right)
    assert torch.equal(torch.autograd.grad(fused.sum(), hidden)[0], torch.autograd.grad(right.sum(), wide)[0].to(body))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = fused_linear_logps(hidden, head, labels)
    assert not torch.equal(low, right)


def quantised(kind, width=D, bias=False, **options):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the test extra")
    plain = nn.Linear(width, V, bias=bias)
    if kind == "8bit":
        head = bnb.nn.Linear8bitLt(width, V, bias=bias, has_fp16_weights=False)
        head.load_state_dict(plain.state_dict())
        head = head.to("cpu")
        head(torch.randn(1, width))  # quantises
        values = head.state.CB if head.state.CB is not None else head.weight.CB
        scale = head.state.SCB if head.state.SCB is not None else head.weight.SCB
        return head, values.float() * scale.float()[:, None] / 127
    head = bnb.nn.Linear4bit(width, V, bias=bias, quant_type=kind, **options)
    head.load_state_dict(plain.state_dict())
    head = head.to("cpu")
    return head, bnb.functional.dequantize_4bit(head.weight.data, head.weight.quant_state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {}),
        ("fp4", {}),
        ("nf4", {"compress_statistics": False}),
        ("nf4", {"width": 24}),  # blocks of 64 entries go over the ends of rows
        ("nf4", {"bias": True}),
        ("8bit", {}),
    ],
    ids=str,
)
def test_quantised_heads_are_read_chunk_by_chunk(kind, options, backend):
    head, whole = quantised(kind, **options)
    rows = resolve_head(head).rows
    read = rows.chunk(5, 77, torch.empty(80, whole.shape[1]))
    # Two factors in another order: 2 roundings, of 8 bits alone.
    torch.testing.assert_close(read, whole[5:77].float(), rtol=2 * 2**-24 * (kind == "8bit"), atol=0)
    hidden, labels = batch(width=options.get("width", D))
    pair = whole.float(), head.bias
    fused, right = (fused_linear_logps(hidden, x, labels, backend=backend, chunk_size=40) for x in (head, pair))
    assert relative_error(fused, right) <= BOUND
    grads = [torch.autograd.grad(x.sum(), hidden)[0] for x in (fused, right)]
    assert relative_error(*grads) <= BOUND


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("options", [{}, {"compress_statistics": False}], ids=str)
def test_four_bits_that_an_evaluation_packed_anew(kind, options):
    """As bitsandbytes does, in place, on a CPU with bf16 units; here by hand, so on any."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the test extra")
    rows = 96  # it packs 32 at a time
    head = bnb.nn.Linear4bit(128, rows, bias=False, quant_type=kind, **options)
    head.load_state_dict(nn.Linear(128, rows, bias=False).state_dict())
    head = head.to("cpu")
    hidden, labels = torch.randn(4, T, 128), torch.randint(rows, (4, T))
    before = fused_linear_logps(hidden, head, labels)
    data, head.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        head.weight.data, head.weight.quant_state
    )
    head.weight.data = data
    assert head.weight.quant_state.packing_format_for_cpu
    after = fused_linear_logps(hidden, head, labels)
    assert torch.equal(after, fused_linear_logps(hidden, head, labels)), "a call changes nothing"
    # Packing rounds the scales to bf16: u of each weight, of logits of size 4 (|h| |w|), and the softmax doubles it.
    assert 0 < (after - before).abs().max() <= 2 * 2**-9 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_on_a_quantised_head(backend):
    model = Model()
    model.lm_head, whole = quantised("nf4")
    _, head = adapted(model)
    hidden, labels = batch()
    plain = nn.Linear(D, V, bias=False)
    plain.weight = nn.Parameter(whole.float(), requires_grad=False)
    twin = Model()
    twin.lm_head = plain
    _, other = adapted(twin)
    other.load_state_dict({k: v for k, v in head.state_dict().items() if "lora" in k}, strict=False)
    fused, right = (fused_linear_logps(hidden, x, labels, backend=backend) for x in (head, other))
    assert relative_error(fused, right) <= BOUND
    grads = [torch.autograd.grad(x.sum(), [hidden, *trained(m)]) for x, m in ((fused, head), (right, other))]
    for got, want in zip(*grads, strict=True):
        assert relative_error(got, want) <= BOUND


def test_autocast_takes_its_dtype():
    _, head = adapted()
    hidden, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fused_linear_logps(hidden, head, labels)
    fused.sum().backward()
    full = fused_linear_logps(hidden, head, labels)
    assert 0 < relative_error(fused, full) < 2**-5
    assert all(p.grad.dtype == torch.float32 for p in trained(head))


def ia3():
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    return peft.get_peft_model(Model(), config).base_model.model.lm_head


def ada_lora():
    config = peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10, init_r=4, target_r=2)
    return peft.get_peft_model(Model(), config).base_model.model.lm_head


def lora_on_an_embedding():
    model = nn.Sequential(nn.Embedding(V, D))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])).base_model.model[0]


def hooked():
    head = adapted()[1]
    head.register_forward_hook(lambda module, inputs, output: 2 * output)
    return head


def patched():
    head = adapted()[1]
    head.forward = lambda hidden: head.base_layer(hidden)
    return head


REFUSED = [
    (lambda: adapted(use_dora=True, lora_dropout=0.1)[1], "DoRA in 'default' with dropout, need lora_dropout=0"),
    (ia3, "lm_head: got peft.tuners.ia3.layer.Linear, need an nn.Linear, or one with PEFT's LoRA"),
    (ada_lora, "lm_head: got peft.tuners.adalora.layer.SVDLinear, need PEFT's LoRA, rsLoRA or DoRA"),
    (lora_on_an_embedding, "lm_head: got LoRA on an nn.Embedding, need LoRA on the model's lm_head"),
    (hooked, "lm_head: got peft.tuners.lora.layer.Linear with forward hooks"),
    (patched, "lm_head: got peft.tuners.lora.layer.Linear with a forward of its own"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_not_understood_is_refused(config, message):
    hidden, labels = batch()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fused_linear_logps(hidden, config(), labels)


@pytest.mark.parametrize("status", ["AVAILABLE", "NOT_AVAILABLE"])
def test_zero3_parameters_are_used_while_they_are_gathered(status):
    """DeepSpeed's protocol, imitated: ds_id and ds_status."""
    from enum import Enum

    hidden, labels = batch()
    head = nn.Linear(D, V, bias=False)
    right = fused_linear_logps(hidden, head, labels)
    head.weight.ds_id = 3
    head.weight.ds_status = Enum("ZeroParamStatus", ["AVAILABLE", "NOT_AVAILABLE"])[status]
    if status == "AVAILABLE":
        assert torch.equal(fused_linear_logps(hidden, head, labels), right)
    else:
        with pytest.raises(ValueError, match="ZeRO-3 parameter that is partitioned, need it whole; wrap the call and"):
            fused_linear_logps(hidden, head, labels)


def _error_on_a_rank(rank: int, world: int) -> float:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    weight, hidden, labels = torch.randn(V, D) / 8, torch.randn(8, T, D), torch.randint(V, (8, T))
    mesh = init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    mine = slice(4 * rank, 4 * rank + 4)
    fused_linear_logps(hidden[mine], sharded, labels[mine]).sum().backward()
    whole = weight.clone().requires_grad_()
    (fused_linear_logps(hidden, whole, labels).sum() / 2).backward()
    assert sharded.grad.placements == (Shard(0),)
    return relative_error(sharded.grad.full_tensor(), whole.grad)


def test_a_dtensor_head_takes_every_ranks_gradient():
    """97 rows on two ranks: uneven shards, averaged as FSDP2 averages."""
    assert max(launch(2, _error_on_a_rank)) <= BOUND


def test_a_sharded_head_is_streamed_above_2_gib_alone(monkeypatch):
    """At the limit itself it is gathered."""
    from torch.distributed.tensor import Shard

    weight = SimpleNamespace(
        device_mesh=SimpleNamespace(ndim=1), placements=[Shard(0)], numel=lambda: 10, new_empty=torch.empty
    )
    for limit, streams in ((39, True), (40, False), (41, False)):  # 10 entries of 4 bytes
        monkeypatch.setattr(heads, "GATHERED_BYTES", limit)
        assert heads._streams(weight, None, "lm_head") == streams
    monkeypatch.setattr(heads, "GATHERED_BYTES", 0)
    for shape in ({"placements": [Shard(1)]}, {"device_mesh": SimpleNamespace(ndim=2)}):
        other = SimpleNamespace(**vars(weight) | shape)
        assert not heads._streams(other, None, "lm_head")
        with pytest.raises(ValueError, match=r"stream=True with placements .*, need Shard\(0\) on a mesh of one"):
            heads._streams(other, True, "lm_head")


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_head_that_is_not_quantised_yet_is_refused(kind):
    """bitsandbytes quantises in .to(device): before, there are no codes to read."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the test extra")
    head = getattr(bitsandbytes.nn, kind)(D, V, bias=False)
    with pytest.raises(ValueError, match=rf"lm_head: got a {kind} that is not quantised yet, need one on its device"):
        fused_linear_logps(torch.randn(1, 3, D), head, torch.zeros(1, 3, dtype=torch.int64))


def test_a_sharded_linear_takes_a_plain_bias():
    weight, bias = torch.randn(V, D), torch.randn(V)
    hidden, labels = torch.randn(1, 3, D), torch.zeros(1, 3, dtype=torch.int64)
    logps = fused_linear_logps(hidden, ShardedLinear(weight, bias), labels)
    assert torch.equal(logps, fused_linear_logps(hidden, (weight, bias), labels))


def test_a_sharded_linear_goes_in_with_its_own_dtype():
    """param_dtype, as FSDP2's policy has it; the gradient comes back in the weight's."""
    weight = torch.randn(V, D, requires_grad=True)
    head = ShardedLinear(weight, param_dtype=torch.bfloat16)
    assert resolve_head(head).rows.weight.dtype == torch.bfloat16
    hidden, labels = torch.randn(1, 3, D).bfloat16(), torch.zeros(1, 3, dtype=torch.int64)
    logps = fused_linear_logps(hidden, head, labels)
    assert torch.equal(logps, fused_linear_logps(hidden, weight.bfloat16(), labels))
    logps.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
