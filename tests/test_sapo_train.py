"""SAPO on the trainer: the order of a step, moving reference, resume, refusals."""

import math

import pytest
import torch

pytest.importorskip("train_extra")
pytest.importorskip("peft", reason="needs the train extra: peft")

import peft
from datasets import Dataset

from asft_kernels.errors import InputError
from asft_kernels.methods.sapo.hooks import Arguments, Hooks
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.models import fuse
from asft_kernels.training import PreferenceConfig, PreferenceTrainer
from test_preference_trainer import logs, options, tokenised
from tiny_lm import saved_tiny_model, tiny_model, tiny_tokenizer
from train_extra import QUIET

pytestmark = QUIET
LN_2 = math.log(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(saved_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def dropout(tmp_path_factory):
    """Drawn in attention, where disable_dropout finds none."""
    return str(saved_tiny_model(tmp_path_factory.mktemp("dropout"), attention_dropout=0.2))


def made(folder, model, *, rows=None, lora=False, evaluation=None, given=None, **changes):
    """Micro-batches of 2, two a step; answers of 4 to 18 tokens, segments of up to 4."""
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids")} for row in tokenised()] if rows is None else rows
    config = PreferenceConfig(**{**options(folder, max_steps=4, learning_rate=1e-2, objective="dpo"), **changes})
    arguments = Arguments(**{"token_generate_length": 4, "ref_sync_steps": 2, **(given or {})})
    return PreferenceTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(),
        eval_dataset=evaluation, method=Hooks(arguments),
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2) if lora else None,
    )  # fmt: skip


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lora", [False, True])
def test_order_of_a_step(tmp_path, dropout, monkeypatch, lora):
    """EMA -> reference -> negatives by the EMA, for both micro-batches -> losses against the reference."""
    trainer = made(tmp_path, dropout, lora=lora)
    seen = {"policy": [], "ema": [], "reference": [], "buffered": []}
    method = trainer.method
    update, write, token_logps = method.moving.update, method.writer.generate_ids, trainer.token_logps

    def updating(step):
        seen["policy"].append(trained(trainer))
        update(step)

    def writing(*args, **kwargs):
        assert not trainer.model.training
        seen["ema"].append(trained(trainer))
        seen["buffered"].append(len(method.buffer))
        return write(*args, **kwargs)

    def scoring(scored, inputs, labels):
        assert not scored.training
        seen["reference"].append(trained(trainer))
        return token_logps(scored, inputs, labels)

    monkeypatch.setattr(method.moving, "update", updating)
    monkeypatch.setattr(method.writer, "generate_ids", writing)
    monkeypatch.setattr(trainer, "token_logps", scoring)
    rows = logs(trainer)
    assert seen["buffered"] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [row["buffer_size"] for row in rows] == [4, 8, 12, 16]
    assert [row["pairs"] for row in rows] == [4] * 4
    for entry in method.buffer.entries:
        differs = [a != b for a, b in zip(entry["chosen_ids"], entry["rejected_ids"], strict=False)]
        assert sum(differs) <= 4
    average, written, references = seen["policy"][0], seen["ema"][::2], seen["reference"][::2]
    assert all(map(same, written, seen["ema"][1::2]))
    assert len(written) == len(references) == 4
    for policy, ema in zip(seen["policy"], written, strict=True):
        average = {name: torch.lerp(average[name], policy[name], 0.5) for name in policy}
        assert same(ema, average)
    assert not same(written[1], seen["policy"][1])
    assert [same(x, y) for x, y in zip(references, written, strict=True)] == [True, False, True, False]
    assert same(references[1], references[0])


