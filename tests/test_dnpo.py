"""DNPO: both losses, labelling, the alternation on a tiny model, and its command."""

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from asft_kernels.cli.data import main as data_main
from asft_kernels.data import PairCollator, load_pairs
from asft_kernels.methods.dnpo import main
from asft_kernels.methods.dnpo import trainer as trainer_module
from asft_kernels.methods.dnpo.labelling import label_pair
from asft_kernels.methods.dnpo.run import _order
from asft_kernels.methods.dnpo.trainer import INITIAL_STD, DNPOTrainer
from asft_kernels.objectives import DNPO, DPO, get_objective
from asft_kernels.sequence import Logps
from tiny_lm import pairs, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

DOUBLE = 1e-14  # a handful of float64 roundings


def policy_of(sums, lengths=None) -> Logps:
    sums = torch.tensor(sums, dtype=torch.float64, requires_grad=True)
    return Logps(sums, torch.full(sums.shape, 3) if lengths is None else torch.tensor(lengths))


# The objective


def test_worked_numbers():
    """u = 0.5 ((-2 + 3) - (-4 + 5)) = 0; a noise that lowers the reference by 4 makes u = 0.5 (1 - 5) = -2."""
    policy = policy_of([-2.0, -4.0])
    clean = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    noisy = torch.tensor([-3.0, -9.0], dtype=torch.float64)
    assert DNPO(lam=0.5)(policy, clean).loss.item() == pytest.approx(math.log(2), rel=DOUBLE)
    assert DNPO(lam=0.5)(policy, noisy).loss.item() == pytest.approx(2 + math.log1p(math.exp(-2)), rel=DOUBLE)
    power = torch.tensor([0.3], dtype=torch.float64)
    loss = DNPO(lam=0.5, alpha=2.0).noise_loss(policy, clean, noisy[1:], power)
    assert loss.item() == pytest.approx(0.6 - 2 - math.log1p(math.exp(-2)), rel=DOUBLE)


def test_without_noise_it_is_dpo():
    policy, ref = policy_of([-2.0, -7.0, -1.0, -400.0]), -10 * torch.rand(4, dtype=torch.float64)
    ours, dpo = DNPO(lam=0.3)(policy, ref), DPO(beta=0.3)(policy, ref)
    assert torch.equal(ours.loss, dpo.loss)
    assert ours.metrics.keys() == dpo.metrics.keys()


@pytest.mark.parametrize("margin", [-500.0, -3.0, 0.0, 2.0, 500.0])
def test_derivatives(margin):
    """g = sigmoid(-u): -lam g to S_w, +lam g to S_l; the noise's loss gives +lam g to the noisy sum, alpha to power."""
    lam = 0.2
    policy, ref = policy_of([margin / lam - 1.0, -1.0]), torch.full((2,), -1.0, dtype=torch.float64)
    g = 1 / (1 + math.exp(margin))
    (grad,) = torch.autograd.grad(DNPO(lam=lam)(policy, ref).loss.sum(), policy.sum)
    assert grad.tolist() == pytest.approx([-lam * g, lam * g], rel=1e-12, abs=1e-300)
    noisy, power = ref[1:].clone().requires_grad_(), torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    ref.requires_grad_()
    loss = DNPO(lam=lam, alpha=0.7).noise_loss(policy, ref, noisy, power)
    grads = torch.autograd.grad(loss.sum(), (noisy, power, policy.sum, ref), allow_unused=True)
    assert grads[0].item() == pytest.approx(lam * g, rel=1e-12, abs=1e-300)
    assert grads[1].item() == 0.7
    assert grads[2:] == (None, None)  # the model does not see the noise's loss


def test_errors():
    with pytest.raises(ValueError, match="dnpo: lam: got 0, need a finite number > 0"):
        get_objective("dnpo", lam=0)
    with pytest.raises(ValueError, match="dnpo: alpha: got -1, need a finite number >= 0"):
        get_objective("dnpo", alpha=-1)
    policy, ref, one = policy_of([-1.0, -2.0]), torch.zeros(2), torch.zeros(1)
    with pytest.raises(ValueError, match=r"dnpo: ref_logps: got \(3, 2\), need a tensor \(2,\)"):
        DNPO()(policy, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"dnpo: noisy_rejected_logps: got \(2,\), need a tensor \(1,\)"):
        DNPO().noise_loss(policy, ref, ref, one)
    with pytest.raises(ValueError, match=r"dnpo: noise_power: got \(\), need a tensor \(1,\)"):
        DNPO().noise_loss(policy, ref, one, torch.zeros(()))


