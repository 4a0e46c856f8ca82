"""`fuse`: log-probabilities of a model's own forward, and everything else of the model as it was."""

import copy
import inspect
import io
import threading
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the train extra: transformers")

import asft_kernels.functional
from asft_kernels.models import FusedOutput, UnsupportedHead, fuse, unfuse
from asft_kernels.models.config import logit_options
from asft_kernels.models.exact import product_unit
from model_cases import ARCHITECTURES, FP32, batch, built, own_logps
from tiny_lm import tiny_config, tiny_model


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients_are_those_of_the_models_own_loss(name):
    model, plain, data = built(name), built(name), batch()
    fuse(model)
    out = model(**data, fused_lm_head=True)
    expected = own_logps(plain, data)
    torch.testing.assert_close(out.log_probs.double(), expected, rtol=0, atol=FP32)
    assert out.label_mask.equal(data["labels"][:, 1:] != -100)
    own = plain(**data)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-5, atol=0)
    out.loss.backward()
    own.loss.backward()
    for weight, gradient in grads(plain).items():
        # fp32 backward passes in another order: 16 roundings of the largest entry for each of some 10 layers.
        assert (grads(model)[weight] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 1e-9, weight


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scale_and_cap_are_found_and_the_config_says_the_same(name):
    model = built(name)
    fuse(model)
    model(**batch(), fused_lm_head=True)
    scale, cap = ARCHITECTURES[name][2]
    found = model.forward.head.logits
    assert found.logit_scale == pytest.approx(scale, rel=1e-6)
    assert found.softcap == pytest.approx(cap, rel=1e-6) if cap else found.softcap is None
    assert logit_options(model.config) == (scale, cap)
    unchecked = built(name)
    fuse(unchecked, check=False)
    assert unchecked.forward.head.logits == (scale, cap)
    torch.testing.assert_close(
        unchecked(**batch(), fused_lm_head=True).log_probs, model(**batch(), fused_lm_head=True).log_probs
    )


@pytest.mark.parametrize("name", ["Gemma2", "Granite"])
def test_temperature_divides_scaled_and_capped_logits(name):
    model, plain = built(name), built(name)
    fuse(model, temperature=0.7)
    got = model(**batch(), fused_lm_head=True).log_probs.double()
    torch.testing.assert_close(got, own_logps(plain, batch(), 0.7), rtol=0, atol=2 * FP32)


def test_mixture_of_experts_adds_its_load_balancing_loss():
    model, data = built("Mixtral", router_aux_loss_coef=0.5), batch()
    fuse(model)
    out = model(**data, fused_lm_head=True)
    torch.testing.assert_close(out.aux_loss, model(**data).aux_loss)
    mean = -out.log_probs.sum() / out.label_mask.sum()
    torch.testing.assert_close(out.loss, mean + 0.5 * out.aux_loss)
    assert model(**data, fused_lm_head=True, output_router_logits=False).aux_loss is None


def test_shifted_labels_and_a_count_of_the_caller():
    model, data = built("Llama"), batch()
    fuse(model)
    expected = model(**data, fused_lm_head=True)
    shifted = nn.functional.pad(data.pop("labels")[:, 1:], (0, 1), value=-100)
    out = model(**data, shift_labels=shifted, num_items_in_batch=torch.tensor(40), fused_lm_head=True)
    assert out.log_probs.shape == shifted.shape
    assert out.log_probs[:, :-1].equal(expected.log_probs)
    torch.testing.assert_close(out.loss, expected.loss * expected.label_mask.sum() / 40)


def test_the_output_is_read_by_name_and_by_key():
    model = built("Llama")
    fuse(model)
    out = model(**batch(), fused_lm_head=True)
    assert isinstance(out, FusedOutput)
    assert out["loss"] is out.loss
    assert list(out) == ["loss", "log_probs", "label_mask"]
    others = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1", "lse", "aux_loss")
    assert all(getattr(out, name) is None for name in others)


def test_every_figure_per_token():
    names = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1", "lse")
    model, data = built("Gemma2"), batch()
    fuse(model, outputs=names, temperature=0.7)
    out = model(**data, fused_lm_head=True)
    own = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, :-1].double() / 0.7
    logp = own.log_softmax(-1)
    expected = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logits": own.mean(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "lse": own.logsumexp(-1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(out[name].double(), values.where(out.label_mask, 0), rtol=0, atol=2 * FP32)
        assert out[name].requires_grad == (name in ("entropy", "lse")), name
    assert out.is_top1.equal((own.argmax(-1) == data["labels"][:, 1:]) & out.label_mask)


