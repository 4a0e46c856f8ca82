"""`PreferenceModel`: the loss inside a model's forward, adapters, images, and a plain Trainer around it."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("trl", reason="needs the train extra: trl")

from trl.trainer.dpo_trainer import DataCollatorForPreference

import asft_kernels.core.token_logps
from asft_kernels import fused_asft_loss, fused_preference_loss
from asft_kernels.data import load_pairs, with_labels
from asft_kernels.models import PreferenceModel, UnsupportedHead, fuse
from asft_kernels.objectives import ASFT
from model_cases import FP32, batch, built, own_logps
from tiny_lm import pairs, tiny_model, tiny_tokenizer, write_lines

COLLATOR = DataCollatorForPreference(pad_token_id=0)


def test_forward_is_the_loss_of_hidden_states_and_head():
    model = PreferenceModel(tiny_model(), ASFT(lam=0.5, beta=0.7, sft_weight=2.0))
    data = batch()
    out = model(**data)
    hidden = model.model.model(data["input_ids"], data["attention_mask"]).last_hidden_state
    loss, expected = fused_asft_loss(
        hidden, model.model.lm_head, data["labels"], lam=0.5, beta=0.7, sft_weight=2.0, return_outputs=True
    )
    torch.testing.assert_close(out["loss"], loss, rtol=1e-6, atol=0)  # one sum, one division
    torch.testing.assert_close(out["pair_losses"].mean(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out["margins"], expected.margins, rtol=0, atol=0)
    torch.testing.assert_close(model.hidden_states(data["input_ids"], data["attention_mask"]), hidden, rtol=0, atol=0)
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_total_of_the_step_replaces_the_mean():
    model = PreferenceModel(tiny_model())
    data = batch(pairs=3)
    mean = model(**data)["loss"]
    torch.testing.assert_close(model(**data, num_pairs=torch.tensor(12))["loss"], mean / 4)
    assert model(**data, num_pairs=torch.tensor(0))["loss"].isfinite()
    with pytest.raises(ValueError, match="num_items_in_batch: got a number of tokens, need num_pairs"):
        model(**data, num_items_in_batch=torch.tensor(30))


def test_hidden_states_of_a_first_batch_with_padding():
    """The batch is held against the model's own logits where there is a token."""
    model, data = PreferenceModel(built("Llama"), "simpo"), batch()
    hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
    expected = model.model.model(data["input_ids"], data["attention_mask"]).last_hidden_state
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert model.fused_head.difference is not None


@pytest.mark.parametrize("name", ["sft", "kto", "poft"])
def test_objectives_of_single_rows(name):
    model, data = PreferenceModel(built("Granite"), name), batch()
    extra = {"kto": {"desirable": torch.tensor([True, False, False])}}.get(name, {})
    if name != "sft":
        extra["ref_logps"] = -torch.arange(3.0) - 2
    data = {key: tensor[:3] for key, tensor in data.items()}
    out = model(**data, **extra)
    hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
    ref_logps = extra.pop("ref_logps", None)
    expected = fused_preference_loss(
        hidden, model.lm_head, data["labels"], name, logit_scale=0.25, ref_logps=ref_logps, objective_inputs=extra
    )
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=0)
    assert out["row_losses"].shape == (3,)
    assert "num_pairs" not in out
    doubled = model(**data, **extra, num_pairs=6, **({} if ref_logps is None else {"ref_logps": ref_logps}))
    torch.testing.assert_close(doubled["loss"], expected / 2)


def test_load_balancing_is_part_of_the_loss_whatever_the_number_of_micro_batches():
    inner = built("Mixtral", router_aux_loss_coef=0.5)
    model, data = PreferenceModel(inner, "simpo"), batch()
    out = model(**data)
    torch.testing.assert_close(out["loss"], out["pair_losses"].mean() + 0.5 * inner(**data).aux_loss)
    torch.testing.assert_close(model(**data, num_pairs=8)["loss"], out["loss"] / 4)


