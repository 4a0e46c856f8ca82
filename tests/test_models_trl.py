"""TRL's DPOTrainer on `fuse` in the place of its own fused head: the same losses and weights, step by step."""

import pytest
import torch

pytest.importorskip("trl", reason="needs trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

import datasets

from asft_kernels.models import fuse
from asft_kernels.models.fused import FusedForward
from tiny_lm import pairs, saved_tiny_model, tiny_tokenizer

pytestmark = [
    # peft 0.21 and trl ask for names that transformers renamed; nothing of ours does
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # peft, of one model in two folders
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
]


def trained(tmp_path, monkeypatch, put_head, lora):
    from trl import DPOConfig, DPOTrainer

    monkeypatch.setattr("trl.trainer.dpo_trainer.add_fused_lm_head", put_head)
    arguments = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True, report_to=[], max_length=64,
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(pairs(12))
    trainer = DPOTrainer(
        str(saved_tiny_model(tmp_path / "model")), args=arguments, train_dataset=rows,
        processing_class=tiny_tokenizer(), peft_config=lora,
    )  # fmt: skip
    trainer.train()
    figures = [row for row in trainer.state.log_history if "loss" in row]
    return trainer, figures


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_dpo(tmp_path, monkeypatch, adapter):
    from trl.trainer import utils

    lora = None
    if adapter:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    own, expected = trained(tmp_path / "own", monkeypatch, utils.add_fused_lm_head, lora)
    torch.manual_seed(0)
    ours, figures = trained(tmp_path / "ours", monkeypatch, fuse, lora)
    inner = ours.model.get_base_model() if adapter else ours.model
    assert isinstance(inner.forward, FusedForward)
    assert inner.forward.head.difference is not None, "the check ran"
    assert len(figures) == 3
    for one, other in zip(figures, expected, strict=True):
        # fp32 log-probabilities of 20 tokens in sums of some -100, over three steps of learning rate 0.01
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        for name in ("rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy"):
            assert one[name] == pytest.approx(other[name], abs=1e-3), name
    assert figures[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert figures[-1]["loss"] < 0.69
    for (name, one), other in zip(ours.model.named_parameters(), own.model.parameters(), strict=True):
        # Adam moves each weight by about the learning rate, whatever the gradient's size: rounding shows where it is 0.
        assert (one - other).abs().mean() <= 1e-4, name
