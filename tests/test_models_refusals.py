"""What `fuse` and `PreferenceModel` do not understand is refused by name, never computed wrongly in silence."""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from asft_kernels.models import PreferenceModel, UnsupportedHead, fuse
from asft_kernels.objectives import DPO
from model_cases import FP32, batch, built, own_logps
from tiny_lm import tiny_model


def fused(name="Llama", **options):
    model = built(name)
    fuse(model, **options)
    return model


# peft asks for a name that transformers renamed; nothing of ours does
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("where", ["lm_head", "q_proj"])
def test_an_adapter_for_each_row(where):
    """PEFT's adapter_names reach the head as an argument of its own; in the body they are the body's business."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=[where], r=2, init_lora_weights=False)
    model = peft.get_peft_model(built("Llama"), config).eval()
    model.add_adapter("other", config)
    plain, data = copy.deepcopy(model), batch()
    names: Any = ["default", "other", "__base__", "default"]
    fuse(model)
    if where == "lm_head":
        with pytest.raises(UnsupportedHead, match=r"Llama.*head is called with adapter_names beside the hidden states"):
            model(**data, adapter_names=names, fused_lm_head=True)
    else:
        got = model(**data, adapter_names=names, fused_lm_head=True).log_probs
        expected = own_logps(plain, {**data, "adapter_names": names})
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=FP32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: {"labels": d["labels"][:, 1:]}, r"labels: got shape \(4, 11\), need \(4, 12\), a label for each"),
        (lambda d: {"labels": d["labels"][:2]}, r"labels: got shape \(2, 12\), need \(4, 12\)"),
        (lambda d: {"labels": d["labels"][0]}, r"labels: got torch.int64 of \(12,\), need \(R, T\) integers"),
        (lambda d: {"labels": d["labels"].float()}, r"labels: got torch.float32 of \(4, 12\), need"),
        (lambda d: {"labels": None}, "labels: got None, need"),
    ],
)
def test_labels_that_do_not_fit(change, text):
    data = batch()
    data |= change(data)
    for call in (
        lambda: fused()(**data, fused_lm_head=True),
        lambda: PreferenceModel(built("Llama"), "simpo")(**data),
        lambda: PreferenceModel(built("Llama"), "simpo").token_logps(**data),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_labels_that_do_not_fit_by_position_embeddings_or_shifted():
    model, data = fused(), batch()
    with pytest.raises(ValueError, match=r"labels: got shape \(4, 11\), need \(4, 12\)"):
        model(data["input_ids"], labels=data["labels"][:, :-1], fused_lm_head=True)
    embeds = model.get_input_embeddings()(data["input_ids"])
    with pytest.raises(ValueError, match=r"need \(4, 12\), a label for each position of inputs_embeds"):
        model(inputs_embeds=embeds, labels=data["labels"][:, :-1], fused_lm_head=True)
    with pytest.raises(ValueError, match=r"shift_labels: got shape \(4, 11\).*under prompt tuning give labels"):
        model(data["input_ids"], shift_labels=data["labels"][:, 1:], fused_lm_head=True)
    with pytest.raises(ValueError, match="shift_labels: got labels as well, need one of the two"):
        model(**data, shift_labels=data["labels"], fused_lm_head=True)


def test_masked_language_models():
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedHead, match="BertForMaskedLM: is a masked language model, need a causal one"):
        fuse(BertForMaskedLM(config))
    config.is_decoder = True
    fuse(BertLMHeadModel(config))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("token_weight", "did you mean 'token_weights'"),
        ("KL", "did you mean 'kl'"),
        ("reference_logps", "did you mean 'ref_logps'"),
        ("reference", "leave it out"),
        ("atention_mask", "did you mean 'attention_mask'"),
    ],
)
def test_names_that_neither_loss_nor_model_knows(name, hint):
    model, data = PreferenceModel(built("Llama"), "kto"), batch()
    with pytest.raises(ValueError, match=f"{name}: got an argument that neither the loss nor LlamaForC.*{hint}"):
        model(**data, ref_logps=torch.zeros(4), desirable=torch.ones(4, dtype=torch.bool), **{name: torch.zeros(4)})
    with pytest.raises(ValueError, match=f"{name}: got an argument"):
        model.token_logps(**data, **{name: torch.zeros(4)})


def test_names_that_models_and_their_attention_know():
    model, data = PreferenceModel(built("Llama"), "simpo"), batch()
    positions = torch.arange(12).expand(4, 12)
    assert model(**data, position_ids=positions, cu_seq_lens_q=None, output_attentions=False)["loss"].isfinite()


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"backend": "cuda"}, "backend: got 'cuda', need one of"),
        ({"chunk_size": 0}, "chunk_size: got 0, need an integer >= 1"),
        ({"cache_bytes": -1}, "cache_bytes: got -1"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"logit_scale": 0.0}, "logit_scale: got 0.0"),
    ],
)
def test_options_are_checked_when_made(option, text):
    for make in (fuse, PreferenceModel):
        model = tiny_model()
        with pytest.raises(ValueError, match=text):
            make(model, **option)
        assert "forward" not in vars(model)


def test_objectives_are_checked_when_made():
    objective: Any
    for objective, text in ((DPO, r"the class DPO, need an object: DPO\(...\)"), (3, "got int"), (None, "got None")):
        with pytest.raises(ValueError, match=f"objective: .*{text}"):
            PreferenceModel(tiny_model(), objective)
    with pytest.raises(
        TypeError, match=r"unexpected keyword argument 'beta'; .* give get_objective\('dpo', beta=...\)"
    ):
        PreferenceModel(tiny_model(), "dpo", beta=0.1)


def test_ids_are_needed():
    model, data = PreferenceModel(built("Llama"), "simpo"), batch()
    expected, ids = model(**data)["loss"], data.pop("input_ids")
    with pytest.raises(ValueError, match="input_ids: got None, need"):
        model(**data)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(**data, inputs_embeds=embeds)["loss"], expected)


def test_a_later_fuse_of_the_model_changes_no_loss():
    model, data = PreferenceModel(built("Llama"), "simpo"), batch()
    expected, logps = model(**data)["loss"], model.token_logps(**data)
    fuse(model.model, temperature=3.0)
    assert model(**data)["loss"].equal(expected)
    assert model.token_logps(**data).equal(logps)


def test_hooks_that_would_not_reach_the_loss():
    model, data = fused(), batch()
    expected = model(**data, fused_lm_head=True).log_probs
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedHead, match="its output head has the forward hook test_models"):
        model(**data, fused_lm_head=True)
    hook.remove()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert not model(**data, fused_lm_head=True).log_probs.equal(expected)


def test_a_fused_call_inside_another_of_the_same_head():
    data = batch()

    model = fused(check=False)
    model.lm_head.register_forward_pre_hook(lambda *_: model(**data, fused_lm_head=True) and None)
    with pytest.raises(UnsupportedHead, match="LlamaForCausalLM: a fused call runs inside another of the same head"):
        model(**data, fused_lm_head=True)
