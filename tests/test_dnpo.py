"""DNPO: both losses, labelling, and the alternation on the trainer."""

import copy
import json
import math

import pytest
import torch

pytest.importorskip("train_extra")
pytest.importorskip("peft", reason="needs the train extra: peft")

import peft
from datasets import Dataset

from asft_kernels import fused_linear_logps
from asft_kernels.cli.data import main as data_main
from asft_kernels.core.sequence import Logps
from asft_kernels.errors import InputError
from asft_kernels.methods.dnpo import hooks
from asft_kernels.methods.dnpo.labelling import label_pair
from asft_kernels.methods.dnpo.noisy_logps import fused_noisy_linear_logps
from asft_kernels.objectives import DNPO, get_objective
from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from asft_kernels.training.hooks import find_method
from rank_processes import launch
from test_preference_trainer import logs, options, rows_that_count_differently, tokenised
from tiny_lm import saved_tiny_model, tiny_model, tiny_tokenizer, write_lines
from train_extra import QUIET

pytestmark = QUIET

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


# The alternation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved_tiny_model(tmp_path_factory.mktemp("model")))


def made(folder, model, *, lam=1.0, alpha=1.0, noise=1e-2, rows=None, lora=None, **changes):
    """One micro-batch of 4 a step, AdamW without decay at a constant rate, unless changes say so."""
    given = dict(
        objective="dnpo", objective_args=[f"lam={lam}", f"alpha={alpha}"], per_device_train_batch_size=4,
        gradient_accumulation_steps=1, learning_rate=3e-3, lr_scheduler_type="constant",
    )  # fmt: skip
    if "objective" in changes:
        given.pop("objective_args")
    evaluation = changes.pop("evaluation", None)
    return PreferenceTrainer(
        model, args=PreferenceConfig(**options(folder, **{**given, **changes})), processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(tokenised()) if rows is None else rows, eval_dataset=evaluation,
        peft_config=lora, method=hooks.Hooks(hooks.Arguments(noise_learning_rate=noise)),
    )  # fmt: skip


def plain_steps(batches, rates, *, lam, alpha, seed):
    """The alternation written out: (losses, noise losses), the policy, the noise head."""
    policy, reference = tiny_model(), tiny_model().requires_grad_(False)
    noise_head = torch.nn.Linear(16, 259)
    torch.nn.init.zeros_(noise_head.weight)
    torch.nn.init.constant_(noise_head.bias, 0.1)
    optimizer, of_noise = (
        torch.optim.AdamW(part.parameters(), lr=rate, weight_decay=0.0)
        for part, rate in zip((policy, noise_head), rates, strict=True)
    )
    objective, generator, found = DNPO(lam=lam, alpha=alpha), torch.Generator().manual_seed(seed), []

    def sequences(model, inputs, labels):
        hidden = model.model(**inputs).last_hidden_state
        logps = fused_linear_logps(hidden, model.lm_head, labels).double().sum(dim=1)
        return hidden, Logps(logps, (labels[:, 1:] != -100).sum(dim=1))

    def noisy(hidden, labels):
        seed = int(torch.randint(2**62, (), generator=generator))
        found = fused_noisy_linear_logps(hidden, reference.lm_head, noise_head, labels, seed=seed)
        sums, power = (x.double().sum(dim=1) for x in found)
        return sums, power / (labels[:, 1:] != -100).sum(dim=1)

    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden, ref = sequences(reference, inputs, labels)
        _, out = sequences(policy, inputs, labels)
        rejected = hidden.chunk(2)[1], labels.chunk(2)[1]
        noise_loss = objective.noise_loss(out, ref.sum, *noisy(*rejected)).mean()
        of_noise.zero_grad()
        noise_loss.backward()
        of_noise.step()
        with torch.no_grad():
            moved, _ = noisy(*rejected)
        loss = objective(out, torch.cat([ref.chosen.sum, moved])).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        found.append((loss.item(), noise_loss.item()))
    return found, policy, noise_head


