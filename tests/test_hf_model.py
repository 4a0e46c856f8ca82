"""The loss inside a Hugging Face model's forward: head options, the head check, ranks, totals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from asft_kernels import fused_asft_loss, fused_linear_logps
from asft_kernels.models import (
    PreferenceModel,
    UnsupportedHead,
    _product_unit,
    logit_options,
    verify_head,
)
from asft_kernels.objectives import ASFT
from tiny_lm import tiny_config, tiny_model

SMALL = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    pad_token_id=0,
)


def batch(pairs=2, length=12, vocab=61, seed=0):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (2 * pairs, length), generator=gen)
    mask = torch.ones_like(ids)
    mask[0, 9:] = mask[-1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_forward_is_the_loss_of_hidden_states_and_head():
    model = PreferenceModel(tiny_model(), ASFT(lam=0.5, beta=0.7, sft_weight=2.0))
    data = batch()
    out = model(**data)
    hidden = model.model.model(data["input_ids"], data["attention_mask"]).last_hidden_state
    loss, expected = fused_asft_loss(
        hidden,
        model.model.lm_head,
        data["labels"],
        lam=0.5,
        beta=0.7,
        sft_weight=2.0,
        return_outputs=True,
    )
    torch.testing.assert_close(out["loss"], loss, rtol=1e-6, atol=0)  # one sum, one division
    torch.testing.assert_close(out["pair_losses"].mean(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out["margins"], expected.margins, rtol=0, atol=0)
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)), (0.3, None)),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)), (0.25, None)),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
            (1.0, 3.0),
        ),
        (lambda: tiny_model(vocab_size=61), (1.0, None)),
    ],
    ids=["Cohere", "Granite", "Gemma2", "Llama"],
)
def test_scale_and_cap_come_from_the_config(model, options):
    torch.manual_seed(0)
    model = model().float()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)  # logits that a cap bends
    assert logit_options(model.config) == options
    assert verify_head(PreferenceModel(model), batch()) < 1e-4
    wrong = PreferenceModel(model, logit_scale=options[0] * 1.01, softcap=options[1])
    with pytest.raises(UnsupportedHead, match=type(model).__name__):
        verify_head(wrong, batch())


def test_head_that_does_more_is_refused_by_name():
    class SharpenedForCausalLM(type(tiny_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    torch.manual_seed(0)
    model = PreferenceModel(SharpenedForCausalLM(tiny_config(initializer_range=0.5)).float())
    message = r"SharpenedForCausalLM: log-prob.* by up to [\d.e+-]+, rounding explains [\d.e+-]+"
    with pytest.raises(UnsupportedHead, match=message) as caught:
        verify_head(model, batch())
    assert "give logit_scale and softcap, or use another model" in str(caught.value)
    assert model.training  # as it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_passes_the_check(dtype):
    model = tiny_model(initializer_range=0.5).to(dtype)
    assert 0 < verify_head(PreferenceModel(model), batch()) < 0.5


def test_wrapped_head_is_refused_with_the_reason():
    model = tiny_model()

    class Adapter(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1

    model.lm_head = Adapter(16, model.config.vocab_size, bias=False)
    with pytest.raises(UnsupportedHead, match=r"LlamaForCausalLM: its output head cannot be fused: lm_head"):
        verify_head(PreferenceModel(model), batch())


def test_models_without_a_head_and_encoder_decoders_are_refused():
    with pytest.raises(UnsupportedHead, match=r"LlamaModel: get_output_embeddings\(\) is None"):
        PreferenceModel(tiny_model().model)
    with pytest.raises(UnsupportedHead, match=r"Linear: has no get_output_embeddings\(\), need a Hugging Face causal"):
        PreferenceModel(torch.nn.Linear(2, 2))
    model = tiny_model()
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedHead, match="encoder-decoder, need a decoder-only"):
        PreferenceModel(model)


# peft 0.21 asks for a name that transformers 5.23 renamed; nothing of ours does
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_adapters_in_the_body_train_and_one_on_the_head_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = PreferenceModel(peft.get_peft_model(tiny_model(), config))
    assert verify_head(model, batch()) < 1e-4
    model(**batch())["loss"].backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)

    config = peft.LoraConfig(target_modules=["lm_head"], r=2, task_type="CAUSAL_LM")
    untied = tiny_model(tie_word_embeddings=False)
    model = PreferenceModel(peft.get_peft_model(untied, config))
    with pytest.raises(UnsupportedHead, match=r"merge the adapter or leave lm_head out"):
        verify_head(model, batch())


def test_total_of_the_step_replaces_the_mean():
    model = PreferenceModel(tiny_model())
    data = batch(pairs=3)
    mean = model(**data)["loss"]
    torch.testing.assert_close(model(**data, num_items_in_batch=torch.tensor(12))["loss"], mean / 4)
    assert model(**data, num_items_in_batch=torch.tensor(0))["loss"].isfinite()


DDP_WORKER = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from tiny_lm import tiny_model
from test_hf_model import batch
from asft_kernels.models import PreferenceModel

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = DistributedDataParallel(PreferenceModel(tiny_model()))
data = batch(pairs=4)
rows = [0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7]
model(**{{name: tensor[rows] for name, tensor in data.items()}})["loss"].backward()
torch.save([p.grad for p in model.parameters()], sys.argv[3] + str(rank))
dist.barrier()
os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way
"""


def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    """Bound: fp32 sums of 4 pairs in another order; 1e-5 is 80 roundings of the largest entry."""
    tests = str(Path(__file__).parent)
    script = tmp_path / "worker.py"
    script.write_text(DDP_WORKER.format(tests=tests))
    command = [sys.executable, str(script)]
    environment = {
        "PYTHONPATH": str(Path(tests).parent),
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
    }
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "grads")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    model = PreferenceModel(tiny_model())
    model(**batch(pairs=4))["loss"].backward()
    for rank in (0, 1):
        for mine, theirs in zip(model.parameters(), torch.load(tmp_path / f"grads{rank}"), strict=True):
            assert (mine.grad - theirs).abs().max() <= 1e-5 * mine.grad.abs().max()


@pytest.mark.parametrize(("precision", "unit"), [("tf32", 2.0**-11), ("ieee", 2.0**-24)])
def test_rounding_of_products_under_the_new_precision_setting(precision, unit):
    """`allow_tf32` cannot be read once fp32_precision was set, as transformers' --tf32 does."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        assert _product_unit(on_gpu=True) == unit
        assert _product_unit(on_gpu=False) == 2.0**-24
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
    data = batch(pairs=1, length=24, vocab=49152)
    assert verify_head(PreferenceModel(model), data) < 1e-3
    hidden = model.get_decoder()(input_ids=data["input_ids"]).last_hidden_state
    assert fused_linear_logps(hidden, model.lm_head, data["labels"]).isfinite().all()
