"""Two processes on one machine: DistributedDataParallel and FSDP2 give the values and gradients of one."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from asft_kernels.models import PreferenceModel, fuse
from model_cases import batch, built
from rank_processes import launch


def rows(kind, rank):
    """Pairs stay together: rows i and i + 4."""
    return [0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7]


def fused_loss(model, data):
    """Every row counts the same on any rank: sums over a fixed number of tokens."""
    return model(**data, num_items_in_batch=20, fused_lm_head=True).loss


def entropy_loss(model, data):
    """Nothing of it passes through the log-probabilities."""
    return model(**data, fused_lm_head=True).entropy.sum()


def pair_loss(model, data):
    return model(**data)["loss"]


def case(kind):
    """(model, its loss): preference loss or log-probabilities; tied where the name says so."""
    inner = built("Gemma2" if "tied" in kind else "Llama")
    if "pairs" in kind:
        return PreferenceModel(inner, "asft"), pair_loss
    fuse(inner, outputs=("entropy",) if "entropy" in kind else ())
    return inner, entropy_loss if "entropy" in kind else fused_loss


def of_rank(rank, world, kind):
    """(loss, gradients) of the wrapped model's second call, after the one with the first batch's check."""
    model, loss = case(kind)
    if kind.startswith("ddp"):
        wrapped = DistributedDataParallel(model)
    else:
        inner = model.model if isinstance(model, PreferenceModel) else model
        for layer in inner.model.layers:
            fully_shard(layer)
        if "head" in kind:
            fully_shard(inner.lm_head)
        wrapped = fully_shard(model)
    data = {name: tensor[rows(kind, rank)] for name, tensor in batch(pairs=4).items()}
    for _ in range(2):
        model.zero_grad()
        value = loss(wrapped, data)
        value.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    return value.item(), {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in grads.items()}


SLOW = ["ddp tokens", "fsdp head tokens", "fsdp root pairs", "fsdp head entropy"]
KINDS = [
    "ddp pairs",
    "fsdp head pairs",
    "fsdp root tied tokens",
    *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW),
]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_gradients_of_one_process(kind):
    """Gradients are means over the ranks. Bound: fp32 sums of 8 rows in another order, 80 roundings of the largest."""
    model, loss = case(kind)
    values = []
    for rank in (0, 1):
        values.append(loss(model, {name: tensor[rows(kind, rank)] for name, tensor in batch(pairs=4).items()}))
    torch.stack(values).mean().backward()
    for (value, grads), own in zip(launch(2, of_rank, kind), values, strict=True):
        assert value == pytest.approx(own.item(), rel=1e-5)
        assert grads.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            assert (grads[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-9, name
