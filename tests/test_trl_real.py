"""benchmarks.trl_real: its contestants compute the same, full logits among them; rows that fail say so."""

import argparse
import json
import sys

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer import dpo_trainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks import trl_real
from benchmarks.run import rows_of
from benchmarks.trl_real import CONTESTANTS, add_full_logits, measure, usable
from tiny_lm import pairs, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
# 16 products and a sum of 259 exponentials in fp32, each rounding 2**-24 of a value below 8.
CLOSE = {"rtol": 0, "atol": 8 * (16 + 259) * 2**-24}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = saved_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=2048)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


def test_full_logits_answer_as_trls_fused_head():
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    fused, full = tiny_model(0), tiny_model(0)
    add_fused_lm_head(fused, outputs=OUTPUTS)
    add_full_logits(full, outputs=OUTPUTS)
    theirs, ours = (made(input_ids=ids, labels=labels, fused_lm_head=True) for made in (fused, full))
    answer = labels[:, 1:] != -100
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(ours, name)[answer], getattr(theirs, name)[answer], **CLOSE, msg=name)
    assert not ours.log_probs[~answer].any()
    plain = full(input_ids=ids, labels=labels)  # as it was
    assert plain.logits.shape == (2, 9, 259)
    torch.testing.assert_close(plain.loss, -theirs.log_probs.sum() / answer.sum(), **CLOSE)


def test_contestants_train_alike(model, tmp_path):
    """DPO by each from the same weights on the same pairs: the losses of four steps."""
    data = write_lines(tmp_path / "pairs.jsonl", ["no pair", *pairs(6)])
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = usable(data, tokenizer, 4)
    assert [r["prompt"][0]["content"] for r in rows] == [r["prompt"] for r in pairs(4)]
    args = argparse.Namespace(model=model, pairs=2, steps=4, bf16=False)
    found = {name: measure(name, Dataset.from_list(rows), tokenizer, args) for name in CONTESTANTS if "DPO" in name}
    assert dpo_trainer.add_fused_lm_head is add_fused_lm_head  # as it was
    expected = found["TRL DPO"]
    for name, row in found.items():
        # beta * a sum of some 40 log-probabilities of size 6, in fp32; Adam's steps magnify it little in four steps.
        assert row["losses"] == pytest.approx(expected["losses"], abs=1e-5), name
        assert row["tokens_per_second"] > 0
        assert (row["V"], row["D"], row["peak_bytes"]) == (259, 16, None)
    assert len(expected["losses"]) == 4


def test_what_fails_has_a_row_and_the_next_begins(model, tmp_path, monkeypatch, capsys):
    def fails(name, *_):
        if name == "TRL DPO":
            raise torch.OutOfMemoryError("no room")
        return {"tokens_per_second": 5.0}

    monkeypatch.setattr(trl_real, "measure", fails)
    data, out = write_lines(tmp_path / "pairs.jsonl", pairs(4)), tmp_path / "speed.jsonl"
    names = ["TRL DPO", "asft_kernels DPO"]
    given = ["trl_real", "--model", str(model), "--data", str(data), "--out", str(out), "--contestants", *names]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="2 failed"):
        trl_real.main()
    failed, went, again, fails_again = rows_of(out)  # nothing of the training before them
    assert (again["contestant"], fails_again["contestant"]) == ("asft_kernels DPO", "TRL DPO")
    assert failed["failed"] == "OutOfMemoryError: no room"
    assert went["contestant"] == "asft_kernels DPO"
    assert "failed" not in went
    assert str(tmp_path) not in json.dumps(went)  # names for paths
    assert "asft_kernels DPO 5 tokens/s" in capsys.readouterr().out
