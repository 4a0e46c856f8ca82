"""One run of DNPO: data, model, head check, evaluation, steps and checkpoints, evaluation, the model without noise."""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from asft_kernels.data import PairCollator, load_pairs, split_every_nth
from asft_kernels.errors import InputError
from asft_kernels.methods.dnpo import checkpoint
from asft_kernels.methods.dnpo.trainer import DNPOTrainer
from asft_kernels.models.loading import check_positions, load_causal_lm, load_tokenizer
from asft_kernels.objectives import DNPO
from asft_kernels.train import run_folder
from asft_kernels.train.metrics import MetricsFile
from asft_kernels.train.trainer import StopWhenAsked, pad_token

SHOWN_IN_BAR = ("loss", "reward_margin", "noise_power", "accuracy")
COMPARED = ("clean_loss", "reward_margin", "reward_accuracy", "accuracy", "chosen_avg_logp", "rejected_avg_logp")


def run(options: argparse.Namespace, say: Callable[[str], None] = print) -> bool:
    """Whether it went to the end: False after Ctrl-C. InputError on bad input."""
    folder, settings = options.output_dir, vars(options)
    metrics = MetricsFile(folder / "metrics.jsonl")
    file = checkpoint.find(folder, settings, resume=options.resume)
    objective = DNPO(lam=options.lam, alpha=options.alpha)
    tokenizer, config = load_tokenizer(options.model)
    check_positions(config, options.max_length)
    train, report = load_pairs(
        options.data, tokenizer, max_length=options.max_length, max_prompt_length=options.max_prompt_length
    )
    say(str(report))
    evaluation = None
    if options.eval_every_nth:
        train, evaluation = split_every_nth(train, options.eval_every_nth)
    total = options.max_steps or -(-len(train) // options.batch_size)
    saved = None if file is None else checkpoint.load(file, pairs=len(train), last_step=total)
    first = 0 if saved is None else saved["step"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = DNPOTrainer(
        load_causal_lm(options.model, "float32").to(device),
        objective,
        learning_rate=options.learning_rate,
        noise_learning_rate=options.noise_learning_rate,
        seed=options.seed,
    )
    collate = PairCollator(pad_token(tokenizer))
    order = _order(len(train), options.batch_size, options.seed, first)
    batches = (_moved(collate([train[i] for i in numbers]), device) for numbers in order)
    loading: Any = {"batch_size": options.batch_size, "collate_fn": collate}
    held_out: Any = DataLoader(evaluation, **loading) if evaluation is not None else None  # type: ignore[arg-type]
    worst = trainer.policy.check_head(_moved(collate([train[0], train[len(train) - 1]]), device))
    say(f"output head checked: fused and own log-probabilities differ by at most {worst:.1e}")

    def evaluate(step: int) -> dict[str, float]:
        figures = trainer.evaluate(_moved(batch, device) for batch in tqdm(held_out, "evaluation", leave=False))
        metrics.write({"kind": "eval", "step": step, **figures})
        return figures

    folder.mkdir(parents=True, exist_ok=True)
    stop, step = StopWhenAsked(say), first
    if saved is None:
        metrics.start(None)
        checkpoint.write_settings(folder, _own_command(), settings)
        before = evaluate(0) if held_out else {}
        torch.manual_seed(options.seed)  # of dropout
    else:
        metrics.start(first, complete=first == total)
        before = next((row for row in metrics.rows() if row["kind"] == "eval"), {})
        checkpoint.restore(saved, trainer)
        del saved
    with stop.listening(), tqdm(total=total, initial=first, desc="steps") as bar:
        for step, batch in zip(range(first + 1, total + 1), batches, strict=False):
            start = time.perf_counter()
            figures = trainer.step(batch)
            seconds = time.perf_counter() - start
            tokens = int(batch["attention_mask"].sum())
            metrics.write({"kind": "train", "step": step, **figures, "tokens_per_second": tokens / seconds})
            bar.set_postfix({name: f"{figures[name]:.3g}" for name in SHOWN_IN_BAR})
            bar.update()
            if not math.isfinite(figures["loss"]):
                raise InputError(f"--learning-rate: the loss is {figures['loss']} after step {step}; lower it")
            if step % options.save_steps == 0 or step == total or stop.asked:
                checkpoint.save(folder, trainer, step, len(train))
            if stop.asked:
                break
    trainer.policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if step < total:
        say(f"stopped by Ctrl-C after step {step}; go on with: {_own_command()} --resume")
        return False
    if held_out:
        say(_table(before, evaluate(step)))
    say(f"done after step {step}; the model, without the noise, and metrics.jsonl: {folder}")
    return True


def _order(pairs: int, batch_size: int, seed: int, first: int) -> Iterator[list[int]]:
    """Numbers of the pairs in each batch, pass after pass in another order, from that of step first + 1 on."""
    generator = torch.Generator().manual_seed(seed)
    batches = -(-pairs // batch_size)
    for passed in itertools.count():
        order = torch.randperm(pairs, generator=generator).split(batch_size)
        yield from (numbers.tolist() for numbers in order[max(first - passed * batches, 0) :])


def _own_command() -> str:
    return run_folder.command().replace("asft-train", "python -m asft_kernels.methods.dnpo", 1)


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    title = f"{before['pairs']:.0f} evaluation pairs, reference without noise"
    lines = [f"{title:<52}{'before':>9}{'after':>9}"]
    return "\n".join([*lines, *(f"{name:<52}{before[name]:>9.3f}{after[name]:>9.3f}" for name in COMPARED)])
