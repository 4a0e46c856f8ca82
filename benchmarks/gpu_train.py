"""A training step end to end: a random Llama of 1.2 B parameters in bf16, AdamW, SimPO on random pairs.

    python -m benchmarks.gpu_train OUT.jsonl [--steps 12] [--pairs 4] [--length 2048] [--valid 0.5]
    python -m benchmarks.gpu_train OUT.jsonl --tiny    # a dry run on any machine; nothing is measured

The same weights, batches and loss for each: log-probabilities by this package (nothing reads the device) and by plain
torch, and Liger-Kernel's fused SimPO where it is installed. A row of JSON each: seconds of a step, peak memory, and the
first losses, which should agree.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from asft_kernels import fused_linear_logps
from asft_kernels.backends import triton_runs_on_cpu
from benchmarks.calls import LogpsOf, plain_torch
from benchmarks.contestants import MODULES
from benchmarks.losses import IGNORE, simpo
from benchmarks.machine import GIB, about, package_version, require
from benchmarks.measure import release, wait

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
WARM = 2  # steps that compile and fill the allocator's caches; they are not counted
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (2B, T, D), weight (V, D), labels (2B, T) -> ()


def per_token(logps_of: LogpsOf, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return simpo(logps_of(hidden, weight, labels), labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel import chunked_loss

    # A CPU's dry run does not wait for a compiler.
    module = chunked_loss.LigerFusedLinearSimPOLoss(compute_nll_loss=False, compiled=DEVICE == "cuda")
    return module(weight, hidden, labels)[0]


def losses(valid: int) -> dict[str, LossOf]:
    """By name. valid: tokens that carry loss, which spares ours a read of the device."""
    backend = "triton" if DEVICE == "cuda" or triton_runs_on_cpu() else "torch"
    ours: Any = partial(fused_linear_logps, shift=False, backend=backend, num_valid=valid)
    found: dict[str, LossOf] = {
        f"asft_kernels {backend}": partial(per_token, ours),
        "plain torch": partial(per_token, plain_torch),
    }
    if package_version("liger-kernel") == "not installed":
        print(f"Liger-Kernel SimPO: left out, {MODULES['liger-kernel']} is not installed", flush=True)
    else:
        found["Liger-Kernel SimPO"] = liger
    return found


def train(loss_of: LossOf, config: Any, batches: Tensor, prompt: int) -> dict[str, Any]:
    """Seconds, memory and losses of a step on each of the batches, from the same weights every time.

    batches: (steps, 2B, T + 1) tokens. prompt: positions at the beginning of a row without loss.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=DEVICE == "cuda")
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, seen = [], []
    for tokens in batches:
        tokens = tokens.to(DEVICE)
        labels = tokens[:, 1:].clone()
        labels[:, :prompt] = IGNORE
        wait(DEVICE)
        began = time.perf_counter()
        hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state
        loss = loss_of(hidden, model.lm_head.weight, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait(DEVICE)
        seconds.append(time.perf_counter() - began)
        seen.append(loss.item())
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else None
    return {"seconds": median(seconds[WARM:]), "peak_gib": peak, "losses": seen, "all_seconds": seconds}


def steps(text: str) -> int:
    """Of argparse: a number of steps."""
    if not (text.isdecimal() and int(text) > WARM):
        raise argparse.ArgumentTypeError(f"got {text}, need a whole number above {WARM}, which warm up")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file that the rows are added to")
    parser.add_argument("--steps", type=steps, default=12, help="of each (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=4, help="in a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens (default: %(default)s)")
    parser.add_argument("--valid", type=float, default=0.5, help="share of them with loss (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="3 steps of one layer and one pair: no measurement")
    args = parser.parse_args()
    require("transformers")
    from transformers import LlamaConfig

    if args.tiny:
        args.steps, args.pairs, args.length = WARM + 1, 1, 16
    sizes: dict[str, Any] = TINY if args.tiny else SIZES
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True, use_cache=False)
    rows, prompt = 2 * args.pairs, round((1 - args.valid) * args.length)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(sizes["vocab_size"], (args.steps, rows, args.length + 1), generator=generator)
    facts, failed = about(DEVICE, "benchmarks.gpu_train", sys.argv[1:]), []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, loss_of in losses(rows * (args.length - prompt)).items():
        try:
            measured = train(loss_of, config, batches, prompt)
        except Exception as error:  # whatever a peer, a compiler or a driver may raise
            measured = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            failed += [name] * name.startswith("asft_kernels")
        release(DEVICE)
        row = {"kind": "train", "name": name, "rows": rows, "length": args.length, "prompt": prompt, **measured}
        print(json.dumps(row), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row | {"about": facts}) + "\n")
    if failed:
        sys.exit(f"{', '.join(failed)} failed, see above")


if __name__ == "__main__":
    main()
