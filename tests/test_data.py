"""Preference pairs: every way to write a row and to get it wrong, masks, limits, the report."""

import gzip
import json

import pytest
import torch

from asft_kernels.errors import InputError

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from asft_kernels.data import (
    BadRow,
    PairCollator,
    load_pairs,
    parse_pair,
    read_rows,
    split_every_nth,
    tokenize_pair,
)
from tiny_lm import pairs, tiny_tokenizer, write_lines

USER = {"role": "user", "content": "Name a colour."}
PLAIN = {"prompt": "Name a colour.", "chosen": "Red", "rejected": "Seven"}
HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hi. Which colour?\n\nHuman: Any\n\nAssistant: Red",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Hi. Which colour?\n\nHuman: Any\n\nAssistant: 7",
}


def texts(row, chat, **limits):
    tokenizer = tiny_tokenizer(chat)
    limits = {"max_length": 200, "max_prompt_length": 150, **limits}
    prompt, chosen, rejected, _ = tokenize_pair(row, tokenizer, **limits)
    return [tokenizer.decode(ids) for ids in (prompt, chosen, rejected)]


def test_plain_strings_as_they_stand_with_eos():
    assert texts(PLAIN, chat=False) == ["Name a colour.", "Red<eos>", "Seven<eos>"]


@pytest.mark.parametrize(
    "row",
    [
        PLAIN,
        {"prompt": [USER], "chosen": "Red", "rejected": "Seven"},
        {
            "prompt": [USER],
            "chosen": [{"role": "assistant", "content": "Red"}],
            "rejected": [{"role": "assistant", "content": "Seven"}],
        },
        {
            "chosen": [USER, {"role": "assistant", "content": "Red"}],
            "rejected": [USER, {"role": "assistant", "content": "Seven"}],
        },
        {
            "prompt": USER["content"],
            "chosen": [USER, {"role": "assistant", "content": "Red"}],
            "rejected": [USER, {"role": "assistant", "content": "Seven"}],
        },
        {
            "chosen": "\n\nHuman: Name a colour.\n\nAssistant: Red",
            "rejected": "\n\nHuman: Name a colour.\n\nAssistant: Seven",
        },
        {
            "prompt": "\n\nHuman: Name a colour.\n\nAssistant:",
            "chosen": " Red",
            "rejected": " Seven",
        },
        {
            "prompt": "\n\nHuman: Name a colour.\n\nAssistant: ",
            "chosen": "\n\nHuman: Name a colour.\n\nAssistant: Red",
            "rejected": "\n\nHuman: Name a colour.\n\nAssistant: Seven",
        },
    ],
    ids=["strings", "prompt messages", "messages", "chats", "prompt and chats", "HH", "HH prompt", "HH prompt twice"],
)
def test_chat_template_ends_at_the_end_of_turn(row):
    prompt = "<turn>user\nName a colour.<eos>\n<turn>assistant\n"
    assert texts(row, chat=True) == [prompt, "Red<eos>", "Seven<eos>"]


def test_dialogue_with_several_turns():
    plain = texts(HH, chat=False)
    assert plain[0] == HH["chosen"].removesuffix(" Red")
    assert plain[1:] == [" Red<eos>", " 7<eos>"]
    assert texts(HH, chat=True)[0] == (
        "<turn>user\nHello<eos>\n<turn>assistant\nHi. Which colour?<eos>\n<turn>user\nAny<eos>\n<turn>assistant\n"
    )


