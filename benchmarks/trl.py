"""A training step of TRL's trainers with `patch_trl` and without, on a CPU: the table in docs/trl.md.

    python -m benchmarks.trl    # measures, adds rows to bench_results/DATE-trl-cpu.jsonl, draws the table

A random Llama of V = 49152, D = 256 and 2 layers, fp32, rows of 128 tokens, half of them the answer's. Each run has a
process of its own; the two sides take turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.machine import about, device_slug, package_version, require
from benchmarks.measure import extra_memory, wait
from benchmarks.run import append, rows_of
from benchmarks.tables import markdown, sources

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "trl.md"
BEGIN, END = "<!-- figures: drawn by `python -m benchmarks.trl` -->", "<!-- /figures -->"
V, D, PAIRS, LENGTH, STEPS = 49152, 256, 4, 128, 3
TRAINERS = ("DPO", "ORPO", "SimPO")
SIDES = ("TRL", "patch_trl")
OPTIONS = {"DPO": {}, "ORPO": {}, "SimPO": {"loss_type": "simpo", "cpo_alpha": 0.0}}


def make(name: str, folder: str) -> Any:
    """A trainer on random words, a token each."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    words = {f"w{i}": i for i in range(V)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1")
    draw = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, V, (count,), generator=draw).tolist())

    half = LENGTH // 2
    row = {"prompt": half, "chosen": half - 1, "rejected": half - 1}  # and the token that ends an answer
    rows = [{key: ("" if key == "prompt" else " ") + text(count) for key, count in row.items()} for _ in range(PAIRS)]
    trainer, config = {"DPO": (trl.DPOTrainer, trl.DPOConfig), "ORPO": (ORPOTrainer, ORPOConfig)}.get(
        name, (CPOTrainer, CPOConfig)
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    arguments = config(
        output_dir=folder, per_device_train_batch_size=PAIRS, max_length=LENGTH, max_steps=STEPS, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", logging_steps=1,
        **OPTIONS[name],
    )  # fmt: skip
    model.save_pretrained(f"{folder}/model")  # DPO loads its reference from there
    return trainer(f"{folder}/model", args=arguments, train_dataset=Dataset.from_list(rows), processing_class=fast)


def timed(trainer: Any, device: str, warm: int = 1) -> dict[str, Any]:
    """Trains. Of the steps after the first `warm` ones the median seconds, forward to optimizer, and tokens a second.

    tokens_per_second: None where the trainer counts no tokens. extra_bytes: the peak over what was there before it.
    """
    from transformers import TrainerCallback

    seconds, began = [], 0.0

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            wait(device)
            began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            seconds.append(time.perf_counter() - began)

    trainer.add_callback(Clock())
    extra = extra_memory(trainer.train, device)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    total = [0.0, *(row["num_tokens"] for row in logs if "num_tokens" in row)]
    rates = [(b - a) / s for a, b, s in zip(total, total[1:], seconds, strict=False)]
    return {
        "seconds": median(seconds[warm:]), "tokens_per_second": median(rates[warm:]) if rates else None,
        "extra_bytes": extra, "losses": [row["loss"] for row in logs],
    }  # fmt: skip


def one(name: str, side: str) -> dict[str, Any]:
    if side == "patch_trl":
        from asft_kernels.training import patch_trl

        patch_trl()
    with tempfile.TemporaryDirectory() as folder:
        return timed(make(name, folder), "cpu")


def table(rows: list[dict[str, Any]], file: Path) -> str:
    """Medians over the rounds of the last run in a file."""
    last = [row for row in rows if row["about"]["started"] == rows[-1]["about"]["started"]]
    lines = []
    for name in dict.fromkeys(row["case"] for row in last):
        cells = [name]
        for field, scale, digits in (("seconds", 1, 2), ("extra_bytes", 2**20, 0)):
            for side in SIDES:
                found = [row[field] for row in last if (row["case"], row["contestant"]) == (name, side)]
                cells.append(f"{median(found) / scale:.{digits}f}")
        lines.append(cells)
    header = ["", "TRL, s a step", "patched", "TRL, extra MiB", "patched"]
    of = sources([{**row, "file": file.name} for row in last], "../bench_results/")
    return "\n".join([*markdown(header, lines, words=1), "", of])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="of both sides; default 2")
    parser.add_argument("--one", nargs=2, metavar=("TRAINER", "SIDE"), help="one run, its row printed")
    args = parser.parse_args()
    require("trl", "datasets")
    if args.one:
        warnings.simplefilter("ignore")
        print(json.dumps(one(*args.one)))
        return
    facts = about("cpu", "benchmarks.trl", sys.argv[1:])
    file = ROOT / "bench_results" / f"{facts['date']}-trl-{device_slug('cpu')}.jsonl"
    shape = {"V": V, "D": D, "pairs": PAIRS, "length": LENGTH, "layers": 2, "dtype": "float32", "device": "cpu"}
    for name in TRAINERS:
        for _ in range(args.rounds):
            for side in SIDES:
                command = [sys.executable, "-m", "benchmarks.trl", "--one", name, side]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                row = {"kind": "trl", "case": name, "contestant": side, **shape, **found, "rounds": args.rounds}
                row |= {"apart": True, "package": "trl", "version": package_version("trl"), "about": facts}
                append(file, [row])
                print(name, side, f"{found['seconds']:.2f} s", flush=True)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows_of(file), file)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
