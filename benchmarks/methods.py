"""Every objective on the same real preference pairs with the same budget: what moves, how fast, at which memory.

    python -m benchmarks.methods --model FOLDER --data pairs.jsonl.gz
    python -m benchmarks.methods --model FOLDER --data pairs.jsonl.gz --methods asft dpo --seeds 0 1 2 --every-nth 8 \\
        --epochs 1 --pairs 16 --bf16 --jobs 4 --rows FILE

One row a method and seed goes to bench_results/methods/rows.jsonl; what has one is left out, so a run that was cut off
goes on when started again. Each trains in a process of its own, by `asft train`. Before and after, `asft score` scores
the held-out pairs, so that all are compared by the same figures. The objectives of the abstract's claim (ASFT, DPO,
ORPO) are scored eight times on the way, for the picture. `python -m benchmarks.methods_report` draws it, and the table;
of several seeds `python -m benchmarks.seeds_report` does.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import about, require
from benchmarks.method_files import LIMITS, CommandFailed, asft, prepare, run, scores_of, split, stop_running
from benchmarks.run import append, rows_of

FOLDER = Path(__file__).parents[1] / "bench_results" / "methods"
ROWS = FOLDER / "rows.jsonl"
PICTURED_EVERY = 0.125  # of a run
BUDGET = ("--learning_rate", "2e-5", "--gradient_checkpointing", "false", "--report_to", "none")


@dataclass(frozen=True)
class Method:
    """objective: as `asft train` takes it; arguments: further ones, with {name} of the files in `prepare`.

    data: the file in `prepare` that takes the place of the training pairs.
    """

    name: str
    arguments: tuple[str, ...] = ()
    objective: str = ""  # default: the name
    pictured: bool = False
    needs: tuple[str, ...] = ()  # files of `prepare`
    data: str = ""


METHODS = (
    Method("asft", pictured=True),
    Method("dpo", pictured=True),
    Method("orpo", pictured=True),
    Method("sft"),
    Method("robust", ("--objective_args", "label_smoothing=0.1")),
    Method("ipo"),
    Method("hinge"),
    Method("hinge_norm"),
    Method("sigmoid_norm"),
    Method("simpo"),
    Method("cpo"),
    Method("kto"),
    Method("lmpo"),
    Method("poft", ("--ref_scores", "{own_scores}", "{sft_scores}"), needs=("own_scores", "sft_scores")),
    Method("rpo"),
    Method("mrpo", ("--ref_scores", "{own_scores}", "{sft_scores}"), needs=("own_scores", "sft_scores")),
    Method("bmc", ("--objective_args", "base=dpo")),
    Method("fpo", ("--sae", "{sae}"), needs=("sae",)),
    Method("dnpo"),
    Method("sapo-asft", ("--method", "sapo", "--token_generate_length", "32"), objective="asft"),
    Method("rad-dpo", objective="dpo", data="rad"),
    Method("rso-hinge_norm", objective="hinge_norm", data="rso"),
    Method("bridged-bmc", ("--objective_args", "base=dpo"), objective="bmc", data="bridged"),
)


def answers(path: Path) -> dict[str, tuple[float, float]]:
    """Mean log-probabilities of chosen and rejected answer by the pair's id, where both have tokens."""
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    return {
        row["id"]: (row["chosen_logps"] / row["chosen_length"], row["rejected_logps"] / row["rejected_length"])
        for row in rows
        if row["chosen_length"] and row["rejected_length"]
    }


def command_of(
    method: Method, args: argparse.Namespace, seed: int, train: Path, held_out: Path, out: Path
) -> list[str]:
    files = {name: str(prepare(name, args.model, train, args.work)) for name in method.needs}
    own = [argument.format(**files) for argument in method.arguments]
    data = prepare(method.data, args.model, train, args.work) if method.data else train
    given = ["--model", str(args.model), "--data", str(data), "--output_dir", str(out), "--seed", str(seed)]
    given += ["--save_only_model", "true", *BUDGET, *LIMITS]
    given += ["--bf16", str(args.bf16).lower(), "--use_cpu", str(not torch.cuda.is_available()).lower()]
    if args.epochs:
        given += ["--num_train_epochs", str(args.epochs), "--save_strategy", "epoch"]
    else:
        given += ["--max_steps", str(args.steps), "--save_strategy", "steps", "--save_steps", str(args.steps)]
    # Evaluation and the reference's scores take no larger batches: the peak is to be that of a step.
    given += [f"--per_device_{kind}_batch_size={args.pairs // args.accumulate}" for kind in ("train", "eval")]
    given += ["--gradient_accumulation_steps", str(args.accumulate)]
    given += ["--objective", method.objective or method.name]
    if method.pictured:
        given += ["--eval_data", str(held_out), "--eval_strategy", "steps", "--eval_steps", str(PICTURED_EVERY)]
    return asft("train", *given, *own)


