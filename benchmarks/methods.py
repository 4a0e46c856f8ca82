"""Every objective on the same real preference pairs with the same budget: what moves, how fast, at which memory.

    python -m benchmarks.methods --model FOLDER --data pairs.jsonl.gz

One row a method goes to bench_results/methods/rows.jsonl; methods that have one are left out, so a run that was cut
off goes on when started again. Each trains in a process of its own, by `asft train`. Before and after, `asft score`
scores the held-out pairs, so that all are compared by the same figures. The objectives of the abstract's claim (ASFT,
DPO, ORPO) are scored every few steps, for the picture. `python -m benchmarks.methods_report` draws it, and the table.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from asft_kernels.data import BadRow, parse_pair
from benchmarks.machine import about, require
from benchmarks.run import append, rows_of

FOLDER = Path(__file__).parents[1] / "bench_results" / "methods"
ROWS = FOLDER / "rows.jsonl"
PICTURED_EVERY = 5  # steps
BUDGET = ("--learning_rate", "2e-5", "--seed", "0", "--gradient_checkpointing", "false", "--report_to", "none")
LIMITS = ("--max_length", "512")


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
EDIT_TOKENS = 64  # of a bridged answer at most


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def asft(*words: str) -> list[str]:
    return python("asft_kernels.cli", *words)


def run(command: list[str], log: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of the command; the peak is at least that of this process.

    Its output goes to log; RuntimeError with its last line if it fails.
    """
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(
            f"exit status {process.returncode}: {last}; the whole output is in {log}: {shlex.join(command)}"
        )
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def split(data: Path, folder: Path, train: int, held_out: int) -> tuple[Path, Path]:
    """The first lines of data as training pairs, the next ones as evaluation pairs; dialogues as chat messages.

    So that the model's chat template is used. Lines that hold no pair stay as they are.
    """
    files = folder / "train.jsonl", folder / "eval.jsonl"
    with (gzip.open if data.suffix == ".gz" else open)(data, "rt") as source:
        for path, count in zip(files, (train, held_out), strict=True):
            path.write_text("".join(as_chat(line) for line in itertools.islice(source, count)))
    return files


def as_chat(line: str) -> str:
    try:
        pair = parse_pair(json.loads(line))
        answers = {side: pair.text(side).strip() for side in ("chosen", "rejected")}
    except BadRow:
        return line
    rows = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return json.dumps({"prompt": pair.messages, **rows}) + "\n"


def scores_of(model: Path, data: Path, folder: Path) -> Path:
    """The file of asft score, made if it is not there."""
    found = list(folder.glob("*.parquet"))
    if not found:
        run(
            asft("score", "--model", str(model), "--data", str(data), "--output", str(folder), *LIMITS),
            folder.with_name(folder.name + ".log"),
        )
        found = list(folder.glob("*.parquet"))
    return found[0]


def answers(path: Path) -> dict[str, tuple[float, float]]:
    """Mean log-probabilities of chosen and rejected answer by the pair's id, where both have tokens."""
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    return {
        row["id"]: (row["chosen_logps"] / row["chosen_length"], row["rejected_logps"] / row["rejected_length"])
        for row in rows
        if row["chosen_length"] and row["rejected_length"]
    }


def prepare(name: str, model: Path, train: Path, work: Path) -> Path:
    """A file that methods need, made if it is not there."""
    if name == "sae":
        path = work / "sae.safetensors"
        if not path.exists():
            given = ("--model", str(model), "--data", str(train), "--output", str(path), "--max-length", "512")
            run(asft("data", "sae", *given), work / "sae.log")
        return path
    if name in ("rad", "rso", "bridged"):
        return prepare_pairs(name, model, train, work)
    if name == "own_scores":
        return scores_of(model, train, work / "scores-own")
    second = work / "sft-model"  # a second reference: what the method sft left
    if not second.is_dir():
        raise RuntimeError(f"{second} is missing; take sft into --methods, with rows that do not hold it yet")
    return scores_of(second, train, work / "scores-sft")


def prepare_pairs(name: str, model: Path, train: Path, work: Path) -> Path:
    """Training pairs by one of the data commands, on what the model itself says of answers, or writes."""
    made, log, data = work / f"{name}.jsonl", work / f"{name}.log", "benchmarks.method_data"
    if made.exists():
        return made
    asft_data = ("data", name.replace("bridged", "bmc"))
    if name == "bridged":
        given = ("--model", str(model), "--max_new_tokens", str(EDIT_TOKENS))
        run(asft(*asft_data, str(train), str(made), *given), log)
        return made
    source = work / f"{name}-input.jsonl"
    if name == "rad":
        scores = scores_of(model, train, work / "scores-own")
        run(python(data, "scored", str(train), str(source), "--scores", str(scores)), log)
        run(asft(*asft_data, str(source), str(made)), log)
        return made
    answers_file = work / "candidates.jsonl"
    if not answers_file.exists():
        run(python(data, "candidates", str(train), str(answers_file), "--model", str(model)), log)
    scores = scores_of(model, answers_file, work / "scores-candidates")
    run(python(data, "rewarded", str(answers_file), str(source), "--scores", str(scores)), log)
    run(asft(*asft_data, str(source), str(made), "--accept", "2"), log)
    return made


