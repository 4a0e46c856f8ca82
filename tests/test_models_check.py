"""The check of `fuse`: tight in few bits, robust against broken values and quantised heads, one thread at a time."""

import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from transformers import LlamaForCausalLM

from asft_kernels import fused_linear_logps
from asft_kernels.models import PreferenceModel, UnsupportedHead, fuse
from model_cases import FP32, batch, built
from tiny_lm import tiny_config, tiny_model


class Doing(LlamaForCausalLM):
    """A Llama with a head bias that does something with its logits."""

    def __init__(self, config, do, bias):
        super().__init__(config)
        self.do = do
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        with torch.no_grad():
            self.lm_head.weight.normal_(std=0.25)
            self.lm_head.bias.fill_(bias)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.do(out.logits)
        return out


def doing(do, bias, dtype) -> Any:
    torch.manual_seed(0)
    return Doing(tiny_config(tie_word_embeddings=False), do, bias).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_an_offset_of_all_logits_hides_nothing(dtype, bias):
    """log_softmax does not see it, but bf16 logits of size 100 are rounded by up to 0.25."""
    wrong = doing(lambda z: torch.tanh(z - bias), bias, dtype)
    fuse(wrong)
    with pytest.raises(UnsupportedHead, match="Doing: does more than scale and cap its head's output: an output of 0"):
        wrong(**batch(), fused_lm_head=True)
    wrong = doing(lambda z: z + z.sin().square() / 10, bias, dtype)
    fuse(wrong)
    with pytest.raises(UnsupportedHead, match="Doing: log-probabilities from hidden states and head differ"):
        wrong(**batch(), fused_lm_head=True)
    right = doing(lambda z: z, bias, dtype)
    fuse(right)
    right(**batch(), fused_lm_head=True)
    assert right.forward.head.difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_an_exact_output_shows_is_far_below_bf16(dtype):
    model = doing(lambda z: z + z.square() / 100, 0.0, dtype)
    fuse(model)
    with pytest.raises(UnsupportedHead, match="Doing: log-probabilities from hidden states and head differ"):
        model(**batch(), fused_lm_head=True)


def test_a_model_that_rounds_its_logits_passes():
    model = doing(lambda z: z.bfloat16(), 0.0, torch.bfloat16)
    fuse(model)
    assert model(**batch(), fused_lm_head=True).loss.isfinite()


def masked_vocabulary(wrong=False, scale=1.0):
    model = doing((lambda z: z + z.square() / 50) if wrong else (lambda z: z), 0.0, torch.float32)
    with torch.no_grad():
        model.lm_head.bias[5] = float("-inf")
        model.lm_head.weight.mul_(scale)
    data = batch()
    data["labels"][0, 5] = 5
    fuse(model)
    return model, data


def test_one_label_without_a_finite_value_does_not_end_the_check():
    model, data = masked_vocabulary()
    assert model(**data, fused_lm_head=True).log_probs[0, 4] == float("-inf")
    assert 0 < model.forward.head.difference < FP32
    wrong, data = masked_vocabulary(wrong=True)
    with pytest.raises(UnsupportedHead, match="Doing: log-probabilities from hidden states and head differ"):
        wrong(**data, fused_lm_head=True)


def test_a_batch_without_finite_values_is_no_check():
    model, data = built("Llama"), batch()
    fuse(model, softcap=20.0)  # wrong
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert model(**data, fused_lm_head=True).loss.isnan()
    assert not model.forward.head.checked
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    with pytest.raises(UnsupportedHead, match="differ from those of the model's own"):
        model(**data, fused_lm_head=True)


def test_tuples_keep_the_load_balancing_loss():
    model, data = built("Mixtral", router_aux_loss_coef=0.5), batch()
    fuse(model)
    expected = model(**data, fused_lm_head=True)
    out = model(**data, return_dict=False, fused_lm_head=True)
    assert out.loss.equal(expected.loss)
    assert out.aux_loss.equal(expected.aux_loss)
    loss = PreferenceModel(model, "simpo")(**data, return_dict=False)
    torch.testing.assert_close(loss["aux_loss"], expected.aux_loss)


def test_hidden_states_are_passed_on_and_a_cache_is_refused():
    model, data = built("Llama"), batch()
    fuse(model)
    out = model(**data, output_hidden_states=True, fused_lm_head=True)
    own = model(**data, output_hidden_states=True).hidden_states
    assert len(out.hidden_states) == len(own) == 3
    assert all(one.equal(other) for one, other in zip(out.hidden_states, own, strict=True))
    assert model(**data, fused_lm_head=True).hidden_states is None
    with pytest.raises(ValueError, match="use_cache: got True, need False"):
        model(**data, use_cache=True, fused_lm_head=True)


def test_first_batches_of_two_threads_leave_modes_alone():
    model, data = built("Llama").train(), batch()
    fuse(model)
    model.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # a check lasts: the others come meanwhile
    start, failed = threading.Barrier(4), []

    def first():
        start.wait(20)
        try:
            model(**data, fused_lm_head=True)
        except Exception as error:
            failed.append(error)
        if not all(module.training for module in model.modules()):
            failed.append("left in evaluation")

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(module.training for module in model.modules())


def quantised(kind) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, of the test extra")
    model = tiny_model(vocab_size=320, hidden_size=64, initializer_range=0.5, tie_word_embeddings=False).bfloat16()
    plain = model.lm_head
    make = {
        "4bit": partial(bnb.nn.Linear4bit, quant_type="nf4", compute_dtype=torch.bfloat16),
        "8bit": partial(bnb.nn.Linear8bitLt, has_fp16_weights=False),
    }[kind]
    model.lm_head = make(64, plain.out_features, bias=False)
    model.lm_head.load_state_dict(plain.state_dict())
    model.lm_head.to("cpu")
    if kind == "8bit":
        model.lm_head(torch.randn(1, 64, dtype=torch.bfloat16))  # quantises
    return model


# bitsandbytes, of CPUs; peft asks for a name that transformers renamed
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_heads(kind, train, lora):
    """Held against the codes' own product; repeated, after the model's own forward, which may repack the codes."""
    model: Any = quantised(kind)
    inner = model
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    model.train(train)
    data = batch()
    fuse(model)
    first = model(**data, fused_lm_head=True)
    assert inner.forward.head.difference < 1e-3
    hidden = inner.model(data["input_ids"], data["attention_mask"]).last_hidden_state
    expected = fused_linear_logps(hidden, inner.lm_head, data["labels"])[:, :-1]
    torch.testing.assert_close(first.log_probs, expected, rtol=0, atol=FP32)
    with torch.no_grad():
        logits = model(data["input_ids"], attention_mask=data["attention_mask"]).logits.float()
    again = model(**data, fused_lm_head=True)
    # Repacked scales are bf16: 2^-9 of logits of up to 20, twice in a log-probability.
    repacked = kind == "4bit" and not train
    torch.testing.assert_close(again.log_probs, first.log_probs, rtol=0, atol=0.08 if repacked else FP32)
    own = logits[:, :-1].log_softmax(-1).gather(-1, data["labels"][:, 1:, None].clamp(min=0))[..., 0]
    # LLM.int8 rounds hidden states to 1/127 of their largest, bf16 its logits of up to 20 by 0.08: not far, not equal.
    assert (own - first.log_probs).where(first.label_mask, 0).abs().max() < 1
    again.loss.backward()
