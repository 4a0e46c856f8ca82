"""`asft train` from arguments to files: metrics, curves, checkpoints, resume, Ctrl-C, errors, dry run."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("train_extra")

import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

from asft_kernels.cli import main as asft
from asft_kernels.cli.train import parse
from asft_kernels.errors import InputError
from asft_kernels.models.loading import loading, with_all_weights
from asft_kernels.objectives import DPO, get_objective
from asft_kernels.training import run_folder
from asft_kernels.training.arguments import ModelArguments
from asft_kernels.training.callbacks import MetricsFile
from asft_kernels.training.checkpoints import find_checkpoint
from asft_kernels.training.figures import Evaluation, change
from asft_kernels.training.plot import plot_curves
from asft_kernels.training.reference import require_references
from asft_kernels.training.run_folder import command, require_same_settings
from asft_kernels.training.trainer import PreferenceTrainer
from tiny_lm import pairs, saved_tiny_model, tiny_model, write_lines
from train_extra import QUIET

pytestmark = QUIET
ROOT = Path(__file__).parents[1]
TIMES = {"tokens_per_second", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


def main(words):
    return asft(["train", *words])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of a run with dropout, so that a resumed run must restore the generators too."""
    folder = tmp_path_factory.mktemp("job")
    model = saved_tiny_model(folder / "model", attention_dropout=0.1)
    data = write_lines(folder / "pairs.jsonl", [*pairs(30), "{"])
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(data), "--eval_every_nth", "8"),
        *("--max_length", "64", "--learning_rate", "1e-2", "--disable_dropout", "false", "--use_cpu", "true"),
        *("--max-steps", "8", "--per-device-train-batch-size", "2", "--disable-tqdm", "true", "--report_to", "none"),
        *("--gradient_checkpointing", "false"),
    ]


@pytest.fixture(scope="module")
def whole_run(job, tmp_path_factory):
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main([*job, "--output_dir", str(folder)]) == 0
    return folder


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def test_run_writes_metrics_curves_model_and_summary(whole_run):
    train = [row for row in rows(whole_run) if row["kind"] == "train"]
    evaluations = [row for row in rows(whole_run) if row["kind"] == "eval"]
    assert [row["step"] for row in train] == list(range(1, 9))
    assert [row["step"] for row in evaluations] == [0, 8]
    figures = {"loss", "sft_loss", "align_loss", "logps/chosen", "avg_logps/rejected", "log_odds/margins", "accuracy"}
    assert figures | {"learning_rate", "grad_norm", "pairs", "entropy"} <= set(train[0])
    assert figures | {"pairs"} <= set(evaluations[0])
    for row in train:
        assert row["loss"] == pytest.approx(row["sft_loss"] + row["align_loss"], rel=1e-5)
    assert (whole_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(whole_run.glob("*.partial"))

    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["pairs"] == 3  # rows 8, 16, 24
    margin = summary["changes"]["log_odds/margins"]
    assert margin["before"] == pytest.approx(evaluations[0]["log_odds/margins"], rel=1e-5)
    assert margin["after"] == pytest.approx(evaluations[1]["log_odds/margins"], rel=1e-5)
    assert margin["standard_error"] > 0

    trained = transformers.AutoModelForCausalLM.from_pretrained(whole_run)
    assert not torch.equal(trained.lm_head.weight, tiny_model(attention_dropout=0.1).lm_head.weight)
    assert transformers.AutoTokenizer.from_pretrained(whole_run).eos_token == "<eos>"
    settings = json.loads((whole_run / "run.json").read_text())
    assert settings["settings"]["objective"] == "ASFT(lam=1.0, beta=1.0, sft_weight=1.0)"
    assert {"torch", "transformers", "trl", "python"} <= set(settings["versions"])


def test_what_was_read_is_said(job, tmp_path, capsys):
    assert main([*job, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "31 rows, 30 kept, 1 left out" in said
    assert "line 31" in said
    assert "27 pairs for training, 3 for evaluation" in said
    assert "output head checked: fused and own log-probabilities differ by at most" in said
    assert "paired s.e." in said
    assert str(tmp_path / "out" / "curves.png") in said


def interrupted_after(step, monkeypatch):
    write = MetricsFile.on_log

    def write_and_interrupt(self, args, state, control, logs=None, **rest):
        write(self, args, state, control, logs, **rest)
        if "loss" in logs and state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsFile, "on_log", write_and_interrupt)


def test_curves_show_parts_that_add_up_and_the_rewards(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    shown = []

    def labels(figure, file, **_):
        shown.append([label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]])
        file.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", labels)
    row = {"kind": "train", "step": 1, "log_odds/margins": 0.1, "accuracy": 0.5}
    plot_curves([row | {"loss": 3.0, "sft_loss": 2.0, "align_loss": 1.0}], tmp_path / "asft.png")
    rewards = {"rewards/margins": 0.1, "rewards/accuracies": 0.7}
    plot_curves([row | rewards | {"loss": 0.7, "sft_loss": 10.0, "align_loss": 0.7}], tmp_path / "dpo.png")
    parts = ["SFT part: $-$avg log p (chosen)", "alignment part"]
    assert shown[0] == ["loss", *parts, "chosen $-$ rejected", "chosen likelier"]
    assert shown[1] == ["loss", "chosen $-$ rejected", "chosen has the larger reward", "chosen likelier"]


def test_ctrl_c_saves_and_resume_goes_on_identically(job, whole_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    interrupted_after(3, monkeypatch)
    assert main([*job, "--output_dir", str(folder)]) == 130
    said = capsys.readouterr().out
    assert "stopped after step 4; go on with: " in said
    assert said.rstrip().count("--resume") == 1
    assert (folder / "checkpoint-4").is_dir()
    assert (folder / "curves.png").is_file()
    monkeypatch.undo()
    with (folder / "metrics.jsonl").open("a") as file:  # as if it had gone on, and been killed
        file.write('{"kind": "train", "step": 5, "loss": 0}\n{"kind": "tr')
    (folder / "checkpoint-5").mkdir()  # a save that was killed: no trainer_state.json

    capsys.readouterr()
    assert main([*job, "--output_dir", str(folder), "--resume"]) == 0
    assert capsys.readouterr().out.count(f"goes on from {folder / 'checkpoint-4'}\n") == 1
    assert rows(folder) == rows(whole_run)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole_run))
    assert ours == theirs
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, whole_run)]
    assert weights[0] == weights[1]


