"""`asft eval`: figures worked by hand, one report, runs that go on."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("matplotlib", reason="needs the train extra: matplotlib")
pytest.importorskip("sacrebleu", reason="needs the train extra: sacrebleu")
pytest.importorskip("rouge_score", reason="needs the train extra: rouge_score")

from sacrebleu.metrics.bleu import BLEU

from asft_kernels.cli import main
from asft_kernels.evaluation import answers, figures
from tiny_lm import pairs, saved_tiny_model, tiny_model, tiny_tokenizer, write_lines

COUNT = 7


def row(chosen, rejected, lengths, generated="a b", tokens=3):
    return {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_length": lengths[0],
            "rejected_length": lengths[1], "generated": generated, "generated_length": tokens,
            "ended": True}  # fmt: skip


def test_numbers_worked_by_hand():
    rows = [row(-2.0, -3.0, (4, 2)), row(-4.0, -2.0, (2, 1), "x", 1), row(-1.0, -1.0, (1, 1), None, 0)]
    got = figures.of_pairs(rows, ["a c b", "y", "z"])
    assert got["margin"].tolist() == [1, -2, 0]
    assert got["margin_mean"].tolist() == [1, 0, 0]
    assert got["accuracy"].tolist() == [1, 0, 0]

    def log_odds(logp):
        return math.log(math.exp(logp) / (1 - math.exp(logp)))

    # a few roundings of numbers about 1
    assert got["log_odds_margin"] == pytest.approx([log_odds(-0.5) - log_odds(-1.5), 0, 0], rel=16 * 2**-53, abs=2**-50)
    assert got["rouge_l"][:2] == pytest.approx([100 * 2 * 1 * (2 / 3) / (1 + 2 / 3), 0])  # a, b of a, c, b
    assert np.isnan(got["rouge_l"][2])
    summary = figures.summary(got)
    assert summary["margin"]["value"] == pytest.approx(-1 / 3)
    assert summary["margin"]["standard_error"] == pytest.approx(math.sqrt((16 / 9 + 25 / 9 + 1 / 9) / 2 / 3))
    assert summary["generated_length"] == {"value": 2, "standard_error": 1, "pairs": 2}
    assert figures.summary(figures.of_pairs([row(-1, 0, (1, 1), None)], ["a"])).keys() == {
        name for name in figures.MEANINGS if name.split("_")[0] not in ("generated", "ended", "rouge", "bleu")
    }


TEXTS = [("the cat sat on the mat today", "the cat sat on a mat today"), ("no", "a dog came in"), ("b a", "a b")] * 3


def test_bleu_is_sacrebleus_of_the_corpus():
    got = figures.of_pairs([row(-1, -2, (1, 1), text) for text, _ in TEXTS], [reference for _, reference in TEXTS])
    texts, references = ([pair[side] for pair in TEXTS] for side in (0, 1))
    assert figures.corpus_bleu(got["bleu"]) == BLEU().corpus_score(texts, [references]).score
    found = figures.summary(got)["bleu"]
    assert found["pairs"] == 9
    assert 0 < found["standard_error"] < found["value"]


def test_words_of_other_scripts_count():
    got = figures.of_pairs([row(-1, -2, (1, 1), "Привет, мир")], ["привет мир"])
    assert got["rouge_l"].tolist() == [100]


def test_a_difference_is_of_the_same_pairs():
    """Margins that differ by one everywhere: the difference has no error, however large each model's own is."""
    rows = [row(-float(i), -3.0, (1, 1), text) for i, (text, _) in enumerate(TEXTS)]
    one = figures.of_pairs(rows, [reference for _, reference in TEXTS])
    other = figures.of_pairs([{**r, "chosen_logps": r["chosen_logps"] + 1} for r in rows], [r for _, r in TEXTS])
    found = figures.comparison(one, other)
    assert found["margin"] == {"value": -1, "standard_error": 0, "pairs": 9}
    assert found["bleu"] == {"value": 0, "standard_error": 0, "pairs": 9}
    assert figures.summary(one)["margin"]["standard_error"] > 0.5


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    data = write_lines(folder / "pairs.jsonl", [*pairs(COUNT), "{"])
    return data, saved_tiny_model(folder / "one"), saved_tiny_model(folder / "two", seed=1)