# Labelling


def test_the_better_answer_is_chosen_and_a_tie_is_human():
    assert label_pair("h", "g", 1.0, 2) == ("g", "h", "generated")
    assert label_pair("h", "g", -1.0, -2.0) == ("h", "g", "human")
    assert label_pair("h", "g", 1.0, 1.0) == ("h", "g", "human")


def test_labelling_command(tmp_path, capsys):
    row = {"prompt": "Why?", "human": "as it is", "generated": "so", "human_score": 3, "generated_score": 7.5}
    rows = [
        row,
        {**row, "human_score": 7.5},
        {**row, "generated_score": float("nan")},
        {**row, "generated": row["human"]},
        {name: value for name, value in row.items() if name != "human_score"},
        {**row, "generated": 3},
    ]
    output = tmp_path / "pairs.jsonl"
    assert data_main(["dnpo", str(write_lines(tmp_path / "scored.jsonl", rows)), str(output)]) == 0
    text = capsys.readouterr().out
    for part in (
        "6 rows, 3 bad; 2 rows written",
        "number that is not finite: 1 (line 3)",
        "left out, both answers are the same: 1 (line 4)",
        "missing key 'human_score': 1 (line 5)",
        "wrong type: 1 (line 6)",
        "the generated answer is the better one: 1 (line 1)",
        "equal scores, the human answer is chosen: 1 (line 2)",
    ):
        assert part in text
    assert [json.loads(line) for line in output.read_text().splitlines()] == [
        {"prompt": "Why?", "chosen": "so", "rejected": "as it is", "chosen_from": "generated"},
        {"prompt": "Why?", "chosen": "as it is", "rejected": "so", "chosen_from": "human"},
    ]
    assert len(load_pairs(output, tiny_tokenizer())[0]) == 2


# The alternation


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    path = write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", pairs(8))
    dataset, _ = load_pairs(path, tiny_tokenizer(), max_length=64)
    return [PairCollator(0)([dataset[i] for i in range(start, start + 4)]) for start in (0, 4)]


def trainer_of(lam=1.0, alpha=1.0, **options) -> DNPOTrainer:
    rates = {"learning_rate": 3e-3, "noise_learning_rate": 1e-2, **options}
    return DNPOTrainer(tiny_model(), DNPO(lam=lam, alpha=alpha), **rates)


def noise_power(trainer, batches) -> float:
    """Mean square of the noise on the first batch's rejected rows, whatever draw."""
    hidden = trainer._hidden(trainer.reference, batches[0]).chunk(2)[1]
    labels = batches[0]["labels"].chunk(2)[1]
    return trainer.noise_head(hidden[:, :-1][labels[:, 1:] >= 0]).square().mean().item()


def test_margin_moves_and_the_reference_stays(batches):
    trainer = trainer_of()
    before = {name: value.clone() for name, value in trainer.reference.state_dict().items()}
    start = trainer.evaluate(batches)
    assert start["reward_margin"] == pytest.approx(0, abs=1e-5)  # the policy is its reference
    assert start["clean_loss"] == pytest.approx(math.log(2), abs=1e-5)
    for step in range(8):
        figures = trainer.step(batches[step % 2])
        assert all(map(math.isfinite, figures.values()))
    end = trainer.evaluate(batches)
    assert end["pairs"] == 8
    assert end["reward_margin"] > 0.5
    assert end["clean_loss"] < start["clean_loss"] - 0.1
    assert trainer.policy.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.reference.state_dict().items())


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.01, 0.5, math.inf), (1.0, 0.001, 0.02)])
def test_noise_grows_freely_or_settles_by_alpha(batches, alpha, low, high):
    """Against a model that stands still, from 0.01 on: a weak constraint lets it grow, the default holds it."""
    trainer = trainer_of(lam=0.1, alpha=alpha, learning_rate=0.0, noise_learning_rate=3e-3)
    assert noise_power(trainer, batches) == pytest.approx(INITIAL_STD**2, rel=1e-5)
    for _ in range(100):
        assert math.isfinite(trainer.step(batches[0])["noise_loss"])
    for _ in range(20):  # it is where it stays, not on its way there
        figures = trainer.step(batches[0])
        assert low < figures["noise_power"] < high
    assert figures["noise_power"] == pytest.approx(noise_power(trainer, batches), rel=0.2)


