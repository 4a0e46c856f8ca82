"""benchmarks.methods: the split of the data, the figures of the table, the picture."""

import argparse
import gzip
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("accelerate", reason="needs the train extra: accelerate")
pytest.importorskip("matplotlib", reason="needs the train extra: matplotlib")

from asft_kernels.cli import main as asft
from benchmarks import method_files, methods, methods_report
from benchmarks.method_data import CANDIDATES, rewards
from benchmarks.method_files import CommandFailed, prepare, run, scores_of, split
from benchmarks.methods import METHODS, command_of
from benchmarks.methods_report import draw, table, text
from benchmarks.run import rows_of
from tiny_lm import pairs, saved_tiny_model, tiny_tokenizer, write_lines

ABOUT = {
    "machine": "chip", "python": "3",
    "torch": "2", "commit": "c", "command": "python -m benchmarks.methods", "date": "2030-01-02",
}  # fmt: skip
SETTINGS = {"model": "m", "data": "d.jsonl", "data_sha256": "0" * 64, "pairs_per_step": 4}
# chosen, rejected, and both after: margins 1, -1 before, 2, 1 after
ANSWERS = [[-2.0, -3.0, -1.0, -3.0], [-4.0, -3.0, -2.5, -3.5]]


def row(method, peak=2**30, held_out=()):
    return {
        "method": method, "peak_bytes": peak, "steps": 40, "tokens_per_second": 250.4, "answers": ANSWERS,
        "held_out": [*held_out], "about": ABOUT, "settings": SETTINGS,
    }  # fmt: skip