def words(job, output, *more):
    data, one, two = job
    return ["eval", "--model_name_or_path", str(one), "--model", str(two), "--dataset_name", str(data), "--output_dir",
            str(output), "--max_length", "64", "--max_new_tokens", "5", "--batch_size", "3", *more]  # fmt: skip


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert main(words(job, output)) == 0
    return output


def own_margin(seed, index):
    """By the model's own float64 logits."""
    model, pair, sums = tiny_model(seed).double().eval(), pairs(COUNT)[index], []
    for side in ("chosen", "rejected"):
        start, ids = (tiny_tokenizer()(text)["input_ids"] for text in (pair["prompt"], pair["prompt"] + pair[side]))
        ids = torch.tensor([[*ids, 1]])  # <eos>
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        sums.append(logps[len(start) - 1 :].sum().item())
    return sums[0] - sums[1]


def test_the_report(whole, job):
    found = json.loads((whole / "report.json").read_text())
    names = [str(path) for path in job[1:]]
    assert list(found["models"]) == names
    with torch.no_grad():
        margins = [[own_margin(seed, index) for index in range(COUNT)] for seed in (0, 1)]
    for name, margin in zip(names, margins, strict=True):
        got = found["models"][name]
        # Two sums of some 12 fp32 log-probabilities of about 6, each 1000 roundings deep (tests/test_score.py).
        assert got["margin"]["value"] == pytest.approx(np.mean(margin), abs=24 * 6 * 1000 * 2**-24)
        assert got["accuracy"]["value"] == pytest.approx(np.mean([m > 0 for m in margin]))
        assert got["margin"]["pairs"] == COUNT
        assert got["generated_length"]["value"] <= 5
        assert got["chosen_length"]["value"] == np.mean([len(pair["chosen"]) + 1 for pair in pairs(COUNT)])
    (compared,) = found["comparisons"]
    assert compared["models"] == names[::-1]  # the later one minus the first
    difference = np.subtract(margins[1], margins[0])
    assert compared["difference"]["margin"]["value"] == pytest.approx(difference.mean(), abs=0.02)
    error = difference.std(ddof=1) / COUNT**0.5
    assert compared["difference"]["margin"]["standard_error"] == pytest.approx(error, abs=0.02)
    text = (whole / "report.md").read_text()
    assert all(f"| {name} |" in text for name in figures.MEANINGS)
    assert "## Differences, pair by pair\n\nThe later model's minus the earlier one's" in text
    assert f"| | {names[1]} − {names[0]} | pairs |" in text
    for picture in ("margins.png", "lengths.png"):
        assert (whole / picture).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on(whole, job, tmp_path, monkeypatch, capsys):
    add, added = answers.UnfinishedScores.add, []

    def add_and_interrupt(self, rows):
        add(self, rows)
        added.append((self.path.name, len(list(rows))))
        if len(added) in (2, 5):  # scores, then answers
            raise KeyboardInterrupt

    monkeypatch.setattr(answers.UnfinishedScores, "add", add_and_interrupt)
    assert main(words(job, tmp_path)) == 130
    assert "asft eval: stopped; what is scored and generated is kept" in capsys.readouterr().err
    assert main(words(job, tmp_path)) == 130
    assert main(words(job, tmp_path)) == 0
    assert sum(count for _, count in added) == 2 * 2 * COUNT  # nothing twice
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, whole))
    for model, of_model in theirs["models"].items():
        for name, entry in of_model.items():
            # Batches of other rows round otherwise, as in test_the_report.
            assert ours["models"][model][name]["value"] == pytest.approx(entry["value"], abs=0.02), name
    monkeypatch.setattr(answers, "load_causal_lm", None)
    assert main(words(job, tmp_path)) == 0  # all is there
    assert main(words(job, tmp_path, "--max_pairs", "2")) == 2
    assert "scores.jsonl was made with other pairs; delete that file, or name another folder" in capsys.readouterr().err