def measure(method: Method, seed: int, args: argparse.Namespace, train: Path, held_out: Path) -> dict[str, Any]:
    name = f"{method.name}-{seed}"
    out = args.work / name
    shutil.rmtree(out, ignore_errors=True)
    seconds, peak = run(command_of(method, args, seed, train, held_out, out), args.work / f"{name}.log")
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = answers(scores_of(args.model, held_out, args.work / "scores-before"))
    after = answers(scores_of(out, held_out, args.work / f"scores-{name}"))
    rows = rows_of(out / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    shutil.rmtree(args.work / f"scores-{name}")
    if method.name == "sft" and seed == args.seeds[0]:
        shutil.rmtree(args.work / "sft-model", ignore_errors=True)
        out.rename(args.work / "sft-model")
    else:
        shutil.rmtree(out)
    return {
        "method": method.name,
        "seed": seed,
        "seconds": seconds,
        "peak_bytes": max((row["peak_bytes"] for row in steps if "peak_bytes" in row), default=peak),
        "steps": len(steps),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in steps[1:]),
        "loss": [row["loss"] for row in steps],
        "held_out": [
            [row["step"], row["avg_logps/chosen"], row["avg_logps/rejected"]] for row in rows if row["kind"] == "eval"
        ],
        "answers": [[*before[key], *after[key]] for key in before],
    }


def at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least 2")
    return int(text)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least 1")
    return int(text)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="preference pairs: JSON lines, plain or gzipped")
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a row a method and seed; default 0")
    budget, held_out = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=at_least_two, default=40, help="optimiser steps; default 40")
    budget.add_argument("--epochs", type=at_least_one, help="passes over all training lines; needs --every-nth")
    parser.add_argument("--pairs", type=at_least_two, default=4, help="pairs a step; default 4")
    parser.add_argument("--accumulate", type=at_least_one, default=1, help="micro-batches of a step; default 1")
    held_out.add_argument("--held-out", type=at_least_two, default=128, help="lines to evaluate on; default 128")
    held_out.add_argument("--every-nth", type=at_least_two, help="evaluate on every Nth line, train on the others")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast; the weights stay float32")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="trainings at once; default 1")
    parser.add_argument(
        "--work", type=Path, default=Path("methods-work"), help="folder for models; default: %(default)s"
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="file for the rows; default: %(default)s")
    args = parser.parse_args()
    require("transformers", "pyarrow", "datasets")
    unknown = set(args.methods) - {m.name for m in METHODS}
    if unknown:
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in METHODS)}")
    wait = [m.name for m in METHODS if m.name in args.methods and (m.needs or m.data)]
    if args.jobs > 1 and wait:
        parser.error(f"--jobs: got {args.jobs} with {', '.join(wait)}, which wait for files of others; need 1")
    if args.epochs and not args.every_nth:
        parser.error(f"--epochs: got {args.epochs} without --every-nth, which says what all training lines are")
    if args.pairs % args.accumulate:
        parser.error(f"--accumulate: got {args.accumulate}, need a divisor of --pairs, {args.pairs}")
    for path in (args.model, args.data):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    args.settings = {
        "model": args.model.name,
        "data": args.data.name,
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        **({"epochs": args.epochs} if args.epochs else {"steps": args.steps}),
        "pairs_per_step": args.pairs,
        **({"every_nth": args.every_nth} if args.every_nth else {"held_out": args.held_out}),
        **({"accumulate": args.accumulate} if args.accumulate > 1 else {}),
        **({"bf16": True} if args.bf16 else {}),
    }
    found = rows_of(args.rows)
    if any(row["settings"] != args.settings for row in found):
        parser.error(
            f"--rows: {args.rows} holds rows of {found[0]['settings']}, need {args.settings}; name another file"
        )
    # What was prepared for other settings must not be taken.
    unique = json.dumps([args.settings, str(args.model.resolve())]).encode()
    args.work = args.work / hashlib.sha256(unique).hexdigest()[:12]
    return args


def main() -> None:
    args = read_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    # A quarter more than are needed: some lines are no pairs, some prompts too long.
    train, held_out = split(args.data, args.work, args.steps * args.pairs * 5 // 4, args.held_out, args.every_nth)

    # Names for paths: the row is read on other machines.
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    facts = about("cuda" if torch.cuda.is_available() else "cpu", "benchmarks.methods", words)
    done = {(row["method"], row.get("seed", 0)) for row in rows_of(args.rows)}
    left = [(m, seed) for seed in args.seeds for m in METHODS if m.name in args.methods and (m.name, seed) not in done]
    if left:
        try:
            scores_of(args.model, held_out, args.work / "scores-before")
        except CommandFailed as error:
            sys.exit(f"{error.tail}\n{error}")
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(left), unit="method") as bar:
        names = {pool.submit(measure, m, seed, args, train, held_out): f"{m.name}, seed {seed}" for m, seed in left}
        try:
            for future in as_completed(names):
                try:
                    row = future.result()
                except RuntimeError as error:
                    if isinstance(error, CommandFailed) and not failed:
                        tqdm.write(error.tail)
                    failed.append(names[future])
                    tqdm.write(f"{names[future]}: {error}")
                else:
                    append(args.rows, [{**row, "jobs": args.jobs, "settings": args.settings, "about": facts}])
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_running()
            raise
    if failed:
        sys.exit(f"{len(failed)} methods failed: their rows are missing; start the command again for them")
    report = "methods_report" if args.rows == ROWS else "seeds_report"
    print(f"{args.rows}: complete; now: python -m benchmarks.{report} --rows {args.rows}")


if __name__ == "__main__":
    main()