def test_each_side_moves_alone(batches):
    still = trainer_of(learning_rate=0.0)
    start = [p.detach().clone() for p in still.policy.parameters()]
    noise = still.noise_head.weight.detach().clone()
    still.step(batches[0])
    assert all(torch.equal(p, q) for p, q in zip(still.policy.parameters(), start, strict=True))
    assert not torch.equal(still.noise_head.weight, noise)
    quiet = trainer_of(noise_learning_rate=0.0)
    quiet.step(batches[0])
    assert torch.equal(quiet.noise_head.weight, noise)
    assert not torch.equal(next(quiet.policy.parameters()), start[0])


def test_without_noise_a_step_is_dpos(batches, monkeypatch):
    """std = 0 and standing still: the same weights as a step of DPO with beta = lam, gradient clipping included."""
    monkeypatch.setattr(trainer_module, "INITIAL_STD", 0.0)
    trainer = trainer_of(lam=0.3, noise_learning_rate=0.0)
    figures = trainer.step(batches[0])
    assert figures["reference_shift"] == pytest.approx(0, abs=1e-4)
    assert figures["loss"] == pytest.approx(figures["clean_loss"], abs=1e-5)
    other = trainer_of(lam=0.3)
    ref = other._sequences(other.reference, other._hidden(other.reference, batches[0]), batches[0]["labels"])
    policy = other._sequences(other.policy, other._hidden(other.policy, batches[0]), batches[0]["labels"])
    DPO(beta=0.3)(policy, ref.sum.detach()).loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(other.parameters, 1.0)
    other.optimizer.step()
    for a, b in zip(trainer.policy.parameters(), other.policy.parameters(), strict=True):
        # AdamW's first step is the rate times the gradient's sign: entries near 0 may differ by twice that.
        close = ((a - b).abs() < 1e-5).double().mean()
        assert close > 0.99


def test_the_model_trains_against_the_noisy_reference(batches, monkeypatch):
    """u with noise is u without it, plus lam times what the noise did to the rejected answer's sum."""
    monkeypatch.setattr(trainer_module, "INITIAL_STD", 3.0)
    figures = trainer_of(lam=0.3).step(batches[0])
    assert abs(figures["reference_shift"]) > 1
    moved = 0.3 * figures["reference_shift"]
    assert figures["noisy_reward_margin"] == pytest.approx(figures["reward_margin"] + moved, abs=1e-4)
    assert abs(figures["loss"] - figures["clean_loss"]) > 0.1


def test_draws_differ_by_step_and_repeat_by_seed(batches):
    runs = [[trainer.step(batch)["reference_shift"] for batch in (batches[0], batches[0])]
            for trainer in (trainer_of(seed=1), trainer_of(seed=1), trainer_of(seed=2))]  # fmt: skip
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_pairs_without_a_token_do_not_count(batches):
    batch = {name: value.clone() for name, value in batches[0].items()}
    batch["labels"][5] = -100  # the second pair's rejected answer
    kept = [0, 2, 3, 4, 6, 7]
    fewer = {name: value[kept] for name, value in batches[0].items()}
    figures = [trainer_of(noise_learning_rate=0.0).step(b) for b in (batch, fewer)]
    for name in ("clean_loss", "chosen_avg_logp", "rejected_avg_logp"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-5)
    assert all(map(math.isfinite, figures[0].values()))