BAD = {
    "missing key 'rejected'": {"prompt": "a", "chosen": "b"},
    "missing key 'chosen'": {"prompt": "a", "rejected": "b"},
    "missing key 'prompt'": {"chosen": "b", "rejected": "c"},
    "wrong type": {"prompt": None, "chosen": "b", "rejected": "c"},
    "wrong type ": {"prompt": "a", "chosen": 3, "rejected": "c"},
    "wrong type  ": {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"},
    "wrong type   ": {"prompt": [], "chosen": "b", "rejected": "c"},
    "empty answer": {"prompt": "a", "chosen": " \n", "rejected": "c"},
    "empty answer ": {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "dialogues differ before the last assistant turn": {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: A\n\nAssistant: c",
    },
    "dialogues differ before the last assistant turn ": {
        "chosen": [USER, {"role": "assistant", "content": "b"}],
        "rejected": [USER, USER, {"role": "assistant", "content": "c"}],
    },
    "prompt is not how its answers begin": {
        "prompt": "Something else",
        "chosen": [USER, {"role": "assistant", "content": "b"}],
        "rejected": [USER, {"role": "assistant", "content": "c"}],
    },
    "prompt is not how its answers begin ": {
        "prompt": "\n\nHuman: a\n\nAssistant:",
        "chosen": "\n\nHuman: b\n\nAssistant: c",
        "rejected": "\n\nHuman: b\n\nAssistant: d",
    },
    "prompt is not how its answers begin  ": {"prompt": "a", "chosen": "b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "answer is not one assistant message": {"prompt": "a", "chosen": [USER], "rejected": "c"},
    "text with half a surrogate pair, which no tokenizer can encode": {
        "prompt": "a",
        "chosen": "\ud83d",
        "rejected": "c",
    },
    "prompt longer than the limit": {"prompt": "a" * 99, "chosen": "b", "rejected": "c"},
    "prompt without a token": {"prompt": "", "chosen": "b", "rejected": "c"},
    "chat messages, and the tokenizer has no chat template": {
        "prompt": [USER],
        "chosen": "b",
        "rejected": "c",
    },
    "unreadable JSON": "{'prompt': 1}",
    "unreadable JSON ": '{"prompt": ' + "1" * 5000 + "}",
    "not a JSON object": "[1, 2]",
    "empty line": "  ",
}


def kind_of(name):
    return name.rstrip()


@pytest.mark.parametrize("name", [n for n in BAD if isinstance(BAD[n], dict)])
def test_bad_row_kinds(name):
    row = BAD[name]
    with pytest.raises(BadRow) as caught:
        tokenize_pair(row, tiny_tokenizer(), max_length=60, max_prompt_length=40)
    assert caught.value.kind == kind_of(name)


def test_one_summary_names_every_row_left_out(tmp_path):
    path = write_lines(tmp_path / "mixed.jsonl", [*pairs(3), *BAD.values(), *pairs(2)])
    dataset, report = load_pairs(path, tiny_tokenizer(), max_length=60, max_prompt_length=40)
    assert dataset["line"][:] == [1, 2, 3, len(BAD) + 4, len(BAD) + 5]
    assert (report.rows, report.kept, report.left_out) == (len(BAD) + 5, 5, len(BAD))
    text = str(report)
    assert f"{len(BAD) + 5} rows, 5 kept, {len(BAD)} left out" in text
    for number, name in enumerate(BAD, start=4):
        assert kind_of(name) in text
        assert number in report.bad[kind_of(name)]
    with pytest.raises(InputError, match=rf"{len(BAD)} rows cannot be used, and --strict is on.*line 4"):
        load_pairs(path, tiny_tokenizer(), max_length=60, max_prompt_length=40, strict=True)


def test_not_utf8_is_a_bad_row_and_bom_is_not(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = json.dumps(PLAIN).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\n" + b"\xff\xfe\n" + row)
    dataset, report = load_pairs(path, tiny_tokenizer())
    assert dataset["line"][:] == [1, 3]
    assert report.bad == {"not UTF-8": [2]}


def test_empty_lines_at_the_end_are_no_rows(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(2), "", " "])
    _, report = load_pairs(path, tiny_tokenizer(), strict=True)
    assert (report.rows, report.left_out) == (2, 0)


def test_a_prompt_that_its_answers_repeat_stands_once():
    prompt = HH["chosen"].removesuffix(" Red")
    assert texts({"prompt": prompt, **HH}, chat=False) == texts(HH, chat=False)


def test_long_lists_of_lines_are_shortened(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(1), *["{"] * 30])
    _, report = load_pairs(path, tiny_tokenizer())
    assert "unreadable JSON: 30 (lines 2, 3, 4, 5, 6, 7, 8, 9 and 22 more)" in str(report)


def test_long_answers_are_cut_and_counted(tmp_path):
    long = {"prompt": "abcd", "chosen": "x" * 50, "rejected": "y"}
    path = write_lines(tmp_path / "pairs.jsonl", [*pairs(1), long])
    dataset, report = load_pairs(path, tiny_tokenizer(), max_length=40, strict=True)
    assert report.truncated == [2]
    assert "answer cut at max_length 40: 1 (line 2)" in str(report)
    assert [len(dataset[1][name]) for name in ("prompt", "chosen", "rejected")] == [4, 36, 2]


def test_gzip_is_recognised_by_content(tmp_path):
    plain = write_lines(tmp_path / "pairs.jsonl", pairs(4))
    zipped = tmp_path / "named_oddly"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    first, second = (load_pairs(path, tiny_tokenizer())[0] for path in (plain, zipped))
    assert first[:] == second[:]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.jsonl', no such file; need a file of JSON lines"):
        load_pairs(tmp_path / "nowhere.jsonl", tiny_tokenizer())
    with pytest.raises(InputError, match="is a folder"):
        load_pairs(tmp_path, tiny_tokenizer())
    with pytest.raises(InputError, match=r"no usable pair; first: line 1: missing key 'chosen'"):
        load_pairs(write_lines(tmp_path / "all_bad.jsonl", [{"prompt": "a"}]), tiny_tokenizer())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(9999)))[:-900])
    with pytest.raises(InputError, match=r"cannot be read beyond line \d+.*is the copy complete"):
        list(read_rows(cut))


