"""One run of DNPO: data, model, head check, evaluation, steps, evaluation, the model without its noise."""

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
from asft_kernels.dnpo.trainer import DNPOTrainer
from asft_kernels.integrations.hf_model import verify_head
from asft_kernels.integrations.loading import check_positions, load_causal_lm, load_tokenizer
from asft_kernels.objectives import DNPO
from asft_kernels.train.arguments import ArgumentProblem
from asft_kernels.train.metrics import MetricsFile
from asft_kernels.train.trainer import StopWhenAsked, pad_token

SHOWN_IN_BAR = ("loss", "reward_margin", "noise_power", "accuracy")
COMPARED = ("clean_loss", "reward_margin", "reward_accuracy", "accuracy", "chosen_avg_logp", "rejected_avg_logp")


def run(options: argparse.Namespace, say: Callable[[str], None] = print) -> bool:
    """Whether it went to the end: False after Ctrl-C. ArgumentProblem, DataError, ModelProblem on bad input."""
    folder = options.output_dir
    metrics = MetricsFile(folder / "metrics.jsonl")
    if metrics.rows():
        raise ArgumentProblem(f"--output-dir: {folder} holds a run already; name another folder")
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = DNPOTrainer(
        load_causal_lm(options.model, "float32").to(device),
        objective,
        learning_rate=options.learning_rate,
        noise_learning_rate=options.noise_learning_rate,
        seed=options.seed,
    )
    loading: Any = {"batch_size": options.batch_size, "collate_fn": PairCollator(pad_token(tokenizer))}
    generator = torch.Generator().manual_seed(options.seed)
    batches: Any = DataLoader(train, shuffle=True, generator=generator, **loading)  # type: ignore[arg-type]
    held_out: Any = DataLoader(evaluation, **loading) if evaluation is not None else None  # type: ignore[arg-type]
    worst = verify_head(trainer.policy, _moved(next(iter(batches)), device))
    say(f"output head checked: fused and own log-probabilities differ by at most {worst:.1e}")

    def evaluate(step: int) -> dict[str, float]:
        figures = trainer.evaluate(_moved(batch, device) for batch in tqdm(held_out, "evaluation", leave=False))
        metrics.write({"kind": "eval", "step": step, **figures})
        return figures

    folder.mkdir(parents=True, exist_ok=True)
    total = options.max_steps or len(batches)
    stop, step = StopWhenAsked(say), 0
    before = evaluate(0) if held_out else {}
    with stop.listening(), tqdm(total=total, desc="steps") as bar:
        for step, batch in zip(range(1, total + 1), _forever(batches), strict=False):
            start = time.perf_counter()
            figures = trainer.step(_moved(batch, device))
            seconds = time.perf_counter() - start
            tokens = int(batch["attention_mask"].sum())
            metrics.write({"kind": "train", "step": step, **figures, "tokens_per_second": tokens / seconds})
            bar.set_postfix({name: f"{figures[name]:.3g}" for name in SHOWN_IN_BAR})
            bar.update()
            if not math.isfinite(figures["loss"]):
                raise ArgumentProblem(f"--learning-rate: the loss is {figures['loss']} after step {step}; lower it")
            if stop.asked:
                break
    trainer.policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if held_out and not stop.asked:
        say(_table(before, evaluate(step)))
    end = "stopped by Ctrl-C" if stop.asked else "done"
    say(f"{end} after step {step}; the model, without the noise, and metrics.jsonl: {folder}")
    return not stop.asked


def _forever(batches: DataLoader) -> Iterator[Mapping[str, Tensor]]:
    return itertools.chain.from_iterable(itertools.repeat(batches))


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    title = f"{before['pairs']:.0f} evaluation pairs, reference without noise"
    lines = [f"{title:<52}{'before':>9}{'after':>9}"]
    return "\n".join([*lines, *(f"{name:<52}{before[name]:>9.3f}{after[name]:>9.3f}" for name in COMPARED)])