# The command


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    model = saved_tiny_model(folder / "model")
    data = write_lines(folder / "pairs.jsonl", [*pairs(24), "{"])
    limits = ["--max-length", "64", "--max-prompt-length", "32", "--batch-size", "4", "--lam", "1"]
    return ["--model", str(model), "--data", str(data), *limits, "--learning-rate", "3e-3"]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_command_trains_and_drops_the_noise(job, tmp_path, capsys):
    from safetensors.torch import load_file

    folder = tmp_path / "out"
    assert main([*job, "--max-steps", "8", "--eval-every-nth", "8", "--output-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "25 rows, 24 kept, 1 left out" in out
    assert "done after step 8" in out
    written = rows(folder)
    assert [row["step"] for row in written] == [0, *range(1, 9), 8]
    assert written[-1]["reward_margin"] > written[0]["reward_margin"] + 0.1
    assert {"loss", "noise_loss", "noise_power", "reference_shift", "noisy_reward_margin"} <= written[1].keys()
    original, saved = (load_file(path / "model.safetensors") for path in (Path(job[1]), folder))
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in original.items()}
    assert any(not torch.equal(saved[name], original[name]) for name in saved)
    assert (folder / "tokenizer.json").is_file()
    assert main([*job, "--output-dir", str(folder)]) == 2
    assert "holds a run already; add --resume to go on with it, or name another folder" in capsys.readouterr().err


def test_one_pass_over_the_pairs_is_the_default(job, tmp_path):
    assert main([*job, "--output-dir", str(tmp_path / "out")]) == 0
    assert len(rows(tmp_path / "out")) == 6


def test_ctrl_c_ends_after_the_step_with_the_model_saved(job, tmp_path, capsys, monkeypatch):
    step = DNPOTrainer.step

    def interrupted(self, batch):
        if self.steps_done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        self.steps_done += 1
        return step(self, batch)

    monkeypatch.setattr(DNPOTrainer, "steps_done", 0, raising=False)
    monkeypatch.setattr(DNPOTrainer, "step", interrupted)
    folder = tmp_path / "out"
    assert main([*job, "--max-steps", "50", "--output-dir", str(folder)]) == 130
    assert "stopped by Ctrl-C after step 2; go on with: python -m asft_kernels.methods.dnpo" in capsys.readouterr().out
    assert len(rows(folder)) == 2
    assert (folder / "model.safetensors").is_file()


# Going on after an interruption

RESUMED = ["--max-steps", "9", "--save-steps", "4", "--eval-every-nth", "8"]


@pytest.fixture(scope="module")
def dropout_job(job, tmp_path_factory):
    """As job, with a model that draws from torch's own generator at every step; 9 steps are a pass and a half."""
    model = saved_tiny_model(tmp_path_factory.mktemp("dropout") / "model", attention_dropout=0.3)
    return ["--model", str(model), *job[2:]]


@pytest.fixture(scope="module")
def whole_run(dropout_job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main([*dropout_job, *RESUMED, "--output-dir", str(folder)]) == 0
    return folder


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def same_run(one, other) -> bool:
    """To the bit in the model, and in the figures of every step."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    same_model = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return same_model and without_time(rows(one)) == without_time(rows(other))


def killed():
    raise RuntimeError("killed")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def at_step(monkeypatch, number, happens) -> None:
    """Before the step of that number is computed, counted from where the run begins or goes on."""
    step = DNPOTrainer.step

    def watched(self, batch):
        self.steps_done += 1
        if self.steps_done == number:
            happens()
        return step(self, batch)

    monkeypatch.setattr(DNPOTrainer, "steps_done", 0, raising=False)
    monkeypatch.setattr(DNPOTrainer, "step", watched)


def test_a_killed_run_goes_on_to_the_same_model(dropout_job, whole_run, tmp_path, monkeypatch):
    """From the checkpoint after step 4, though it wrote figures up to step 7."""
    run = [*dropout_job, *RESUMED, "--output-dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        at_step(patch, 8, killed)
        with pytest.raises(RuntimeError, match="killed"):
            main(run)
    assert rows(tmp_path / "out")[-1]["step"] == 7
    torch.manual_seed(99)  # as another process would stand
    with monkeypatch.context() as patch:
        at_step(patch, 6, killed)  # steps 5 to 9, no more
        assert main([*run, "--resume"]) == 0
    assert same_run(tmp_path / "out", whole_run)


def test_ctrl_c_loses_no_step(dropout_job, whole_run, tmp_path, monkeypatch, capsys):
    run = [*dropout_job, *RESUMED, "--output-dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        at_step(patch, 7, interrupt)
        assert main(run) == 130
    assert "evaluation pairs" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        at_step(patch, 3, killed)  # steps 8 and 9
        assert main([*run, "--resume"]) == 0
    assert same_run(tmp_path / "out", whole_run)
    assert "3 evaluation pairs" in capsys.readouterr().out  # beside the evaluation before the first step


def test_a_finished_run_ends_again_or_goes_on(dropout_job, whole_run, tmp_path, monkeypatch):
    folder, longer = tmp_path / "out", tmp_path / "longer"
    shutil.copytree(whole_run, folder)
    (folder / "model.safetensors").unlink()
    run = [*dropout_job, *RESUMED]
    with monkeypatch.context() as patch:
        at_step(patch, 1, killed)
        assert main([*run, "--output-dir", str(folder), "--resume"]) == 0
    assert same_run(folder, whole_run)
    assert main([*run, "--output-dir", str(folder), "--resume", "--max-steps", "11"]) == 0
    assert main([*run, "--output-dir", str(longer), "--max-steps", "11"]) == 0
    kept = [row for row in rows(folder) if (row["kind"], row["step"]) != ("eval", 9)]  # the shorter run's end
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert same_run(folder, longer)


def test_a_kill_while_it_saves_leaves_the_checkpoint_before(dropout_job, whole_run, tmp_path, monkeypatch):
    run = [*dropout_job, *RESUMED, "--output-dir", str(tmp_path / "out")]
    save, saves = torch.save, []

    def half(content, path):
        saves.append(path)
        if len(saves) == 2:
            Path(path).write_bytes(b"half of it")
            killed()
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(RuntimeError, match="killed"):
            main(run)
    assert main([*run, "--resume"]) == 0
    assert same_run(tmp_path / "out", whole_run)


def test_resume_refuses_what_would_be_another_experiment(dropout_job, whole_run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(whole_run, folder)
    resume = [*dropout_job, *RESUMED, "--output-dir", str(folder), "--resume"]
    changes = {"lam": ("1.0", "2.0"), "noise-learning-rate": ("0.0001", "1.0"), "seed": ("0", "3"),
               "batch-size": ("4", "2"), "eval-every-nth": ("8", "5"), "alpha": ("1.0", "0.5")}  # fmt: skip
    for name, (was, now) in changes.items():
        assert main([*resume, f"--{name}", now]) == 2
        assert f"--resume: --{name} was {was} and is {now} now, need the same" in capsys.readouterr().err
    assert main([*resume, "--max-steps", "8"]) == 2
    assert "--max-steps: got 8, need at least 9, the step of" in capsys.readouterr().err
    data = Path(dropout_job[3])
    text = data.read_text()
    data.write_text(text.splitlines()[0] + "\n" + text)
    code = main(resume)
    data.write_text(text)
    assert code == 2
    assert "--data had 21 pairs for training and has 22 now, need the same pairs" in capsys.readouterr().err
    (folder / "checkpoint.pt").unlink()
    assert main(resume) == 2
    assert "--resume: no checkpoint.pt with its run.json in" in capsys.readouterr().err


def test_each_pass_has_every_pair_in_another_order():
    batches = list(itertools.islice(_order(10, 4, 5, 0), 9))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    passes = [list(itertools.chain(*batches[k : k + 3])) for k in (0, 3, 6)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    for first in range(9):
        assert list(itertools.islice(_order(10, 4, 5, first), 9 - first)) == batches[first:]
    assert next(_order(10, 4, 6, 0)) != batches[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model: got 'nowhere', no such folder"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--lam", "0"], "dnpo: lam: got 0.0, need a finite number > 0"),
        (["--max-length", "4096"], "--max-length: got 4096, need at most 256"),
        (["--eval-every-nth", "1"], "eval_every_nth: got 1, need at least 2"),
    ],
)
def test_bad_input_is_said(job, tmp_path, capsys, arguments, message):
    assert main([*job, *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


SHOWN = ("loss", "reward_margin", "noise_power", "accuracy")


def test_a_loss_that_is_not_finite_ends_the_run(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DNPOTrainer, "step", lambda self, batch: dict.fromkeys(SHOWN, float("nan")))
    assert main([*job, "--output-dir", str(tmp_path / "out")]) == 2
    assert "--learning-rate: the loss is nan after step 1; lower it" in capsys.readouterr().err


def test_missing_packages_are_named(job, capsys, monkeypatch):
    monkeypatch.setattr("asft_kernels.methods.dnpo.missing_extra", lambda needed: "transformers: not installed")
    assert main(job) == 2
    assert capsys.readouterr().err == "dnpo: transformers: not installed\n"
