"""What a rank of test_sharded_data_parallel.py does with models under FSDP2.

They stand beside a single process's over two optimiser steps; what is gathered, and how often.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import Replicate

from asft_kernels import fused_linear_logps
from asft_kernels.backends.streaming import StreamedRows
from asft_kernels.errors import InputError
from asft_kernels.models import fuse, shard_head
from asft_kernels.models.exact import exact_output
from model_cases import batch, built

BOUND = 2e-6  # of the largest entry: the for fp32


class Case(NamedTuple):
    """stream: of shard_head, "fsdp" for a head that FSDP2 shards itself, "adapters" for its adapter's parts as units.

    lora: "dora" for DoRA.
    """

    stream: bool | str | None
    micro_batches: int = 1
    lora: bool | str = False
    reshard: bool = True
    checkpointing: bool = False
    param_dtype: torch.dtype | None = None


STREAMED = [
    Case(True),
    Case(False),
    Case(None),
    Case(True, micro_batches=2, reshard=False),
    Case(True, lora=True),
    Case(True, checkpointing=True),
    Case("fsdp", micro_batches=2),
    Case("fsdp", lora=True, reshard=False),
]
ADAPTERS = [Case("adapters", lora=True), Case("adapters", lora="dora")]
QUICK = [STREAMED[3], STREAMED[4], STREAMED[7], *ADAPTERS]
BF16 = [Case(True, param_dtype=torch.bfloat16), Case("fsdp", param_dtype=torch.bfloat16)]


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def built_model(case: Case) -> Any:
    """Fused; the same on every rank."""
    model = built("Llama", vocab_size=61)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=3, target_modules=["lm_head", "q_proj"], use_dora=case.lora == "dora")
        )
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    if case.checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    fuse(model)
    return model


def adapters_of(head: Any) -> list[Any]:
    return [x for x in head.modules() if any(p.requires_grad for p in x.parameters(recurse=False))]


def sharded(model: Any, case: Case, mesh: Any) -> Any:
    """FSDP2 around each layer, the head where it takes it, and the rest."""
    inner = model.get_base_model() if case.lora else model
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": case.reshard}
    if case.param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(case.param_dtype, torch.float32)
    if not isinstance(case.stream, str):
        options["ignored_params"] = shard_head(model, mesh, stream=case.stream, param_dtype=case.param_dtype)
    for layer in inner.model.layers:
        fully_shard(layer, **options)
    if case.stream == "fsdp":
        fully_shard(inner.lm_head, **options)
    if case.stream == "adapters":
        for part in adapters_of(inner.lm_head):
            fully_shard(part, **options)
    return fully_shard(model, **options)


def of_rank(rank: int, micro_batch: int) -> dict[str, Tensor]:
    """Pairs stay together: rows i and i + 4 of a batch."""
    rows = [2 * rank, 2 * rank + 1, 2 * rank + 4, 2 * rank + 5]
    return {name: x[rows] for name, x in batch(pairs=4, seed=micro_batch).items()}


def loss_of(model: Any, data: dict[str, Tensor]) -> Tensor:
    return model(**data, num_items_in_batch=20, fused_lm_head=True).loss


def trained_as_one_process(case: Case, rank: int, world: int, mesh: Any) -> None:
    """Gradients, their norm and parameters after AdamW's two steps."""
    single = built_model(case)
    model = sharded(built_model(case), case, mesh)
    # With its small eps AdamW moves by g / |g|: what is rounding in a small gradient would be as large as the step.
    optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-2, eps=0.1) for x in (single, model)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for micro_batch in range(case.micro_batches):
            torch.stack([loss_of(single, of_rank(r, micro_batch)) for r in range(world)]).mean().backward()
            model.set_requires_gradient_sync(micro_batch == case.micro_batches - 1)
            loss_of(model, of_rank(rank, micro_batch)).backward()
        for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
            if p.requires_grad:
                near(whole(q.grad), p.grad, name)
        norms = [nn.utils.clip_grad_norm_(x.parameters(), 0.1) for x in (single, model)]
        near(whole(norms[1]), norms[0], "norm")
        for optimizer in optimizers:
            optimizer.step()
    data = {name: x for name, x in of_rank(rank, 0).items() if name != "labels"}
    near(model(**data).logits, single(**data).logits, "logits without fused_lm_head")


def near(got: Tensor, exact: Tensor | None, name: str, bound: float = BOUND) -> None:
    assert exact is not None
    difference = (got - exact).abs().max().item()
    assert difference <= bound * exact.abs().max().item(), (name, difference, exact.abs().max().item())


def bf16_agrees(rank: int, world: int, mesh: Any) -> None:
    """Streamed and gathered by FSDP2 round the same rows to bf16: the losses are the same but for fp32 sums' order."""
    values, grads = [], []
    for case in BF16:
        model = sharded(built_model(case), case, mesh)
        loss = loss_of(model, of_rank(rank, 0))
        loss.backward()
        values.append(loss.detach())
        grads.append(whole(model.lm_head.weight.grad))
        assert grads[-1].dtype == torch.float32
    near(values[0], values[1], "loss")
    # FSDP2 rounds each rank's dW to bf16 before the mean, a stream the mean: half a unit of 8 bits each.
    near(grads[0], grads[1], "d lm_head", 2.0**-8)


