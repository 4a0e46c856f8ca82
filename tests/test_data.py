"""Preference pairs: the ids of TRL's own trainer, every way to write a row and to get it wrong, the report."""

import gzip
import json
from types import SimpleNamespace

import pytest

from asft_kernels.errors import InputError

pytest.importorskip("trl", reason="needs the train extra: trl")

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from asft_kernels.data import load_pairs, read_rows, split_every_nth
from tiny_lm import CHAT_TEMPLATE, pairs, stored, tiny_tokenizer, write_lines

USER = {"role": "user", "content": "Name a colour."}
PLAIN = {"prompt": "Name a colour.", "chosen": "Red", "rejected": "Seven"}
SHOWS_ALL = (  # tools, calls and reasoning, and content as text or as parts
    "{% if tools %}<turn>{{ tools | tojson }}\n{% endif %}{% for m in messages %}<turn>{{ m['role'] }}\n"
    "{{ m.reasoning_content or '' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
REWRITES = CHAT_TEMPLATE.replace("<turn>assistant\n{% endif %}", "<turn>assistant\n<think>{% endif %}")
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "d", "parameters": {"type": "object"}}}]


def said(role="assistant", content="Red", **more):
    return {"role": role, "content": content, **more}


def with_template(template):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(single="<s> $A"):
    """As Mistral's and TinyLlama's: a text begins with ▁, and BOS goes before it."""
    from tokenizers.processors import TemplateProcessing

    letters = sorted({char for char in "Capital of France? Paris.Rome.▁" if char != " "})
    words = ["<unk>", "<s>", "</s>", *letters, "▁P"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "P")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def load(tmp_path, rows, tokenizer=None, **options):
    return load_pairs(write_lines(tmp_path / "rows.jsonl", rows), tokenizer or tiny_tokenizer(chat=True), **options)


def texts(tmp_path, row, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer(chat=True)
    (pair,) = load(tmp_path, [row], tokenizer)[0]
    return [tokenizer.decode(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]


CHAT = {"prompt": [USER], "chosen": [said()], "rejected": [said(content="Seven")]}
WHOLE = {"chosen": [USER, said()], "rejected": [USER, said(content="Seven")]}
WITH_TOOLS = {**CHAT, "tools": TOOLS, "chosen": [said(content="", tool_calls=[CALL])]}
TURNS = {**CHAT, "chosen": [said(), said(content=" or blue")]}


@pytest.mark.parametrize(
    ("row", "tokenizer"),
    [
        (PLAIN, tiny_tokenizer(chat=True)),
        ({**PLAIN, "chosen": " Red\n", "rejected": "Seven<eos>"}, tiny_tokenizer()),
        (CHAT, tiny_tokenizer(chat=True)),
        (WHOLE, tiny_tokenizer(chat=True)),
        (TURNS, tiny_tokenizer(chat=True)),
        (WITH_TOOLS, with_template(SHOWS_ALL)),
        ({**WITH_TOOLS, "tools": json.dumps(TOOLS)}, with_template(SHOWS_ALL)),
        (CHAT, with_template(REWRITES)),
        ({"prompt": "Capital of France? ", "chosen": "Paris.", "rejected": "Rome."}, sentencepiece()),
        ({"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "Rome."}, sentencepiece()),
    ],
    ids=["plain", "edges", "chat", "whole", "several", "tools", "tools-text", "rewriting", "merging", "sentencepiece"],
)
def test_ids_are_those_of_trls_trainer(tmp_path, row, tokenizer):
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    (expected,) = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, args, "train")
    (pair,) = load(tmp_path, [row], tokenizer)[0]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert pair[name] == expected[name]


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "chosen": "Red", "rejected": said(content="Seven")},
        {**CHAT, "prompt": USER["content"]},
        {**WHOLE, "prompt": USER["content"]},
        {**WHOLE, "prompt": None},
        {**WHOLE, "prompt": [USER]},
        {**CHAT, "prompt": [{**USER, "tool_calls": None}]},
        {**CHAT, "prompt": [{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}]},
        {
            "conversations": [{"from": "human", "value": USER["content"]}],
            "chosen": {"from": "gpt", "value": "Red"},
            "rejected": {"from": "gpt", "value": "Seven"},
        },
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS_ONLY, SHOWS_ALL], ids=["text", "parts", "both"])
def test_ways_to_write_a_chat(tmp_path, row, template):
    prompt = "<turn>user\nName a colour.<eos>\n<turn>assistant\n"
    assert texts(tmp_path, row, with_template(template)) == [prompt, "Red<eos>\n", "Seven<eos>\n"]