def test_without_the_keyword_nothing_is_changed():
    model, plain, data = built("Llama"), built("Llama"), batch()
    fuse(model)
    model(**data, fused_lm_head=True)
    assert model(**data).logits.equal(plain(**data).logits)
    assert model(**data).loss.equal(plain(**data).loss)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = data["input_ids"][:, :5]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids, **options).equal(plain.generate(ids, **options))
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, nonsense=1)
    unfuse(model)
    unfuse(model)
    assert vars(model).keys() == vars(plain).keys()
    assert vars(model.lm_head).keys() == vars(plain.lm_head).keys()


def test_copies_pickles_and_saved_models(tmp_path):
    model, data = built("Granite"), batch()
    fuse(model)
    expected = model(**data, fused_lm_head=True).log_probs
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    fuse(read)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    for other in (copied, loaded, read):
        assert other.forward.model is other
        assert other(**data, fused_lm_head=True).log_probs.equal(expected)


def test_accelerate_wraps_and_unwraps_the_forward():
    accelerate = pytest.importorskip("accelerate", reason="needs the train extra: accelerate")
    model, data = built("Llama"), batch()
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**data, fused_lm_head=True).log_probs
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    assert "labels" in inspect.signature(prepared.forward).parameters
    assert isinstance(prepared(**data, fused_lm_head=True), FusedOutput)
    assert prepared(**data, fused_lm_head=True).log_probs.equal(expected)
    with pytest.raises(ValueError, match="got a forward that something has wrapped since"):
        unfuse(model)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain(**data, fused_lm_head=True).log_probs.dtype == torch.float32
    assert plain.generate(data["input_ids"], max_new_tokens=1).shape == (4, 13)
    unfuse(plain)
    assert "forward" not in vars(plain)


def test_gradient_checkpointing():
    model, plain, data = built("Llama").train(), built("Llama").train(), batch()
    fuse(model)
    model.activation_checkpointing_enable()
    model(**data, fused_lm_head=True).loss.backward()
    plain(**data).loss.backward()
    for name, gradient in grads(plain).items():
        assert (grads(model)[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


# torch.compile itself, of a tensor with a history that crosses the graph break at the head
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models():
    model, data = built("Llama", num_hidden_layers=1), batch()
    fuse(model)
    expected, logits = model(**data, fused_lm_head=True).log_probs, model(**data).logits
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):  # in turn: what is compiled for one must not be taken for the other
        out = compiled(**data, fused_lm_head=True)
        torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=FP32)
        torch.testing.assert_close(compiled(**data).logits, logits, rtol=0, atol=FP32)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_threads_do_not_meet():
    """One thread generates while another is at the head of the same model."""
    model, data = built("Llama"), batch()
    fuse(model)
    expected, logits = model(**data, fused_lm_head=True).log_probs, model(**data).logits
    at_head, seen = threading.Event(), []
    done = threading.Event()

    def wait(*_):
        at_head.set()
        done.wait(20)

    hook = model.lm_head.register_forward_pre_hook(wait)

    def fused():
        seen.append(model(**data, fused_lm_head=True).log_probs)

    thread = threading.Thread(target=fused)
    thread.start()
    assert at_head.wait(20)
    hook.remove()
    assert model(**data).logits.equal(logits)
    done.set()
    thread.join()
    assert seen[0].equal(expected)


@pytest.mark.parametrize("option", [{"logit_scale": 1.01}, {"softcap": 20.0}])
def test_a_wrong_scale_or_cap_is_refused_by_name(option):
    model = built("Llama")
    fuse(model, **option)
    message = r"LlamaForCausalLM: log-prob.* by up to [\d.e+-]+, rounding explains [\d.e+-]+"
    with pytest.raises(UnsupportedHead, match=message) as caught:
        model(**batch(), fused_lm_head=True)
    assert "leave them out to have them found, or use another model" in str(caught.value)
    fuse(model, **option, check=False)
    assert model(**batch(), fused_lm_head=True).loss.isfinite()


class Doing(type(tiny_model())):
    """A Llama that does something with its logits."""

    def __init__(self, config, do):
        super().__init__(config)
        self.do = do

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.do(out.logits)
        return out


def doing(do):
    torch.manual_seed(0)
    return Doing(tiny_config(initializer_range=0.5), do).float().eval()


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (lambda z: z + z.square() / 50, "does more than scale"),
        (lambda z: z + torch.arange(z.shape[-1]) / 50, "does more than scale"),
        (lambda z: z[..., :-1], "need the same shape"),
        (lambda z: z[:, -1:], "need the same shape"),
        (lambda z: z * 0, "do not follow its head's output"),
        (lambda z: z + torch.zeros(4, 12, 259), r"fails after the output head \(RuntimeError"),
    ],
    ids=["square", "bias", "cut", "last", "zero", "fixed shape"],
)
def test_heads_that_do_more_are_refused_by_name(do, text):
    model = doing(do)
    fuse(model)
    with pytest.raises(UnsupportedHead, match=f"Doing: .*{text}"):
        model(**batch(), fused_lm_head=True)


