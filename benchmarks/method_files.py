"""Files that `benchmarks.methods` trains on and compares by, and the commands that make them."""

import gzip
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from asft_kernels.data import BadRow, parse_pair

LIMITS = ("--max_length", "512")
SCORED = ("--dtype", "float32")  # whatever a model was trained in
EDIT_TOKENS = 64  # of a bridged answer at most
TAIL = 30  # lines
_running: set[int] = set()  # processes that `run` waits for
_stopping = threading.Event()


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def asft(*words: str) -> list[str]:
    return python("asft_kernels.cli", *words)


class CommandFailed(RuntimeError):
    """A command ended with an error; tail: the last lines of its output."""

    def __init__(self, code: int, command: list[str], log: Path):
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        super().__init__(f"exit status {code}: {lines[-1]}; the whole output is in {log}: {shlex.join(command)}")
        self.tail = "\n".join(lines[-TAIL:])


def run(command: list[str], log: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of the command; the peak is at least that of this process.

    Its output goes to log; CommandFailed if it fails.
    """
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _running.add(process.pid)
        if _stopping.is_set():  # asked after `stop_running` may have looked
            process.terminate()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            _running.discard(process.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise CommandFailed(process.returncode, command, log)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def stop_running() -> None:
    """Ends the commands that other threads wait for in `run`, now and later."""
    _stopping.set()
    for pid in list(_running):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def split(data: Path, folder: Path, train: int, held_out: int, every_nth: int | None = None) -> tuple[Path, Path]:
    """Training and evaluation pairs as files, dialogues as chat messages, so that the model's chat template is used.

    The first `train` lines of data and the `held_out` next ones; or, with every_nth = N, all lines, of which those with
    number mod N = N - 1 (counted from 0) are for evaluation. Lines that hold no pair stay as they are.
    """
    files = folder / "train.jsonl", folder / "eval.jsonl"
    lines = [as_chat(line) for line in itertools.islice(read_lines(data), None if every_nth else train + held_out)]
    if every_nth:
        evaluation = lines[every_nth - 1 :: every_nth]
        del lines[every_nth - 1 :: every_nth]
    else:
        lines, evaluation = lines[:train], lines[train:]
    for path, part in zip(files, (lines, evaluation), strict=True):
        path.write_text("".join(part))
    return files


def read_lines(data: Path) -> Iterator[str]:
    """Lines of a file, plain or gzipped."""
    with (gzip.open if data.suffix == ".gz" else open)(data, "rt") as source:
        yield from source


def as_chat(line: str) -> str:
    try:
        pair = parse_pair(json.loads(line))
        answers = {side: pair.text(side).strip() for side in ("chosen", "rejected")}
    except (BadRow, json.JSONDecodeError):
        return line
    rows = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return json.dumps({"prompt": pair.messages, **rows}) + "\n"


def scores_of(model: Path, data: Path, folder: Path) -> Path:
    """The file of asft score, made if it is not there."""
    found = list(folder.glob("*.parquet"))
    if not found:
        run(
            asft("score", "--model", str(model), "--data", str(data), "--output", str(folder), *SCORED, *LIMITS),
            folder.with_name(folder.name + ".log"),
        )
        found = list(folder.glob("*.parquet"))
    return found[0]


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