def test_a_system_column_is_shown(tmp_path):
    assert texts(tmp_path, {**CHAT, "system": "Brief."})[0].startswith("<turn>system\nBrief.<eos>\n<turn>user")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"},
        {
            "prompt": "\n\nHuman: a\n\nAssistant: ",
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: c",
        },
    ],
)
def test_dialogues(tmp_path, row):
    assert texts(tmp_path, row) == ["\n\nHuman: a\n\nAssistant:", " b<eos>", " c<eos>"]


def test_an_eos_that_the_tokenizer_writes_stands_once(tmp_path):
    tokenizer = sentencepiece(single="<s> $A </s>")
    (pair,) = load(tmp_path, [{"prompt": "Capital of France?", "chosen": "Paris.", "rejected": "Rome."}], tokenizer)[0]
    assert [pair[f"{name}_ids"].count(2) for name in ("prompt", "chosen", "rejected")] == [0, 1, 1]


def test_bos_and_eos_stand_once(tmp_path):
    tokenizer = sentencepiece()
    row = {"prompt": "<s>Capital of France?", "chosen": "Paris.</s>", "rejected": "Rome."}
    (pair,) = load(tmp_path, [row], tokenizer)[0]
    assert pair["prompt_ids"].count(1) == 1
    assert [pair[f"{name}_ids"].count(2) for name in ("prompt", "chosen", "rejected")] == [0, 1, 1]


