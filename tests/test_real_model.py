"""SmolLM2-135M-Instruct over answers of the package's own pairs: real, long-tailed, calibrated softmaxes."""

from pathlib import Path

import pytest
import torch

import asft_kernels
from asft_kernels import fused_asft_loss, fused_linear_logps, reference
from bounds import fp32_bound, relative_error, rounded_once

pytest.importorskip("trl", reason="needs the train extra: trl")


@pytest.fixture(scope="module")
def real():
    """hidden (4, T, 576), weight (49152, 576) and labels of 2 pairs, fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from asft_kernels.data import load_pairs, with_labels
    from asft_kernels.models.smollm2 import ModelUnavailable, smollm2_path

    try:
        folder = smollm2_path(download=False)
    except (ModelUnavailable, ImportError) as error:
        pytest.skip(f"no SmolLM2 here: {error}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    path = Path(asft_kernels.__file__).parent / "demo_data" / "eval.jsonl"
    pairs, _ = load_pairs(path, tokenizer, max_length=160)
    batch = with_labels(DataCollatorForPreference(tokenizer.pad_token_id or 0)(list(pairs.select(range(2)))))
    with torch.no_grad():
        hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return hidden, model.lm_head.weight.detach(), batch["labels"]


def leaves(real, dtype):
    hidden, weight, labels = real
    return hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_(), labels


def test_fp32(real):
    hidden, weight, labels = leaves(real, torch.float32)
    exact = leaves(real, torch.float64)
    with torch.no_grad():
        logps = reference.fused_linear_logps(*exact)
        bound = fp32_bound((exact[0] @ exact[1].T).abs().max().item())
        assert relative_error(fused_linear_logps(hidden, weight, labels), logps) <= bound
    assert -5 < logps[logps != 0].mean() < -0.5  # a language model that knows some of this text
    loss, truth = fused_asft_loss(hidden, weight, labels), reference.fused_asft_loss(*exact)
    assert relative_error(loss, truth) <= bound
    grads, truths = (torch.autograd.grad(x, y[:2]) for x, y in ((loss, (hidden, weight)), (truth, exact)))
    for got, right in zip(grads, truths, strict=True):
        assert relative_error(got, right) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(real, dtype):
    low = leaves(real, dtype)
    exact = leaves([x.to(dtype) if x.is_floating_point() else x for x in real], torch.float64)
    truth = reference.fused_asft_loss(*exact)
    loss = fused_asft_loss(*low)
    for got, right in zip(torch.autograd.grad(loss, low[:2]), torch.autograd.grad(truth, exact[:2]), strict=True):
        assert relative_error(got, right) <= 1.1 * rounded_once(right, dtype)
    logps = fused_linear_logps(*low).detach() - reference.fused_linear_logps(*exact).detach()
    assert logps.abs().max() <= 1e-4