def test_a_killed_run_goes_on_identically(job, whole_run, tmp_path):
    """kill -9 after the fifth step; the newest checkpoint is of the fourth."""
    folder = tmp_path / "out"
    words = ["train", *job, "--output_dir", str(folder), "--save_steps", "2"]
    code = (
        "import os, sys; from asft_kernels.cli import main; from asft_kernels.training.callbacks import MetricsFile\n"
        "write = MetricsFile.on_log\n"
        "def log(self, args, state, control, logs=None, **rest):\n"
        "    write(self, args, state, control, logs, **rest)\n"
        "    'loss' in logs and state.global_step == 5 and os.kill(os.getpid(), 9)\n"
        "MetricsFile.on_log = log; main(sys.argv[1:])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True)
    assert done.returncode == -9
    assert main([*words[1:], "--resume"]) == 0
    for one, other in zip(rows(folder), rows(whole_run), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)  # another process may add in another order


def test_resume_of_a_finished_run_does_the_rest_only(job, whole_run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    (folder / "summary.json").unlink()
    assert main([*job, "--output_dir", str(folder), "--resume"]) == 0
    assert [row["step"] for row in rows(folder) if row["kind"] == "train"] == list(range(1, 9))
    assert rows(folder)[-1]["log_odds/margins"] == pytest.approx(rows(whole_run)[-1]["log_odds/margins"], rel=1e-6)
    assert [row["step"] for row in rows(folder) if row["kind"] == "eval"] == [0, 8]
    assert "that was the last step, give --max_steps to train further" in capsys.readouterr().out
    assert (folder / "summary.json").is_file()


def test_a_finished_run_goes_on_for_more_steps(job, whole_run, tmp_path, capsys):
    """By the new schedule from its first step: the checkpoint's is at its end, a rate of 0."""
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    words = [*job, "--output_dir", str(folder), "--resume"]
    assert main([*words, "--max_steps", "7"]) == 2
    assert "max_steps: got 7, need at least 8, the steps that are done" in capsys.readouterr().err
    assert main([*words, "--max_steps", "12"]) == 0
    assert "max_steps was 8 and is 12 now: the learning rate goes on by the new schedule" in capsys.readouterr().out
    rates = [row["learning_rate"] for row in rows(folder) if row["kind"] == "train"]
    assert rates[8:] == pytest.approx([1e-2 * (12 - step) / 12 for step in range(8, 12)])
    moved = json.loads((folder / "run.json").read_text())
    assert moved["settings"]["max_steps"] == 12
    assert main([*words, "--max_steps", "12"]) == 0
    assert "max_steps was" not in capsys.readouterr().out


def test_resume_refuses_what_would_be_another_experiment(job, whole_run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    resume = [*job, "--output_dir", str(folder), "--resume"]
    assert main([*resume, "--objective_args", "lam=2"]) == 2
    assert "resume: objective: 'ASFT(lam=1.0, beta=1.0" in capsys.readouterr().err
    for name, value, was in (
        ("num_train_epochs", "2", "3.0"),
        ("softcap", "3", "None"),
        ("lr_scheduler_type", "cosine", "'linear'"),
        ("optim", "sgd", "'adamw"),
    ):
        assert main([*resume, f"--{name}", value]) == 2
        said = capsys.readouterr()
        assert f"resume: {name}: {was}" in said.err
        assert "rows" not in said.out  # before data are read
    grown = write_lines(tmp_path / "pairs.jsonl", [*pairs(31), "{"])
    assert main([*resume, "--dataset_name", str(grown)]) == 2
    assert "resume: training_pairs: others (1 new or changed: line 31), need the same" in capsys.readouterr().err
    changed = [*pairs(5), {**pairs(1)[0], "chosen": "other"}, *pairs(30)[6:10], *pairs(30)[11:]]
    assert main([*resume, "--dataset_name", str(write_lines(tmp_path / "pairs.jsonl", changed))]) == 2
    expected = "training_pairs: others (1 new or changed: line 6; 2 gone or changed: lines 6, 11), need"
    assert expected in capsys.readouterr().err
    assert main([*resume, "--dataset_name", str(write_lines(tmp_path / "pairs.jsonl", pairs(30)[::-1]))]) == 2
    assert (
        "training_pairs: others (the same rows, but in another order, split or number), need" in capsys.readouterr().err
    )
    (folder / "pairs.json").write_text("{")
    assert main([*resume, "--dataset_name", str(grown)]) == 2
    assert "resume: training_pairs: others, need the same" in capsys.readouterr().err
    other = saved_tiny_model(tmp_path / "model", attention_dropout=0.1)
    assert main([*resume, "--model", str(other)]) == 2
    assert "resume: model: " in capsys.readouterr().err
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    assert main(resume) == 2
    assert "no complete checkpoint in" in (said := capsys.readouterr().err)
    assert "(optimizer.pt is missing; save_only_model keeps none)" in said


@pytest.mark.parametrize(
    ("name", "new"),
    [("method_arguments", {"temperature": 0.5}), ("adam_beta2", 0.5), ("data_seed", 9), ("files", ["b"])],
)
def test_any_setting_that_changes_the_run_is_compared(tmp_path, name, new):
    old = {"method_arguments": {"temperature": 0.7}, "adam_beta2": 0.999, "data_seed": None, "files": ["a"]}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"settings": {**old, "logging_steps": 1}}))
    require_same_settings(path, {**old, "logging_steps": 5}, print)  # may be another
    with pytest.raises(InputError, match=f"resume: {name}: "):
        require_same_settings(path, {**old, name: new}, print)


