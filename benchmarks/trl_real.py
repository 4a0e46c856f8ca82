"""Speed and memory of a training step on a real model and real pairs, beside TRL's DPOTrainer and beside full logits.

    python -m benchmarks.trl_real --model FOLDER --data pairs.jsonl.gz --out FILE [--bf16]

The same pairs in the same order for each, in turns in this process after a training that is not measured, as shapes
that are new to a process cost its first steps most; float32 weights. A row of JSON each time; one that fails says so
and the next begins. `python -m benchmarks.seeds_report` draws the table where the file is called
speed.jsonl and lies beside the rows of `benchmarks.methods`.
"""

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.machine import about, package_version, require
from benchmarks.measure import release
from benchmarks.method_files import as_chat, read_lines
from benchmarks.run import append
from benchmarks.trl import timed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_LENGTH = 512
IGNORE = -100


def add_full_logits(model: Any, outputs: tuple[str, ...] = ("log_probs",), **_: Any) -> None:
    """What TRL's `add_fused_lm_head` does to a model, from the logits of all positions, in float32 as plain torch."""
    own = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **keywords: Any) -> Any:
        if not fused_lm_head or labels is None:
            return own(*args, labels=labels, **keywords)
        from trl.trainer.utils import entropy_from_logits

        logits, labels = own(*args, **keywords).logits[:, :-1].float(), labels[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        found: dict[str, Tensor | None] = dict.fromkeys(("entropy", "mean_logits", "is_top1"))
        with torch.no_grad():  # TRL's metrics
            if "entropy" in outputs:
                found["entropy"] = entropy_from_logits(logits)
            if "mean_logits" in outputs:
                found["mean_logits"] = logits.mean(-1)
            if "is_top1" in outputs:
                found["is_top1"] = logits.argmax(-1) == labels
        return SimpleNamespace(log_probs=-losses.view(labels.shape), **found)

    model.forward = forward


@contextmanager
def full_logits() -> Iterator[None]:
    """DPOTrainers made meanwhile compute log-probabilities from all logits."""
    from trl.trainer import dpo_trainer

    theirs = dpo_trainer.add_fused_lm_head
    dpo_trainer.add_fused_lm_head = add_full_logits
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = theirs


def patched() -> AbstractContextManager[Any]:
    from asft_kernels.training import patch_trl

    return patch_trl()


# Our objective, or none for TRL's DPOTrainer; what surrounds its making; what it is.
CONTESTANTS: dict[str, tuple[str | None, Callable[[], AbstractContextManager[Any]], str]] = {
    "asft_kernels ASFT": ("asft", nullcontext, "PreferenceTrainer, objective asft: no reference model"),
    "asft_kernels DPO": ("dpo", nullcontext, "PreferenceTrainer, objective dpo"),
    "TRL DPO, patch_trl": (None, patched, "DPOTrainer under patch_trl"),
    "TRL DPO": (
        None,
        nullcontext,
        "DPOTrainer as it comes: fused head of trl/kernels/chunked_logprob.py",
    ),
    "TRL DPO, full logits": (None, full_logits, "DPOTrainer, log-probabilities from model(...).logits, plain torch"),
}


def usable(data: Path, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first pairs that `load_pairs` takes, as chat messages."""
    from asft_kernels.data import load_pairs

    lines = [as_chat(line) for line in read_lines(data)]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(lines)
        file.flush()
        dataset, _ = load_pairs(file.name, tokenizer, max_length=MAX_LENGTH)
        return [json.loads(lines[number - 1]) for number in dataset["line"][:count]]


def make(name: str, rows: Any, tokenizer: Any, args: argparse.Namespace, folder: str) -> Any:
    from trl import DPOConfig, DPOTrainer

    from asft_kernels.training import PreferenceConfig, PreferenceTrainer

    objective, surround, _ = CONTESTANTS[name]
    given: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": args.pairs, "max_length": MAX_LENGTH, "report_to": [],
        "max_steps": args.steps, "bf16": args.bf16, "gradient_checkpointing": False, "learning_rate": 2e-5,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": DEVICE == "cpu", "seed": 0,
    }  # fmt: skip
    data = {"train_dataset": rows, "processing_class": tokenizer}
    with surround():
        if objective is None:
            return DPOTrainer(str(args.model), args=DPOConfig(**given), **data)
        return PreferenceTrainer(str(args.model), args=PreferenceConfig(objective=objective, **given), **data)


def measure(name: str, rows: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What `timed` says, and peak_bytes: of a GPU's allocator, models and optimizer included; None on a CPU."""
    held = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0  # by what an earlier one has left
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(name, rows, tokenizer, args, folder)
        found = timed(trainer, DEVICE, args.steps // 4)
    peak = torch.cuda.max_memory_allocated() - held if DEVICE == "cuda" else None
    head = trainer.model.get_output_embeddings().weight
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    return {**found, "peak_bytes": peak, "V": head.shape[0], "D": head.shape[1], "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="preference pairs: JSON lines, plain or gzipped")
    parser.add_argument("--out", type=Path, required=True, help="file that the rows are added to")
    parser.add_argument("--steps", type=int, default=40, help="of each; the first quarter warms up; default 40")
    parser.add_argument("--rounds", type=int, default=2, help="turns, every other one backward; default 2")
    parser.add_argument("--pairs", type=int, default=16, help="of a step; default 16")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], help="default: all")
    args = parser.parse_args()
    require("trl", "datasets")
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = Dataset.from_list(usable(args.data, tokenizer, args.steps * args.pairs))
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    facts, failed = about(DEVICE, "benchmarks.trl_real", words), []
    common = {
        "kind": "trl_real", "case": args.model.name, "pairs": args.pairs, "steps": args.steps, "length": MAX_LENGTH,
        "dtype": "bfloat16 autocast" if args.bf16 else "float32", "device": DEVICE, "package": "trl",
        "version": package_version("trl"), "about": facts,
    }  # fmt: skip
    turns = [name for turn in range(args.rounds) for name in args.contestants[:: -1 if turn % 2 else 1]]
    for unmeasured, name in ((True, args.contestants[-1]), *((False, name) for name in turns)):
        try:
            measured = measure(name, rows, tokenizer, args)
            if unmeasured:
                continue
            rate = measured["tokens_per_second"]
            print(name, "–" if rate is None else f"{rate:.0f}", "tokens/s", flush=True)
        except Exception as error:  # whatever a peer, a compiler or a driver may raise
            if unmeasured:
                continue  # its turn says so
            measured = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            failed.append(f"{name}: {measured['failed']}")
            print(failed[-1], flush=True)
        finally:
            gc.collect()
            release(DEVICE)
        append(args.out, [{"contestant": name, "note": CONTESTANTS[name][2], **measured, **common}])
    if failed:
        sys.exit(f"{len(failed)} failed, see above")


if __name__ == "__main__":
    main()
