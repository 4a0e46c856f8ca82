"""`asft-score` and what trainers read of its files: values, resuming, several models, files that do not fit."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: trl")

import datasets
import pyarrow as pa
from pyarrow import parquet
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.dpo_trainer import DataCollatorForPreference

from asft_kernels.cli.score import main
from asft_kernels.data import load_pairs, read_rows, with_labels
from asft_kernels.errors import InputError
from asft_kernels.models import PreferenceModel
from asft_kernels.models.loading import digest_of_model
from asft_kernels.score import run as run_module
from asft_kernels.score.run import score_path
from asft_kernels.score.scoring import score_pairs
from asft_kernels.score.table import (
    load_scores,
    load_token_logps,
    mean_avg_logps,
    read_metadata,
    tokenizer_fingerprint,
)
from asft_kernels.score.unfinished import UnfinishedScores
from cases import gemms
from tiny_lm import ARROW_KINDS, pairs, saved_tiny_model, stored, tiny_model, tiny_tokenizer, write_lines

ROOT = Path(__file__).parents[1]
LIMITS = dict(max_length=64)
COLLATOR = DataCollatorForPreference(pad_token_id=0)
# A logit is some 400 roundings deep (two layers of products up to 32 wide, norms, softmax, the head), the sum over
# 259 words as many: each shifts a log-probability, about as large as the logits, by at most a unit roundoff.
ROUNDINGS = 1000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", [*pairs(23), "{", pairs(1)[0]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_model(tmp_path_factory.mktemp("model") / "tiny", attention_dropout=0.1)


def command(data, output, *models, extra=()):
    named = [word for model in models for word in ("--model", str(model))]
    limits = ["--max-length", "64", "--batch-size", "4"]
    return ["--data", str(data), *named, "--output", str(output), *limits, *extra]


@pytest.fixture(scope="module")
def scores(data, model, tmp_path_factory):
    """The file of one uninterrupted run, with log-probabilities per token."""
    folder = tmp_path_factory.mktemp("scores")
    assert main(command(data, folder, model, extra=["--token-logps"])) == 0
    return score_path(folder, str(model))


def loaded(data, chat=False):
    return load_pairs(data, tiny_tokenizer(chat), **LIMITS)[0]


def plain_token_logps(dataset):
    """Per side, per pair: log-probabilities of the answer's tokens by the model's own float64 logits, unpadded."""
    language_model = tiny_model(attention_dropout=0.1).double().eval()
    out = []
    for side in ("chosen", "rejected"):
        out.append([])
        for pair in dataset:
            ids, start = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]]), len(pair["prompt_ids"])
            with torch.no_grad():
                logps = language_model(ids).logits[0, :-1].log_softmax(-1)
            out[-1].append(logps.gather(-1, ids[0, 1:, None])[start - 1 :, 0])
    return out


def sums(token_logps):
    return torch.tensor([[logps.sum().item() for logps in side] for side in token_logps], dtype=torch.float64)


def test_scores_are_the_float64_sums_of_the_models_own_logits(data, scores):
    dataset = loaded(data)
    exact = plain_token_logps(dataset)
    got = load_scores(scores, dataset, tiny_tokenizer())
    assert got.shape == (1, 2, 24)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got[0], sums(exact), rtol=ROUNDINGS * 2**-24, atol=0)
    for side, expected in zip(load_token_logps(scores, dataset, tiny_tokenizer()), exact, strict=True):
        for row, logps in zip(side, expected, strict=True):
            torch.testing.assert_close(row, logps.float(), rtol=ROUNDINGS * 2**-24, atol=0)
    table = parquet.read_table(scores)
    for side in ("chosen", "rejected"):
        assert table[f"{side}_length"].to_pylist() == [len(pair[f"{side}_ids"]) for pair in dataset]
        per_token = [np.sum(row, dtype=np.float64) for row in table[f"{side}_token_logps"].to_pylist()]
        assert table[f"{side}_logps"].to_pylist() == pytest.approx(per_token, rel=64 * 2**-53)  # 64 additions


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_the_reference_of_a_trainer_does_not_depend_on_the_batch(data, batch_size):
    """In float64, dropout off although the model trains, in the order of the pairs."""
    dataset = loaded(data)
    model = PreferenceModel(tiny_model(attention_dropout=0.1).double()).train()
    got = torch.zeros(2, len(dataset), dtype=torch.float64)
    for batch in score_pairs(model, dataset, COLLATOR, batch_size=batch_size):
        assert not batch.logps.requires_grad
        got[:, batch.rows] = batch.logps
    torch.testing.assert_close(got, sums(plain_token_logps(dataset)), rtol=ROUNDINGS * 2**-53, atol=0)
    assert model.training
    assert model.model.training


def test_one_product_with_the_head_and_no_logits(data, monkeypatch):
    """Hidden states given, what is left is the head: one product per answer token, in pieces of the vocabulary."""
    dataset, vocab = loaded(data), 30_000
    model = PreferenceModel(tiny_model(vocab_size=vocab))
    tokens = sum(len(pair[f"{side}_ids"]) for pair in dataset for side in ("chosen", "rejected"))
    model.check_head(with_labels(COLLATOR([dataset[0]])))

    def body(input_ids, **_):
        return BaseModelOutputWithPast(torch.ones(*input_ids.shape, 16))

    monkeypatch.setattr(model.model.model, "forward", body)

    def score():
        list(score_pairs(model, dataset, COLLATOR, batch_size=100))

    assert gemms(score, tokens, vocab, 16) == pytest.approx(1, rel=1e-9)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        score()
    assert max(event.self_cpu_memory_usage for event in prof.events()) < 4 * tokens * vocab / 10


def test_longest_first_in_batches_of_like_length(data):
    dataset = loaded(data)
    batches = list(score_pairs(PreferenceModel(tiny_model()), dataset, COLLATOR, batch_size=5))
    order = torch.cat([batch.rows for batch in batches]).tolist()
    lengths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in dataset]
    assert sorted(order) == list(range(24))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert [len(batch.rows) for batch in batches] == [5, 5, 5, 5, 4]


def test_a_file_says_what_it_is_and_datasets_reads_it(data, model, scores, tmp_path, capsys):
    notes = read_metadata(scores)
    assert notes["model"] == str(model)
    assert notes["data"] == "pairs.jsonl"
    assert (notes["pairs"], notes["max_length"]) == (24, 64)
    assert notes["tokenizer"] == tokenizer_fingerprint(tiny_tokenizer())
    assert {"ids", "version", "dtype"} <= set(notes)
    table = datasets.load_dataset("parquet", data_files=str(scores), split="train", cache_dir=str(tmp_path))
    assert table["line"][:] == [*range(1, 24), 25]
    assert len(set(table["id"])) == 23  # line 25 repeats line 1
    assert not list(scores.parent.glob("*unfinished*"))


def test_bad_rows_are_named_and_a_finished_file_is_left_alone(data, model, tmp_path, capsys):
    assert main(command(data, tmp_path, model)) == 0
    said = capsys.readouterr().out
    assert "25 rows, 24 kept, 1 left out" in said
    assert "left out, unreadable JSON: 1 (line 24)" in said
    path = score_path(tmp_path, str(model))
    before = path.stat().st_mtime_ns
    assert main(command(data, tmp_path, model)) == 0
    assert f"{path}: complete already, left as it is" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    for extra, message in (
        (["--max-length", "60"], "(its max-length: 64 then and 60 now); delete that file, or name another folder"),
        (
            ["--data", str(write_lines(tmp_path / "other.jsonl", pairs(5)))],
            "(its pairs: others, as with another file or --max_length)",
        ),
    ):
        assert main([*command(data, tmp_path, model), *extra]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_scores_of_a_model_that_was_replaced_are_not_taken(data, tmp_path, capsys, changed):
    folder = saved_tiny_model(tmp_path / "tiny")
    assert main(command(data, tmp_path / "out", folder)) == 0
    if changed == "model.safetensors":
        tiny_model(seed=1).save_pretrained(folder)
    else:
        text = (folder / changed).read_text()
        (folder / changed).write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert main(command(data, tmp_path / "out", folder)) == 2
    assert "is of another command (its model-files: others); delete that file" in capsys.readouterr().err


def test_the_digest_is_of_weights_base_tokenizer_and_template(tmp_path):
    base, adapter = saved_tiny_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = digest_of_model(str(adapter))
    assert digest_of_model(str(adapter)) == before
    tiny_model(seed=1).save_pretrained(base)
    assert digest_of_model(str(adapter)) != before
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        before = digest_of_model(str(base))
        with (base / name).open("a") as file:
            file.write(" ")
        assert digest_of_model(str(base)) != before, name
    assert digest_of_model("org/name") == "org/name"


@pytest.mark.parametrize("chat", [False, True])
def test_fingerprint_survives_saving_and_tells_tokenizers_apart(tmp_path, chat):
    tokenizer = tiny_tokenizer(chat)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    again("some text", truncation=True, max_length=3)  # a call leaves its settings in the tokenizer
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tiny_tokenizer(not chat)) != tokenizer_fingerprint(tokenizer)
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)


def test_ctrl_c_keeps_what_is_scored_and_the_same_command_goes_on(data, model, scores, tmp_path, monkeypatch, capsys):
    add, batches = UnfinishedScores.add, []

    def add_and_interrupt(self, rows):
        add(self, rows)
        batches.append(self.rows)
        if len(batches) in (2, 3):
            raise KeyboardInterrupt

    arguments = command(data, tmp_path, model, extra=["--token-logps"])
    monkeypatch.setattr(UnfinishedScores, "add", add_and_interrupt)
    assert main(arguments) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    path = score_path(tmp_path, str(model))
    assert not path.exists()
    with path.with_suffix(".unfinished.jsonl").open("a") as file:
        file.write('{"id": "half a ro')  # as a killed run leaves it
    assert main([*arguments, "--max-length", "60"]) == 2  # another command
    assert "max-length: 64 then and 60 now" in capsys.readouterr().err

    assert main(arguments) == 130
    assert main(arguments) == 0
    assert len(batches) == 2 + 1 + 3
    assert "12 of 24 pairs are scored already" in capsys.readouterr().out
    assert parquet.read_table(path).equals(parquet.read_table(scores))  # to the bit
    assert not list(tmp_path.glob("*unfinished*"))


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from asft_kernels.cli.score import main
from asft_kernels.score.unfinished import UnfinishedScores
add = UnfinishedScores.add
def add_and_die(self, rows):
    add(self, rows)
    if len(self.rows) >= 12:
        os.kill(os.getpid(), signal.SIGKILL)
UnfinishedScores.add = add_and_die
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on(data, model, scores, tmp_path, capsys):
    arguments = command(data, tmp_path, model, extra=["--token-logps"])
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert main(arguments) == 0
    assert "12 of 24 pairs are scored already" in capsys.readouterr().out
    ours, theirs = (load_scores(p, loaded(data), tiny_tokenizer()) for p in (score_path(tmp_path, str(model)), scores))
    torch.testing.assert_close(ours, theirs, rtol=ROUNDINGS * 2**-24, atol=0)  # another number of threads


@pytest.fixture(scope="module")
def two(data, model, tmp_path_factory):
    """Files under two models with tokenizers of their own, and whether both were ever in memory."""
    folder = tmp_path_factory.mktemp("two")
    other = saved_tiny_model(folder / "model", num_hidden_layers=1)
    tiny_tokenizer(chat=True).save_pretrained(other)
    alive, load = [], run_module.load_causal_lm

    def watched(*args):
        assert not [name for name, ref in alive if ref() is not None], "two models at a time"
        language_model = load(*args)
        alive.append((args[0], weakref.ref(language_model)))
        return language_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_causal_lm", watched)
        assert main(command(data, folder / "scores", model, other)) == 0
    assert len(alive) == 2
    return [score_path(folder / "scores", str(name)) for name in (model, other)]


def test_two_models_one_after_the_other_each_with_its_tokenizer(data, two):
    files = [parquet.read_table(path) for path in two]
    assert files[0]["id"].equals(files[1]["id"])
    assert files[0]["chosen_length"].equals(files[1]["chosen_length"])  # a byte a token, <eos> at the end
    assert not files[0]["chosen_logps"].equals(files[1]["chosen_logps"])
    averages = [
        [[s / m for s, m in zip(file[f"{side}_logps"].to_pylist(), file[f"{side}_length"].to_pylist(), strict=True)]
         for side in ("chosen", "rejected")]
        for file in files
    ]  # fmt: skip
    got = mean_avg_logps(two, loaded(data))
    assert got.shape == (2, 24)
    assert got.numpy() == pytest.approx((np.array(averages[0]) + np.array(averages[1])) / 2, rel=4 * 2**-53)
    reversed_pairs = loaded(data).select(range(23, -1, -1))
    assert torch.equal(mean_avg_logps(two, reversed_pairs), got.flip(1))


def test_k_references_in_the_order_given(data, two, scores):
    """The same tokenizer: files of the chat one are refused."""
    dataset = loaded(data)
    several = load_scores([scores, two[0]], dataset, tiny_tokenizer())
    assert several.shape == (2, 2, 24)
    assert torch.equal(several[0], several[1])
    with pytest.raises(InputError, match=r"made with another tokenizer, that of '.*'; need the one of the model"):
        load_scores(two, dataset, tiny_tokenizer())


def test_the_page_lays_references_as_a_batch_lies(data):
    """Pairs of the batch along the last dimension, all chosen rows before the rejected ones: ends of turn tell them."""
    (block,) = (
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "docs/score.md").read_text(), re.S) if "index" in b
    )
    tokenizer = tiny_tokenizer()
    dataset = loaded(data)
    lengths = torch.tensor([[len(pair[f"{side}_ids"]) for pair in dataset] for side in ("chosen", "rejected")])
    given = []
    names = {
        "ref_logps": torch.stack([lengths, -lengths]),
        "pairs": dataset,
        "tokenizer": tokenizer,
        "DataCollatorForPreference": DataCollatorForPreference,
        "with_labels": with_labels,
    }
    names["preference"] = lambda ref_logps, labels, **_: given.append((ref_logps, (labels != -100).sum(1)))
    exec(block.replace("[0, 1]", "[3, 1]"), names)
    (one, tokens), (both, _) = given
    assert one.tolist() == tokens.tolist()
    assert both.tolist() == [tokens.tolist(), (-tokens).tolist()]


def test_scores_go_by_pair_not_by_place(data, scores):
    dataset = loaded(data)
    part = dataset.select([20, 3, 3, 11])
    whole = load_scores(scores, dataset, tiny_tokenizer())
    assert torch.equal(load_scores(scores, part, tiny_tokenizer()), whole[:, :, [20, 3, 3, 11]])


def test_files_that_do_not_fit_are_refused(data, scores, two, tmp_path):
    more = load_pairs(write_lines(tmp_path / "more.jsonl", pairs(30)), tiny_tokenizer(), **LIMITS)[0]
    lacks = r"lacks 7 of 30 pairs \(lines 24, 25, 26, 27, 28, 29, 30; first id [0-9a-f]{64}\).*from 'pairs.jsonl' with"
    for refuse in (lambda: load_scores(scores, more, tiny_tokenizer()), lambda: mean_avg_logps([*two, scores], more)):
        with pytest.raises(InputError, match=lacks):
            refuse()
    short = load_pairs(data, tiny_tokenizer(), max_length=20)[0]
    cut = r"answers of other lengths for \d+ of 24 pairs \(lines .*max_length 64; use the same"
    with pytest.raises(InputError, match=cut):
        load_scores(scores, short, tiny_tokenizer())
    with pytest.raises(InputError, match="no log-probabilities per token; score again with --token-logps"):
        load_token_logps(two[0], loaded(data), tiny_tokenizer())
    parquet.write_table(pa.table({"id": ["a"]}), tmp_path / "foreign.parquet")
    for path, message in (
        (tmp_path / "none.parquet", "no such file; need a file that asft score wrote"),
        (scores.parent, "is a folder; name the files in it"),
        (data, "is no Parquet file"),
        (tmp_path / "foreign.parquet", "without the notes of asft score"),
    ):
        with pytest.raises(InputError, match=message):
            load_scores(path, more, tiny_tokenizer())
    with pytest.raises(InputError, match="got no file, need at least one"):
        load_scores([], more, tiny_tokenizer())


def test_scores_that_are_not_finite_are_refused(data):
    model = PreferenceModel(tiny_model())
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(InputError, match=r"log-probability of line \d+ is not a finite number, need one"):
        list(score_pairs(model, loaded(data), COLLATOR))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "no-such"], "--model: got 'no-such', no such folder, and no hub name either"),
        (["--max-length", "999"], "max_length: got 999, need at most 256, the model's positions"),
        (["--max-length", "1"], "max_length: got 1, need at least 2 tokens"),
        (["--data", "no.jsonl"], "data: got 'no.jsonl', no such file"),
        (["--model", "{model}"], "would both be written to"),
    ],
)
def test_bad_input_is_said_before_a_model_is_loaded(data, model, tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.setattr(run_module, "load_causal_lm", None)
    extra = [word.format(model=model) for word in extra]
    assert main([*command(data, tmp_path / "out", model), *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("asft score: ")
    assert message in said


def test_batch_size_is_a_number_of_pairs(data, model, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([*command(data, tmp_path, model), "--batch-size", "0"])
    assert "argument --batch_size: got '0', need a whole number of at least 1" in capsys.readouterr().err
    monkeypatch.setattr(run_module, "_score_rest", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert main(command(data, tmp_path, model)) == 2
    assert "asft score: the device has too little memory" in capsys.readouterr().err


def test_missing_extra_is_named(data, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(command(data, tmp_path, model)) == 2
    assert 'pip install -e ".[train]" in the checkout' in capsys.readouterr().err


def test_importing_the_command_imports_no_optional_package():
    code = (
        "import sys, asft_kernels.score;print([m for m in ('transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# Parquet and Arrow in


@pytest.mark.parametrize("kind", ARROW_KINDS)
def test_rows_are_the_same_from_parquet_and_arrow(tmp_path, kind):
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{**row, "prompt": [*chat, {"role": "user", "content": row["prompt"]}]} for row in pairs(150)]
    rows[70] = {"prompt": chat, "chosen": "a"}
    path = stored(rows, tmp_path, kind)
    assert list(read_rows(path)) == list(enumerate(rows, start=1))
    report = load_pairs(path, tiny_tokenizer(chat=True), max_length=99)[1]
    assert (report.rows, report.bad) == (150, {"missing key 'rejected'": [71]})


@pytest.mark.parametrize("kind", ARROW_KINDS)
def test_ids_do_not_depend_on_the_kind_of_file_nor_on_the_tokenizer(data, tmp_path, kind):
    path = stored(pairs(23), tmp_path, kind)
    assert loaded(path, chat=True)["id"][:] == loaded(data)["id"][:23]


def test_id_is_of_the_text():
    from asft_kernels.data import pair_id, parse_pair

    ids = [
        pair_id(parse_pair(row))
        for row in (
            {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c "},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "chosen": "c", "rejected": "b"},
        )
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert ids[3] == hashlib.sha256(b'["a", "b", "c"]').hexdigest()  # files are kept: it must never change


def test_id_is_of_tools_and_template_arguments_and_not_of_nulls():
    from asft_kernels.data import pair_id, parse_pair

    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    tool = {"type": "function", "function": {"name": "clock"}}
    rows = [row, {**row, "tools": [tool]}, {**row, "chat_template_kwargs": {"think": True}}]
    assert len({pair_id(parse_pair(one)) for one in rows}) == 3
    nulls = {**row, "tools": [{**tool, "function": {"name": "clock", "parameters": None}}]}
    assert pair_id(parse_pair(nulls)) == pair_id(parse_pair(rows[1]))


def test_reading_parquet_takes_no_memory_of_the_files_size(tmp_path):
    """One row group of 40 MB, as pyarrow writes by default, read in pieces of 64 rows."""
    rng = np.random.default_rng(0)
    text = [rng.bytes(1000).hex() for _ in range(20_000)]
    path = tmp_path / "large.parquet"
    parquet.write_table(pa.table({"prompt": text, "chosen": text, "rejected": text}), path, use_dictionary=False)
    size = path.stat().st_size
    before, peak = pa.total_allocated_bytes(), 0
    for _ in read_rows(path):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < size / 5


def test_arrow_files_that_cannot_be_used(tmp_path):
    whole = stored(pairs(500), tmp_path, "parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut.parquet cannot be read beyond row 0 .*is the copy complete"):
        list(read_rows(cut))
    stream = stored(pairs(500), tmp_path, "arrow stream")
    stream.write_bytes(stream.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"cannot be read beyond row \d+ .*is the copy complete"):
        list(read_rows(stream))
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(pairs(3)) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match="holds the splits test, train; name the folder of one of them"):
        list(read_rows(tmp_path / "splits"))
    assert len(list(read_rows(tmp_path / "splits" / "train"))) == 3
    with pytest.raises(InputError, match="is a folder that datasets did not save"):
        list(read_rows(tmp_path))


def test_the_command_takes_parquet(data, model, scores, tmp_path):
    path = stored([*pairs(23), pairs(1)[0]], tmp_path, "parquet")
    assert main(command(path, tmp_path / "out", model)) == 0
    from_parquet = load_scores(score_path(tmp_path / "out", str(model)), loaded(data), tiny_tokenizer())
    assert torch.equal(from_parquet, load_scores(scores, loaded(data), tiny_tokenizer()))


def test_slugs_are_files_in_the_folder(tmp_path):
    for model, name in (
        ("org/name", "org--name"),
        ("../runs/a/", "runs--a"),
        ("/x y/ä", "x--y"),
        ("..", "model"),
    ):
        assert score_path(tmp_path, model) == tmp_path / f"{name}.parquet"
    assert len(score_path(tmp_path, "x/" * 500).name) < 255


def test_notes_are_json(scores):
    raw = parquet.read_schema(scores).metadata[b"asft_score"]
    assert json.loads(raw) == read_metadata(scores)