def test_evaluation_pairs_that_come_or_go_are_said_so(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"settings": {"evaluation_pairs": "digest"}}))
    with pytest.raises(InputError, match=r"evaluation_pairs: some then and none now \(give --eval_dataset_name"):
        require_same_settings(path, {"evaluation_pairs": None}, print)
    path.write_text(json.dumps({"settings": {"evaluation_pairs": None}}))
    with pytest.raises(InputError, match=r"evaluation_pairs: none then and some now \(leave --eval_dataset_name"):
        require_same_settings(path, {"evaluation_pairs": "digest"}, print)


def test_any_trace_of_a_run_is_not_overwritten(job, whole_run, tmp_path, capsys):
    for name in ("metrics.jsonl", "model.safetensors"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        shutil.copy(whole_run / "run.json", folder)
        shutil.copy(whole_run / name, folder)
        assert main([*job, "--output_dir", str(folder)]) == 2
        assert "holds a run already; add --resume" in capsys.readouterr().err


def test_advice_after_a_save_that_was_cut_short_leads_on(job, whole_run, tmp_path, monkeypatch, capsys):
    """Of a disk that is full at the first checkpoint: each text names what begins again in that folder."""
    folder = tmp_path / "out"
    words = [*job, "--max_steps", "2", "--save_steps", "1", "--output_dir", str(folder)]

    def full(self, *_):
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "_save_checkpoint", full)
        assert main(words) == 1
    assert "make room, and --resume auto goes on" in capsys.readouterr().err
    assert main(words) == 2
    assert "holds a run already; add --resume auto" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 2
    assert "begin again with --resume auto, or leave --resume out" in capsys.readouterr().err
    assert main([*words, "--resume", "auto"]) == 0
    assert [row["step"] for row in rows(folder) if row["kind"] == "train"] == [1, 2]
    assert find_checkpoint(str(folder / "checkpoint-1"), folder, print)  # written anew


