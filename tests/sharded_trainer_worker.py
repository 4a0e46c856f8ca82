"""PreferenceTrainer on one of two CPU ranks, started by torchrun: sharded_trainer_worker.py folder model kind steps."""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from test_preference_trainer import options, rows_that_count_differently
from tiny_lm import tiny_tokenizer

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
FSDP2 = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def main() -> None:
    folder, model, kind, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    sharding = {"deepspeed": ZERO3} if kind == "zero3" else {"fsdp": True, "fsdp_config": FSDP2}
    config = PreferenceConfig(
        **options(
            folder, objective="asft", max_steps=steps, optim="adamw_torch", learning_rate=1e-2,
            lr_scheduler_type="constant", per_device_train_batch_size=2, ddp_backend="gloo", save_steps=1,
            save_strategy="steps", sharded_head=kind if kind in ("stream", "gather") else None, **sharding,
        )
    )  # fmt: skip
    if kind != "zero3":
        assert config.device.type == "cpu"
        # On CPUs accelerate leaves an FSDP config aside without a word (AcceleratorState): its own code then runs.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = PreferenceTrainer(
        model, args=config, train_dataset=rows_that_count_differently(), processing_class=tiny_tokenizer()
    )
    trainer.train(resume_from_checkpoint=steps > 2)
    trainer.save_model()
    if config.process_index == 0:
        head = trainer.accelerator.unwrap_model(trainer.model).lm_head
        rows = [row for row in trainer.state.log_history if "loss" in row]
        torch.save({"rows": rows, "head": type(head).__name__}, Path(folder) / "found.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


if __name__ == "__main__":
    main()
