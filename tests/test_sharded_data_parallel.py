"""A head sharded over data-parallel ranks gives the values and gradients of one process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import streamed_worker
from asft_kernels.backends import HAS_TRITON, interpreter_fault
from rank_processes import launch

TESTS = Path(__file__).parent


def test_streamed_head_gives_one_process_values_and_gradients():
    """61 rows on three ranks, 24 cases; ranks that differ; no tensor of V D elements; bytes on the wire."""
    launch(3, streamed_worker.on_torch)


def test_streamed_head_on_triton():
    """In its interpreter: 8 cases, a rank without a token among them."""
    if not HAS_TRITON or interpreter_fault():
        pytest.skip("needs Triton, and a NumPy that its interpreter takes")
    launch(3, streamed_worker.on_triton, TRITON_INTERPRET="1")


@pytest.mark.parametrize("cases", ["QUICK", pytest.param("STREAMED", marks=pytest.mark.slow)])
def test_models_under_fsdp2_train_as_one_process(cases):
    """Streamed and gathered, LoRA, accumulation, checkpointing, bf16; the head gathered once a step; refusals."""
    pytest.importorskip("transformers", reason="needs the train extra: transformers")
    pytest.importorskip("peft", reason="needs the train extra: peft")
    import sharded_model_worker

    launch(2, sharded_model_worker.checked, getattr(sharded_model_worker, cases))


class Gathering(torch.autograd.Function):
    """Behind a module's output, as DeepSpeed puts it: in backward the module's parameters come back."""

    @staticmethod
    def forward(ctx, output, seen):
        ctx.seen = seen
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append("gathered")
        return grad, None


def test_gradients_pass_what_hooks_put_on_the_heads_output():
    """Else ZeRO-3's weight would be in shards when the head's backward reads it."""
    pytest.importorskip("transformers", reason="needs the train extra: transformers")
    from asft_kernels.models import fuse
    from model_cases import batch, built

    model, seen = built("Llama"), []
    fuse(model)

    def hook(module, args, output):
        return Gathering.apply(output, seen)

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    model.lm_head.register_forward_hook(hook)
    for _ in range(2):  # with the first batch's check, and without
        seen.clear()
        model.lm_head.weight.register_hook(lambda grad: seen.append("head"))
        model(**batch(), fused_lm_head=True).loss.backward()
        assert seen[:2] == ["gathered", "head"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fsdp2": False}, None),
        ({"asked": "gather", "fsdp2": False}, None),
        ({"asked": "gather"}, "gathered, as sharded_head says"),
        ({"limit": 61 * 16 * 4}, "gathered, as it takes no more than "),
        ({"kind": "Qwen2"}, "gathered, as it is tied to the embedding"),
        ({"efficient": True}, "gathered, as cpu_ram_efficient_loading is on; it is large"),
        ({"parallel": object()}, "gathered, as parallelism_config is on; it is large"),
        ({}, "streamed"),
    ],
)
def test_a_run_says_how_its_head_goes(given, said, monkeypatch):
    """A head is large past its size of 61 x 16 in fp32, less a byte."""
    pytest.importorskip("accelerate", reason="needs the train extra: accelerate")
    from asft_kernels.training import sharded
    from model_cases import built

    monkeypatch.setattr(sharded, "GATHERED_BYTES", given.get("limit", 61 * 16 * 4 - 1))
    monkeypatch.setattr(sharded, "shard_head", lambda *a, **options: set())
    monkeypatch.setattr(torch.distributed, "init_device_mesh", lambda *a: None)
    plugin = SimpleNamespace(
        mixed_precision_policy=None, cpu_ram_efficient_loading=given.get("efficient", False), ignored_modules=None
    )
    accelerator = SimpleNamespace(
        is_fsdp2=given.get("fsdp2", True), parallelism_config=given.get("parallel"), mixed_precision="no",
        state=SimpleNamespace(fsdp_plugin=plugin), device=torch.device("cpu"), num_processes=2,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=SimpleNamespace(sharded_head=given.get("asked")), accelerator=accelerator,
        model=built(given.get("kind", "Llama")),
    )  # fmt: skip
    found = sharded.place_head(trainer)
    assert found == said if found is None or said is None else found.startswith(said)
    assert (found == "streamed") == bool(plugin.ignored_modules)


CLASSES = {"gather": "FSDPLinear", "stream": "FSDPShardedLinear", "zero3": "Linear"}
KINDS = [
    "gather",
    "stream",
    pytest.param("zero3", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_preference_trainer_under_accelerates_sharding(tmp_path, kind):
    """Two steps, then a third from their checkpoint, on two ranks: losses, norms and weights of one process.

    Bounds: rel 1e-5 as two ranks without sharding have; AdamW moves a weight by lr g / (|g| + eps), which a gradient
    near 0 turns to noise of the size of its roundings, 2^-24 of the largest gradient to the smallest.
    """
    pytest.importorskip("trl", reason="needs the train extra: trl")
    from safetensors.torch import load_file

    from test_preference_trainer import logs, made, rows_that_count_differently
    from tiny_lm import saved_tiny_model

    model = str(saved_tiny_model(tmp_path / "model", initializer_range=0.3, tie_word_embeddings=False))
    alone = made(
        tmp_path / "alone", model, rows=rows_that_count_differently(), objective="asft", max_steps=3,
        optim="adamw_torch", per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
    )  # fmt: skip
    expected = logs(alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    folder = tmp_path / "run"
    for steps in ("2", "3"):
        (folder / "found.pt").unlink(missing_ok=True)
        done = subprocess.run(
            [*command, str(TESTS / "sharded_trainer_worker.py"), str(folder), model, kind, steps],
            capture_output=True, text=True, timeout=240, env=environment,
        )  # fmt: skip
        assert (folder / "found.pt").is_file(), done.stderr[-3000:]
    found = torch.load(folder / "found.pt")
    assert found["head"] == CLASSES[kind]
    for row, other in zip(found["rows"], expected, strict=True):
        for name in ("loss", "grad_norm", "pairs", "logps/chosen", "entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-5), name
    saved = load_file(folder / "model.safetensors")
    for name, value in alone.model.named_parameters():
        assert (value - saved[name]).abs().max() <= 1e-4, name
