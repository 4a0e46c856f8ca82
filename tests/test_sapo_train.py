"""`python -m asft_kernels.methods.sapo` from arguments to files: each loss, the order of a step, resume, Ctrl-C, errors."""

import json
import os
import shutil
import signal

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("accelerate", reason="needs the train extra: accelerate")
pytest.importorskip("matplotlib", reason="needs the train extra: matplotlib")

from asft_kernels.train.arguments import RunArguments
from asft_kernels.train.metrics import MetricsFile

from asft_kernels.data import PairCollator
from asft_kernels.errors import InputError
from asft_kernels.methods.sapo import main
from asft_kernels.methods.sapo.buffer import ReplayBuffer
from asft_kernels.methods.sapo.data import load_chosen
from asft_kernels.methods.sapo.ema import MovingModels
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.methods.sapo.trainer import SapoTrainer, sequence_logps
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import get_objective
from tiny_lm import pairs, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

TIMES = {"tokens_per_second", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


def chosen_rows(count):
    return [{"prompt": row["prompt"], "chosen": row["chosen"] * 2} for row in pairs(count)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Micro-batches of 2, two a step; answers of 6 to 36 tokens, segments of up to 4."""
    folder = tmp_path_factory.mktemp("job")
    model = saved_tiny_model(folder / "model", attention_dropout=0.1)
    data = write_lines(folder / "chosen.jsonl", [*chosen_rows(20), {"prompt": "no answer"}])
    return [
        *("--model", str(model), "--data", str(data), "--max-length", "64", "--max-prompt-length", "32"),
        *("--learning-rate", "1e-2", "--max-steps", "6", "--per-device-train-batch-size", "2"),
        *("--gradient-accumulation-steps", "2", "--token-generate-length", "4", "--ref-sync-steps", "2"),
        *("--objective", "dpo", "--disable-tqdm", "true"),
    ]


@pytest.fixture(scope="module")
def whole_run(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main([*job, "--output-dir", str(folder)]) == 0
    return folder


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("objective", ["dpo", "orpo", "asft"])
def test_each_loss_trains(job, tmp_path, objective, capsys):
    folder = tmp_path / "out"
    assert main([*job, "--objective", objective, "--max-steps", "3", "--output-dir", str(folder)]) == 0
    train = rows(folder)
    assert [row["step"] for row in train] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and row["loss"] == row["loss"] for row in train)
    assert [row["buffer_size"] for row in train] == [4, 8, 12]
    assert [row["pairs"] for row in train] == [4, 4, 4]
    assert all(0 <= row["unchanged_share"] <= 1 for row in train)
    assert (folder / "model.safetensors").is_file()
    assert (folder / "curves.png").is_file()
    state = torch.load(next(folder.glob("checkpoint-*")) / "sapo_models.pt", weights_only=True)
    assert (state["reference"] is not None) == (objective == "dpo")
    said = capsys.readouterr().out
    assert "21 rows, 20 kept, 1 left out" in said
    assert "missing key 'chosen'" in said


def test_dpo_begins_at_log_2(whole_run):
    """Before the first step the reference is the policy but for dropout: without it the margin would be exactly 0."""
    assert rows(whole_run)[0]["loss"] == pytest.approx(0.693, abs=0.05)
    assert "reward_margin" in rows(whole_run)[0]


def trainer_for(tmp_path, objective="dpo", count=8, nll_on_prompt=False, **options):
    data, _ = load_chosen(
        write_lines(tmp_path / "c.jsonl", chosen_rows(count)), tiny_tokenizer(), max_length=64, max_prompt_length=32
    )
    arguments = RunArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start(None)
    objective = get_objective(objective)
    model = PreferenceModel(tiny_model(), objective)
    models = MovingModels(model, needs_reference=objective.needs_reference, **options)
    return SapoTrainer(
        model, arguments, tokenizer=tiny_tokenizer(), metrics=metrics, train_dataset=data, models=models,
        buffer=ReplayBuffer(100), regeneration=Regeneration(max_length=64, token_generate_length=4),
        nll_on_prompt=nll_on_prompt,
    )  # fmt: skip


def head(module):
    return module.lm_head.weight.detach().clone()


def test_order_of_a_step(tmp_path, monkeypatch):
    """EMA -> reference -> negatives by the EMA -> loss against the reference; the EMA by hand."""
    trainer = trainer_for(tmp_path, ref_sync_steps=2)
    seen = {"policy": [], "ema": [], "reference": [], "buffered": []}
    write, loss = trainer.writer.generate_ids, trainer.compute_loss

    def writing(*args, **kwargs):
        assert trainer.writer.model is trainer.models.ema.model
        seen["policy"].append(head(trainer.model))
        seen["ema"].append(head(trainer.models.ema))
        seen["buffered"].append(len(trainer.buffer))
        return write(*args, **kwargs)

    def loss_of(model, inputs, *args, **kwargs):
        seen["reference"].append(head(trainer.models.reference))
        assert torch.equal(inputs["ref_logps"], sequence_logps(trainer.models.reference, inputs))
        assert not inputs["ref_logps"].requires_grad
        return loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.writer, "generate_ids", writing)
    monkeypatch.setattr(trainer, "compute_loss", loss_of)
    trainer.train()
    assert seen["buffered"] == [0, 2, 4, 6]
    for entry in trainer.buffer.entries:
        differs = [a != b for a, b in zip(entry["chosen"], entry["rejected"], strict=False)]
        assert 1 <= sum(differs) <= 4
    average = seen["policy"][0]
    for policy, ema in zip(seen["policy"], seen["ema"], strict=True):
        average = torch.lerp(average, policy, 0.5)
        assert torch.equal(ema, average)
    assert not torch.equal(seen["ema"][1], seen["policy"][1])
    same = [torch.equal(reference, ema) for reference, ema in zip(seen["reference"], seen["ema"], strict=True)]
    assert same == [True, False, True, False]
    assert torch.equal(seen["reference"][1], seen["reference"][0])


def test_reference_sums_are_the_models_own():
    """Against log_softmax of the logits in float64; bound: fp32 sums over 10 tokens of size 6, 1e-5 each."""
    model = PreferenceModel(tiny_model())
    batch = PairCollator(0)([{"prompt": [5, 6], "chosen": [7, 8, 1], "rejected": [9, 1]}])
    logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = (logps * (batch["labels"][:, 1:] >= 0)).sum(-1)
    torch.testing.assert_close(sequence_logps(model, batch), expected.detach(), rtol=0, atol=1e-4)


def test_likelihood_over_the_prompt_leaves_padding_out(tmp_path):
    trainer = trainer_for(tmp_path, "orpo", nll_on_prompt=True)
    batch = PairCollator(0)(
        [{"prompt": [5, 6], "chosen": [7, 8, 1], "rejected": [9]}, {"prompt": [5], "chosen": [7, 0], "rejected": [9]}]
    )
    inputs = trainer._prepare_inputs(dict(batch))
    assert inputs["nll_labels"].tolist() == [[5, 6, 7, 8, 1, -100, -100, -100], [5, 7, 0, *[-100] * 5]]
    assert "ref_logps" not in inputs


def test_unchanged_negatives_are_counted_and_give_no_dpo_gradient(tmp_path, monkeypatch):
    """y- = y: D = 0 exactly, loss log 2, gradient 0."""
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(Regeneration, "negatives", lambda self, rows, *_: [list(row["chosen"]) for row in rows])
    trainer.train()
    for row in rows(tmp_path):
        assert row["unchanged_share"] == 1.0
        assert row["loss"] == pytest.approx(0.6931471805599453, rel=1e-6)
    first = rows(tmp_path)[0]
    assert first["grad_norm"] < 1e-6  # chosen and rejected parts cancel up to fp32 rounding


def test_ctrl_c_saves_and_resume_goes_on_identically(job, whole_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    write = MetricsFile.write

    def write_and_interrupt(self, row):
        write(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsFile, "write", write_and_interrupt)
    assert main([*job, "--output-dir", str(folder)]) == 130
    said = capsys.readouterr().out
    assert "stopped after step 3; go on with: python -m asft_kernels.methods.sapo " in said
    monkeypatch.undo()
    torch.manual_seed(99)  # the checkpoint alone decides
    assert main([*job, "--output-dir", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(whole_run)
    ours, theirs = (torch.load(f / "checkpoint-6" / "sapo_models.pt", weights_only=True) for f in (folder, whole_run))
    for part in ("average", "reference"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    buffers = [torch.load(f / "checkpoint-6" / "sapo_buffer_0.pt", weights_only=True) for f in (folder, whole_run)]
    assert buffers[0]["buffer"] == buffers[1]["buffer"]


def test_held_out_pairs_are_evaluated_before_and_after(job, tmp_path, capsys):
    folder = tmp_path / "out"
    held_out = write_lines(tmp_path / "pairs.jsonl", pairs(5))
    run = [*job, "--max-steps", "2", "--eval-data", str(held_out), "--output-dir", str(folder)]
    assert main(run) == 0
    evaluations = [row for row in rows(folder) if row["kind"] == "eval"]
    assert [(row["step"], row["pairs"]) for row in evaluations] == [(0, 5), (2, 5)]
    assert evaluations[0]["loss"] == pytest.approx(0.6931471805599453, rel=1e-6)  # no dropout, reference = policy
    changes = json.loads((folder / "summary.json").read_text())["changes"]
    assert changes["margin"]["after"] == pytest.approx(evaluations[1]["margin"])
    (folder / "summary.json").unlink()
    assert main([*run, "--resume"]) == 0  # nothing but the end is left to do
    again = json.loads((folder / "summary.json").read_text())["changes"]
    assert again["margin"] == pytest.approx(changes["margin"], rel=1e-5)
    assert "paired s.e." in capsys.readouterr().out


def test_resume_refuses_what_would_be_another_experiment(job, whole_run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    resume = [*job, "--output-dir", str(folder), "--resume"]
    for name, value, was in (("ema-beta", "0.9", "0.5"), ("top-k", "3", "50"), ("learning-rate", "1", "0.01")):
        assert main([*resume, f"--{name}", value]) == 2
        assert f"--resume: --{name} was {was}" in capsys.readouterr().err
    newest = folder / "checkpoint-6"
    other = [*job, "--output-dir", str(tmp_path / "other"), "--resume", str(newest)]
    assert main(other) == 2
    assert "need a checkpoint of --output-dir" in capsys.readouterr().err
    (newest / "sapo_buffer_0.pt").unlink()
    assert main([*resume, "--max-steps", "8"]) == 2
    assert "has no sapo_buffer_0.pt, need a checkpoint of SAPO" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ema-beta", "1"], "--ema-beta: got 1.0, need a number from 0 to below 1"),
        (["--ref-sync-steps", "0"], "--ref-sync-steps: got 0, need at least 1 step"),
        (["--temperature", "0"], "--temperature: got 0.0, need a number > 0"),
        (["--top-p", "2"], "--top-k, top-p: got 50, 2.0"),
        (["--max-replay-buffer-size", "0"], "--max-replay-buffer-size: got 0, need at least 1"),
        (["--ref-scores", "x"], "--ref-scores: got files, need none: the reference of SAPO moves"),
        (["--objective", "kto"], "'kto' needs desirable"),
        (["--objective", "sft"], "'sft' is not of pairs"),
        (["--max-length", "512"], "--max-length: got 512, need at most 256, the model's positions"),
        (["--data", "nowhere"], "'nowhere', no such file"),
    ],
)
def test_bad_arguments(job, tmp_path, capsys, extra, message):
    assert main([*job, "--output-dir", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err


def test_chosen_side_of_any_row(tmp_path):
    """What stands as rejected does not matter, not even its type; --strict refuses what has no chosen answer."""
    same = [{"prompt": "p ", "chosen": "yes", **extra} for extra in ({}, {"rejected": 3}, {"rejected": "no"})]
    file = write_lines(tmp_path / "rows.jsonl", same)
    limits = dict(max_length=64, max_prompt_length=32)
    data, _ = load_chosen(file, tiny_tokenizer(), **limits)
    assert len({(tuple(row["prompt"]), tuple(row["chosen"])) for row in data}) == 1
    write_lines(file, [*same, {"prompt": "p"}])
    with pytest.raises(InputError, match=r"1 rows cannot be used, and --strict is on; first: line 4: missing key"):
        load_chosen(file, tiny_tokenizer(), **limits, strict=True)
    with pytest.raises(InputError, match=r"no usable row; first: line 1: missing key 'chosen'"):
        load_chosen(write_lines(file, [{"prompt": "p"}]), tiny_tokenizer(), **limits)


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("asft_kernels.methods.sapo.missing_extra", lambda: "transformers: not installed")
    assert main([]) == 2
    assert "sapo: transformers: not installed" in capsys.readouterr().err
