"""Several processes give one's loss and gradients: sequences in pieces, batches in parts, and errors on all ranks."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("train_extra")

from asft_kernels import fused_asft_loss, fused_linear_logps, fused_preference_loss, preference_loss_from_logps
from asft_kernels.core.sequence_parallel import process_group
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import ASFT, LMPO, kto_kl
from bounds import relative_error
from cases import IGNORE, make_case, packed
from model_cases import batch, built
from objective_cases import call_inputs, objective_of
from rank_processes import launch
from test_every_objective import NAMES
from train_extra import QUIET

pytestmark = QUIET
# float64, relative to the largest entry: sums of some 50 terms in another order, 50 * 2^-53, which the objectives'
# derivatives (log-odds near p = 1, squares) magnify by less than 100.
EXACT = 1e-12
SINGLE = 2e-6  # fp32, as the issue asks: each rank's sums in another order, 8 roundings of 2^-24 and two more

rank = dist.get_rank


# Sequences in pieces, on all ranks of the world


def positions(length: int) -> list[int]:
    """Of three ranks: head and tail, the middle, nothing."""
    return [[0, 1, length - 2, length - 1], list(range(2, length - 2)), []][rank()]


def shifted(tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor[:, 1:], (0, 1), value=fill)


def pieces(case, call):
    """(hidden, labels, call) of this rank's pieces of what a whole batch has, hidden a leaf."""
    at = positions(case.labels.shape[1])
    hidden = case.hidden.detach()[:, at].clone().requires_grad_()
    own = dict(call)
    if "token_weights" in own:
        own["token_weights"] = shifted(own["token_weights"])[:, at]
    if "nll_labels" in own:
        own["nll_labels"] = shifted(own["nll_labels"], IGNORE)[:, at]
    if "ref_logps" in own and own["ref_logps"].shape == case.labels.shape:
        own["ref_logps"] = own["ref_logps"][:, at]
    return hidden, shifted(case.labels, IGNORE)[:, at], {**own, "shift": False, "sequence_group": dist.group.WORLD}


def figures_of(out):
    return {**{k: v for k, v in vars(out).items() if k != "metrics"}, **out.metrics}


def compared(name, dtype, **more):
    """Largest relative difference of loss, gradients and figures from the whole batch's in one process."""
    case = make_case(rows=8, bias=True).to(dtype)
    case.labels[1] = IGNORE
    objective = objective_of(name)
    call = {**call_inputs(objective, case.labels), **more}
    whole, outputs = fused_preference_loss(
        case.hidden, case.head, case.labels, objective, return_outputs=True, **call
    )  # fmt: skip
    truth = torch.autograd.grad(whole, case.leaves)
    hidden, labels, own = pieces(case, call)
    loss, ours = fused_preference_loss(
        hidden, case.head, labels, objective_of(name), return_outputs=True, **own
    )  # fmt: skip
    grads = list(torch.autograd.grad(loss, [hidden, *case.leaves[1:]]))
    for grad in grads[1:]:
        dist.all_reduce(grad)  # the sum over the group is its size times one process's, the mean is one's
    grads = [grad / dist.get_world_size() for grad in grads]
    errors = [relative_error(loss, whole.double())]
    at = positions(case.labels.shape[1])
    scale = truth[0].abs().max()
    errors.append(float((grads[0] - truth[0][:, at]).abs().max() / scale) if at else 0.0)
    errors += [relative_error(got, right.double()) for got, right in zip(grads[1:], truth[1:], strict=True)]
    theirs = figures_of(outputs)
    errors += [relative_error(x, theirs[key].double()) for key, x in figures_of(ours).items()]
    return max(errors)


def sequence_objectives():
    found = {}
    for name in NAMES:
        if name in WEIGH_BY_PLACE:
            continue
        for dtype in (torch.float64, torch.float32):
            found[f"{name} {dtype}"] = compared(name, dtype)
    labels = make_case(rows=8).labels
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3))
    found["weighted"] = compared("dpo", torch.float64, token_weights=weights)
    found["nll"] = compared("orpo_token_nll", torch.float64, nll_labels=labels[:4].where(labels[:4] >= 0, 5))
    return found