def test_best_model_is_loaded_at_the_end(job, tmp_path, capsys):
    """Best by a figure that falls at every step: the final model is the first checkpoint's, and so are its figures."""
    folder = tmp_path / "out"
    words = [
        *job, "--max_steps", "3", "--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", "1",
        "--save_steps", "1", "--metric_for_best_model", "avg_logps/chosen", "--greater_is_better", "false",
        "--output_dir", str(folder),
    ]  # fmt: skip
    assert main(words) == 0
    evaluations = [row["avg_logps/chosen"] for row in rows(folder) if row["kind"] == "eval"][:4]
    assert evaluations[1] == min(evaluations[1:])
    assert "best after step 1:" in capsys.readouterr().out
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(f).state_dict() for f in (folder, folder / "checkpoint-1")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 1
    assert summary["changes"]["avg_logps/chosen"]["after"] == pytest.approx(evaluations[1], rel=1e-5)


def test_ctrl_c_without_checkpoints_saves_none(job, tmp_path, monkeypatch, capsys):
    interrupted_after(3, monkeypatch)
    assert main([*job, "--save_strategy", "no", "--output_dir", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().out
    assert "stopping after this step, without a checkpoint" in said
    assert "stopped after step 4; no checkpoint, as save_strategy is no" in said
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_ctrl_c_before_the_first_step_stops_at_once(job, tmp_path, monkeypatch):
    """During the first evaluation there is nothing to save, and no step to wait for."""
    step = PreferenceTrainer.prediction_step

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(PreferenceTrainer, "prediction_step", interrupted)
    assert main([*job, "--output_dir", str(tmp_path / "out")]) == 130
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    monkeypatch.undo()
    assert main([*job, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]) == 0  # no step was lost


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "out/checkpoint-4"], ["--resume=out/checkpoint-4"]])
def test_printed_command_drops_resume_and_its_value(monkeypatch, resume):
    monkeypatch.setattr(sys, "argv", ["/bin/asft", "train", "--data", "a b", *resume, "--max_steps", "2"])
    assert command() == "asft train --data 'a b' --max_steps 2"