def test_steps_are_those_of_the_plain_alternation(tmp_path, model, monkeypatch):
    """fp32 throughout; Adam divides by the root of a gradient's square, so that roundings of small ones show."""
    monkeypatch.setattr(hooks, "INITIAL_STD", 0.1)
    trainer = made(tmp_path, model, noise=3e-2)
    kept, batches = [], trainer.method.batches

    def keeping(trainer, incoming):
        kept.extend(copy.deepcopy(incoming))
        return batches(trainer, incoming)

    monkeypatch.setattr(trainer.method, "batches", keeping)
    rows = logs(trainer)
    expected, policy, noise_head = plain_steps(kept, (3e-3, 3e-2), lam=1.0, alpha=1.0, seed=trainer.args.seed)
    for row, (loss, noise_loss) in zip(rows, expected, strict=True):
        # Sums of some -100 in fp32: 1e-5 each, and what Adam makes of it.
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["noise_loss"] == pytest.approx(noise_loss, abs=1e-4)
    for one, other in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        assert (one - other).abs().mean() <= 3e-5  # a hundredth of a step of Adam
    for one, other in zip(trainer.method.noise_head.parameters(), noise_head.parameters(), strict=True):
        assert (one - other).abs().mean() <= 3e-4
    first = rows[0]
    assert first["clean_loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is its reference
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["noise_power"] == pytest.approx(0.01, rel=1e-5)
    shift = first["reference_shift"]  # of the rejected sums, by which the margin with noise differs
    assert shift != 0
    assert first["noisy_rewards/margins"] == pytest.approx(first["rewards/margins"] + shift, abs=1e-4)


def test_the_noise_of_a_step_is_of_all_its_micro_batches(tmp_path, model):
    """Without the margin's part its gradient to a bias is that of mean(std^2): 2 std / V, however a step is split."""
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = made(
            tmp_path / f"{size}", model, lam=1e-9, rows=rows_that_count_differently(), max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        (row,) = logs(trainer)
        assert row["pairs"] == 7
        assert row["noise_power"] == pytest.approx(hooks.INITIAL_STD**2, rel=1e-5)
        grad = trainer.method.noise_head.bias.grad
        torch.testing.assert_close(grad, torch.full_like(grad, 2 * hooks.INITIAL_STD / 259), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("bf16", "layers"), [(False, ["v_proj"]), (True, ["v_proj"]), (False, ["lm_head"])])
def test_with_adapters_the_reference_is_the_model_without_them(tmp_path, model, bf16, layers):
    lora = peft.LoraConfig(target_modules=layers, r=2, task_type="CAUSAL_LM")
    trainer = made(
        tmp_path, model, lora=lora, bf16=bf16, learning_rate=1e-2, evaluation=Dataset.from_list(tokenised(4))
    )
    assert trainer.ref_model is None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    rows = logs(trainer)
    assert rows[0]["clean_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["clean_loss"] < math.log(2) - 1e-3
    assert rows[-1]["noise_power"] != rows[0]["noise_power"]


@pytest.mark.parametrize("bf16", [False, True])
def test_without_noise_it_trains_as_dpo(tmp_path, model, monkeypatch, bf16):
    """std = 0 and standing still: the noisy sums are the reference's own, by the same products."""
    monkeypatch.setattr(hooks, "INITIAL_STD", 0.0)
    ours = logs(made(tmp_path / "dnpo", model, lam=0.3, noise=0.0, bf16=bf16, gradient_accumulation_steps=2))
    given = {"objective": "dpo", "beta": 0.3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    config = options(tmp_path, **given, bf16=bf16, learning_rate=3e-3, lr_scheduler_type="constant")
    dpo = PreferenceTrainer(
        model, args=PreferenceConfig(**config), train_dataset=Dataset.from_list(tokenised()),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    for one, other in zip(ours, logs(dpo), strict=True):
        assert one["reference_shift"] == pytest.approx(0, abs=1e-4)  # fp32 sums of some -100
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_resumes_to_the_bit(tmp_path):
    """Noise, its optimiser and its draws; dropout's numbers are the model's alone."""
    model = str(saved_tiny_model(tmp_path / "model", attention_dropout=0.3))
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2,
             "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}  # fmt: skip
    whole = made(tmp_path / "whole", model, **given)
    expected = logs(whole)
    torch.manual_seed(99)
    again, checkpoint = made(tmp_path / "again", model, **given), tmp_path / "whole" / "checkpoint-2"
    again.train(resume_from_checkpoint=str(checkpoint))
    rows = [row for row in again.state.log_history if "loss" in row]
    names = ("loss", "noise_loss", "noise_power", "reference_shift", "grad_norm")
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in expected]
    for part in ("model", "noise_head"):
        one, other = ((t.model if part == "model" else t.method.noise_head).state_dict() for t in (again, whole))
        assert all(torch.equal(one[name], other[name]) for name in one)
    (checkpoint / "method.pt").unlink()
    with pytest.raises(InputError, match=r"has no method\.pt, need a checkpoint of the same objective and method"):
        made(tmp_path / "third", model, **given).train(resume_from_checkpoint=str(checkpoint))


SCORED = Dataset.from_list([{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for row in tokenised(4)])
REFUSED = [
    ({"objective": "dnpo + sft"}, "need dnpo by itself: it trains its reference's noise, too"),
    ({"objective": "dnpo", "ref_scores": ["x"]}, "ref_scores: .* dnpo asks the reference model for more"),
    ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True, need False: DNPO needs"),
    ({"rows": SCORED}, "ref_scores: got the reference's log-probabilities with the data, need none"),
    ({"noise": -1.0}, "noise_learning_rate: got -1.0, need a finite number >= 0"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_is_not_understood_is_refused_by_name(tmp_path, model, changes, says):
    with pytest.raises(InputError, match=says):
        made(tmp_path, model, **changes)


def test_the_objective_brings_the_method():
    assert find_method(None, DNPO()).name == "dnpo"
    with pytest.raises(InputError, match="method: got 'sapo', need 'dnpo'"):
        find_method("sapo", DNPO())


def trained_on_ranks(rank, world, folder, model):
    """What the method holds after two steps, by objective."""
    found = {}
    for name, given in (("dnpo", {"objective_args": ["lam=1e-9"]}), ("dpo", {"method": "sapo"})):
        config = PreferenceConfig(
            **options(
                folder / name, objective=name, max_steps=2, per_device_train_batch_size=4,
                gradient_accumulation_steps=1, ddp_backend="gloo", save_strategy="steps", save_steps=2, **given,
            )
        )  # fmt: skip
        rows = Dataset.from_list(tokenised(16))
        trainer = PreferenceTrainer(model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())
        trainer.train()
        if name == "dnpo":
            head = trainer.method.noise_head
            found[name] = {**head.state_dict(), "grad": head.bias.grad}
        else:
            found[name] = trainer.method.state_dict()["average"]
    return found


def test_two_ranks(tmp_path, model):
    """The noise moves as that of one process with all pairs would, and SAPO's average is the same on both."""
    both = launch(2, trained_on_ranks, tmp_path, model)
    for name in ("dnpo", "dpo"):
        one, other = (of_rank[name] for of_rank in both)
        assert all(torch.equal(one[key], other[key]) for key in one)
        saved = {path.name for path in (tmp_path / name / "checkpoint-2").glob("method*")}
        assert saved == {"method.pt", "method_0.pt", "method_1.pt"}
    alone = made(
        tmp_path / "alone", model, lam=1e-9, noise=1e-4, max_steps=2, per_device_train_batch_size=8,
        learning_rate=1e-3, lr_scheduler_type="linear", rows=Dataset.from_list(tokenised(16)),
    )  # fmt: skip
    alone.train()
    expected, found = alone.method.noise_head.state_dict(), both[0]["dnpo"]
    for key, value in expected.items():
        assert (value - found[key]).abs().mean() <= 1e-6, key  # a hundredth of a step of Adam
    torch.testing.assert_close(found["grad"], alone.method.noise_head.bias.grad, rtol=1e-4, atol=0)