def sequence_layouts():
    """Packed pieces, log-probabilities of a model, the loss and statistics of lmpo, of pieces and of the whole."""
    found = {}
    case = make_case(rows=8).to(torch.float64)
    hidden, labels, borders = packed(case)
    truth = fused_asft_loss(hidden, case.weight, labels, cu_seqlens=borders)
    exact = torch.autograd.grad(truth, case.weight)[0]
    ends = borders[1:].long() - 1
    moved = labels.roll(-1).index_fill(0, ends, IGNORE)
    mine = torch.arange(len(labels)) * dist.get_world_size() // len(labels) == rank()  # cut anywhere
    own_borders = torch.nn.functional.pad(mine.cumsum(0), (1, 0))[borders.long()]
    options = {"cu_seqlens": own_borders, "shift": False, "sequence_group": dist.group.WORLD}
    loss = fused_asft_loss(hidden[mine], case.weight, moved[mine], **options)
    grad = torch.autograd.grad(loss, case.weight)[0]
    dist.all_reduce(grad)
    found["packed"] = max(relative_error(loss, truth), relative_error(grad / dist.get_world_size(), exact))

    hidden, labels, own = pieces(case, {})
    whole = fused_preference_loss(case.hidden, case.weight, case.labels, "simpo")
    logps = fused_linear_logps(hidden, case.weight, labels, shift=False)

    class AtOnce(ASFT):
        def from_tokens(self, logps, offsets, backend):
            raise AssertionError("its sums are of pieces")

    fused_preference_loss(hidden, case.weight, labels, AtOnce(), **own)
    of_logps: Any = preference_loss_from_logps(logps, labels, "simpo", **own)
    found["of logps"] = relative_error(of_logps, whole)

    # The pair's own statistics over all ranks: the whole batch's are those of one process without a group.
    one, parts = LMPO(), LMPO()
    logps = fused_linear_logps(case.hidden, case.weight, case.labels).detach()
    for step in range(2):
        size = dist.get_world_size()
        part = fused_preference_loss(hidden + step, case.weight, labels, parts, **own)
        sums = torch.distributed.is_initialized
        torch.distributed.is_initialized = lambda: False  # as in one process
        try:
            alone = fused_preference_loss(case.hidden + step, case.weight, case.labels, one)
        finally:
            torch.distributed.is_initialized = sums
        found["lmpo", step] = relative_error(part, alone)
    assert size == 3
    for name, value in one.state_dict().items():
        found["lmpo", name] = relative_error(parts.state_dict()[name], value)
    return found


class Wire(TorchDispatchMode):
    """Bytes that a rank gives to all_reduce."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "all" in func.__name__:
            assert "reduce" in func.__name__, func
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def sequence_bytes():
    """Of one call and its backward, by objective."""
    case, found = make_case(rows=8), {}
    for name in ("asft", "orpo_token_nll", "bmc_of_ipo_by_policy", "wpo_of_a_sum"):
        objective = objective_of(name)
        call = call_inputs(objective, case.labels)
        if name.startswith("orpo"):
            call["nll_labels"] = case.labels[:4]
        hidden, labels, own = pieces(case, call)
        with Wire() as wire:
            fused_preference_loss(hidden, case.weight, labels, objective, **own).backward()
        found[name] = wire.bytes
    return found


def message_of(call, kind=ValueError):
    try:
        call()
    except kind as error:
        return str(error)
    return None


def sequence_errors():
    """What each rank is told; none of them waits."""
    case = make_case(rows=4)
    world = dist.group.WORLD
    hidden, labels, own = pieces(case, {})
    wrong = labels.index_fill(1, torch.tensor([0]), 10_000) if rank() == 1 else labels
    few = slice(2 if rank() == 0 else 4)

    def loss(objective="asft", at=labels, rows=slice(None), **more):
        return lambda: fused_preference_loss(hidden[rows], case.weight, at[rows], objective, **{**own, **more})

    def of_logps():
        value = torch.zeros(labels.shape if rank() else (1, 1))
        return preference_loss_from_logps(value, labels, "asft", **own)

    def reduced_otherwise():
        reduction = "sum" if rank() else "mean"
        return preference_loss_from_logps(torch.full(labels.shape, -1.0), labels, "asft", reduction=reduction, **own)

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (3, 1), mesh_dim_names=("cp", "tp"))
    found = {
        "out of range": message_of(loss(at=wrong)),
        "other rows": message_of(loss(rows=few)),
        "of logps": message_of(of_logps),
        "reduction of logps": message_of(reduced_otherwise),
        "shift": message_of(loss(shift=True)),
        "no group": message_of(loss(sequence_group="cp")),
        "mesh": message_of(loss(sequence_group=mesh)),
        "fine": message_of(loss(sequence_group=mesh["cp"])),
        "name": message_of(loss("orpoo" if rank() == 2 else "orpo")),
        "objective": message_of(loss("asft" if rank() else "orpo")),
        "reference": message_of(loss("dpo", ref_logps=torch.full((4,), -3.0 - rank()))),
        "same reference": message_of(loss("dpo", ref_logps=torch.full((4,), -3.0))),
        **{name: message_of(loss(objective_of(name))) for name in WEIGH_BY_PLACE},
    }
    assert process_group(mesh["tp"]) is None
    assert process_group(world) is world
    return found


# Batches in parts, and models whose sequences are in pieces


def of_pairs(data, pairs):
    """Rows of these pairs: chosen, then rejected."""
    count = len(data["labels"]) // 2
    rows = [*pairs, *(count + i for i in pairs)]
    return {name: tensor[rows] for name, tensor in data.items()}


def eight_pairs():
    """Of unequal lengths; pair 6 has no label on one side, pair 7 none at all. Causal alone, as in pieces."""
    data = batch(pairs=8)
    del data["attention_mask"]
    for row in range(16):
        data["labels"][row, 5 + row % 7 :] = -100
    data["labels"][[6, 7, 15]] = -100
    return data


def mean_of_ranks(model):
    """Gradients as DDP makes them, without it."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def difference(model, truth):
    """Largest relative difference of gradients."""
    own = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return max(relative_error(own[name], p.grad) for name, p in truth.named_parameters())


