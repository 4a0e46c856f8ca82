"""`asft-data sapo`: negatives of one offline pass, what is left out, runs that go on."""

import json

import pytest

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from asft_kernels.cli.data import main
from asft_kernels.data import parse_pair
from asft_kernels.data_commands import partial
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.models.generation import TransformersGenerator
from tiny_lm import pairs, saved_tiny_model, tiny_tokenizer, write_lines

ROWS = [{"prompt": row["prompt"], "chosen": row["chosen"] * 2} for row in pairs(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_tiny_model(tmp_path_factory.mktemp("model"))


def command(model, tmp_path, rows, *options, output="out.jsonl"):
    source = write_lines(tmp_path / "in.jsonl", rows)
    limits = ("--max-length", "64", "--token-generate-length", "4", "--batch-size", "3")
    return ["sapo", str(source), str(tmp_path / output), "--model", str(model), *limits, *options]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rejected_answers_differ_in_one_segment(model, tmp_path, capsys):
    """Byte tokens: before t and behind t + 4 the texts agree, unless the segment ended the answer."""
    bad = [{"prompt": "p"}, {"prompt": "p" * 70, "chosen": "yes"}]
    assert main(command(model, tmp_path, [*ROWS, *bad])) == 0
    written = read(tmp_path / "out.jsonl")
    said = capsys.readouterr().out
    assert "12 rows, 2 bad; 10 rows written" in said
    assert "missing key 'chosen': 1 (line 11)" in said
    assert "prompt fills max_length: 1 (line 12)" in said
    assert [(row["prompt"], row["chosen"]) for row in written] == [(row["prompt"], row["chosen"]) for row in ROWS]
    for row in written:
        parse_pair(row)
        assert row["rejected"] != row["chosen"]


def test_answer_longer_than_the_model_keeps_its_end(model, tmp_path, monkeypatch):
    """40 of prompt and answer may be seen; the answer has 90 bytes, and those behind the segment stay."""
    monkeypatch.setattr(
        TransformersGenerator, "generate_ids",
        lambda self, ids, *, max_new_tokens, **_: [self.tokenizer("?" * max_new_tokens)["input_ids"] for _ in ids],
    )  # fmt: skip
    answer = "0123456789" * 9
    assert main(command(model, tmp_path, [{"prompt": "Count: ", "chosen": answer}], "--max-length", "40")) == 0
    (row,) = read(tmp_path / "out.jsonl")
    start = row["rejected"].index("?")
    assert start <= 40 - len("Count: ") - 4
    assert row["rejected"] == answer[:start] + "????" + answer[start + 4 :]


def test_segment_that_comes_out_as_it_was_is_left_out(model, tmp_path, monkeypatch, capsys):
    made = Regeneration.negatives
    monkeypatch.setattr(
        Regeneration, "negatives",
        lambda self, rows, *rest: [rows[0]["chosen_ids"], *made(self, rows, *rest)[1:]],
    )  # fmt: skip
    assert main(command(model, tmp_path, ROWS[:4])) == 0
    assert "left out, segment written anew as it was: 2 (lines 1, 4)" in capsys.readouterr().out
    assert len(read(tmp_path / "out.jsonl")) == 2


def test_dialogue_keeps_its_space_and_an_empty_answer_is_left_out(model, tmp_path, monkeypatch, capsys):
    encode, answers = tiny_tokenizer(), iter(["fine<eos>", "<eos>"])
    monkeypatch.setattr(
        Regeneration, "negatives", lambda self, rows, *_: [encode(next(answers))["input_ids"] for _ in rows]
    )
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello"
    assert main(command(model, tmp_path, [{"chosen": dialogue}, {"chosen": dialogue}])) == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row == {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " fine"}
    assert "left out, new answer: empty answer: 1 (line 2)" in capsys.readouterr().out


@pytest.mark.parametrize("answer", ["Yes.", "Yes.\n"])
def test_both_answers_of_a_chat_end_alike(tmp_path, monkeypatch, answer):
    """The template's new line behind the end is none of the answer's."""
    folder = saved_tiny_model(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(folder)
    monkeypatch.setattr(
        Regeneration, "negatives", lambda self, rows, *_: [[*row["chosen_ids"][1:]] for row in rows]
    )  # fmt: skip
    chat = {"prompt": [{"role": "user", "content": "So?"}], "chosen": [{"role": "assistant", "content": answer}]}
    assert main(command(folder, tmp_path, [chat])) == 0
    (row,) = read(tmp_path / "out.jsonl")
    assert row["rejected"][0]["content"] == answer[1:]


def test_interrupted_run_goes_on_with_the_same_rows(model, tmp_path, monkeypatch):
    assert main(command(model, tmp_path, ROWS)) == 0
    calls, made = [], Regeneration.negatives

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(self, *args)

    monkeypatch.setattr(partial, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(Regeneration, "negatives", interrupted)
    again = command(model, tmp_path, ROWS, output="again.jsonl")
    assert main(again) == 130
    monkeypatch.setattr(Regeneration, "negatives", made)
    assert main(again) == 0
    assert read(tmp_path / "again.jsonl") == read(tmp_path / "out.jsonl")
    equal = ROWS[:1] * 6
    assert main(command(model, tmp_path, equal, output="equal.jsonl")) == 0
    written = [row["rejected"] for row in read(tmp_path / "equal.jsonl")]
    assert written[:3] != written[3:]  # batches are drawn apart
    assert main(command(model, tmp_path, equal, "--seed", "1", output="other.jsonl")) == 0
    assert [row["rejected"] for row in read(tmp_path / "other.jsonl")] != written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "0"), "temperature: got 0.0, need a number > 0"),
        (("--top-p", "0"), "top_k, top_p: got 50, 0.0"),
        (("--max-length", "999"), "max_length: got 999, need at most 256, the model's positions"),
    ],
)
def test_bad_arguments(model, tmp_path, capsys, options, message):
    assert main(command(model, tmp_path, ROWS, *options)) == 2
    assert message in capsys.readouterr().err