BAD = [
    ("missing key 'rejected'", {"prompt": "a", "chosen": "b"}),
    ("missing key 'prompt'", {"chosen": "b", "rejected": "c"}),
    ("wrong type", {"prompt": "a", "chosen": 3, "rejected": "c"}),
    ("wrong type", {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}),
    ("wrong type", {"prompt": [], "chosen": "b", "rejected": "c"}),
    ("wrong type", {**CHAT, "tools": "{"}),
    ("empty answer", {"prompt": "a", "chosen": " \n", "rejected": "c"}),
    ("empty answer", {**CHAT, "chosen": [said(content="")]}),
    ("chosen and rejected have different prompts", {"chosen": "\n\nHuman: a\n\nAssistant: b",
                                                   "rejected": "\n\nHuman: A\n\nAssistant: c"}),
    ("answer with a turn of another role", {"chosen": "\n\nHuman: a\n\nAssistant: b",
                                           "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d"}),
    ("answer with a turn of another role", {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b\n\nHuman: d",
                                           "rejected": " c"}),
    ("wrong type", {**PLAIN, "ref_chosen_logps": "-1"}),
    ("wrong type", {**PLAIN, "ref_chosen_logps": float("nan")}),
    ("reference of other tokens", {**PLAIN, "ref_chosen_token_logps": [-1.0]}),
    ("reference of an answer that max_length cuts", {**PLAIN, "chosen": "b" * 70, "ref_chosen_logps": -1.0}),
    ("chosen and rejected have different prompts", {**WHOLE, "rejected": [said("user", "x"), said()]}),
    ("prompt is not how its answers begin", {**WHOLE, "prompt": "Something else"}),
    ("prompt is not how its answers begin", {"prompt": "a", "chosen": "b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    ("answer with a turn of another role", {**CHAT, "chosen": [said(), said("tool"), said()]}),
    ("text with half a surrogate pair, which no tokenizer can encode", {**PLAIN, "chosen": "\ud83d"}),
    ("prompt fills max_length", {"prompt": "a" * 60, "chosen": "b", "rejected": "c"}),
    ("prompt without a token", {"prompt": "", "chosen": "b", "rejected": "c"}),
    ("system column beside plain text", {**PLAIN, "system": "Brief."}),
    ("tools column beside plain text", {**PLAIN, "tools": TOOLS}),
    ("the template does not show the tools", {**CHAT, "tools": TOOLS}),
    ("the template does not show tool_calls", {**CHAT, "chosen": [said(tool_calls=[CALL])]}),
    ("the template does not show the difference", {**CHAT, "rejected": [said(reasoning_content="think")]}),
    ("chosen equals rejected", {**PLAIN, "rejected": "Red"}),
    ("chosen equals rejected up to max_length", {"prompt": "a", "chosen": "b" * 70, "rejected": "b" * 71}),
    ("unpaired row", {"prompt": "a", "completion": "b", "label": True}),
    ("ShareGPT turn that is not understood", {**CHAT, "prompt": [{"from": "observation", "value": "x"}]}),
    ("row with images", {**CHAT, "images": ["a.png"]}),
    ("unreadable JSON", "{'prompt': 1}"),
    ("unreadable JSON", '{"prompt": ' + "1" * 5000 + "}"),
    ("not a JSON object", "[1, 2]"),
    ("empty line", "  "),
]  # fmt: skip


def test_one_summary_names_every_row_left_out(tmp_path):
    rows = [*pairs(3), *(row for _, row in BAD), *pairs(2)]
    dataset, report = load(tmp_path, rows, max_length=60)
    assert dataset["line"][:] == [1, 2, 3, len(BAD) + 4, len(BAD) + 5]
    assert (report.rows, report.kept, report.left_out) == (len(rows), 5, len(BAD))
    assert {line: kind for kind, lines in report.bad.items() for line in lines} == {
        line: kind for line, (kind, _) in enumerate(BAD, start=4)
    }
    assert f"{len(rows)} rows, 5 kept, {len(BAD)} left out" in str(report)
    with pytest.raises(InputError, match=rf"{len(BAD)} rows cannot be used, and --strict is on.*line 4"):
        load(tmp_path, rows, max_length=60, strict=True)


def test_a_missing_key_is_told_beside_those_that_are_there(tmp_path):
    row = {"instruction": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(InputError, match="missing key 'prompt': the row has instruction, chosen, rejected; without it"):
        load(tmp_path, [row], strict=True)


NOTES = [
    ("answer cut at max_length 60", {"prompt": "a", "chosen": "b" * 70, "rejected": "c"}, CHAT_TEMPLATE),
    ("plain text taken as it stands, without the tokenizer's chat template", PLAIN, CHAT_TEMPLATE),
    ("plain text that holds special tokens, used as it stands", {**PLAIN, "chosen": "Red<eos>"}, CHAT_TEMPLATE),
    ("answer that ends in another special token than EOS, which follows it", {**PLAIN, "chosen": "Red<turn>"}, None),
    ("plain prompt that its answers begin with once more",
     {**PLAIN, "chosen": "Name a colour. Red", "rejected": " Name a colour. Seven"}, None),
    ("column system_prompt, which is not read", {**PLAIN, "system_prompt": "Brief."}, None),
    ("column history, which is not read", {**PLAIN, "history": [["a", "b"]]}, None),
    ("column ref_logps, which is not read", {**PLAIN, "ref_logps": -1}, None),
    ("answers that differ in white space alone", {**PLAIN, "rejected": "R ed"}, None),
    ("chat messages that hold special tokens already: a template in a template",
     {**CHAT, "prompt": [said("user", "<turn>a")]}, CHAT_TEMPLATE),
    ("white space around the answer, which the template strips", {**CHAT, "chosen": [said(content=" Red\n")]},
     CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")),
    ("reasoning_content that the template does not show", {**CHAT, "chosen": [said(reasoning_content="x")]},
     CHAT_TEMPLATE),
    ("prompt ids are no beginning of the whole: the template rewrites it, or tokens merge", CHAT, REWRITES),
]  # fmt: skip


@pytest.mark.parametrize(("note", "row", "template"), NOTES, ids=[note[:30] for note, *_ in NOTES])
def test_what_is_worth_a_look_is_named_and_kept(tmp_path, note, row, template):
    _, report = load(tmp_path, [row], with_template(template), max_length=60, strict=True)
    assert report.notes[note] == [1]
    assert f"kept, {note}: 1 (line 1)" in str(report)


def test_reasoning_that_the_template_shows_makes_a_difference(tmp_path):
    row = {**CHAT, "chosen": [said(reasoning_content="a")], "rejected": [said(reasoning_content="b")]}
    assert texts(tmp_path, row, with_template(SHOWS_ALL))[1:] == ["aRed<eos>\n", "bRed<eos>\n"]


def test_templates_that_refuse(tmp_path):
    alone = "messages | length == 1 and not add_generation_prompt"
    refusing = with_template("{{ messages[0]['content'] if " + alone + " else raise_exception('no roles') }}")
    with pytest.raises(InputError, match="line 1: the chat template refuses the chat: no roles"):
        load(tmp_path, [CHAT], refusing)
    with pytest.raises(InputError, match="its chat template shows neither the text nor the parts"):
        load(tmp_path, [CHAT], with_template("fixed"))
    with pytest.raises(InputError, match=r"its chat template refuses a user's message: .*endfor.* need one"):
        load(tmp_path, [CHAT], with_template("{% for m in messages %}{{ m['content'] }}"))
    first = "{{ raise_exception('a system message first') if messages[0]['role'] != 'system' }}" + CHAT_TEMPLATE
    with pytest.raises(InputError, match="line 1: the chat template refuses the chat: a system message first"):
        load(tmp_path, [CHAT], with_template(first))
    assert len(load(tmp_path, [{**CHAT, "system": "Brief."}], with_template(first))[0]) == 1
    with pytest.raises(InputError, match=r"line 1: .* has no chat template: need one; name an instruct model"):
        load(tmp_path, [CHAT], tiny_tokenizer())


def test_ids_beyond_the_embedding_are_one_error(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    rows = [*pairs(6), {**PLAIN, "chosen": "x <|new|>"}]
    assert len(load(tmp_path, rows, tokenizer, vocab_size=260)[0]) == 7
    with pytest.raises(InputError, match=r"line 7 has the token '<\|new\|>' of id 259, need less than 259"):
        load(tmp_path, rows, tokenizer, vocab_size=259)
    tokenizer.pad_token = "<|new|>"
    with pytest.raises(InputError, match="the pad token's id is 259"):
        load(tmp_path, pairs(2), tokenizer, vocab_size=259)


def test_chosen_alone(tmp_path):
    dataset, _ = load(tmp_path, [{"prompt": "a", "chosen": "b"}, {**PLAIN, "rejected": 3}], answers=("chosen",))
    assert dataset.column_names == ["line", "id", "prompt_ids", "chosen_ids"]
    assert len(dataset) == 2


def test_files_shards_and_several_names(tmp_path):
    rows, tokenizer = pairs(6), tiny_tokenizer()
    expected = load(tmp_path, rows, tokenizer)[0][:]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_lines(folder / "train-0.jsonl", rows[:2])
    (folder / "train-1.json").write_text(json.dumps(rows[2:4], indent=1))
    (folder / "train-2.json.gz").write_bytes(gzip.compress(json.dumps(rows[4:]).encode()))
    write_lines(folder / "test-0.jsonl", rows[:1])
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "splits")
    several = [*sorted(folder.glob("train*"))]
    for names in (folder, several, tmp_path / "splits", stored(rows, tmp_path, "parquet")):
        assert load_pairs(names, tokenizer)[0][:] == expected
    assert "train-1.json (lines 3 to 4)" in load_pairs(several, tokenizer)[1].source
    assert len(load_pairs(folder, tokenizer, split="test")[0]) == 1
    for names, message in (
        ([], "got no name"),
        (tmp_path / "nowhere.jsonl", "nowhere.jsonl', no such file"),
        (tmp_path / "none", "no such file"),
        (stored(rows, tmp_path, "folder").parent / "empty", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            load_pairs(names, tokenizer)


def shards(folder, *names):
    """A file of each name, with an answer that is the name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, [{**PLAIN, "chosen": name}])
    return folder


@pytest.mark.parametrize(
    ("names", "split", "taken"),
    [
        (["train/part-0.jsonl", "test/part-0.jsonl"], "test", ["test/part-0.jsonl"]),
        (["hh_train.jsonl", "hh_test.jsonl"], "train", ["hh_train.jsonl"]),
        (["Train_1.jsonl", "train_2.json", "Test.jsonl"], "train", ["Train_1.jsonl", "train_2.json"]),
        (["train_sft-00000-of-00002.jsonl", "train_prefs-0.jsonl", "test_sft-0.jsonl"], "train_sft",
         ["train_sft-00000-of-00002.jsonl"]),
        (["a/train-00000-of-00001-0123456789abcdef.jsonl", "a/more.jsonl"], "train",
         ["a/train-00000-of-00001-0123456789abcdef.jsonl"]),
        (["a.jsonl", "b.jsonl", ".hidden/c.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
    ],
)  # fmt: skip
def test_a_split_is_of_its_own_files(tmp_path, names, split, taken):
    dataset, _ = load_pairs(shards(tmp_path / "data", *names), tiny_tokenizer(), split=split)
    assert sorted(tiny_tokenizer().batch_decode(dataset["chosen_ids"][:])) == [f"{name}<eos>" for name in sorted(taken)]


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (
            ["train_sft-0.jsonl", "train_prefs-0.jsonl"],
            "train",
            "'train', and .* holds 'train_prefs', 'train_sft'; need",
        ),
        (["train.jsonl", "eval.jsonl"], "test", "'test', and .* holds 'eval', 'train'; need"),
        (["a.jsonl"], "test", "'test', and .* holds 'train'; need"),
        (["train_test.jsonl"], "train", "may be of 'test' or 'train_test'; name files"),
        (["train/test.jsonl"], "train", "may be of 'test' or 'train'; name files"),
    ],
)
def test_splits_that_are_not_there_or_unclear(tmp_path, names, split, message):
    with pytest.raises(InputError, match=f"^split: .*{message}"):
        load_pairs(shards(tmp_path / "data", *names), tiny_tokenizer(), split=split)


def test_splits_of_files_and_of_what_datasets_saved(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", pairs(2))
    with pytest.raises(InputError, match=r"split: got 'test', and '.*train.jsonl' has no splits; need 'train', all of"):
        load_pairs(path, tiny_tokenizer(), split="test")
    DatasetDict(train=Dataset.from_list(pairs(2))).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"split: got 'test', and '.*saved' holds 'train'; need one of these"):
        load_pairs(tmp_path / "saved", tiny_tokenizer(), split="test")


def test_csv_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "pairs.csv"
    Dataset.from_list(pairs(3)).to_csv(path)
    with pytest.raises(InputError, match=r"pairs.csv is CSV; need .*from_csv\(.*to_json\('pairs.jsonl'\) writes one"):
        load_pairs(path, tiny_tokenizer())


SUMS = {"ref_chosen_logps": -1, "ref_rejected_logps": -2.5}


def test_references_of_the_rows_are_columns(tmp_path):
    several = {"ref_chosen_logps": [-1, -2], "ref_rejected_logps": [-3, -4.5]}
    tokens = {"ref_chosen_token_logps": [-1.0] * 4, "ref_rejected_token_logps": [-0.5] * 6}
    for given in (SUMS, several, tokens, {**SUMS, **tokens}):
        dataset, report = load(tmp_path, [{**PLAIN, **given}, {"prompt": "left out"}, {**PLAIN, **given}])
        for name, value in given.items():
            assert dataset[name][:] == [value] * 2
        assert not [note for note in report.notes if "not read" in note]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**PLAIN, **SUMS}, PLAIN], "ref_chosen_logps: line 2 has nothing, need a number"),
        ([PLAIN, {**PLAIN, **SUMS}], "ref_chosen_logps: line 1 has nothing, need a number"),
        ([{**PLAIN, "ref_chosen_logps": -1}], "ref_rejected_logps: line 1 has nothing, need a value"),
        (
            [{**PLAIN, **SUMS}, {**PLAIN, **SUMS, "ref_chosen_logps": [-1]}],
            "line 2 has a list of 1 numbers, need a num",
        ),
    ],
)
def test_references_of_some_rows_alone_are_refused(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, rows)


def test_a_hub_name(tmp_path, monkeypatch):
    import datasets

    rows = [*pairs(3), {**pairs(1)[0], "rejected": None}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: Dataset.from_list(rows))
    dataset, report = load_pairs("org/name", tiny_tokenizer(), split="test")
    assert (len(dataset), report.bad) == (3, {"missing key 'rejected'": [4]})
    several = [{**CHAT, "tools": [{**TOOLS[0], "strict": strict}]} for strict in (None, True)]  # a column has both
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: Dataset.from_list(several))
    tokenizer = with_template(SHOWS_ALL)
    shown = tokenizer.batch_decode(load_pairs("org/name", tokenizer)[0]["prompt_ids"][:])
    assert ["strict" in text for text in shown] == [False, True]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match=r"data: 'org/name' cannot be loaded \(division by zero\)"):
        load_pairs("org/name", tiny_tokenizer())


def test_odd_bytes(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = json.dumps(PLAIN).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\n" + b"\xff\xfe\n" + row + b"\n\n \n")
    dataset, report = load_pairs(path, tiny_tokenizer())
    assert dataset["line"][:] == [1, 3]
    assert report.bad == {"not UTF-8": [2]}
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"".join(b'{"a": %d}\n' % i for i in range(9999)))[:-900])
    with pytest.raises(InputError, match=r"cannot be read beyond line \d+.*is the copy complete"):
        list(read_rows(cut))


def test_split_goes_by_line_number(tmp_path):
    rows = pairs(24)
    train, evaluation = split_every_nth(load(tmp_path, [*rows[:5], "{", *rows[6:]])[0], 8)
    assert evaluation["line"][:] == [8, 16, 24]
    assert len(train) == 20
    with pytest.raises(InputError, match="eval_every_nth: got 1, need at least 2"):
        split_every_nth(train, 1)
    with pytest.raises(InputError, match="leaves 20 pairs for training and 0 for evaluation"):
        split_every_nth(train, 1000)