def whole(objective, data, **more):
    model = PreferenceModel(built("Llama").double(), objective)
    found = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False  # as in one process
    try:
        model(**data, **more)["loss"].backward()
    finally:
        torch.distributed.is_initialized = found
    return model


def data_parallel():
    """DDP with 5, 3 and 0 pairs a rank, the last with rows and no label; in two micro-batches, too."""
    found, data = {}, eight_pairs()
    mine = [[[0, 1, 2], [3, 6]], [[4], [5]], [[7], [7]]][rank()]
    of_rank = {"num_pairs": 6 / dist.get_world_size()}  # pairs 0 to 5 count
    for name in ("asft", "simpo", "lmpo"):
        truth = whole(objective_of(name) if name != "lmpo" else LMPO(), data)
        if name == "lmpo":  # one call of each rank has all pairs
            parts, micro = [[pair for pairs in mine for pair in pairs]], "at once"
        else:
            parts, micro = mine, "accumulated"
        model = PreferenceModel(built("Llama").double(), LMPO() if name == "lmpo" else name)
        wrapped = DistributedDataParallel(model)
        for i, pairs in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else wrapped.no_sync():
                wrapped(**of_pairs(data, pairs), **of_rank)["loss"].backward()
        found[name, micro] = difference(wrapped, truth)
        if name == "lmpo":
            for key, value in truth.objective.state_dict().items():
                found[name, key] = relative_error(model.objective.state_dict()[key], value)
    kl = kto_kl(torch.arange(2.0)[: rank()] - 3, torch.zeros(2)[: rank()] - 5)  # 0, 1 and 2 rows a rank
    found["kto_kl"] = relative_error(kl, torch.tensor((2 + 2 + 3) / 3))
    few = of_pairs(data, [rank()] if rank() < 2 else [7])  # fewer pairs than ranks
    truth = whole("asft", of_pairs(data, [0, 1]))
    wrapped = DistributedDataParallel(PreferenceModel(built("Llama").double(), "asft"))
    wrapped(**few, num_pairs=2 / dist.get_world_size())["loss"].backward()
    found["fewer pairs than ranks"] = difference(wrapped, truth)
    return found