def test_rows_of_a_model_that_was_replaced_are_not_taken(tmp_path, capsys):
    data = write_lines(tmp_path / "pairs.jsonl", pairs(2))
    models = [saved_tiny_model(tmp_path / name) for name in ("one", "two")]
    assert main(words((data, *models), tmp_path / "out", "--no_generate")) == 0
    tiny_model(seed=5).save_pretrained(models[0])
    assert main(words((data, *models), tmp_path / "out", "--no_generate")) == 2
    assert "scores.jsonl was made with other model_files" in capsys.readouterr().err


def test_without_generation_and_few_pairs(job, tmp_path, capsys):
    assert main(words(job, tmp_path, "--no_generate", "--max_pairs", "2")) == 0
    report = (tmp_path / "report.md").read_text()
    said = capsys.readouterr().out
    tables = report[report.index("Value ±") : report.index("## What the figures are")]
    assert "## Differences" in tables
    assert tables in said
    found = json.loads((tmp_path / "report.json").read_text())
    assert all("bleu" not in of_model and of_model["margin"]["pairs"] == 2 for of_model in found["models"].values())


def test_other_tokens_are_named(job, tmp_path, capsys):
    data, one, _ = job
    more = ("--no_generate", "--max_pairs", "2")
    assert main(words(job, tmp_path / "same", *more)) == 0
    assert "tokenizers differ" not in capsys.readouterr().out
    larger = tiny_tokenizer()
    larger.add_tokens(["red"])
    other = saved_tiny_model(tmp_path / "larger", vocab_size=len(larger))
    larger.save_pretrained(other)
    assert main(words((data, one, other), tmp_path / "other", *more)) == 0
    assert "the tokenizers differ: means per token and lengths are of other tokens" in capsys.readouterr().out


def test_a_report_of_other_models_is_kept(job, tmp_path, capsys):
    _, one, two = job
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"models": {str(two): {}}}))
    assert main(words(job, tmp_path)) == 2
    there = f"--output_dir: {report} is of ['{two}'], got ['{one}', '{two}']; name another folder"
    assert there in capsys.readouterr().err
    report.write_text("[]")
    assert main(words(job, tmp_path)) == 2
    assert "report.json is not a report of asft eval" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_prompt_that_leaves_no_room_has_no_answer(job, tmp_path, capsys):
    data = write_lines(tmp_path / "long.jsonl", [*pairs(2), {**pairs(1)[0], "prompt": "long " * 45}])
    assert main(words((data, *job[1:]), tmp_path / "out", "--max_length", "256", "--max_new_tokens", "40")) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["models"][str(job[1])]
    assert (found["bleu"]["pairs"], found["margin"]["pairs"]) == (2, 3)
    line = "1 of 3 pairs have no generated answer: prompt and --max_new_tokens 40 exceed the model's 256 positions"
    for text in (capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()):
        assert f"{job[1]}: {line}; --max_new_tokens 31 fits all of them\n" in text


@pytest.mark.parametrize(
    ("prompts", "positions", "said"),
    [
        ([6, 3], 10, "2 of 3 pairs .* exceed the model's 10 positions; --max_new_tokens 4 fits all of them"),
        ([12, 3], 10, "2 of 3 .*; --max_new_tokens 7 fits the shortest"),
        ([12, 10], 10, "2 of 3 .*; take shorter prompts"),
    ],
)
def test_room_for_answers(prompts, positions, said):
    rows = [{"generated": "a"}, {"generated": None}, {"generated": None}]
    given = [{"prompt_ids": [0] * length} for length in (1, *prompts)]
    assert re.fullmatch(f".*{said}", answers.without_room(given, rows, positions, 8) or "")
    assert answers.without_room(given[:1], rows[:1], positions, 8) is None


def test_what_cannot_be_used(job, tmp_path, capsys, monkeypatch):
    assert main([*words(job, tmp_path), "--model", str(job[1])]) == 2
    assert "two of one name; need names that differ" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert main(words(job, tmp_path)) == 2
    assert capsys.readouterr().err == 'asft eval: sacrebleu: not installed; pip install -e ".[train]" in the checkout\n'
