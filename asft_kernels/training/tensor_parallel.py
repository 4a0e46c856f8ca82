"""A run whose model transformers shards as it loads it: ranks of one tensor-parallel group have the same pairs.

transformers' `DistributedConfig(tp_size, fsdp_size)` is the engine. accelerate's FSDP2 cannot be it: version 1.15
prepares such a model with a class (`ReplicateParallel`) that transformers 5.23 no longer has.
"""

import os
from typing import Any

from torch import Tensor

from asft_kernels.errors import InputError

INSTEAD = (
    "need model_init_kwargs={'distributed_config': {'tp_size': ..., 'fsdp_size': ...}}, by which transformers shards"
)


def check_parallelism(args: Any) -> None:
    """Takes args.parallelism_config's tp_size and dp_shard_size over into args.model_init_kwargs.

    Raises:
        InputError: for what neither transformers nor this package can do.
    """
    asked: Any = args.parallelism_config
    if asked is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        from accelerate import ParallelismConfig

        asked = ParallelismConfig()  # of what accelerate launch has set
    for name in ("cp_size", "sp_size"):
        if (size := getattr(asked, name, 1)) > 1:
            raise InputError(
                f"parallelism_config: got {name} {size}, need 1: PreferenceTrainer has whole sequences; train on "
                "pieces of them with PreferenceModel(..., sequence_group=mesh) (docs/distributed-ranks.md has the loop)"
            )
    given = dict(args.model_init_kwargs or {})
    if asked is not None and asked.tp_size > 1:
        if asked.dp_replicate_size > 1:
            raise InputError(
                f"parallelism_config: got dp_replicate_size {asked.dp_replicate_size} with tp_size {asked.tp_size}, "
                "need dp_shard_size for the ranks of data parallelism"
            )
        if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise InputError(f"fsdp: got accelerate's with tp_size {asked.tp_size}, {INSTEAD}; leave it out")
        sizes = {"tp_size": asked.tp_size, "fsdp_size": asked.dp_shard_size}
        if (other := given.setdefault("distributed_config", sizes)) != sizes:
            raise InputError(
                f"parallelism_config: got {sizes} there and {other} in model_init_kwargs, need one of both"
            )
    if "distributed_config" in given:
        args.model_init_kwargs = {**given, "device_map": None}  # TRL's "auto" is refused beside it


def sharded_at_load(trainer: Any) -> bool:
    """Returns whether transformers has sharded the model as it loaded it, which older versions of 5 never do."""
    return getattr(trainer, "is_distributed_loading_by_transformers", False)


def check_tensor_parallel(trainer: Any) -> None:
    """Raises InputError for what would be silently wrong on ranks that share pairs.

    Args:
        trainer: a PreferenceTrainer, its model loaded.
    """
    size, args = trainer.get_tp_size(), trainer.args
    if size == 1:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(f"fsdp, deepspeed: got one of them with tp_size {size}, {INSTEAD}; leave them out")
    if not sharded_at_load(trainer):
        raise InputError(f"model: got one that transformers did not shard, with tp_size {size}, {INSTEAD}")
    for name, got, need in (
        ("peft_config", hasattr(trainer.model, "peft_config"), "none: an adapter is whole on each rank"),
        ("quantization_config", getattr(trainer.model, "is_quantized", False), "none"),
        ("objective", trainer._state_of_objective() and trainer.objective, "one without statistics of all ranks"),
        ("precompute_ref_log_probs", args.precompute_ref_log_probs, "False: TRL gathers each pair once a rank"),
        ("sync_ref_model", args.sync_ref_model, "False"),
        ("load_best_model_at_end", args.load_best_model_at_end, "False: the Trainer loads whole weights alone"),
        ("method", trainer.method.name if trainer.method.of_rank else "", "one that draws the same on all ranks"),
    ):
        if got:
            raise InputError(f"{name}: got {got!r} with tp_size {size}, need {need}")


def data_ranks(trainer: Any) -> int:
    """Returns how many ranks, or groups of tensor parallelism, have pairs of their own."""
    return trainer.args.world_size // trainer.get_tp_size()


def data_rank(trainer: Any) -> int:
    """Returns which of them this one is: ranks of one group follow one another."""
    return trainer.args.process_index // trainer.get_tp_size()


def sum_over_data(trainer: Any, own: Tensor) -> Tensor:
    """Returns the sum over all ranks, those that share pairs counted once."""
    return trainer.accelerator.reduce(own, "sum") / trainer.get_tp_size()


def gathered_rows(trainer: Any, own: Tensor) -> Tensor:
    """Returns (rows, ...) of all ranks as `gather_for_metrics` does, those that share pairs counted once."""
    every = trainer.accelerator.gather(own)
    rows = every.unflatten(0, (data_ranks(trainer), trainer.get_tp_size(), -1))[:, 0].flatten(0, 1)
    state = trainer.accelerator.gradient_state
    return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows
