"""`asft-train` from arguments to files: metrics, curves, checkpoints, resume, Ctrl-C, errors."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("accelerate", reason="needs the train extra: accelerate")
pytest.importorskip("matplotlib", reason="needs the train extra: matplotlib")

import transformers

from asft_kernels import train as train_package
from asft_kernels.data import load_pairs
from asft_kernels.models import PreferenceModel
from asft_kernels.train import main
from asft_kernels.train.arguments import RunArguments
from asft_kernels.train.metrics import Evaluation, MetricsFile, change
from asft_kernels.train.run_folder import command
from asft_kernels.train.trainer import PreferenceTrainer
from tiny_lm import pairs, saved_sae, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

ROOT = Path(__file__).parents[1]
TIMES = {"tokens_per_second", "runtime", "samples_per_second", "steps_per_second",
         "model_preparation_time"}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of a run with dropout, so that a resumed run must restore the generators too."""
    folder = tmp_path_factory.mktemp("job")
    model = saved_tiny_model(folder / "model", attention_dropout=0.1)
    data = write_lines(folder / "pairs.jsonl", [*pairs(30), "{"])
    return [
        *("--model", str(model), "--data", str(data), "--eval-every-nth", "8"),
        *("--max-length", "64", "--max-prompt-length", "32", "--learning-rate", "1e-2"),
        *("--max-steps", "8", "--per-device-train-batch-size", "2", "--disable-tqdm", "true"),
    ]


@pytest.fixture(scope="module")
def whole_run(job, tmp_path_factory):
    """One uninterrupted run; its folder and what it said."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main([*job, "--output-dir", str(folder)]) == 0
    return folder


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def test_run_writes_metrics_curves_model_and_summary(whole_run):
    train = [row for row in rows(whole_run) if row["kind"] == "train"]
    evaluations = [row for row in rows(whole_run) if row["kind"] == "eval"]
    assert [row["step"] for row in train] == list(range(1, 9))
    assert [row["step"] for row in evaluations] == [0, 8]
    figures = {"loss", "sft", "align", "chosen_avg_logp", "rejected_avg_logp", "margin", "accuracy"}
    assert figures | {"loss_token_share", "learning_rate", "grad_norm", "pairs"} <= set(train[0])
    assert figures - {"align"} | {"avg_logp_margin", "pairs"} <= set(evaluations[0])
    assert '"tokens_per_second"' in (whole_run / "metrics.jsonl").read_text()
    assert all(0 < row["loss_token_share"] < 1 for row in train)
    for row in train:
        assert row["loss"] == pytest.approx(row["sft"] + row["align"], rel=1e-5)
    for row in [*train, *evaluations]:
        assert row["sft"] == pytest.approx(-row["chosen_avg_logp"], rel=1e-5)
    assert (whole_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(whole_run.glob("*.partial"))

    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["pairs"] == 3  # lines 8, 16, 24
    margin = summary["changes"]["margin"]
    assert margin["before"] == pytest.approx(evaluations[0]["margin"])
    assert margin["after"] == pytest.approx(evaluations[1]["margin"])
    assert margin["standard_error"] > 0
    assert summary["changes"]["chosen_avg_logp"]["change"] > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(whole_run)
    start = tiny_model(attention_dropout=0.1)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    assert AutoTokenizer.from_pretrained(whole_run).eos_token == "<eos>"
    settings = json.loads((whole_run / "run.json").read_text())
    assert settings["settings"]["objective"] == "ASFT(lam=1.0, beta=1.0, sft_weight=1.0)"
    assert {"torch", "transformers", "python"} <= set(settings["versions"])


def test_summary_of_rows_is_said_once(job, tmp_path, capsys):
    assert main([*job, "--max-steps", "1", "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("31 rows, 30 kept, 1 left out") == 1
    assert "left out, unreadable JSON: 1 (line 31)" in said
    assert "27 pairs for training, 3 for evaluation" in said
    assert "paired s.e." in said
    assert str(tmp_path / "out" / "curves.png") in said


def test_ctrl_c_saves_and_resume_goes_on_identically(job, whole_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    write = MetricsFile.write

    def write_and_interrupt(self, row):
        write(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsFile, "write", write_and_interrupt)
    assert main([*job, "--output-dir", str(folder)]) == 130
    said = capsys.readouterr().out
    assert "stopped after step 4; go on with: " in said
    assert said.rstrip().count("--resume") == 1
    assert (folder / "checkpoint-4").is_dir()
    assert (folder / "curves.png").is_file()
    monkeypatch.undo()
    with (folder / "metrics.jsonl").open("a") as file:  # as if it had gone on, and been killed
        file.write('{"kind": "train", "step": 5, "loss": 0}\n{"kind": "tr')
    (folder / "checkpoint-5").mkdir()  # a save that was killed: no trainer_state.json

    assert main([*job, "--output-dir", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(whole_run)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole_run))
    assert ours == theirs


def test_resume_of_a_finished_run_does_the_rest_only(job, whole_run, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    (folder / "summary.json").unlink()
    assert main([*job, "--output-dir", str(folder), "--resume"]) == 0
    assert rows(folder)[:-1] == rows(whole_run)[:-1]
    assert rows(folder)[-1]["margin"] == pytest.approx(rows(whole_run)[-1]["margin"], rel=1e-6)


def test_resume_refuses_what_would_be_another_experiment(job, whole_run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    assert main([*job, "--output-dir", str(folder), "--resume", "--lam", "2"]) == 2
    assert "--resume: --objective was 'ASFT(lam=1.0, beta=1.0" in capsys.readouterr().err
    assert main([*job, "--output-dir", str(folder)]) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err
    assert main([*job, "--output-dir", str(tmp_path / "fresh"), "--resume"]) == 2
    assert "no complete checkpoint in" in capsys.readouterr().err
    assert main([*job, "--output-dir", str(folder), "--resume", str(tmp_path)]) == 2
    assert "is no complete checkpoint" in capsys.readouterr().err
    for name, value, was in (
        ("num-train-epochs", "2", "1.0"),
        ("softcap", "3", "None"),
        ("lr-scheduler-type", "cosine", "'linear'"),
        ("warmup-steps", "2", "0"),
        ("optim", "sgd", "'adamw"),
    ):
        assert main([*job, "--output-dir", str(folder), "--resume", f"--{name}", value]) == 2
        assert f"--resume: --{name} was {was}" in capsys.readouterr().err
    checkpoint = str(next(folder.glob("checkpoint-*")))
    elsewhere = [*job, "--output-dir", str(tmp_path / "elsewhere"), "--resume", checkpoint]
    assert main([*elsewhere, "--lam", "2"]) == 2
    assert "--resume: --objective was 'ASFT(lam=1.0" in capsys.readouterr().err
    assert main([*elsewhere, "--max-steps", "9"]) == 0  # and compares with the evaluation of the old run
    assert "--max-steps was 8 and is 9 now" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "elsewhere") if row["kind"] == "train"] == list(range(1, 10))
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (tmp_path / "elsewhere", folder))
    assert ours["changes"]["margin"]["before"] == theirs["changes"]["margin"]["before"]
    assert main([*job, "--output-dir", str(tmp_path / "elsewhere"), "--resume", checkpoint]) == 2
    assert "holds a run already, and" in capsys.readouterr().err


def test_any_trace_of_a_run_is_not_overwritten(job, whole_run, tmp_path, capsys):
    for name in ("metrics.jsonl", "model.safetensors"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        shutil.copy(whole_run / "run.json", folder)
        shutil.copy(whole_run / name, folder)
        assert main([*job, "--output-dir", str(folder)]) == 2
        assert "holds a run already" in capsys.readouterr().err


def test_last_partial_window_is_logged_and_its_loss_is_per_pair(job, tmp_path):
    """28 of 2 pairs a step but 1 in the last: a mean of the steps' means would be another loss."""
    common = [*job, "--eval-every-nth", "10", "--max-steps", "-1", "--save-strategy", "no"]
    assert main([*common, "--logging-steps", "9", "--output-dir", str(tmp_path / "a")]) == 0
    train = [row for row in rows(tmp_path / "a") if row["kind"] == "train"]
    assert [(row["step"], row["pairs"]) for row in train] == [(9, 18), (14, 9)]
    for row in train:
        assert row["loss"] == pytest.approx(row["sft"] + row["align"], rel=1e-5)
        assert "grad_norm" in row


def test_best_model_is_loaded_at_the_end(job, tmp_path, capsys):
    """Best by a figure that falls at every step: the final model is the first checkpoint's, and so are its figures."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "out"
    best = [*job, "--max-steps", "3", "--load-best-model-at-end", "true", "--eval-strategy", "steps",
            "--eval-steps", "1", "--save-steps", "1", "--metric-for-best-model", "chosen_avg_logp",
            "--greater-is-better", "false", "--output-dir", str(folder)]  # fmt: skip
    assert main(best) == 0
    evaluations = {row["step"]: row for row in rows(folder) if row["kind"] == "eval"}
    assert list(evaluations) == [0, 1, 2, 3]
    step = min((1, 2, 3), key=lambda step: evaluations[step]["chosen_avg_logp"])
    assert step == 1
    assert f"best after step {step}:" in capsys.readouterr().out
    models = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, folder / f"checkpoint-{step}")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == step
    assert summary["changes"]["margin"]["after"] == pytest.approx(evaluations[step]["margin"], rel=1e-5)
    assert main([*best, "--resume"]) == 0
    assert {row["step"]: row["loss"] for row in rows(folder) if row["kind"] == "eval"} == {
        step: row["loss"] for step, row in evaluations.items()
    }


def test_ctrl_c_without_checkpoints_saves_none(job, tmp_path, monkeypatch, capsys):
    write = MetricsFile.write

    def write_and_interrupt(self, row):
        write(self, row)
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            assert "stopping" not in capsys.readouterr().out  # said by a callback, not within the handler

    monkeypatch.setattr(MetricsFile, "write", write_and_interrupt)
    assert main([*job, "--save-strategy", "no", "--output-dir", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().out
    assert "stopping after this step, without a checkpoint" in said
    assert "stopped after step 4; --save-strategy no: no checkpoint" in said
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "out/checkpoint-4"], ["--resume=out/checkpoint-4"]])
def test_printed_command_drops_resume_and_its_value(monkeypatch, resume):
    monkeypatch.setattr(sys, "argv", ["asft-train", "--data", "a b", *resume, "--lam", "2"])
    assert command() == "asft-train --data 'a b' --lam 2"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--lam", "-1"], "--objective: asft: lam: got -1.0, need a finite number >= 0"),
        (["--beta", "0"], "--objective: asft: beta: got 0.0, need a finite number > 0"),
        (["--beta", "nan"], "--objective: asft: beta: got nan, need"),
        (["--sft-weight", "inf"], "--objective: asft: sft_weight: got inf, need"),
        (["--lam", "0", "--sft-weight", "0"], "both are 0, need one above 0"),
        (["--max-length", "1"], "--max-length, --max-prompt-length: got 1, 32; need at least"),
        (["--max-length", "999"], "--max-length: got 999, need at most 256, the model's positions"),
        (["--eval-every-nth", "1"], "--eval-every-nth: got 1, need at least 2"),
        (["--eval-data", "x.jsonl"], "--eval-data, --eval-every-nth: got both, need one"),
        (
            ["--label-smoothing-factor", "0.1"],
            "--label-smoothing-factor: got 0.1, need 0: the loss",
        ),
        (["--bf16", "true"], "bf16"),
        (["--backend", "cuda"], "--backend: got 'cuda', need 'torch' or 'triton'"),
        (["--data", "no.jsonl"], "data: got 'no.jsonl', no such file; need a file of JSON lines"),
        (
            ["--strict"],
            "1 rows cannot be used, and --strict is on; first: line 31: unreadable JSON",
        ),
        (["--model", "."], "--model: '.' cannot be loaded as a causal language model"),
        (["--eval-every-nth", "500"], "leaves 30 pairs for training and 0 for evaluation"),
    ],
)
def test_bad_input_says_what_and_what_to_do(job, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    assert main([*job, "--output-dir", str(tmp_path / "out"), *extra]) == 2
    said = capsys.readouterr().err
    assert "asft-train: " in said
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("no-such-folder", "no such folder, and no hub name either"),
        ("./org/name", "no such folder, and no hub name either"),
        ("runs/some/model", "no such folder, and no hub name either"),
        ("org/model name", "no such folder, and no hub name either"),
        ("folder/model.gguf", "a file"),
    ],
)
def test_a_model_that_cannot_be_one_is_refused_before_the_hub_is_asked(job, tmp_path, capsys, monkeypatch, name, what):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", Mock(side_effect=AssertionError("asked")))
    assert main([*job, "--output-dir", "out", "--model", name]) == 2
    need = "need a folder that from_pretrained reads, or a hub name as org/name"
    assert f"--model: got {name!r}, {what}; {need}" in capsys.readouterr().err


def test_a_hub_name_is_asked_for(job, tmp_path, capsys, monkeypatch):
    asked = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asked)
    assert main([*job, "--output-dir", str(tmp_path / "out"), "--model", "org/name"]) == 2
    assert "--model: 'org/name' cannot be loaded" in capsys.readouterr().err
    asked.assert_called_once_with("org/name")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no such file"),
        ([], "data: no usable pair"),
        (['{"prompt": "Say it"}'], "data: no usable pair; first: line 1"),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_data_is_checked_before_the_model_is_loaded(job, tmp_path, capsys, monkeypatch, option, lines, message):
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", Mock(side_effect=AssertionError("loaded"))
    )
    path = tmp_path / "bad.jsonl"
    if lines is not None:
        write_lines(path, lines)
    at = job.index("--eval-every-nth")
    arguments = [*job[:at], *job[at + 2 :], option, str(path)]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(train_package.importlib.util, "find_spec", lambda name: None)
    assert main([]) == 2
    said = capsys.readouterr().err
    assert "transformers, datasets, accelerate, matplotlib: not installed" in said
    assert 'pip install "asft_kernels[train]"' in said


def test_importing_the_command_imports_no_trainer():
    code = (
        "import sys, asft_kernels.train;"
        "print([m for m in ('transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


class Gradients(PreferenceTrainer):
    """Keeps the gradients of the first optimiser step."""

    first = None

    def _clip_grad_norm(self, model):
        if self.first is None:
            self.first = [p.grad.clone() for p in model.parameters()]
        return super()._clip_grad_norm(model)


def trained(tmp_path, micro, accumulation, dataset):
    arguments = RunArguments(
        output_dir=str(tmp_path / f"{micro}-{accumulation}"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start(None)
    trainer = Gradients(
        PreferenceModel(tiny_model()),
        arguments,
        tokenizer=tiny_tokenizer(),
        metrics=metrics,
        train_dataset=dataset,
    )
    trainer.train()
    return trainer.first, metrics.rows()[0]


@pytest.mark.parametrize(("micro", "accumulation", "count"), [(1, 4, 4), (1, 8, 8), (3, 2, 4)])
def test_accumulation_gives_the_same_gradients(tmp_path, micro, accumulation, count):
    """In the last case micro-batches have 3 pairs and 1: a mean of means would be another loss.

    Bound: fp32 sums in another order; 1e-5 is 80 roundings of the largest entry.
    """
    dataset, _ = load_pairs(write_lines(tmp_path / "p.jsonl", pairs(count)), tiny_tokenizer())
    one, row = trained(tmp_path, count, 1, dataset)
    many, row_of_many = trained(tmp_path, micro, accumulation, dataset)
    for first, second in zip(one, many, strict=True):
        assert (first - second).abs().max() <= 1e-5 * first.abs().max()
    for name in ("loss", "sft", "margin", "accuracy", "pairs", "grad_norm"):
        assert row[name] == pytest.approx(row_of_many[name], rel=1e-5)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    from asft_kernels.errors import InputError

    arguments = RunArguments(output_dir=str(tmp_path), disable_tqdm=True)
    arguments._n_gpu = 2
    with pytest.raises(InputError, match=r"2 GPUs in one process: .* torchrun --nproc-per-node 2"):
        PreferenceTrainer(PreferenceModel(tiny_model()), arguments, tokenizer=tiny_tokenizer(), metrics=None)


def test_change_is_paired():
    """Margins 1, 2, 3 -> 2, 4, 3: differences 1, 2, 0: mean 1, standard error 1 / sqrt(3)."""
    import numpy as np

    def table(margins):
        return Evaluation(np.array([[-1.0, -2.0, m, 1.0, 1.0] for m in margins] + [[0.0] * 5]))

    result = change(table([1, 2, 3]), table([2, 4, 3]))["margin"]
    assert result == pytest.approx({"before": 2, "after": 3, "change": 1, "standard_error": 3**-0.5})


RANKS = """
import os, sys
import torch

def leave(code):  # gloo's threads now and then abort a process that ends in the ordinary way
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(code)

sys.path[:0] = [{tests!r}, {root!r}]
from asft_kernels.train import main
if len(sys.argv) > 3:
    leave(main(sys.argv[1:]))
import test_train
rank = test_train.os.environ["RANK"]
folder = test_train.Path(sys.argv[1]) / rank  # each rank writes rows of its own
folder.mkdir()
torch.save(test_train.trained(folder, 2, 1, test_train.uneven()), sys.argv[2] + rank)
leave(0)
"""


def run_ranks(folder, arguments):
    """Two processes that find each other at a port that was free just now."""
    tests = Path(__file__).parent
    script = folder / "ranks.py"
    script.write_text(RANKS.format(tests=str(tests), root=str(tests.parent)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                 "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output


def uneven():
    """Four pairs of which three count: two ranks of two have one and two of them."""
    from datasets import Dataset

    sides = {"prompt": [[5, 6], [7, 8], [9, 10], [11]], "chosen": [[20], [21, 22], [23], [24, 25, 26]]}
    return Dataset.from_dict({**sides, "rejected": [[30, 31], [32], [], [33, 34]]})


def test_ranks_with_unequal_numbers_of_counting_pairs_give_the_same_gradients(tmp_path):
    """Bound: fp32 sums in another order; 1e-5 is 80 roundings of the largest entry."""
    one, row = trained(tmp_path, 4, 1, uneven())
    assert row["pairs"] == 3
    run_ranks(tmp_path, [str(tmp_path), str(tmp_path / "gradients")])
    for rank in (0, 1):
        gradients, theirs = torch.load(tmp_path / f"gradients{rank}")
        for first, second in zip(one, gradients, strict=True):
            assert (first - second).abs().max() <= 1e-5 * first.abs().max()
        for name in ("loss", "sft", "align", "margin", "accuracy", "pairs", "grad_norm"):
            assert row[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_two_ranks_train_as_one_process(job, tmp_path):
    """The same pairs a step (2 ranks of 1, one process of 2), no dropout: the same run."""
    from transformers import AutoModelForCausalLM

    model = saved_tiny_model(tmp_path / "model")
    common = [*job, "--model", str(model), "--max-steps", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*common, "--output-dir", str(one)]) == 0
    run_ranks(tmp_path, [*common, "--per-device-train-batch-size", "1", "--output-dir", str(two)])
    for name in ("loss", "sft", "margin", "accuracy", "pairs", "loss_token_share", "grad_norm"):
        first, second = ([row[name] for row in rows(f) if name in row] for f in (one, two))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), name
    trained = [AutoModelForCausalLM.from_pretrained(f).lm_head.weight for f in (one, two)]
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "shows"),
    [("fpo", "rejected_feature_distance"), ("kto", "chosen_kl")],
)
def test_two_ranks_train_fpo_and_kto_as_one_process(job, tmp_path, objective, shows):
    """The same pairs a step and an evaluation (2 ranks of half as many), activations recomputed: the same run.

    kto's reference point is a mean over both ranks, fpo's reference features are written by the first for both.
    Bounds: fp32 gradients of sums in another order, of the kind of 1e-6; Adam divides each by its own size, so that
    what small ones are off by passes on to the next steps' losses (1e-4) and the weights (a hundredth of a step).
    """
    from transformers import AutoModelForCausalLM

    common = [*job, "--model", str(saved_tiny_model(tmp_path / "model")), "--objective", objective]
    common += ["--data", str(write_lines(tmp_path / "pairs.jsonl", pairs(32))), "--max-steps", "4"]
    common += ["--activation-checkpointing", "true"]
    if objective == "fpo":
        common += ["--sae", str(saved_sae(tmp_path / "sae.npz")), "--objective-args", "top_k=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*common, "--per-device-eval-batch-size", "4", "--output-dir", str(one)]) == 0
    halves = ["--per-device-train-batch-size", "1", "--per-device-eval-batch-size", "2"]
    run_ranks(tmp_path, [*common, *halves, "--output-dir", str(two)])
    assert len(rows(one)) == len(rows(two)) == 6
    for first, second in zip(rows(one), rows(two), strict=True):
        assert first.pop("kind") == second.pop("kind")
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    assert rows(one)[4][shows] > 0.1, "the reference point, or the features, have moved"
    trained = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (one, two)]
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


def test_ctrl_c_before_the_first_step_stops_at_once(job, tmp_path, monkeypatch, capsys):
    """During the first evaluation there is nothing to save, and no step to wait for."""
    monkeypatch.setattr(PreferenceTrainer, "prediction_step", _interrupting(PreferenceTrainer.prediction_step))
    assert main([*job, "--output-dir", str(tmp_path / "out")]) == 130
    assert "asft-train: interrupted" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    monkeypatch.undo()
    assert main([*job, "--max-steps", "1", "--output-dir", str(tmp_path / "out")]) == 0  # no step was lost


def _interrupting(step):
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    return interrupted


def test_help_shows_the_command_s_own_options_and_all_of_them_if_asked(capsys):
    shown = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([option])
        shown.append(capsys.readouterr().out)
    assert all("--objective-args" in text and "--max-steps" in text for text in shown)
    assert ["--label-smoothing-factor" in text for text in shown] == [False, True]
    assert len(shown[0].splitlines()) < 150
    assert "\nasft-train --model FOLDER" in shown[0]
