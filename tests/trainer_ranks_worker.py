"""What the processes of test_trainer_ranks.py run: PreferenceTrainer on one of two ranks."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from datasets import Dataset, disable_caching
from torch import distributed as dist

from asft_kernels.errors import InputError
from asft_kernels.models.seam import output_head
from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from test_preference_trainer import options
from tiny_lm import pairs, tiny_tokenizer

FSDP2 = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
FILLED = {
    "objective": "orpo", "nll_on_prompt": True, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2,
    "save_strategy": "steps",
}  # fmt: skip
KTO = {"objective": "kto", "gradient_accumulation_steps": 1, "max_steps": 3}
SYNCED = {
    "objective": "dpo", "sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 1e-2, "save_steps": 2,
    "save_strategy": "steps",
}  # fmt: skip


def made(folder: Path, model: str, count: int, *, fsdp: bool = False, **changes: Any) -> Any:
    GradientState._reset_state()
    AcceleratorState._reset_state()
    if dist.is_initialized():
        changes["ddp_backend"] = "gloo"
    sharded = {"fsdp": True, "fsdp_config": FSDP2} if fsdp else {}
    changes = {"optim": "adamw_torch", "lr_scheduler_type": "constant", "per_device_train_batch_size": 1} | changes
    config = PreferenceConfig(**options(folder, **changes, **sharded))
    assert config.device.type == "cpu"
    if fsdp:  # on CPUs accelerate leaves such a config aside without a word (AcceleratorState): its own code then runs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    rows = Dataset.from_list(pairs(count))
    return PreferenceTrainer(model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())


def logged(trainer: Any, resume: Any = None) -> list[dict[str, float]]:
    trainer.train(resume_from_checkpoint=resume)
    return [row for row in trainer.state.log_history if "loss" in row]


def plain(rank: int, world: int, folder: Path, model: str) -> dict:
    refused = []
    for wrong in ({"dispatch_batches": True, "split_batches": True}, {"even_batches": False}):
        try:
            made(folder, model, 4, accelerator_config=wrong)
        except InputError as error:
            refused.append(str(error))
    stream = Dataset.from_list(pairs(6)).to_iterable_dataset()
    trainer = made(folder / "filled", model, 5, **FILLED)
    filled = logged(trainer)
    for wrong in (stream, {"one": stream}):
        try:
            trainer.evaluate(wrong)
        except InputError as error:
            refused.append(str(error))
    resumed = logged(made(folder / "resumed", model, 5, **FILLED), str(folder / "filled" / "checkpoint-2"))
    ahead = {"objective": "dpo", "precompute_ref_log_probs": True, "max_steps": 1}
    precomputed = logged(made(folder / "precomputed", model, 5, **ahead))
    disable_caching()
    uncached = logged(made(folder / "uncached", model, 5, **ahead))
    return {
        "refused": refused, "filled": filled, "resumed": resumed, "precomputed": precomputed, "uncached": uncached,
        "kto": logged(made(folder / "kto", model, 5, **KTO)),
    }  # fmt: skip


def under_fsdp2(rank: int, world: int, folder: Path, model: str) -> dict:
    out: dict[str, Any] = {}
    for way in ("gather", "stream"):
        trainer = made(
            folder / way, model, 8, fsdp=True, objective="dpo", bf16=True, sharded_head=way, max_steps=1
        )  # fmt: skip
        rows = logged(trainer)
        head: Any = output_head(trainer.accelerator.unwrap_model(trainer.model))
        out[way] = {"loss": rows[0]["loss"], "dtypes": [head.weight.dtype, getattr(head, "param_dtype", None)]}
    ahead = {"objective": "dpo", "precompute_ref_log_probs": True, "max_steps": 1}
    out["precomputed"] = logged(made(folder / "precomputed", model, 5, fsdp=True, **ahead))
    whole = logged(made(folder / "whole", model, 12, fsdp=True, **SYNCED))
    resumed = made(folder / "resumed", model, 12, fsdp=True, **SYNCED)
    again = logged(resumed, str(folder / "whole" / "checkpoint-2"))
    return out | {"whole": whole, "again": again}
