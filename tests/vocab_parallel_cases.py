"""What the processes of test_vocab_parallel.py run, and the inputs that they share with it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from asft_kernels import fused_asft_loss, fused_linear_logps, fused_preference_loss
from asft_kernels.core.distributed import VocabParallelHead
from asft_kernels.objectives import LMPO, OBJECTIVES, get_objective
from cases import Case, gemms, make_case
from objective_cases import call_inputs, objective_of

DIFFERENTIABLE = ("lse", "entropy", "mean_logits")
FIGURES: Any = {"return_stats": True, "differentiable": DIFFERENTIABLE}


@dataclass
class Options:
    """A case: its inputs, keywords of the call, and how many rows of the head are padding."""

    dtype: torch.dtype = torch.float32
    make: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    padding: int = 0
    largest: float = 32.0  # of its logits


CASES = {
    "float64": Options(torch.float64, {"bias": True}, {"chunk_size": 16}),
    "peaked": Options(torch.float64, {"peaked": True, "spread": 4.0}, {"chunk_size": 16}, largest=120),
    "recomputed": Options(torch.float64, {"bias": True}, {"chunk_size": 16, "cache_bytes": 0}),
    "capped": Options(torch.float64, {"bias": True}, {"chunk_size": 16, "softcap": 3.0, "logit_scale": 1.7}),
    "padded": Options(torch.float64, {"bias": True}, {"chunk_size": 16}, padding=70),
    "bounded": Options(torch.float64, {}, {"num_valid": 40}),
    "empty batch": Options(torch.float64, {"valid": -1.0}),
    "float32": Options(make={"bias": True}, call={"chunk_size": 16}),
    "float32 peaked": Options(make={"peaked": True, "spread": 4.0}, call={"chunk_size": 16}, largest=120),
    "float32 recomputed": Options(make={"bias": True}, call={"chunk_size": 16, "cache_bytes": 0}),
    "far": Options(torch.float64, {"peaked": True, "spread": 12.0}, {"chunk_size": 16}, largest=360),
    "float32 far": Options(make={"peaked": True, "spread": 12.0}, call={"chunk_size": 16}, largest=360),
    "float32 far recomputed": Options(
        make={"peaked": True, "spread": 12.0}, call={"chunk_size": 16, "cache_bytes": 0}, largest=360
    ),
    "bfloat16": Options(torch.bfloat16, {"bias": True}, {"chunk_size": 16}),
    "triton": Options(make={"rows": 2, "T": 9, "D": 16, "V": 40, "bias": True, "spread": 4.0}, call={"chunk_size": 16}),
}


def made(name: str) -> Case:
    """A case with a label in the last row, which of three ranks is all that the last has."""
    options = CASES[name]
    case = make_case(dtype=options.dtype, **options.make)
    if (case.labels >= 0).any():
        case.labels[0, 3] = len(case.weight) - 1
    return case


def cut(options: Options, rank: int, world: int) -> slice:
    """A rank's rows of the case's head: uneven; of four or three ranks the second has none; padding not counted."""
    V = options.make.get("V", 97)
    ends = {2: [0, V // 3, V], 3: [0, V - 1, V - 1, V], 4: [0, V // 3, V // 3, V - 1, V]}[world]
    return slice(ends[rank], ends[rank + 1])


def loss_of_logps(logps: torch.Tensor) -> torch.Tensor:
    return (torch.randn(logps.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * logps).sum()


def loss_of(found: Any) -> torch.Tensor:
    """Something with another gradient in each value of each figure."""
    g = torch.Generator().manual_seed(1)
    return sum(
        (torch.randn(found.logps.shape, generator=g, dtype=torch.float64) * getattr(found, name)).sum()
        for name in ("logps", *DIFFERENTIABLE)
    )


def objective_loss(name: str, hidden: Any, head: Any, labels: torch.Tensor) -> torch.Tensor:
    objective = objective_of(name)
    return fused_preference_loss(hidden, head, labels, objective, **call_inputs(objective, labels)).sum()


def local(case: Case, options: Options, rank: int, world: int) -> tuple[list[torch.Tensor], VocabParallelHead]:
    """(leaves of this rank, its head): with padding, rows of NaN stand at the end of the last rank's."""
    own = cut(options, rank, world)
    leaves = [x.detach().clone() if i == 0 else x.detach()[own].clone() for i, x in enumerate(case.leaves)]
    vocab = None
    if options.padding:
        vocab = len(case.weight)
        if rank == world - 1:
            nan = [x.new_full((options.padding, *x.shape[1:]), torch.nan) for x in leaves[1:]]
            leaves[1:] = [torch.cat([x, y]) for x, y in zip(leaves[1:], nan, strict=True)]
    leaves = [x.requires_grad_() for x in leaves]
    return leaves, VocabParallelHead(*leaves[1:], group=dist.group.WORLD, vocab=vocab)