def test_training_and_evaluation_lines_do_not_overlap(tmp_path):
    source = tmp_path / "pairs.jsonl.gz"
    dialogue = {side: f"\n\nHuman: hello\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    with gzip.open(source, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in (*({"number": i} for i in range(9)), dialogue))
    train, held_out = split(source, tmp_path, 5, 5)
    assert [r["number"] for r in rows_of(train)] == [0, 1, 2, 3, 4]
    *numbers, last = rows_of(held_out)
    assert [r["number"] for r in numbers] == [5, 6, 7, 8]
    assert last["prompt"] == [{"role": "user", "content": "hello"}]
    assert last["rejected"] == [{"role": "assistant", "content": "rejected"}]


def test_every_nth_line_is_held_out(tmp_path):
    """Number mod N is N - 1, counted from 0, as `asft train --eval_every_nth` holds out; all others train."""
    source = write_lines(tmp_path / "pairs.jsonl", [{"number": i} for i in range(10)])
    train, held_out = split(source, tmp_path, 2, 2, every_nth=4)
    assert [r["number"] for r in rows_of(held_out)] == [3, 7]
    assert [r["number"] for r in rows_of(train)] == [0, 1, 2, 4, 5, 6, 8, 9]


def test_figures_of_the_table():
    """By hand: margins move by 1 and 2, chosen by 1 and 1.5, rejected by 0 and -0.5."""
    lines = table([row("dpo", 2**30 + 3 * 2**20), row("sft")])
    assert lines[2] == "| *before* | 50.0 | +0.000 |  | from -3.000 | from -3.000 |  |  |"
    assert lines[3] == "| dpo | 100.0 | +1.500 | +1.500 ± 0.500 | +1.250 ± 0.250 | -0.250 ± 0.250 | 250 | +3 |"
    assert lines[4].startswith("| sft |")
    assert lines[4].endswith("| +0 |")


def test_text_names_what_is_missing(tmp_path):
    written = text([row("asft", held_out=[[0, -2.0, -2.0], [5, -1.5, -1.8]])])
    assert "Not measured yet: dpo, orpo, sft" in written
    assert "likelihoods.png" in written
    draw([row("asft", held_out=[[0, -2.0, -2.0], [5, -1.5, -1.8]])], tmp_path / "likelihoods.png")
    assert (tmp_path / "likelihoods.png").stat().st_size > 1000


def test_a_failed_command_is_named_with_its_output(tmp_path):
    with pytest.raises(CommandFailed, match=r"exit status 3: why; the whole output is in .*log") as failed:
        run([sys.executable, "-c", "print('where\\nwhy'); raise SystemExit(3)"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "where\nwhy\n"
    assert failed.value.tail == "where\nwhy"


def test_peak_memory_is_the_commands_own(tmp_path):
    """In a process as the benchmark is: a command's peak counts that of its parent, and this one's may be large."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.method_files import run;"
        "print(run([sys.executable, '-c', 'x = b\"x\" * 2**30'], Path(sys.argv[1]))[1])"
    )
    parent = [sys.executable, "-c", code, str(tmp_path / "log")]
    answer = subprocess.run(parent, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    peak = int(answer.stdout)
    assert 2**30 < peak < 2**30 + 2**27  # beside it an interpreter


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_command_is_one_that_its_program_takes(method, monkeypatch, tmp_path):
    from asft_kernels.cli.train import parse
    from asft_kernels.training.hooks import installed

    monkeypatch.setattr(methods, "prepare", lambda name, *_: tmp_path / name)
    given = {"model": Path("m"), "steps": 40, "pairs": 4, "work": tmp_path}
    args = argparse.Namespace(**given, epochs=None, accumulate=1, bf16=False)
    command = command_of(method, args, 0, Path("train"), Path("eval"), tmp_path / "out")[3:]
    of_methods = {name: kind.Arguments for name, kind in installed().items() if kind.Arguments is not None}
    _, config, model, *_ = parse(command[1:], of_methods)
    assert command[0] == "train"
    assert config.objective == (method.objective or method.name)
    assert (config.max_steps, config.per_device_eval_batch_size, model.model_name_or_path) == (40, 4, "m")
    assert (config.bf16, config.gradient_accumulation_steps, config.seed) == (False, 1, 0)


def test_a_pass_over_the_pairs_in_bf16(tmp_path):
    from asft_kernels.cli.train import parse

    given = {"model": Path("m"), "steps": 40, "pairs": 16, "work": tmp_path}
    args = argparse.Namespace(**given, epochs=2, accumulate=4, bf16=True)
    command = command_of(METHODS[0], args, 5, Path("train"), Path("eval"), tmp_path / "out")
    _, config, model = parse(command[4:], {})
    assert (config.max_steps, config.num_train_epochs, config.seed) == (-1, 2, 5)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 4)
    assert (config.bf16, model.dtype) == (True, "float32")


def test_the_autoencoder_of_fpo_is_made_by_a_command_that_its_program_takes(tmp_path):
    """The command itself, up to the model that is not there."""
    with pytest.raises(RuntimeError) as failed:
        prepare("sae", tmp_path / "nosuch", write_lines(tmp_path / "train.jsonl", pairs(4)), tmp_path)
    assert "unrecognized" not in (tmp_path / "sae.log").read_text()
    assert "nosuch" in str(failed.value).partition("; the whole output")[0]


def test_data_commands_run_on_what_the_model_makes(tmp_path, monkeypatch):
    """Of a tiny model with a chat template: what comes out are pairs, scored and ordered by the model's own figures."""
    started = method_files.run

    def here(command, log):
        """Commands of the package in this process: imports take seconds."""
        if command[1:3] != ["-m", "asft_kernels.cli"]:
            return started(command, log)
        assert asft(command[3:]) == 0
        return 0.0, 0

    monkeypatch.setattr(method_files, "run", here)
    # Untied: with tied embeddings it would say the last token of the prompt, a line break, again and again.
    model = saved_tiny_model(tmp_path / "model", max_position_embeddings=2048, tie_word_embeddings=False)
    tiny_tokenizer(chat=True).save_pretrained(model)
    train = write_lines(tmp_path / "train.jsonl", pairs(4))

    rad = rows_of(prepare("rad", model, train, tmp_path))
    own = rewards(scores_of(model, train, tmp_path / "scores-own"))
    better = [line for line, (chosen, rejected) in own.items() if chosen > rejected]
    assert [r["chosen_score"] for r in rad] == [own[line][side] for line in better for side in (0, 1)]
    assert all(1 < r["chosen_score"] < 10 for r in rad)
    assert rad[0]["chosen"] == rad[1]["rejected"] != rad[0]["rejected"]

    rso = rows_of(prepare("rso", model, train, tmp_path))
    sampled = [r[side] for r in rows_of(tmp_path / "candidates.jsonl") for side in ("chosen", "rejected")]
    assert len(sampled) == 4 * CANDIDATES == 16
    assert all(r["chosen_score"] > r["rejected_score"] and r["chosen"] in sampled for r in rso)
    assert 0 < len(rso) <= 4

    bridged = rows_of(prepare("bridged", model, train, tmp_path))
    originals = [pair["rejected"] for pair in pairs(4)]
    assert bridged
    assert all(r["rejected"] in originals and r["chosen"] != r["original_chosen"] for r in bridged)


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs benchmarks.methods on two lines, with `measure` in the place of training."""
    write_lines(tmp_path / "pairs.jsonl", [{}, {}])
    monkeypatch.setattr(methods, "scores_of", lambda *_: None)

    def call(*words, measure=None):
        monkeypatch.setattr(methods, "measure", measure)
        given = ["methods", "--model", str(tmp_path), "--data", str(tmp_path / "pairs.jsonl")]
        given += ["--rows", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path / "work"), *words]
        monkeypatch.setattr(sys, "argv", given)
        methods.main()
        return rows_of(tmp_path / "rows.jsonl")

    return call


def test_rows_of_other_settings_are_not_mixed(main, tmp_path, capsys):
    write_lines(tmp_path / "rows.jsonl", [row("sft")])
    with pytest.raises(SystemExit):
        main()
    assert "need {'model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--epochs", "1"), "--epochs: got 1 without --every-nth"),
        (("--jobs", "2", "--methods", "sft", "poft", "rso-hinge_norm"), "--jobs: got 2 with poft, rso-hinge_norm"),
        (("--pairs", "6", "--accumulate", "4"), "--accumulate: got 4, need a divisor of --pairs, 6"),
        (("--epochs", "1", "--steps", "3"), "not allowed with argument"),
        (("--every-nth", "8", "--held-out", "3"), "not allowed with argument"),
    ],
)
def test_options_that_do_not_go_together(main, words, text, capsys):
    with pytest.raises(SystemExit):
        main(*words)
    assert text in capsys.readouterr().err


def test_a_row_a_method_and_seed_several_at_once(main, tmp_path):
    """Two trainings wait for each other, which one after the other could not; a run goes on where it was cut off."""
    both, seen = threading.Barrier(2, timeout=30), []

    def measure(method, seed, *_):
        seen.append((method.name, seed))
        both.wait()
        return {"method": method.name, "seed": seed}

    words = ("--methods", "asft", "dpo", "--seeds", "0", "1", "--every-nth", "2", "--epochs", "1", "--jobs", "2")
    rows = main(*words, measure=measure)
    assert sorted((r["method"], r["seed"]) for r in rows) == [("asft", 0), ("asft", 1), ("dpo", 0), ("dpo", 1)]
    assert {seed for _, seed in seen[:2]} == {0}  # the first seed of all methods before the second
    assert rows[0]["settings"] | {"epochs": 1, "every_nth": 2} == rows[0]["settings"]
    assert rows[0]["jobs"] == 2
    write_lines(tmp_path / "rows.jsonl", rows[:-1])
    seen.clear()
    both.reset()
    main(*words, "--jobs", "1", measure=lambda method, seed, *_: seen.append((method.name, seed)) or rows[-1])
    assert seen == [(rows[-1]["method"], rows[-1]["seed"])]


def test_ctrl_c_ends_what_runs_and_begins_no_more(main, tmp_path, monkeypatch):
    monkeypatch.setattr(method_files, "_stopping", threading.Event())
    begun = []

    def measure(method, seed, *_):
        begun.append((method.name, seed))
        if method.name == "asft":
            code = "import time; print('up', flush=True); time.sleep(100)"
            run([sys.executable, "-c", code], tmp_path / f"log{seed}")
        while not ((tmp_path / "log0").exists() and (tmp_path / "log0").read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        main("--methods", "asft", "dpo", "--seeds", "0", "1", "--jobs", "2", measure=measure)
    assert time.perf_counter() - start < 60
    assert begun[:2] == [("asft", 0), ("dpo", 0)]
    assert ("dpo", 1) not in begun


def test_the_first_failed_log_is_shown(main, tmp_path, capsys):
    def measure(method, seed, *_):
        if seed == 1:
            return {"method": method.name, "seed": seed}
        code = f"print('from {method.name}'); print('bad'); raise SystemExit(1)"
        run([sys.executable, "-c", code], tmp_path / f"{method.name}.log")

    with pytest.raises(SystemExit, match="2 methods failed"):
        main("--methods", "asft", "dpo", "--seeds", "0", "1", measure=measure)
    said = capsys.readouterr().out
    assert "from asft\nbad" in said
    assert "from dpo\n" not in said
    assert "dpo, seed 0: exit status 1: bad" in said
    assert [r["seed"] for r in rows_of(tmp_path / "rows.jsonl")] == [1, 1]


@pytest.mark.parametrize(
    ("end", "text"),
    [
        ([40, -2.0, -3.25], "chosen rose by 0.500 nats a token, rejected fell by 0.250; chosen moved faster."),
        ([40, -2.6, -3.75], "chosen fell by 0.100 nats a token, rejected fell by 0.750; rejected moved faster."),
    ],
)
def test_movement_in_words(end, text):
    row = {"method": "dpo", "held_out": [[0, -2.5, -3.0], [5, 9.0, 9.0], end]}
    assert methods_report.verdict(row) == f"- dpo: {text}"