@pytest.mark.parametrize("bf16", [False, True])
def test_policy_and_reference_are_computed_with_their_own_weights(tmp_path, model, monkeypatch, bf16):
    """Against a model apart from the trainer's: autocast keeps casts of weights, which the exchange must drop."""
    trainer = made(tmp_path, model, bf16=bf16, given={"ref_sync_steps": 100})
    losses, apart, compared = trainer._losses, tiny_model(), []
    fuse(apart)

    def sums(weights, inputs):
        apart.load_state_dict(weights, strict=False)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return apart(**given, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)

    def losing(model, inputs):
        policy, reference = trained(trainer), dict(trainer.method.moving.reference)
        values, out, aux = losses(model, inputs)
        expected = sums(policy, inputs)
        # The same kernel on the same numbers: sums of 18 fp32 tokens in another order.
        torch.testing.assert_close(torch.cat([out.chosen_logps, out.rejected_logps]), expected, rtol=1e-5, atol=1e-4)
        ratio = (expected - sums(reference, inputs)).chunk(2)
        torch.testing.assert_close(values, -torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip
        compared.append(values.detach())
        return values, out, aux

    monkeypatch.setattr(trainer, "_losses", losing)
    rows = logs(trainer)
    assert rows[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert abs(rows[-1]["loss"] - LN_2) > 1e-3
    assert len(compared) == 8


def test_unchanged_negatives_are_counted_and_give_no_dpo_gradient(tmp_path, model, monkeypatch):
    """y- = y: the margin is 0 exactly; chosen and rejected parts of the gradient cancel up to fp32 rounding."""
    monkeypatch.setattr(Regeneration, "negatives", lambda self, rows, *_: [list(row["chosen_ids"]) for row in rows])
    rows = logs(made(tmp_path, model))
    assert [row["unchanged_share"] for row in rows] == [1.0] * 4
    assert [row["loss"] for row in rows] == pytest.approx([LN_2] * 4, rel=1e-6)
    assert rows[0]["grad_norm"] < 1e-6


@pytest.mark.parametrize("objective", ["asft", "orpo", "dpo + 0.5 sft"])
def test_other_objectives_train_and_rejected_answers_are_ignored(tmp_path, model, objective):
    chosen = logs(made(tmp_path / "1", model, objective=objective, max_steps=2))
    pairs = made(tmp_path / "2", model, objective=objective, max_steps=2, rows=tokenised())
    assert [row["loss"] for row in chosen] == [row["loss"] for row in logs(pairs)]
    assert (pairs.method.moving.reference is None) == ("dpo" not in objective)
    assert pairs.ref_model is None


def test_resumes_to_the_bit(tmp_path, dropout):
    """With dropout, buffer and both sets of weights; held-out pairs are compared with the moving reference."""
    given = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
             "eval_steps": 2, "evaluation": Dataset.from_list(tokenised(3))}  # fmt: skip
    whole = made(tmp_path / "whole", dropout, **given)
    assert whole.evaluate()["eval_loss"] == pytest.approx(LN_2, rel=1e-6)
    expected = logs(whole)
    torch.manual_seed(99)  # the checkpoint alone decides
    again = made(tmp_path / "again", dropout, **given)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again.train(resume_from_checkpoint=str(checkpoint))
    rows = [row for row in again.state.log_history if "loss" in row]
    assert [(r["loss"], r["grad_norm"]) for r in rows] == [(r["loss"], r["grad_norm"]) for r in expected]
    evaluated = [[r["eval_loss"] for r in t.state.log_history if "eval_loss" in r][-1] for t in (again, whole)]
    assert evaluated[0] == evaluated[1] != pytest.approx(LN_2, abs=1e-4)
    states = [trainer.method.state_dict() for trainer in (again, whole)]
    assert same(trained(again), trained(whole))
    assert all(same(states[0][name], states[1][name]) for name in ("average", "reference"))
    assert states[0]["buffer"] == states[1]["buffer"]
    ended, last = made(tmp_path / "ended", dropout, **given), str(tmp_path / "whole" / "checkpoint-4")
    ended._load_from_checkpoint(last)
    ended.load_own_state(last)  # as a run does that has nothing but its end left to do
    assert ended.evaluate()["eval_loss"] == evaluated[1]
    (checkpoint / "method_0.pt").unlink()
    with pytest.raises(InputError, match=r"has no method_0\.pt, need a checkpoint of the same objective and method"):
        made(tmp_path / "third", dropout, **given).train(resume_from_checkpoint=str(checkpoint))


REFUSED = [
    ({"given": {"ema_beta": 1.0}}, "ema_beta: got 1.0, need a number from 0 to below 1"),
    ({"given": {"ema_beta": math.nan}}, "ema_beta: got nan"),
    ({"given": {"ref_update_mode": "both"}}, "ref_update_mode: got 'both', need one of 'ema', 'policy', 'fixed'"),
    ({"given": {"ref_sync_steps": 0}}, "ref_sync_steps: got 0, need at least 1"),
    ({"given": {"max_replay_buffer_size": 0}}, "max_replay_buffer_size: got 0, need at least 1"),
    ({"given": {"token_generate_length": 0}}, "token_generate_length: got 0, need at least 1 token"),
    ({"given": {"temperature": 0.0}}, "temperature: got 0.0, need a number > 0: negatives are sampled"),
    ({"given": {"top_p": 2.0}}, "top_k, top_p: got 50, 2.0"),
    ({"ref_scores": ["x"]}, r"ref_scores: got \['x'\], need none: the reference of SAPO moves"),
    ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True, need none"),
    ({"sync_ref_model": True}, "sync_ref_model: got True, need none"),
    ({"objective": "sft"}, "need one of pairs for SAPO"),
    ({"max_length": None}, "max_length: got None .* need a number"),
    ({"truncation_mode": "keep_end"}, "truncation_mode 'keep_end', need a number and 'keep_start'"),
    ({"rows": [{"prompt_ids": [5] * 64, "chosen_ids": [6]}] * 4}, r"a row without an answer within max_length 64"),
    ({"rows": [{"prompt": "a", "chosen": "b"}]}, "train_dataset: got no column rejected, need"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_what_is_not_understood_is_refused_by_name(tmp_path, model, changes, says):
    with pytest.raises(InputError, match=says):
        made(tmp_path, model, **changes).train()