def gathered_attention(group, at):
    """Attention of this rank's queries to all keys, which are gathered: a sequence-parallel model on any device.

    at: the positions of each rank, in the order of the group.
    """
    from torch.distributed._functional_collectives import all_gather_single_autograd, wait_tensor

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        everywhere = torch.tensor([place for of_rank in at for place in of_rank])
        own = torch.tensor(at[dist.get_rank(group)])
        key, value = (wait_tensor(all_gather_single_autograd(x.contiguous(), 2, group)) for x in (key, value))
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores.masked_fill(everywhere[None] > own[:, None], -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return attention


def context_parallel(*_):
    """Two data-parallel groups of two ranks, each with the head and tail or the middle of its sequences.

    A batch of two groups is 3 + 2 pairs. With the average over all four ranks, and with the sum over a group alone.
    """
    from transformers import AttentionInterface

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    at = [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    AttentionInterface.register("gathered", gathered_attention(mesh["cp"].get_group(), at))
    data = eight_pairs()
    pairs = [[0, 1, 2], [4, 6]][mesh.get_local_rank("dp")]
    own, of_all = of_pairs(data, pairs), of_pairs(data, [0, 1, 2, 4, 6])
    here = at[mesh.get_local_rank("cp")]
    pieces = {
        "input_ids": own["input_ids"][:, here],
        "shift_labels": shifted(own["labels"], IGNORE)[:, here],
        "position_ids": torch.tensor(here).expand(len(own["labels"]), -1),
    }
    found = {}
    for name in ("asft", "lmpo", "orpo_token_nll", "wpo_of_a_sum"):
        objective = lambda: LMPO() if name == "lmpo" else objective_of(name)  # noqa: B023, E731
        inner = built("Llama", attn_implementation="gathered").double()
        model = PreferenceModel(inner, objective(), sequence_group=mesh["cp"])
        wrapped = DistributedDataParallel(model)
        truth = whole(objective(), of_all)
        out = wrapped(**pieces, num_pairs=4 / 2)  # 4 pairs count, of 2 data-parallel ranks
        out["loss"].backward()
        if name != "orpo_token_nll":  # whose likelihood is of the batch: another one on each data-parallel rank
            found[name, "mean"] = difference(wrapped, truth)
        if name != "lmpo":  # whose statistics are of all ranks
            truth, model = whole(objective(), own), PreferenceModel(inner, objective(), sequence_group=mesh["cp"])
            model.zero_grad()
            out = model(**pieces)
            out["loss"].backward()
            found[name, "loss"] = relative_error(out["loss"], truth(**own)["loss"])
            for p in model.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad, group=mesh["cp"].get_group())
                p.grad /= 2  # the sum is two ranks' losses
            found[name, "sum"] = difference(model, truth)
    model = PreferenceModel(built("Llama"), sequence_group=mesh["cp"])
    found["labels"] = message_of(lambda: model(own["input_ids"], labels=own["labels"]))
    return found


def trainers(folder):
    """PreferenceTrainer on three ranks with a pair each at a time, two of eight of which do not count."""
    from asft_kernels.errors import InputError
    from asft_kernels.training import PreferenceConfig, PreferenceTrainer
    from test_preference_trainer import options, rows_that_count_differently
    from tiny_lm import saved_tiny_model, tiny_tokenizer

    rows = rows_that_count_differently()
    rows = rows.map(lambda row, i: {"rejected_ids": [] if i == 5 else row["rejected_ids"]}, with_indices=True)
    found = {}
    model = str(saved_tiny_model(folder / "model", initializer_range=0.3))
    dist.barrier()  # the first rank alone writes

    def made(objective, accumulation, **more):
        steps = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "ddp_backend": "gloo"}
        config = PreferenceConfig(
            **options(
                folder, **{**steps, **more}, objective=objective, gradient_accumulation_steps=accumulation,
                per_device_train_batch_size=1,
            )
        )  # fmt: skip
        return PreferenceTrainer(model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())

    for objective, accumulation in (("asft", 1), ("asft", 2), ("lmpo", 1)):
        trainer = made(objective, accumulation)
        trainer.train()
        row = next(row for row in trainer.state.log_history if "loss" in row)
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        found[objective, accumulation] = row, weights, trainer._state_of_objective()

    trainer = made("asft", 1, max_steps=4, logging_steps=4, save_strategy="steps", save_steps=2)
    count = trainer._count
    if rank() == 1:  # NaN there alone, in the step before the checkpoint

        def broken(losses, *rest):
            count(losses * (torch.nan if trainer.state.global_step == 1 else 1), *rest)

        setattr(trainer, "_count", broken)  # noqa: B010
    found["nan"] = message_of(trainer.train, InputError)
    return found


WEIGH_BY_PLACE = ("ld_dpo", "ld_of_a_sum", "ld_wpo")


def of_three(rank, world, folder):
    cases = (sequence_objectives, sequence_layouts, sequence_bytes, sequence_errors, data_parallel)
    return {case.__name__: case() for case in cases} | {"trainers": trainers(folder)}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return launch(3, of_three, tmp_path_factory.mktemp("three"))


def test_sequences_in_pieces_are_as_whole_ones(three):
    """Loss, gradients and figures of every objective; the third rank has no position at all."""
    for of_rank in three:
        found = of_rank["sequence_objectives"]
        assert len(found) == 2 * (len(NAMES) - len(WEIGH_BY_PLACE)) + 2
        for key, error in found.items():
            assert error <= (SINGLE if "float32" in key else EXACT), key


def test_pieces_of_packed_rows_and_lmpos_statistics(three):
    for of_rank in three:
        for key, error in of_rank["sequence_layouts"].items():
            assert error <= EXACT, key