def gradients(rank: int, world: int) -> dict:
    out = {}
    for name, options in CASES.items():
        case = made(name)
        leaves, head = local(case, options, rank, world)
        found = fused_linear_logps(leaves[0], head, case.labels, **options.call, **FIGURES)
        grads = torch.autograd.grad(loss_of(found), leaves)
        if options.padding and rank == world - 1:
            own = len(grads[1]) - options.padding
            assert all((x[own:] == 0).all() for x in grads[1:])
            grads = [grads[0], *(x[:own] for x in grads[1:])]
        alone = fused_linear_logps(leaves[0], head, case.labels, **options.call)
        logps = torch.autograd.grad(loss_of_logps(alone), leaves)
        logps = [x[: len(y)] for x, y in zip(logps, grads, strict=True)]
        out[name] = {x: y.detach() for x, y in vars(found).items()} | {"grads": list(grads), "of logps": logps}
    return out


def objectives(rank: int, world: int) -> dict:
    out = {}
    case = made("float64")
    for name in OBJECTIVES:
        leaves, head = local(case, CASES["float64"], rank, world)
        loss = objective_loss(name, leaves[0], head, case.labels)
        out[name] = {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaves[0])[0]}
    return out


def statistics(rank: int, world: int) -> dict:
    """LMPO's after three steps in training."""
    out, case = {}, made("float64")
    for pairs in (len(case.labels) // 2, 1):
        objective = LMPO()
        _, head = local(case, CASES["float64"], rank, world)
        out[pairs] = [*lmpo_steps(case, head, pairs, objective), objective.state_dict()]
    return out


def lmpo_steps(case: Case, head: Any, pairs: int, objective: LMPO) -> list[torch.Tensor]:
    half = len(case.labels) // 2
    rows = [*range(pairs), *range(half, half + pairs)]
    hidden, labels = case.hidden.detach()[rows], case.labels[rows]
    return [fused_preference_loss(hidden * (1 + step / 10), head, labels, objective) for step in range(3)]


def without_the_first(case: Case) -> Case:
    """Biases of -inf for all rows of the first of two ranks, and no label there."""
    V = len(case.weight)
    with torch.no_grad():
        case.leaves[2][: V // 3] = -torch.inf
    case.labels[(case.labels >= 0) & (case.labels < V // 3)] = V - 1
    return case


def triton(rank: int, world: int) -> dict:
    options, out = CASES["triton"], {}
    case = made("triton")
    for name in ("asft", "figures", "absent", "absent torch"):
        if name == "absent":
            case = without_the_first(case)
        leaves, head = local(case, options, rank, world)
        call = options.call | {"backend": "torch" if "torch" in name else "triton"}
        if "absent" in name:
            found = fused_linear_logps(leaves[0], head, case.labels, **call, return_stats=["log_sum_sq_probs"])
            loss = loss_of_logps(found.logps)
            out[name + " figure"] = found.log_sum_sq_probs
        elif name == "asft":
            loss = fused_preference_loss(leaves[0], head, case.labels, "asft", **call)
        else:
            loss = loss_of(fused_linear_logps(leaves[0], head, case.labels, **call, **FIGURES))
        out[name] = {"grads": torch.autograd.grad(loss, leaves)}
    return out


def further(rank: int, world: int) -> dict:
    from peft import LoraConfig, inject_adapter_in_model

    case, out = made("float64"), {}
    own = cut(CASES["float64"], rank, world)
    A, B = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((4, 24), (97, 4)))
    grads = []
    for rows in (slice(0, 97), own):
        linear = torch.nn.Linear(24, rows.stop - rows.start, bias=False, dtype=torch.float64)
        linear.weight.data.copy_(case.weight.detach()[rows])
        adapted: Any = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), torch.nn.Sequential(linear))[0]
        adapted.lora_A["default"].weight.data = A.double()
        adapted.lora_B["default"].weight.data = B[rows].double()
        head = adapted if rows != own else VocabParallelHead(adapted, group=dist.group.WORLD)
        hidden = case.hidden.detach().clone().requires_grad_()
        fused_linear_logps(hidden, head, case.labels, softcap=5.0).sum().backward()
        grads.append([hidden.grad, adapted.lora_A["default"].weight.grad, adapted.lora_B["default"].weight.grad])
    whole, here = grads
    out["lora"] = {"hidden": (here[0], whole[0]), "A": (here[1], whole[1]), "B": (here[2], whole[2][own])}

    leaves, head = local(case, CASES["float64"], rank, world)

    def call(hidden: torch.Tensor) -> Any:
        return fused_linear_logps(hidden, head, case.labels, chunk_size=16, **FIGURES)

    traced = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(loss_of(run(leaves[0])), leaves) for run in (traced, call)]
    return out | {"traced": list(zip(*results, strict=True))}


