"""Tensor-parallel models and DTensor heads: the loss and gradients of one process, and no logits between ranks."""

import pytest

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from rank_processes import launch
from tensor_parallel_cases import KINDS, heads, models, sides, whole_gradients, with_fully_shard

FP32 = 2e-6  # of the largest entry of each gradient: the same sums in other orders


def test_models(tmp_path):
    """torch's ColwiseParallel in each output layout, transformers' plan, preference losses; 2 ranks."""
    got = launch(2, models, str(tmp_path))
    for kind in KINDS:
        value, grads = whole_gradients(kind)
        for found in (x[kind] for x in got):
            assert found["value"] == pytest.approx(value, rel=1e-6), kind
            assert found["grads"].keys() == grads.keys()
            for name, grad in grads.items():
                assert (found["grads"][name] - grad).abs().max() <= FP32 * grad.abs().max(), (kind, name)
            # At most dH in fp32 is sent at a time: logits of these tokens would be 61 / 16 of it.
            assert max(found["sent"]) <= found["grad_hidden_bytes"], kind


def test_heads():
    """DTensors in a direct call, float64: 100 roundings; names of mesh dimensions decide what is not said otherwise."""
    got = launch(2, heads)
    for found in got:
        for what, (grad, right) in found["grads"].items():
            assert (grad - right).abs().max() <= 2e-14 * right.abs().max(), what
        said = found["said"]
        assert said["name"].startswith("lm_head: got a DTensor sharded over the mesh dimension 'x', need a name that")
        assert said["hidden"].startswith("hidden: got a DTensor placed (Shard(dim=1),), need it replicated")
        for name in ("adapter", "colwise adapter"):
            assert said[name].startswith("lm_head: got PEFT's adapter on a head that tensor-parallel ranks have"), name
        assert said["hooked"].startswith("lm_head: got an nn.Linear with forward hooks")
        assert said["group"].startswith("group: got str, need a torch.distributed.ProcessGroup")
        assert said["vocab"].startswith("vocab: got 98, need 1 to 97")
        assert said["noisy"].startswith("lm_head: got rows of a head that stands on several ranks")


@pytest.mark.slow
def test_with_data_parallelism():
    """2 x 2 ranks: fully_shard over the one dimension of the mesh, the vocabulary over the other."""
    got = launch(4, with_fully_shard)
    for kind in ("root", "head", "tied"):
        values, grads = sides(kind)
        for rank, found in enumerate(x[kind] for x in got):
            assert found["value"] == pytest.approx(values[rank // 2], rel=1e-6), kind
            for name, grad in grads.items():
                assert (found["grads"][name] - grad).abs().max() <= FP32 * grad.abs().max(), (kind, name)