def command_of(method: Method, args: argparse.Namespace, train: Path, held_out: Path, out: Path) -> list[str]:
    files = {name: str(prepare(name, args.model, train, args.work)) for name in method.needs}
    own = [argument.format(**files) for argument in method.arguments]
    data = prepare(method.data, args.model, train, args.work) if method.data else train
    given = ["--model", str(args.model), "--data", str(data), "--output_dir", str(out)]
    given += ["--max_steps", str(args.steps), *BUDGET, *LIMITS]
    # Evaluation and the reference's scores take no larger batches: the peak is to be that of a step.
    given += [f"--per_device_{kind}_batch_size={args.pairs}" for kind in ("train", "eval")]
    given += ["--objective", method.objective or method.name]
    given += ["--save_strategy", "steps", "--save_steps", str(args.steps), "--save_only_model", "true"]
    if method.pictured:
        given += ["--eval_data", str(held_out), "--eval_strategy", "steps", "--eval_steps", str(PICTURED_EVERY)]
    return asft("train", *given, *own)


def measure(method: Method, args: argparse.Namespace, train: Path, held_out: Path) -> dict[str, Any]:
    out = args.work / method.name
    shutil.rmtree(out, ignore_errors=True)
    seconds, peak = run(command_of(method, args, train, held_out, out), args.work / f"{method.name}.log")
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    before = answers(scores_of(args.model, held_out, args.work / "scores-before"))
    after = answers(scores_of(out, held_out, out / "scores"))
    rows = rows_of(out / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    if method.name == "sft":
        shutil.rmtree(args.work / "sft-model", ignore_errors=True)
        out.rename(args.work / "sft-model")
    else:
        shutil.rmtree(out)
    return {
        "method": method.name,
        "seconds": seconds,
        "peak_bytes": peak,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="preference pairs: JSON lines, plain or gzipped")
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], help="default: all")
    parser.add_argument("--steps", type=at_least_two, default=40, help="optimiser steps; default 40")
    parser.add_argument("--pairs", type=at_least_two, default=4, help="pairs a step; default 4")
    parser.add_argument("--held-out", type=at_least_two, default=128, help="lines to evaluate on; default 128")
    parser.add_argument(
        "--work", type=Path, default=Path("methods-work"), help="folder for models; default: %(default)s"
    )
    parser.add_argument("--rows", type=Path, default=ROWS, help="file for the rows; default: %(default)s")
    args = parser.parse_args()
    require("transformers", "pyarrow", "datasets")
    unknown = set(args.methods) - {m.name for m in METHODS}
    if unknown:
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in METHODS)}")
    for path in (args.model, args.data):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    settings = {
        "model": args.model.name,
        "data": args.data.name,
        "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "steps": args.steps,
        "pairs_per_step": args.pairs,
        "held_out": args.held_out,
    }
    rows = rows_of(args.rows)
    if any(row["settings"] != settings for row in rows):
        parser.error(f"--rows: {args.rows} holds rows of {rows[0]['settings']}, need {settings}; name another file")
    # What was prepared for other settings must not be taken.
    args.work = args.work / hashlib.sha256(json.dumps([settings, str(args.model.resolve())]).encode()).hexdigest()[:12]
    args.work.mkdir(parents=True, exist_ok=True)
    # A quarter more than are needed: some lines are no pairs, some prompts too long.
    train, held_out = split(args.data, args.work, args.steps * args.pairs * 5 // 4, args.held_out)

    # Names for paths: the row is read on other machines.
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    facts = about("cpu", "benchmarks.methods", words)
    done = {row["method"] for row in rows}
    failed = []
    with tqdm([m for m in METHODS if m.name in args.methods and m.name not in done], unit="method") as bar:
        for method in bar:
            bar.set_postfix_str(method.name)
            try:
                row = measure(method, args, train, held_out)
            except RuntimeError as error:
                failed.append(f"{method.name}: {error}")
                tqdm.write(failed[-1])
                continue
            append(args.rows, [{**row, "settings": settings, "about": facts}])
    if failed:
        sys.exit(f"{len(failed)} methods failed: their rows are missing; start the command again for them")
    print(f"{args.rows}: complete; now: python -m benchmarks.methods_report")


if __name__ == "__main__":
    main()