def gathers_of(unit: Callable[[Any], Any], mesh: Any, rank: int) -> list[int]:
    """All-gathers of lm_head.weight by FSDP2 in each of three steps."""
    model = built("Llama")
    fuse(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    unit(model)
    model = fully_shard(model, mesh=mesh)
    counts, gather = [], _fsdp_param_group.foreach_all_gather
    for _ in range(3):
        seen: Counter[str] = Counter()

        def counting(params: Any, *args: Any, seen: Counter[str] = seen) -> Any:
            seen.update(p._param_fqn for p in params)
            return gather(params, *args)

        with mock.patch.object(_fsdp_param_group, "foreach_all_gather", counting):
            loss_of(model, of_rank(rank, 0)).backward()
        counts.append(seen["lm_head.weight"])
    return counts


def head_is_gathered_once(rank: int, world: int, mesh: Any) -> None:
    """The first step's check runs a forward of its own; a root is not resharded after forward."""
    of_its_own = {"mesh": mesh, "reshard_after_forward": False}
    assert gathers_of(lambda m: fully_shard([m.model.norm, m.lm_head], **of_its_own), mesh, rank) == [2, 1, 1]
    assert gathers_of(lambda m: fully_shard(m.lm_head, mesh=mesh), mesh, rank) == [4, 2, 2]
    assert gathers_of(lambda m: None, mesh, rank) == [1, 1, 1]


def memory_decides(rank: int, world: int, mesh: Any) -> None:
    """A DTensor, of shard_head or given as it is, is streamed where it takes more than GATHERED_BYTES."""
    model = built("Llama")
    shard_head(model, mesh)
    hidden, labels = torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.int64)
    for limit, expected in ((61 * 16 * 4, 0), (61 * 16 * 4 - 1, 1)):
        for head in (model.lm_head, model.lm_head.weight):
            with (
                mock.patch("asft_kernels.core.heads.GATHERED_BYTES", limit),
                mock.patch.object(StreamedRows, "skip", autospec=True, side_effect=StreamedRows.skip) as chunks,
                torch.no_grad(),
            ):
                fused_linear_logps(hidden, head, labels)
            assert chunks.call_count == expected, (limit, chunks.call_count)
    with (
        mock.patch("asft_kernels.core.heads.GATHERED_BYTES", 61 * 16 * 2),
        mock.patch.object(StreamedRows, "skip", autospec=True, side_effect=StreamedRows.skip) as chunks,
        torch.autocast("cpu", torch.bfloat16), torch.no_grad(),
    ):  # fmt: skip
        fused_linear_logps(hidden, model.lm_head, labels)
    assert chunks.call_count == 0  # in autocast's dtype it takes half as much


def exact_values(rank: int, world: int, mesh: Any) -> None:
    """In the order of the head's rows, of 4 chunks; fp64: 16 products in another order."""
    model = built("Llama", vocab_size=61)
    weight, hidden = model.lm_head.weight.detach().clone(), torch.randn(3, 16)
    shard_head(model, mesh, stream=True)
    with mock.patch("asft_kernels.models.exact.ROWS", 16):
        values = exact_output(model.lm_head, hidden).values
    exact = hidden.double() @ weight.double().T
    assert (values - exact).abs().max() <= 1e-14 * exact.abs().max()


def refusals(rank: int, world: int, mesh: Any) -> None:
    with pytest.raises(InputError, match="got a head tied to the embedding, need one of its own"):
        shard_head(built("Qwen2"), mesh)
    with pytest.raises(InputError, match=r"mesh: got 2 dimensions, need one.*hybrid sharding leave the head to fully"):
        shard_head(built("Llama"), init_device_mesh("cpu", (1, world)))
    with pytest.raises(InputError, match=r"mesh: got ProcessGroup, need a DeviceMesh; .*init_device_mesh"):
        shard_head(built("Llama"), dist.group.WORLD)
    with pytest.raises(InputError, match=r"stream: got 'gather', need True .*, False"):
        shard_head(built("Llama"), mesh, stream="gather")  # pyright: ignore[reportArgumentType]
    for alone in (False, True):
        model = built("Llama")
        if alone:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(
            InputError, match="weight is a DTensor, need a plain one; call shard_head before fully_shard"
        ):
            shard_head(model, mesh)
    model = built("Llama")
    shard_head(model, mesh, stream=True)
    with pytest.raises(InputError, match="got a head of ShardedLinear, need an nn"):
        shard_head(model, mesh)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.redistribute(mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"lm_head: got stream=True with placements \(Replicate"):
        fused_linear_logps(torch.randn(1, 3, 16), model.lm_head, torch.ones(1, 3, dtype=torch.int64))


def refused_by_one_rank(rank: int, world: int, mesh: Any) -> None:
    """The adapters' parts are gathered once, by who refuses, too; all ranks raise, and the next call goes on."""
    model = built_model(Case(True, lora=True))
    head, streamed = model.get_base_model().lm_head, shard_head(model, mesh, stream=True)
    for part in adapters_of(head):
        fully_shard(part, mesh=mesh, ignored_params=streamed)
    hidden, labels, bad = torch.randn(2, 4, 16), torch.ones(2, 4, dtype=torch.int64), rank == 1
    for given in ({"labels": labels + 1000 * bad}, {"labels": labels, "softcap": -1 if bad else None}):
        own = r"labels: got values|softcap: got -1" if bad else "lm_head: rank 1 of the 2 .* refuses"
        with pytest.raises(ValueError, match=own):
            fused_linear_logps(hidden, head, given.pop("labels"), **given)
    assert fused_linear_logps(hidden, head, labels).isfinite().all()


def checked(rank: int, world: int, cases: list[Case]) -> None:
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", FutureWarning)  # torch's own calls of its renamed collectives
    mesh = init_device_mesh("cpu", (world,))
    for case in cases:
        try:
            trained_as_one_process(case, rank, world, mesh)
        except Exception as error:
            raise AssertionError(str(case)) from error
    for check in (
        bf16_agrees, head_is_gathered_once, memory_decides, exact_values, refused_by_one_rank, refusals,
    ):  # fmt: skip
        check(rank, world, mesh)