def test_split_goes_by_line_number(tmp_path):
    rows = pairs(24)
    path = write_lines(tmp_path / "pairs.jsonl", [*rows[:5], "{", *rows[6:]])
    train, evaluation = split_every_nth(load_pairs(path, tiny_tokenizer())[0], 8)
    assert evaluation["line"][:] == [8, 16, 24]
    assert len(train) == 20
    with pytest.raises(InputError, match="eval_every_nth: got 1, need at least 2"):
        split_every_nth(train, 1)
    with pytest.raises(InputError, match="leaves 20 pairs for training and 0 for evaluation"):
        split_every_nth(train, 1000)


@pytest.mark.parametrize("given", [None, "<pad>"])
def test_a_collator_needs_a_token_id(given):
    with pytest.raises(ValueError, match=r"pad_token_id: got \w+, need a token id: tokenizer.pad_token_id"):
        PairCollator(given)


def test_batch_is_chosen_rows_first_with_exact_masks(tmp_path):
    tokenizer = tiny_tokenizer()
    path = write_lines(tmp_path / "pairs.jsonl", pairs(3))
    dataset, _ = load_pairs(path, tokenizer)
    batch = PairCollator(tokenizer.pad_token_id)([dataset[i] for i in range(3)])
    assert {name: t.shape[0] for name, t in batch.items()} == dict.fromkeys(batch, 6)
    assert batch["input_ids"].shape[1] % 8 == 0
    for row in range(6):
        pair, side = dataset[row % 3], "chosen" if row < 3 else "rejected"
        length = int(batch["attention_mask"][row].sum())
        expected = [*pair["prompt"], *pair[side]]
        assert batch["input_ids"][row, :length].tolist() == expected
        assert batch["labels"][row, len(pair["prompt"]) : length].tolist() == pair[side]
        masked = batch["labels"][row] == -100
        assert masked.sum() == batch["labels"].shape[1] - len(pair[side])
    assert torch.equal(batch["input_ids"][:3, :5], batch["input_ids"][3:, :5])  # same prompts


def test_prompt_tokens_do_not_depend_on_the_answer():
    row = {**PLAIN, "prompt": "A prompt that ends within a wor"}
    tokenizer = tiny_tokenizer()
    limits = dict(max_length=100, max_prompt_length=50)
    first = tokenize_pair({**row, "chosen": "d"}, tokenizer, **limits)[0]
    second = tokenize_pair({**row, "chosen": "m"}, tokenizer, **limits)[0]
    assert first == second


def test_template_that_rewrites_the_prompt_is_a_bad_row():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }} turns: " + tokenizer.chat_template
    with pytest.raises(BadRow, match="rewrites the prompt"):
        tokenize_pair(PLAIN, tokenizer, max_length=99, max_prompt_length=50)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRow, match=r"refuses the dialogue: roles must alternate"):
        tokenize_pair(PLAIN, tokenizer, max_length=99, max_prompt_length=50)


def test_extra_keys_are_fine():
    assert parse_pair({**PLAIN, "score": 1}).chosen == "Red"
