"""One batch through the plain log-softmax path and the fused path: values, seconds, extra memory.

Three ways to the same loss and the same gradients (to hidden states and head), lam = beta = 1:

    plain, all positions   logits of every position, as a forward returns them, and log_softmax
    plain, answers only    asft_kernels.reference: logits of the positions that carry loss
    fused                  fused_asft_loss

Seconds: medians of rounds that take the three in turn, after one round unmeasured. Memory: the
peak above what was resident before the call, each way in a fresh process of its own, after a first
tiny call; it includes the two gradients, which every way must return.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asft_kernels import reference
from asft_kernels.functional import fused_asft_loss

ROUNDS = 3
MIB = 2**20


def plain_all_positions(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-2 avg_w - log(1 - exp(avg_l)), which is ASFT at lam = beta = 1; logits of all positions."""
    targets, valid = labels[:, 1:].clamp(min=0), labels[:, 1:] >= 0
    logps = F.linear(hidden, weight)[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    average = (logps * valid).sum(1) / valid.sum(1)
    chosen, rejected = average.chunk(2)
    return (-2 * chosen - torch.log(-torch.expm1(rejected))).mean()


WAYS: dict[str, Callable[..., Any]] = {
    "plain, all positions": plain_all_positions,
    "plain, answers only": reference.fused_asft_loss,
    "fused": fused_asft_loss,
}


def loss_and_gradients(name: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """(loss, dH, dW), detached."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    loss = WAYS[name](hidden, weight, labels)
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def compare(model: Path, data: Path, *, pairs: int, max_length: int) -> str:
    """The table, as text, for the first `pairs` pairs of `data` and the model in folder `model`."""
    hidden, weight, labels = _batch(model, data, pairs, max_length)
    results = {name: loss_and_gradients(name, hidden, weight, labels) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name in WAYS:
            start = time.perf_counter()
            loss_and_gradients(name, hidden, weight, labels)
            seconds[name].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.pt"
        torch.save((hidden, weight, labels), path)
        memory = {name: _extra_memory(name, path) for name in WAYS}

    exact = loss_and_gradients("plain, answers only", *(hidden.double(), weight.double()), labels)
    positions, answers = labels.numel(), int((labels[:, 1:] >= 0).sum())
    lines = [
        f"{pairs} pairs, {positions} positions of which {answers} carry loss, vocabulary "
        f"{len(weight)}, {str(weight.dtype).removeprefix('torch.')}, {weight.device}",
        "",
        f"{'':<22}{'loss':>11}{'error against float64':>31}{'seconds':>13}{'extra memory':>14}",
        f"{'':<33}{'loss':>11}{'dH':>10}{'dW':>10}",
    ]
    for name, values in results.items():
        errors = "".join(f"{e:>10.1e}" for e in _errors(values, exact))
        peak = memory[name]
        peak_text = "unknown" if peak is None else f"{peak / MIB:.0f} MiB"
        seconds_text = f"{median(seconds[name]):.2f}"
        lines.append(f"{name:<22}{values[0].item():>11.6f} {errors}{seconds_text:>13}{peak_text:>14}")
    plain, fused = results["plain, all positions"], results["fused"]
    apart = _errors(fused, plain)
    gradients = (plain[1].nbytes + plain[2].nbytes) / MIB
    lines += [
        "",
        f"fused and plain differ by {apart[0]:.1e} in the loss, {apart[1]:.1e} in dH, {apart[2]:.1e} in dW:",
        "the rounding of whichever lies further from float64",
        "dH, dW: gradients to hidden states and head, relative (Frobenius norm); loss: absolute",
        f"extra memory: peak of forward and backward, {gradients:.0f} MiB of it the gradients; 'answers only' goes row",
        "by row, and autograd holds the head's gradient of a row beside the sum of those before",
    ]
    return "\n".join(lines)


def _errors(values: tuple[Tensor, ...], base: tuple[Tensor, ...]) -> list[float]:
    """Absolute of the loss, relative of the gradients."""
    loss, *gradients = (value.double() - b.double() for value, b in zip(values, base, strict=True))
    sizes = (b.double().norm() for b in base[1:])
    return [
        abs(loss.item()),
        *((g.norm() / n).item() for g, n in zip(gradients, sizes, strict=True)),
    ]


def _batch(model: Path, data: Path, pairs: int, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (2B, T, D), weight (V, D), labels (2B, T)) of real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from asft_kernels.data import load_pairs, with_labels
    from asft_kernels.models import PreferenceModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset, _ = load_pairs(data, tokenizer, max_length=max_length)
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    batch = with_labels(collator([dataset[index] for index in range(pairs)]))
    wrapped = PreferenceModel(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)).eval()
    with torch.no_grad():
        hidden = wrapped.hidden_states(batch["input_ids"], batch["attention_mask"])
    return hidden, wrapped.lm_head.weight.detach(), batch["labels"]


def _extra_memory(name: str, path: Path) -> int | None:
    """Bytes, measured in a fresh process; None where the platform does not tell."""
    command = [sys.executable, "-m", "asft_kernels.demo.compare", name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def _measure(name: str, path: str) -> int | None:
    hidden, weight, labels = torch.load(path, weights_only=True)
    few = torch.arange(4).repeat(2, 1)  # the tiny call: libraries loaded, operators registered
    loss_and_gradients(name, hidden[:2, :4].clone(), weight[:8].clone(), few)
    before = _memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        return None
    loss_and_gradients(name, hidden, weight, labels)
    peak = _memory("VmHWM")
    return peak - before if peak is not None and before is not None else None


def _memory(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


if __name__ == "__main__":
    print(_measure(*sys.argv[1:3]))
