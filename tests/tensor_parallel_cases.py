"""What the processes of test_tensor_parallel.py run, and what one process has for it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asft_kernels import fused_linear_logps
from asft_kernels.core.distributed import VocabParallelHead
from asft_kernels.models import PreferenceModel, fuse
from cases import make_case
from model_cases import batch, built

KINDS = ["gathered", "sharded", "dtensor", "transformers", "pairs"]
ROWS = [[0, 1, 4, 5], [2, 3, 6, 7]]  # of each side of data parallelism


def model_of(kind: str) -> Any:
    return built("Gemma2" if kind in ("tied", "sharded") else "Llama", num_key_value_heads=2)


def loss_of(kind: str, model: Any) -> Callable[[], Tensor]:
    """Makes the model's loss; its first call has the first batch's check."""
    if kind == "pairs":
        pairs = PreferenceModel(model, "asft")
        return lambda: pairs(**batch())["loss"]
    fuse(model, outputs=("entropy",))

    def tokens() -> Tensor:
        found = model(**batch(), fused_lm_head=True)
        return found.loss + found.entropy.mean()

    return tokens


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def whole_gradients(kind: str) -> tuple[float, dict[str, Tensor]]:
    model = model_of(kind)
    loss = loss_of(kind, model)()
    loss.backward()
    return loss.item(), gradients(model)


def sides(kind: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of each side's rows, gradients of their mean."""
    model = model_of(kind)
    fuse(model)
    losses = [side_loss(model, rows) for rows in ROWS]
    torch.stack(losses).mean().backward()
    return [x.item() for x in losses], gradients(model)


def side_loss(model: Any, rows: list[int]) -> Tensor:
    data = {name: tensor[rows] for name, tensor in batch(pairs=4).items()}
    return model(**data, num_items_in_batch=20, fused_lm_head=True).loss


def parallelised(kind: str, mesh: Any) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = model_of(kind)
    styles = {"sharded": ColwiseParallel(), "dtensor": ColwiseParallel(use_local_output=False)}
    plan: dict[str, Any] = {"lm_head": styles.get(kind, ColwiseParallel(output_layouts=Replicate()))}
    for layer in range(2):
        plan |= {f"model.layers.{layer}.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan[f"model.layers.{layer}.mlp.down_proj"] = RowwiseParallel()
    if model.lm_head.weight is model.model.embed_tokens.weight:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh, plan)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model
    return parallelize_module(model, mesh, plan)


def of_transformers(folder: str, rank: int, world: int) -> Any:
    import transformers
    from transformers.distributed import DistributedConfig

    if rank == 0:
        model_of("transformers").save_pretrained(folder + "/model")
    dist.barrier()
    config = DistributedConfig(tp_plan="auto", tp_size=world)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder + "/model", distributed_config=config, dtype=torch.float32
    )
    return model.eval()


def models(rank: int, world: int, folder: str) -> dict:
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, out = init_device_mesh("cpu", (world,)), {}
    for kind in KINDS:
        model = of_transformers(folder, rank, world) if kind == "transformers" else parallelised(kind, mesh)
        make = loss_of(kind, model)
        make()
        sent: list[int] = []
        own = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, own: Any = own, sent: list[int] = sent, **kwargs: Any) -> Any:
            sent.append(tensor.numel() * tensor.itemsize)
            return own(tensor, *args, **kwargs)

        dist.all_reduce = counted
        with loss_parallel() if kind == "dtensor" else nullcontext():
            loss = make()
            loss.backward()
        dist.all_reduce = own
        tokens, D = int((batch()["labels"][:, 1:] != -100).sum()), model.config.hidden_size
        out[kind] = {"value": loss.item(), "grads": gradients(model), "sent": sent, "grad_hidden_bytes": 4 * tokens * D}
    return out


def heads(rank: int, world: int) -> dict:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from asft_kernels.methods.dnpo.noisy_logps import fused_noisy_linear_logps

    case = make_case(dtype=torch.float64, bias=True)
    named, unnamed = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), init_device_mesh("cpu", (world,))
    odd = init_device_mesh("cpu", (world,), mesh_dim_names=("x",))

    def sharded(mesh: Any) -> list[Any]:
        return [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in case.leaves[1:]]

    right = torch.autograd.grad(fused_linear_logps(case.hidden, case.head, case.labels).sum(), case.leaves)
    grads = {}
    for name, mesh in (("named", named), ("of hidden", unnamed), ("module", unnamed)):
        hidden, (weight, bias) = case.hidden.detach().clone().requires_grad_(), sharded(mesh)
        head: Any = (weight, bias)
        states = DTensor.from_local(hidden, mesh, [Replicate()]) if name == "of hidden" else hidden
        if name == "module":
            head = nn.Linear(24, 97, dtype=torch.float64)
            head.load_state_dict({"weight": case.weight.detach(), "bias": case.bias.detach()})
            head = parallelize_module(head, mesh, ColwiseParallel())
            weight, bias = head.weight, head.bias
        fused_linear_logps(states, head, case.labels).sum().backward()
        for what, x, y in zip(("hidden", "weight", "bias"), (hidden, weight, bias), right, strict=True):
            grads[f"{name} {what}"] = (whole(x.grad), y)

    # Data parallel, each rank with rows of its own: gradients are means.
    weight, bias = sharded(unnamed)
    (fused_linear_logps(case.hidden, (weight, bias), case.labels).sum() * rank).backward()
    grads["data parallel weight"] = (whole(weight.grad), right[1] * sum(range(world)) / world)

    from peft import LoraConfig, inject_adapter_in_model

    def adapted(colwise: bool) -> Any:
        linear = nn.Linear(24, 97, dtype=torch.float64)
        if colwise:
            parallelize_module(linear, unnamed, ColwiseParallel())
        else:
            linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), named, [Shard(0)]))
        config = LoraConfig(r=3, target_modules=["0"])
        return cast("Any", inject_adapter_in_model(config, nn.Sequential(linear)))[0]

    plain = nn.Linear(24, 97, dtype=torch.float64)
    plain.register_forward_hook(lambda *_: None)
    local = VocabParallelHead(sharded(named)[0].to_local(), group=named.get_group())
    calls: dict[str, Any] = {
        "name": lambda: fused_linear_logps(case.hidden, tuple(sharded(odd)), case.labels),
        "hidden": lambda: fused_linear_logps(
            distribute_tensor(case.hidden.detach(), named, [Shard(1)]), tuple(sharded(named)), case.labels
        ),
        "adapter": lambda: fused_linear_logps(case.hidden, adapted(False), case.labels),
        "colwise adapter": lambda: fused_linear_logps(case.hidden, adapted(True), case.labels),
        "hooked": lambda: fused_linear_logps(case.hidden, plain, case.labels),
        "group": lambda: VocabParallelHead(case.weight, group="tp"),
        "vocab": lambda: VocabParallelHead(sharded(named)[0].to_local(), group=named.get_group(), vocab=98),
        "noisy": lambda: fused_noisy_linear_logps(case.hidden, local, nn.Linear(24, 97), case.labels, seed=0),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    return {"grads": grads, "said": said}


def with_fully_shard(rank: int, world: int) -> dict:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh, out = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")), {}
    for kind in ("root", "head", "tied"):
        model = parallelised(kind, mesh["tp"])
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        if kind == "head":
            fully_shard(model.lm_head, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
        fuse(model)
        for _ in range(2):  # with the first batch's check, and without
            model.zero_grad()
            loss = side_loss(model, ROWS[mesh.get_local_rank("dp")])
            loss.backward()
        out[kind] = {"value": loss.item(), "grads": gradients(model)}
    return out