# Adapters. peft asks for a name that transformers renamed; nothing of ours does
PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(kind, model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    return peft.get_peft_model(model, config)


@PEFT_WARNING
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_adapters(kind, when):
    data, inner = batch(), built("Llama")
    plain = adapted(kind, copy.deepcopy(inner)).eval()
    if when == "before":
        fuse(inner)
    model = adapted(kind, inner).eval()
    if when == "after":
        fuse(model)
    out = model(**data, fused_lm_head=True)
    expected = own_logps(plain, data)
    torch.testing.assert_close(out.log_probs[:, -11:].double(), expected, rtol=0, atol=FP32)
    own = plain(**data)
    torch.testing.assert_close(out.loss, own.loss, rtol=1e-5, atol=0)
    out.loss.backward()
    own.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, p in plain.named_parameters():
        if p.requires_grad:
            assert (trained[name] - p.grad).abs().max() <= 2e-5 * p.grad.abs().max(), name


@PEFT_WARNING
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_preference_loss_of_adapters(kind):
    data = batch()
    plain = adapted(kind, built("Llama")).eval()
    model = PreferenceModel(adapted(kind, built("Llama")).eval(), "simpo")
    out = model(**data)
    lengths = (data["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close(
        torch.cat([out["chosen_avg_logps"], out["rejected_avg_logps"]]).double(),
        own_logps(plain, data).sum(1) / lengths,
        rtol=0, atol=FP32,
    )  # fmt: skip
    torch.testing.assert_close(model.token_logps(**data)[:, :-1].double(), own_logps(plain, data), rtol=0, atol=FP32)
    out["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@PEFT_WARNING
def test_disabled_adapters_are_left_out():
    data, base = batch(), built("Llama")
    expected = own_logps(base, data)
    model = adapted("lora", built("Llama")).eval()
    fuse(model)
    with_adapter = model(**data, fused_lm_head=True).log_probs
    with model.disable_adapter():
        without = model(**data, fused_lm_head=True).log_probs
    torch.testing.assert_close(without.double(), expected, rtol=0, atol=FP32)
    assert (with_adapter - without).abs().max() > 100 * FP32


# Images and packed rows go to the model


def tiny_llava():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from model_cases import SMALL

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    from transformers import LlamaConfig

    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SMALL), image_token_index=60)
    model = LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def test_images_pass_to_the_model_and_count():
    model, plain, data = tiny_llava(), tiny_llava(), batch(vocab=59)
    data["input_ids"][:, :4] = 60  # 4 patches an image
    data["pixel_values"] = torch.randn(4, 3, 8, 8)
    fuse(model)
    got = model(**data, fused_lm_head=True).log_probs.double()
    torch.testing.assert_close(got, own_logps(plain, data), rtol=0, atol=FP32)
    other = {**data, "pixel_values": data["pixel_values"].flip(0)}
    assert (model(**other, fused_lm_head=True).log_probs - got).abs().max() > 0.01
    loss = PreferenceModel(tiny_llava(), "simpo")
    out = loss(**data)
    sums = own_logps(plain, data).sum(1).chunk(2)
    torch.testing.assert_close(out["chosen_logps"].double(), sums[0], rtol=0, atol=8 * FP32)  # 8 tokens
    out["loss"].backward()


def test_packed_rows_with_position_ids():
    """Two sequences in one row, told apart by their positions, as TRL's padding-free batches are."""
    model, plain = built("Llama"), built("Llama")
    fuse(model)
    ids = torch.randint(2, 61, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    data = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    torch.testing.assert_close(
        model(**data, fused_lm_head=True).log_probs.double(), own_logps(plain, data), rtol=0, atol=FP32
    )
    apart = own_logps(plain, {"input_ids": ids[:, 5:], "labels": ids[:, 5:]})
    torch.testing.assert_close(model(**data, fused_lm_head=True).log_probs[:, 5:].double(), apart, rtol=0, atol=FP32)


# The check and the backend are the same everywhere


@pytest.fixture
def loaded(tmp_path):
    return load_pairs(write_lines(tmp_path / "pairs.jsonl", pairs(8)), tiny_tokenizer())[0]


def test_no_path_leaves_the_check_out():
    def wrong(**options):
        return PreferenceModel(built("Granite", vocab_size=300), logit_scale=1.0, **options)

    data = batch()
    for call in (
        lambda model: model(**data),
        lambda model: model.token_logps(**data),
        lambda model: model.hidden_states(data["input_ids"], data["attention_mask"]),
        lambda model: model.check_head(data),
    ):
        with pytest.raises(UnsupportedHead, match="GraniteForCausalLM: log-probabilities from hidden states"):
            call(wrong())
    assert wrong(check=False)(**data)["loss"].isfinite()


def test_backend_is_the_same_in_check_scoring_and_training(loaded, monkeypatch):
    asked, choose = [], asft_kernels.core.token_logps.choose_backend
    monkeypatch.setattr(
        "asft_kernels.core.token_logps.choose_backend", lambda name, *x: asked.append(name) or choose("torch", *x)
    )
    model = PreferenceModel(tiny_model(), "dpo", backend="triton")
    model(**batch(), ref_logps=torch.zeros(4))
    model.token_logps(**with_labels(COLLATOR([loaded[0]])))
    assert len(asked) >= 3
    assert set(asked) == {"triton"}


def test_several_gpus_in_one_process_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM: got several GPUs in one process"):
        PreferenceModel(tiny_model())._replicate_for_data_parallel()  # what nn.DataParallel calls


# transformers.Trainer as it is


def trained(tmp_path, loaded, objective, micro, accumulation, **extra):
    from transformers import Trainer, TrainingArguments

    first = {}

    class Keeping(Trainer):
        def _clip_grad_norm(self, model):
            first.update({name: p.grad.clone() for name, p in model.named_parameters()})
            return super()._clip_grad_norm(model)

        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, micro, collate_fn=self.data_collator)

    def collate(rows):
        made = with_labels(COLLATOR(rows))
        return {**made, **{name: make(len(rows)) for name, make in extra.items()}}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / f"{micro}-{accumulation}"), per_device_train_batch_size=micro, max_steps=1,
        gradient_accumulation_steps=accumulation, save_strategy="no", disable_tqdm=True, report_to=[],
        remove_unused_columns=False, logging_steps=1, use_cpu=True,
    )  # fmt: skip
    trainer = Keeping(PreferenceModel(tiny_model(), objective), arguments, train_dataset=loaded, data_collator=collate)
    trainer.train()
    return trainer.state.log_history[0]["loss"], first


