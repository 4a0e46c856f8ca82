"""asft-train's trainer with pairs that are made on the way: what SAPO does before each optimiser step.

EMA of the policy -> reference -> negatives for the incoming rows, into the buffer -> a batch out of it -> loss
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from asft_kernels.errors import InputError
from asft_kernels.generation import TransformersGenerator
from asft_kernels.methods.sapo.buffer import ReplayBuffer
from asft_kernels.methods.sapo.ema import MovingModels
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.models import PreferenceModel
from asft_kernels.train.arguments import RunArguments
from asft_kernels.train.trainer import PreferenceTrainer

MODELS = "sapo_models.pt"  # in a checkpoint: EMA and reference
BUFFER = "sapo_buffer_{rank}.pt"  # and each rank's buffer and generator of random numbers


class SapoTrainer(PreferenceTrainer):
    """Trains a PreferenceModel on rows {"prompt", "chosen"} of token ids.

    models: EMA and reference, made from `model`; buffer: the pairs made so far, of this rank.
    nll_on_prompt: the likelihood term of the objective covers the prompt too (TRL's ORPO).

    The order of a step is that of the authors' code. All micro-batches of a step are made before its first
    backward pass, by the same EMA.
    """

    def __init__(
        self,
        model: PreferenceModel,
        args: RunArguments,
        *,
        tokenizer: Any,
        models: MovingModels,
        buffer: ReplayBuffer,
        regeneration: Regeneration,
        nll_on_prompt: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model, args, tokenizer=tokenizer, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("sharded parameters (FSDP, DeepSpeed): the EMA needs them whole; use one GPU or DDP")
        self.models, self.buffer, self.regeneration = models, buffer, regeneration
        self.nll_on_prompt = nll_on_prompt
        for module in (models.average, models.reference):
            if module is not None:
                module.to(args.device)
        self.writer = TransformersGenerator(models.ema.model, tokenizer, batch_size=args.train_batch_size)
        self.random = torch.Generator().manual_seed(args.seed + args.process_index)
        self.made, self.unchanged = 0, 0  # negatives since the last log, and how many equal the chosen answer

    def get_train_dataloader(self) -> DataLoader:
        """Of rows as they are: pairs are made of them later."""
        collate_pairs, self.data_collator = self.data_collator, list
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate_pairs

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        incoming = list(itertools.islice(epoch_iterator, num_batches))
        if incoming:
            self.models.update(self.accelerator.unwrap_model(self.model), self.state.global_step)
        batches = [self._batch(rows) for rows in incoming]
        return batches, self._get_num_items_in_batch(batches, device)

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """As many pairs as a batch has, out of the buffer that those of `rows` have just joined."""
        with self.compute_loss_context_manager():
            negatives = self.regeneration.negatives(rows, self.writer, self.random)
        for row, rejected in zip(rows, negatives, strict=True):
            self.buffer.push({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": rejected})
            self.made += 1
            self.unchanged += rejected == row["chosen"]
        collate: Any = self.data_collator
        return collate(self.buffer.sample(self.args.train_batch_size, self.random))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = super()._prepare_inputs(inputs)
        if self.nll_on_prompt:
            chosen = slice(len(batch["labels"]) // 2)
            batch["nll_labels"] = batch["input_ids"][chosen].masked_fill(batch["attention_mask"][chosen] == 0, -100)
        if self.models.reference is not None:
            with self.compute_loss_context_manager():
                batch["ref_logps"] = sequence_logps(self.models.reference, batch)
        return batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            counts = torch.tensor([self.unchanged, self.made, len(self.buffer)], device=self.args.device)
            totals: Any = self.accelerator.reduce(counts, "sum")
            unchanged, made, buffered = totals.tolist()
            logs.update(unchanged_share=unchanged / max(made, 1), buffer_size=buffered)
            self.made = self.unchanged = 0
        super().log(logs, start_time)

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            torch.save(self.models.state_dict(), folder / MODELS)
        own = {"buffer": self.buffer.state_dict(), "random": self.random.get_state()}
        torch.save(own, folder / BUFFER.format(rank=self.args.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_sapo_state(Path(checkpoint))

    def load_sapo_state(self, checkpoint: Path) -> None:
        files = [checkpoint / name for name in (MODELS, BUFFER.format(rank=self.args.process_index))]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"--resume: {checkpoint} has no {file.name}, need a checkpoint of SAPO with its EMA and buffer "
                    "(without --save-only-model)"
                )
        models, own = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
        self.models.load_state_dict(models)
        self.buffer.load_state_dict(own["buffer"])
        self.random.set_state(own["random"])


@torch.no_grad()
def sequence_logps(model: PreferenceModel, batch: dict[str, Tensor]) -> Tensor:
    """(R,) sums over each row's labels, float64: one matrix product."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return model.token_logps(**inputs).double().sum(dim=-1)