def test_bytes_are_those_of_the_formula(three):
    """docs/distributed.md: 24 for the agreement, 8 R for each kind of length, 16 R for each sum and its gradient."""
    R = 8
    sums = {"asft": 1, "orpo_token_nll": 2, "bmc_of_ipo_by_policy": 2, "wpo_of_a_sum": 2}
    for of_rank in three:
        for name, count in sums.items():
            lengths = 2 if name.startswith("orpo") else 1
            assert of_rank["sequence_bytes"][name] == 56 + 8 * R * lengths + 16 * R * count, name


def test_an_error_on_one_rank_of_the_group_is_one_on_all(three):
    for i, of_rank in enumerate(three):
        found = of_rank["sequence_errors"]
        own = "labels: got values from" if i == 1 else "sequence_group: got an error on rank 1, need none"
        assert found.pop("out of range").startswith(own)
        assert found.pop("other rows").startswith("sequence_group: got 2 to 4 sequences on its ranks, need a piece of")
        own = "logps: got shape" if i == 0 else "sequence_group: got an error on rank 0"
        assert found.pop("of logps").startswith(own)
        other = "objective, reduction: got another on some ranks of sequence_group"
        assert found.pop("reduction of logps").startswith(other)
        assert found.pop("shift").startswith("shift: got True with sequence_group, need False")
        assert found.pop("no group").startswith("sequence_group: got str, need a ProcessGroup")
        assert found.pop("mesh").startswith("sequence_group: got a DeviceMesh of 2 dimensions, need one")
        assert found.pop("fine") is None
        assert ("orpoo" if i == 2 else "sequence_group: got an error on rank 2") in found.pop("name")
        assert found.pop("objective").startswith(other)
        assert found.pop("reference").startswith("ref_logps: got another on some ranks of sequence_group")
        assert found.pop("same reference") is None
        for name in WEIGH_BY_PLACE:
            assert found.pop(name).startswith("sequence_group: got LDDPO, which weighs tokens by their place")
        assert not found


def test_a_group_without_processes_is_refused():
    case = make_case()
    with pytest.raises(ValueError, match=r"sequence_group: got a group where torch.distributed does not run"):
        fused_asft_loss(case.hidden, case.weight, case.labels, shift=False, sequence_group="cp")


@pytest.fixture(scope="module")
def four():
    return launch(4, context_parallel)


def test_batches_in_parts_are_as_whole_ones(three):
    """Unequal pairs and tokens, a rank without a pair, accumulation, lmpo's statistics, kto's reference point.

    Llama's norms round gradients to fp32, here of a loss that is 3 times as large.
    """
    for of_rank in three:
        for key, error in of_rank["data_parallel"].items():
            assert error <= SINGLE, key


@pytest.mark.parametrize(("objective", "accumulation"), [("asft", 1), ("asft", 2), ("lmpo", 1)])
def test_a_trainer_on_three_ranks_is_one_process(three, tmp_path, objective, accumulation):
    """Whatever micro-batches and ranks: one step of SGD by 1 with all pairs at once."""
    from asft_kernels.training import PreferenceConfig, PreferenceTrainer
    from test_preference_trainer import options, rows_that_count_differently
    from tiny_lm import saved_tiny_model, tiny_tokenizer

    rows = rows_that_count_differently()
    rows = rows.map(lambda row, i: {"rejected_ids": [] if i == 5 else row["rejected_ids"]}, with_indices=True)
    given = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}
    size = {"per_device_train_batch_size": 3 * accumulation, "gradient_accumulation_steps": 1}
    alone = PreferenceTrainer(
        str(saved_tiny_model(tmp_path / "model", initializer_range=0.3)), train_dataset=rows,
        args=PreferenceConfig(**options(tmp_path, **given, **size, objective=objective)),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    alone.train()
    expected = next(row for row in alone.state.log_history if "loss" in row)
    for of_rank in three:
        row, weights, state = of_rank["trainers"][objective, accumulation]
        for name in ("loss", "pairs", "logps/chosen", "entropy", "num_tokens"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5), name
        for name, value in alone.model.state_dict().items():
            # Sums of at most 6 pairs in another order: some roundings of a gradient of size 1.
            assert (value - weights[name]).abs().max() <= 64 * 2.0**-24, name
        for name, value in alone._state_of_objective().items():
            assert state[name].item() == pytest.approx(value.item(), rel=1e-6), name


def test_a_loss_that_is_nan_on_one_rank_ends_all(three):
    for of_rank in three:
        assert of_rank["trainers"]["nan"].startswith("learning_rate: the loss is nan after step 2")


def test_a_model_whose_sequences_are_in_pieces(four):
    for found in four:
        assert found.pop("labels").startswith("labels: got labels with sequence_group, need shift_labels")
        for key, error in found.items():
            assert error <= EXACT, key