@pytest.mark.parametrize(
    ("objective", "extra"),
    [("asft", {}), ("sft", {}), ("dpo", {"ref_logps": lambda n: torch.full((2 * n,), -40.0)})],
)
def test_a_plain_trainer(tmp_path, loaded, objective, extra):
    """Loss and gradient of 8 pairs, at 1, 2 and 4 micro-batches.

    Bound: fp32 sums in another order, 80 roundings of the largest entry; the log has 4 digits after the point.
    """
    model = PreferenceModel(tiny_model(), objective)
    whole = with_labels(COLLATOR([loaded[i] for i in range(8)]))
    model(**whole, **{name: make(8) for name, make in extra.items()})["loss"].backward()
    expected = model(**whole, **{name: make(8) for name, make in extra.items()})["loss"].item()
    for accumulation in (1, 2, 4):
        loss, first = trained(tmp_path, loaded, objective, 8 // accumulation, accumulation, **extra)
        assert loss == pytest.approx(expected, abs=1e-4)
        for name, p in model.named_parameters():
            assert (first[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-9, name


def test_heads_of_their_own_are_whole_modules():
    """The head goes to the loss as a module: what it adds to its weight is the primitive's business."""
    model = tiny_model(tie_word_embeddings=False)

    class Adapter(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1

    model.lm_head = Adapter(16, model.config.vocab_size, bias=False)
    with pytest.raises(UnsupportedHead, match=r"LlamaForCausalLM: its output head cannot be fused: lm_head"):
        PreferenceModel(model)(**batch())