def refusals(rank: int, world: int) -> dict:
    case = made("float32")
    leaves, head = local(case, CASES["float32"], rank, world)
    other = case.labels.clone()
    other[other != -100] = 3
    half, tokens = len(other) // 2, other.numel()
    noise, noise_of_all = (torch.rand(other.shape, generator=torch.Generator().manual_seed(x)) for x in (rank, 9))
    ref = -noise_of_all.sum(dim=1)

    def loss(objective: str, **given: Any) -> Any:
        return fused_preference_loss(leaves[0], head, case.labels, objective, **given)

    calls: dict[str, Any] = {
        "shape": lambda: fused_linear_logps(leaves[0], head, case.labels[:, 1:] if rank == 1 else case.labels),
        "keyword": lambda: fused_linear_logps(leaves[0], head, case.labels, softcap=-1 if rank == 2 else None),
        "labels": lambda: fused_linear_logps(leaves[0], head, other if rank == 2 else case.labels),
        "hidden": lambda: fused_linear_logps(leaves[0] * (1 - 2 * (rank == 0)), head, case.labels),
        "scale of hidden": lambda: fused_linear_logps(leaves[0] * (1 + 0.5 * (rank == 1)), head, case.labels),
        "order of hidden": lambda: fused_linear_logps(leaves[0].flip(0) if rank else leaves[0], head, case.labels),
        "options": lambda: fused_linear_logps(leaves[0].detach() if rank else leaves[0], head, case.labels),
        "range": lambda: fused_linear_logps(leaves[0], head, case.labels + 97),
        "order": lambda: fused_linear_logps(leaves[0], head, case.labels.flip(1) if rank else case.labels),
        "shift": lambda: fused_linear_logps(leaves[0], head, case.labels, shift=rank != 1),
        "objective": lambda: fused_preference_loss(leaves[0], head, case.labels, "orpoo" if rank == 1 else "orpo"),
        "beta": lambda: fused_preference_loss(leaves[0], head, case.labels, get_objective("simpo", beta=1.0 + rank)),
        "lam": lambda: fused_asft_loss(leaves[0], head, case.labels, lam=-1.0 if rank == 0 else 1.0),
        "weights": lambda: loss("simpo", token_weights=noise),
        "scale of weights": lambda: loss("simpo", token_weights=noise_of_all * (1 + 0.1 * (rank == 1))),
        "order of weights": lambda: loss("simpo", token_weights=noise_of_all.flip(0, 1) if rank else noise_of_all),
        "scale of references": lambda: loss("dpo", ref_logps=ref * (1 + 0.1 * (rank == 1))),
        "references": lambda: loss("dpo", ref_logps=-noise.sum(dim=1)),
        "inputs": lambda: loss("fpo", ref_logps=ref, objective_inputs={"feature_distance": noise[:half, 0]}),
        "reduction": lambda: loss("simpo", reduction="sum" if rank else "mean"),
        "second labels": lambda: loss("orpo", nll_labels=case.labels[:half].where(torch.tensor(rank == 0), -100)),
        "borders": lambda: fused_linear_logps(
            leaves[0].flatten(0, 1), head, case.labels.flatten(), cu_seqlens=torch.tensor([0, 9 + (rank == 1), tokens])
        ),
        "fine": lambda: loss("dpo", ref_logps=ref, token_weights=noise_of_all),
    }
    if rank == 0:  # by itself: with num_valid ranks tell each other nothing, so the others are in no call
        calls["num_valid"] = lambda: fused_linear_logps(leaves[0], head, case.labels, num_valid=tokens, softcap=-1)
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    rows = case.weight.detach()
    for name, (weight, vocab) in {
        "constructor": (rows if rank != 1 else rows[0], None),
        "vocabs": (rows, 90 + rank),
        "large vocab": (rows, 1000),
        "no vocab": (rows, "97" if rank == 2 else 97),
    }.items():
        try:
            VocabParallelHead(weight, group=dist.group.WORLD, vocab=vocab)
        except ValueError as error:
            said[name] = str(error)
    return {"said": said}


def cost(rank: int, world: int) -> dict:
    N, D, V = 48, 64, 1024
    case = make_case(rows=2, T=N // 2 + 1, D=D, V=V, valid=1.0)
    weight = case.weight.detach()[rank * V // 2 : (rank + 1) * V // 2].clone().requires_grad_()
    head = VocabParallelHead(weight, group=dist.group.WORLD)
    sent: list[int] = []
    own = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.itemsize)
        return own(tensor, *args, **kwargs)

    dist.all_reduce = counted

    def run(**options: Any) -> None:
        found = fused_linear_logps(case.hidden, head, case.labels, chunk_size=100, **options)
        (found if isinstance(found, torch.Tensor) else found.logps).sum().backward()

    out: dict[str, Any] = {"N": N, "D": D, "products": gemms(run, N, V, D), "bytes": sent.copy()}
    sent.clear()
    run(return_stats=True)
    out["with figures"] = sent.copy()
    sent.clear()
    with torch.no_grad():
        fused_linear_logps(case.hidden, head, case.labels)
    return out | {"evaluation": sent}
