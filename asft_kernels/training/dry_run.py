"""What a run would do: tokens, share that carries loss, time and memory by one measured batch, the first pair."""

import math
import re
import resource
import time
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from asft_kernels.core.heads import resolve_head
from asft_kernels.core.options import Options
from asft_kernels.cost import of_head
from asft_kernels.data.images import images_in
from asft_kernels.memory import in_units
from asft_kernels.models.seam import causal_lm, output_head
from asft_kernels.training.collator import longest_first, token_counts
from asft_kernels.training.tensor_parallel import data_ranks, sharded_at_load
from asft_kernels.training.trainer import PreferenceTrainer

MARKS = ("⟦", "⟧")  # around what carries loss
ADAM_BYTES = 8  # two fp32 moments a trainable parameter


def describe(trainer: PreferenceTrainer) -> str:
    """Returns the report of a dry run: nothing is saved, no weight moves.

    Time and memory come of one forward and backward on the longest training pairs.
    """
    rows = trainer.train_dataset
    tokens = of_loss = 0
    if not trainer.method.makes_pairs:
        prompt, *answers = token_counts(rows)
        most = trainer.args.max_length or np.inf  # the collator cuts there; which end, changes no count
        tokens = int(sum(np.minimum(prompt + answer, most).sum() for answer in answers))
        of_loss = int(sum(np.minimum(answer, most).sum() for answer in answers))
    args = trainer.args
    batches = len(trainer.get_train_dataloader())  # of this process
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    pairs_a_step = args.train_batch_size * args.gradient_accumulation_steps * data_ranks(trainer)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(an_epoch * args.num_train_epochs)
    text = [
        f"tokens: {tokens:,} in {len(rows)} pairs, {of_loss / max(tokens, 1):.0%} carry loss",
        *_images(rows),
        f"steps: {steps} of {pairs_a_step} pairs",
    ]
    if not trainer.method.makes_pairs:
        text += [_measured(trainer, tokens / len(rows), steps), _first_pair(trainer)]
    return "\n".join(text)


def _images(rows: Any) -> list[str]:
    if "images" not in rows.column_names:
        return []
    images, having = images_in(rows)
    return [f"images: {images} in {having} of {len(rows)} pairs, read batch by batch"]


def _measured(trainer: PreferenceTrainer, tokens_a_pair: float, steps: int) -> str:
    args, device = trainer.args, trainer.args.device
    order = longest_first(trainer.train_dataset)[: args.train_batch_size]
    batch = trainer.collator([trainer.train_dataset[i] for i in order.tolist()])
    model = trainer.model.to(device)
    model.train()
    seconds = math.inf
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        trainer.training_step(model, batch, num_items_in_batch=torch.tensor(len(order), device=device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    trainer.windows["train"].take(lambda sums: sums)
    here = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters() if p.requires_grad)
    own = sum(p.numel() for p in here)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident()
    rate = int(batch["attention_mask"].sum()) / seconds
    of_step = args.train_batch_size * args.gradient_accumulation_steps * tokens_a_pair
    total = steps * of_step / rate
    return (
        f"time: {rate:,.0f} tokens a second on the longest pairs, about {_duration(total)} for {steps} steps\n"
        f"memory: {(peak + ADAM_BYTES * own) / 2**30:.1f} GiB ({peak / 2**30:.1f} measured with the longest pairs, "
        f"{ADAM_BYTES * own / 2**30:.1f} for AdamW of {own:,} trainable parameters)" + _of_head(trainer, batch)
    )


def _of_head(trainer: PreferenceTrainer, batch: dict[str, torch.Tensor]) -> str:
    """What of that the head takes; nothing under autocast or where it is streamed or sharded: estimate knows none."""
    args, model = trainer.args, causal_lm(trainer.model)
    if sharded_at_load(trainer):
        return ""
    head = resolve_head(output_head(model))
    if args.bf16 or args.fp16 or head.rows.is_streamed:
        return ""
    options = Options(backend=args.backend, cache_bytes=args.cache_bytes, chunk_size=args.chunk_size)
    mask = batch["completion_mask"]
    said = of_head(
        head, int(mask[:, 1:].sum()), mask.numel(), model.dtype, args.device, options,
        hidden_grad=True,
    )  # fmt: skip
    return f"\nhead and loss: {in_units(said.peak)} of it, {said.advice}"


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} hours" if hours >= 1 else f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
    )


def _first_pair(trainer: PreferenceTrainer) -> str:
    """As the model sees it, special tokens and all."""
    batch = trainer.collator([trainer.train_dataset[0]])
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    shown = []
    for name, ids, attention, mask in zip(
        ("chosen", "rejected"), batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        ids, mask = ids[attention.bool()], mask[attention.bool()].bool()
        prompt, answer = (_shortened(tokenizer.decode(part), trainer) for part in (ids[~mask], ids[mask]))
        shown.append(f"first pair, {name} ({MARKS[0]}carries loss{MARKS[1]}):\n{prompt}{MARKS[0]}{answer}{MARKS[1]}")
    return "\n".join(shown)


def _shortened(text: str, trainer: PreferenceTrainer) -> str:
    """Of the token that stands for an image's parts, one and how many they are."""
    token = getattr(trainer.processing_class, "image_token", None)
    if not token:
        return text
    return re.sub(f"(?:{re.escape(token)}){{2,}}", lambda run: f"{token} x{len(run[0]) // len(token)}", text)