def test_a_scale_that_no_config_names_is_found():
    model = doing(lambda z: z.mul_(1.5))  # in place: log-probabilities must not be what it writes on
    fuse(model)
    plain = doing(lambda z: z.mul_(1.5))
    got = model(**batch(), fused_lm_head=True).log_probs.double()
    torch.testing.assert_close(got, own_logps(plain, batch()), rtol=0, atol=FP32)
    assert model.forward.head.logits == (1.5, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_passes_the_check(dtype):
    model = tiny_model(initializer_range=0.5).to(dtype)
    fuse(model)
    assert model(**batch(), fused_lm_head=True).log_probs.dtype == torch.float32
    assert 0 < model.forward.head.difference < 0.5


def test_autocast_passes_the_check():
    model, plain, data = tiny_model(initializer_range=0.5), tiny_model(initializer_range=0.5), batch()
    fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**data, fused_lm_head=True).log_probs
        expected = own_logps(plain, data)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.2)  # logits of up to 10 in bf16: 2^-8 * 10 * 2


def test_cast_lm_head_to_fp32_leaves_autocast_out():
    model, plain, data = tiny_model(initializer_range=0.5), tiny_model(initializer_range=0.5), batch()
    fuse(model, cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**data, fused_lm_head=True).log_probs
        hidden = plain.model(data["input_ids"], data["attention_mask"]).last_hidden_state.float()
    logps = nn.functional.linear(hidden, plain.lm_head.weight)[:, :-1].double().log_softmax(-1)
    expected = logps.gather(-1, data["labels"][:, 1:, None].clamp(min=0))[..., 0]
    torch.testing.assert_close(got.double(), expected.where(data["labels"][:, 1:] != -100, 0), rtol=0, atol=FP32)


def test_an_fp32_head_over_a_bf16_body():
    """Its own forward has no such product: log-probabilities are those of the cast hidden states."""
    model, data = built("Llama").bfloat16(), batch()
    model.lm_head.float()
    fuse(model)
    got = model(**data, fused_lm_head=True).log_probs
    hidden = model.model(data["input_ids"], data["attention_mask"]).last_hidden_state.float()
    logps = nn.functional.linear(hidden, model.lm_head.weight)[:, :-1].double().log_softmax(-1)
    expected = logps.gather(-1, data["labels"][:, 1:, None].clamp(min=0))[..., 0].where(
        data["labels"][:, 1:] != -100, 0
    )
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=FP32)


def test_heads_that_cannot_be_fused_say_why():
    model = tiny_model()

    class Adapter(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1

    model.lm_head = Adapter(16, model.config.vocab_size, bias=False)
    fuse(model)
    with pytest.raises(UnsupportedHead, match=r"LlamaForCausalLM: its output head cannot be fused: lm_head"):
        model(**batch(), fused_lm_head=True)
    patched = tiny_model()
    patched.lm_head.forward = lambda hidden: nn.functional.linear(hidden, patched.lm_head.weight) + 1
    fuse(patched)
    with pytest.raises(UnsupportedHead, match="a forward of its own"):
        patched(**batch(), fused_lm_head=True)


def test_models_without_a_head_and_encoder_decoders_are_refused():
    with pytest.raises(UnsupportedHead, match=r"LlamaModel: get_output_embeddings\(\) is None"):
        fuse(tiny_model().model)
    with pytest.raises(UnsupportedHead, match=r"Linear: has no get_output_embeddings\(\), need a Hugging Face causal"):
        fuse(nn.Linear(2, 2))
    model = tiny_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedHead, match="encoder-decoder, need a decoder-only"):
        fuse(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"outputs": ("logits",)}, "outputs: got .*, need a tuple of 'log_probs'"),
        ({"differentiable": ("is_top1",)}, r"differentiable: got \('is_top1',\), need a tuple of 'entropy', 'lse'"),
        ({"differentiable": "lse"}, "differentiable: got 'lse', need a tuple of 'entropy', 'lse'"),
        ({"outputs": "entropy"}, "outputs: got 'entropy', need a tuple"),
        ({"temperature": 0.0}, "temperature: got 0.0, need a finite number > 0"),
    ],
)
def test_what_fuse_does_not_understand(options, text):
    with pytest.raises(ValueError, match=text):
        fuse(tiny_model(), **options)


