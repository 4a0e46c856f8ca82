"""`asft train` on one of several CPU ranks, started by torchrun: tensor_parallel_trainer_worker.py words..."""

import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from asft_kernels.cli import frame
from asft_kernels.cli.train import parse
from asft_kernels.training.run import run


def body() -> int:
    data, config, model = parse(sys.argv[1:], {})
    assert config.device.type == "cpu"
    # accelerate 1.15 takes tensor parallelism on several GPUs alone; its own code then runs.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    run(data, config, model)
    return 0


if __name__ == "__main__":
    code = frame.run("asft train", body, stopped="")
    sys.stdout.flush()
    if code == 0:
        torch.distributed.barrier()
    os._exit(code)  # gloo's threads now and then abort a process that ends in the ordinary way
