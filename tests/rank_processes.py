"""Runs a test's ranks: the processes of one gloo group, forked from one that has imported what takes seconds."""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

IMPORTED = (
    "torch.distributed.tensor", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "datasets",
    "peft", "trl.trainer.dpo_trainer",
)  # fmt: skip
LIMIT = 240  # seconds: a rank that waits for ever is killed


def launch(world: int, function: Callable[..., Any], *args: Any, **environment: str) -> list[Any]:
    """What `function(rank, world, *args)` returns on each of `world` ranks; an error on one of them is raised here.

    environment: variables of the ranks, beside those of this process and those that torchrun sets.
    """
    # Of packages that the tests of this process import: one file alone may need none of them.
    multiprocessing.set_forkserver_preload([name for name in IMPORTED if name.partition(".")[0] in sys.modules])
    with tempfile.TemporaryDirectory(prefix="asft-ranks-") as folder:
        ranks = torch.multiprocessing.start_processes(
            _rank,
            (world, folder, function, args, {**os.environ, **environment}),
            world,
            join=False,
            start_method="forkserver",
        )
        assert ranks is not None
        end = time.monotonic() + LIMIT
        try:
            while not ranks.join(timeout=max(0, end - time.monotonic())):
                assert time.monotonic() < end, f"ranks that are not done after {LIMIT} s"
        finally:
            for process in ranks.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}") for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple, environment: dict) -> None:
    size = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update(environment | {name: str(value) for name, value in size.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f"{folder}/{rank}")
    if dist.is_initialized():  # a command ends its group itself
        dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way