def test_lora_and_going_on_with_an_adapter(job, tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    first, second = tmp_path / "first", tmp_path / "second"
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--objective", "dpo"]
    short = [*job, "--max_steps", "2"]
    assert main([*short, *lora, "--output_dir", str(first)]) == 0
    assert (first / "adapter_config.json").is_file()
    again = [*short, "--model", str(first), "--objective", "dpo", "--output_dir", str(second)]
    assert main(again) == 0
    assert rows(second)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # the reference is the adapter as it came
    assert rows(second)[0]["logps/chosen"] == pytest.approx(rows(first)[-1]["logps/chosen"], rel=1e-5)


@pytest.mark.parametrize("given", [["q_proj"], ["q_proj", "v_proj"], "all-linear", r".*\.q_proj"])
def test_one_module_for_lora_is_a_name_and_no_pattern(given):
    assert ModelArguments(lora_target_modules=given).lora_target_modules == given


def test_settings_may_stand_in_yaml(job, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"objective: orpo\nobjective_args: [lam=0.5]\noutput_dir: {tmp_path / 'out'}\nmax_steps: 1\n")
    assert main([*job[:-10], *job[-8:], "--config", str(config)]) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings["objective"].startswith("ORPO(lam=0.5")


def test_dry_run_says_what_would_be_and_does_nothing(job, tmp_path, capsys):
    assert main([*job, "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "carry loss" in said
    assert "steps: 8 of 2 pairs" in said
    assert "tokens a second" in said
    assert "GiB" in said
    assert "head and loss: 0.1 MiB of it, most of it " in said
    assert "Say red 0: ⟦red<eos>⟧" in said
    assert not (tmp_path / "out").exists()


def test_help_shows_ours_first_and_each_name_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    titles = [line[:-1] for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:4] == ["options", "model", "data and run", "objective and head"]
    assert {"method dnpo", "method fpo", "method sapo"} <= set(titles[4:])
    assert titles[-3:] == ["adapters and quantisation", "TRL's DPOConfig", "transformers' TrainingArguments"]
    where = [
        said.index(f"\n  --{name} ") for name in ("model_name_or_path", "output_dir", "objective", "learning_rate")
    ]
    assert where == sorted(where)
    assert "--learning-rate" not in said
    assert len(said[: said.index("\n\n")].splitlines()) == 1  # usage


CONFIGS = {
    "a: b: c": "cannot be read: mapping values are not allowed here",
    "- 1": "is not what an option is called, a colon and its value",
    "lerning_rate: 1": "lerning_rate: no such option; did you mean learning_rate?",
    "torch_dtype: auto": "torch_dtype: no such option; did you mean dtype?",
    "model: x": "model: no such option; did you mean model_name_or_path?",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_what_is_wrong_with_a_config_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\n")
    assert main([f"--config={path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("asft train: config: ") == 1
    assert CONFIGS[text] in said.splitlines()[-1]


@pytest.mark.parametrize(
    "names",
    [("optimizer.bin",), ("optimizer_0",), ("global_step7",), ("optimizer.pt", "scheduler.pt", "pytorch_model.bin")],
)
def test_checkpoints_of_every_engine_are_complete(tmp_path, names):
    """FSDP's whole and in shards, DeepSpeed's, and the Trainer's own."""
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    with pytest.raises(InputError, match="no complete checkpoint"):
        find_checkpoint("last", tmp_path, print)
    for name in names:
        torch.save({}, checkpoint / name)
    assert find_checkpoint("last", tmp_path, print) == checkpoint


def test_one_value_of_a_list_needs_no_brackets_in_yaml(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: a.jsonl\nobjective_args: lam=0.5\nobjective: orpo\nuse_cpu: true\n")
    data, settings, _ = parse(["--config", str(config)], {})
    assert (data.dataset_name, settings.objective_args) == (["a.jsonl"], ["lam=0.5"])


@pytest.mark.parametrize("given", ["objective_args: [beta=0.3]", "beta: 0.3"])
def test_parameters_of_a_files_objective_are_not_anothers(tmp_path, given):
    config, name = tmp_path / "run.yaml", given.partition(":")[0]
    config.write_text(f"dataset_name: a.jsonl\nuse_cpu: true\nobjective: dpo\n{given}\n")
    words = ["--config", str(config), "--objective", "asft"]
    with pytest.raises(InputError, match=f"{name}: got .* for its objective 'dpo', need --{name} on the command line"):
        parse(words, {})
    own = ["lam=0.5"] if name == "objective_args" else ["0.5"]
    assert parse([*words, f"--{name}", *own], {})[1].build_objective()
    assert parse([*words[:2], "--objective=dpo"], {})[1].build_objective() == DPO(beta=0.3)


@pytest.mark.parametrize("words", [["--config", "no.yaml"], ["--config"], ["--config", "a", "--config", "b"]])
def test_a_config_that_is_not_one_file_is_one_line(capsys, words):
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("asft train: config: ")


def test_ctrl_c_ahead_of_training_promises_no_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr("asft_kernels.cli.train.parse", Mock(side_effect=KeyboardInterrupt))
    assert main([]) == 130
    assert "in --output_dir, or begins again without one\n" in capsys.readouterr().err


BAD = [
    (["--lerning_rate", "1"], "--lerning_rate: no such option; did you mean --learning_rate?"),
    (["--warmup_ratio=0.1"], "--warmup_ratio: no such option; did you mean --warmup_steps (below 1: a share"),
    (["--torch-dtype", "auto"], "--torch_dtype: no such option; did you mean --dtype?"),
    (["--qqzzqq"], "--qqzzqq: no such option; asft train --help lists the options"),
    (["--resume", "a", "b"], "got 'b' behind no option"),
    (["--learning_rate", "abc"], "argument --learning_rate: invalid float value: 'abc'"),
    (["--objective_args", "lam=-1"], "objective: asft: lam: got -1, need a finite number >= 0"),
    (["--objective", "dpo(bta=1) + sft"], "objective: dpo: got the parameter 'bta', need one of beta, "),
    (["--beta", "0"], "objective: asft: beta: got 0.0, need a finite number > 0"),
    (["--loss_type", "sigmoid"], "loss_type: got 'sigmoid', which is called objective here: need objective='dpo'"),
    (["--max_length", "999"], "got 999, need at most 256, the model's positions"),
    (["--eval_every_nth", "1"], "eval_every_nth: got 1, need at least 2"),
    (["--eval_data", "x.jsonl"], "eval_dataset_name, eval_every_nth: got both, need one"),
    (["--label_smoothing_factor", "0.1"], "label_smoothing_factor: got 0.1, need 0: the loss"),
    (["--data", "no.jsonl"], "no.jsonl"),
    (["--strict"], "--strict is on; first: line 31"),
    (["--model", "."], "'.' cannot be loaded as a causal language model"),
    (["--model", "no-such-folder"], "no such folder, and no hub name either"),
    (["--report_to", "wandb"], "wandb"),
    (["--model_init_kwargs", '{"output_loading_info": true}'], "got 'output_loading_info', need it left out"),
    (["--model_init_kwargs", '{"dtype": 5}'], "model_init_kwargs: dtype: got 5, need one of float32"),
    (["--model_init_kwargs", "{"], "model_init_kwargs: got '{', need JSON ("),
    (["--model_init_kwargs", '{"foo": 1}'], "model_init_kwargs: got {'foo': 1}, with which "),
    (["--model_init_kwargs", '{"dtype": "float16"}'], "dtype: got 'float16', need it in --dtype alone, which is 'flo"),
    (["--model_init_kwargs", '{"revision": "v2"}'], "revision: got 'v2', need it in --model_revision alone, which is"),
    (["--model_init_kwargs", '{"num_hidden_layers": 1}'], "(weights with model.layers.1.input_layernorm.weight and 8"),
    (["--model_init_kwargs", '{"num_hidden_layers": 3}'], "(weights without model.layers.2.input_layernorm.weight and"),
    (
        ["--model_init_kwargs", '{"hidden_size": 8, "ignore_mismatched_sizes": true}'],
        "(weights without model.embed_tokens.weight and",
    ),
    (["--attn_implementation", "foo"], "attn_implementation: got 'foo', with which "),
    (["--eval_every_nth", "500"], "leaves 30 pairs for training and 0 for evaluation"),
    (["--output_dir", __file__], "is a file, need a folder"),
]


if find_spec("deepspeed") is None:
    BAD.append((["--deepspeed", "zero3.json"], "deepspeed: not installed, need it for a DeepSpeed config; pip"))


@pytest.mark.parametrize(("extra", "message"), BAD, ids=[" ".join(words)[:40] for words, _ in BAD])
def test_bad_input_is_one_line_that_says_what_to_do(job, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    assert main([*job, "--output_dir", str(tmp_path / "out"), *extra]) == 2
    said = capsys.readouterr().err
    assert said.count("asft train: ") == 1
    assert message in said
    assert "usage:" not in said
    assert "Traceback" not in said


def test_evaluation_needs_pairs(job, tmp_path, capsys):
    at = job.index("--eval_every_nth")
    words = [*job[:at], *job[at + 2 :], "--eval_strategy", "steps", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "eval_strategy: got 'steps' without pairs to evaluate on; add --eval_every_nth" in capsys.readouterr().err


def test_what_is_likely_a_mistake_is_named(job, tmp_path, capsys, monkeypatch):
    data = job[job.index("--dataset_name") + 1]
    at = job.index("--eval_every_nth")
    words = [*job[:at], *job[at + 2 :], "--eval_dataset_name", data, "--use_peft", "--dry_run"]
    rate = words.index("--learning_rate")
    words = [*words[:rate], *words[rate + 2 :], "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "30 of 30 evaluation pairs are training pairs, too" in said
    assert "learning_rate 1e-06, TRL's default, is next to nothing for adapters" in said
    monkeypatch.setattr("asft_kernels.training.run.find_spec", lambda name: None)
    assert main([*words, "--load_in_4bit"]) == 2
    assert "load_in_4bit: needs bitsandbytes, which is not installed" in capsys.readouterr().err


def test_data_is_checked_before_the_model_is_loaded(job, tmp_path, capsys, monkeypatch):
    loaded = Mock(side_effect=AssertionError("loaded"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    path = write_lines(tmp_path / "bad.jsonl", ['{"prompt": "Say it"}'])
    assert main([*job, "--data", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "no usable pair; first: line 1" in capsys.readouterr().err


def test_change_is_paired():
    """Margins 1, 2, 3 -> 2, 4, 3: differences 1, 2, 0: mean 1, standard error 1 / sqrt(3)."""
    import numpy as np

    def table(margins):
        return Evaluation(np.array([[-1.0, -2.0, m, 1.0, 1.0] for m in margins] + [[0.0] * 5]))

    result = change(table([1, 2, 3]), table([2, 4, 3]))["log_odds/margins"]
    assert result == pytest.approx({"before": 2, "after": 3, "change": 1, "standard_error": 3**-0.5})


def test_a_file_to_evaluate_on_has_no_split(job, tmp_path, capsys):
    held_out = write_lines(tmp_path / "held_out.jsonl", pairs(3))
    at = job.index("--eval_every_nth")
    words = [*job[:at], *job[at + 2 :], "--output_dir", str(tmp_path / "out"), "--dry_run",
             "--eval_dataset_name", str(held_out)]  # fmt: skip
    assert main(words) == 0
    assert "30 pairs for training, 3 for evaluation" in capsys.readouterr().out
    assert main([*words, "--dataset_test_split", "validation"]) == 2
    assert "split: got 'validation'" in capsys.readouterr().err


def test_the_digest_of_pairs_holds_what_they_say_of_a_reference():
    """A run that went on with other log-probabilities of the reference would be another one; so would a row twice."""
    rows = {"id": ["a" * 64, "b" * 64], "line": [1, 2], "prompt": ["x", "y"]}
    sums = {f"ref_{side}_logps": [-3.0, -4.0] for side in ("chosen", "rejected")}
    plain, brought = Dataset.from_dict(rows), Dataset.from_dict(rows | sums)
    other = Dataset.from_dict(rows | sums | {"ref_chosen_logps": [-3.0, -4.5]})
    digests = {run_folder.digest_of_pairs(x) for x in (plain, brought, other, plain.select([0, 1, 1]))}
    assert len(digests) == 4
    first, second = (run_folder._ids_of_lines(x) for x in (brought, other))
    assert first["1"] == second["1"]
    assert first["2"] != second["2"]


def test_an_evaluation_set_without_rows_brings_no_reference():
    empty = Dataset.from_dict({"ref_chosen_logps": [], "ref_rejected_logps": []})
    require_references(get_objective("dpo"), None, [empty])


def test_a_model_that_lacks_weights_is_blamed_on_it_and_spare_ones_are_no_fault_of_a_keyword(tmp_path):
    """Beside a keyword that changes no layer; of one that drops layers the weights are named above."""
    from safetensors.torch import load_file, save_file

    def changed(name, change):
        folder = saved_tiny_model(tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    lacking = changed("lacking", lambda weights: weights.pop("model.norm.weight"))
    for keywords, begins in (
        ({"attn_implementation": "eager"}, "--model: "),
        ({"use_cache": False}, "--model, model_"),
    ):
        message = begins + ".*weights without model.norm.weight, which would be random"
        both = AutoModelForCausalLM.from_pretrained(lacking, **keywords, output_loading_info=True)
        with pytest.raises(InputError, match=message), loading(lacking, keywords):
            with_all_weights(*both, keywords)
    spare = changed("spare", lambda weights: weights.update({"v_head.weight": torch.zeros(2)}))
    both = AutoModelForCausalLM.from_pretrained(spare, use_cache=False, output_loading_info=True)
    assert both[1]["unexpected_keys"]
    assert with_all_weights(*both, {"use_cache": False}) is both[0]


def test_references_are_counted_in_every_row():
    mrpo, rows = get_objective("mrpo(alpha=(0.5, 0.5))"), Dataset.from_dict({"ref_chosen_logps": [[1.0, 2.0], [1.0]]})
    require_references(mrpo, None, [rows.select([0])])
    with pytest.raises(InputError, match="mrpo: alpha: got 2 weights for 1 references"):
        require_references(mrpo, None, [rows])