def test_labels_are_needed_and_positions_must_be_there():
    model, data = built("Llama"), batch()
    fuse(model)
    labels = data.pop("labels")
    with pytest.raises(ValueError, match="labels: got None, need"):
        model(**data, fused_lm_head=True)
    with pytest.raises(UnsupportedHead, match="leave out logits_to_keep"):
        model(**data, labels=labels, logits_to_keep=3, fused_lm_head=True)
    with pytest.raises(ValueError, match="labels: got values"):
        model(**data, labels=labels + 1000, fused_lm_head=True)


def test_a_batch_without_labels_has_a_loss_of_zero_and_gradients():
    model, data = built("Llama"), batch()
    fuse(model)
    data["labels"].fill_(-100)
    out = model(**data, fused_lm_head=True)
    assert out.loss == 0
    out.loss.backward()
    assert all(g.abs().max() == 0 for g in grads(model).values())


def test_backend_is_the_same_in_check_and_training(monkeypatch):
    asked, choose = [], asft_kernels.core.token_logps.choose_backend
    monkeypatch.setattr(
        "asft_kernels.core.token_logps.choose_backend", lambda name, *x: asked.append(name) or choose(name, *x)
    )
    model = built("Llama")
    fuse(model, backend="torch")
    model(**batch(), fused_lm_head=True)
    assert asked == ["torch", "torch"]


def test_only_positions_that_carry_loss_are_computed(monkeypatch):
    rows, primitive = [], asft_kernels.core.token_logps.linear_logps
    monkeypatch.setattr(
        "asft_kernels.core.token_logps.linear_logps", lambda *x, **kw: rows.append(len(x[3])) or primitive(*x, **kw)
    )
    model, data = built("Llama"), batch()
    fuse(model, check=False)
    out = model(**data, fused_lm_head=True)
    assert rows == [int(out.label_mask.sum())]


def test_several_gpus_in_one_process_are_refused():
    model = built("Llama")
    fuse(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM: got several GPUs in one process"):
        model._replicate_for_data_parallel()  # what nn.DataParallel calls


@pytest.mark.parametrize(("precision", "unit"), [("tf32", 2.0**-11), ("ieee", 2.0**-24)])
def test_rounding_of_products_under_the_new_precision_setting(precision, unit):
    """`allow_tf32` cannot be read once fp32_precision was set, as transformers' --tf32 does."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        assert product_unit(on_gpu=True) == unit
        assert product_unit(on_gpu=False) == 2.0**-24
    finally:
        matmul.fp32_precision = before


def test_real_model_head_is_checked():
    """SmolLM2: fused log-probabilities of real hidden states agree with its own logits."""
    from transformers import AutoModelForCausalLM

    from asft_kernels.models.smollm2 import ModelUnavailable, smollm2_path

    try:
        folder = smollm2_path(download=False)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fuse(model)
    model(**batch(pairs=1, length=24, vocab=49152), fused_lm_head=True)
    assert model.forward.head.difference < 1e-3


def test_a_fused_model_is_freed_at_once():
    model = built("Llama")
    fuse(model)
    model(**batch(), fused_lm_head=True)
    alive = weakref.ref(model)
    del model
    assert alive() is None, "a cycle: memory of a large model would wait for the garbage collector"


def test_the_check_leaves_dropout_and_modes_as_they_were():
    """No random number is drawn: the step is that of a model whose check is off, however far training has come."""
    outputs = []
    for check in (True, False):
        model = built("Llama", attention_dropout=0.5).train()
        model.model.layers[0].eval()
        before = [module.training for module in model.modules()]
        fuse(model, check=check)
        torch.manual_seed(3)
        outputs.append(model(**batch(), fused_lm_head=True).log_probs)
        assert [module.training for module in model.modules()] == before
    assert outputs[0].equal(outputs[1])


def test_gradients_go_through_what_a_hook_of_the_head_has_put_there():
    """As DeepSpeed's, which gathers the weight in the backward of an operator that it puts behind the output."""
    passed = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, *grads):
            passed.append(grads[0].shape)
            return grads[0]

    model, data = built("Llama"), batch()

    def post_forward(module, args, output):
        return Marked.apply(output)

    post_forward.__module__ = "deepspeed.runtime.zero"  # anyone else's hook is refused
    model.lm_head.register_forward_hook(post_forward)
    fuse(model)
    log_probs = model(**data, fused_lm_head=True).log_probs
    assert not passed
    log_probs.sum().backward()
    assert len(passed) == 1
    assert model.lm_head.weight.grad is not None
