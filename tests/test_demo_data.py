"""The demo pairs: well-formed, distinct, and of lengths that do not give the answer away."""

import json
from pathlib import Path

import pytest

import asft_kernels

FOLDER = Path(asft_kernels.__file__).parent / "demo_data"
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def texts_of(row: dict) -> dict[str, str]:
    """Key -> text of a row; each is one message of its role."""
    assert {key: [message["role"] for message in row[key]] for key in row} == {key: [ROLES[key]] for key in ROLES}
    return {key: messages[0]["content"] for key, messages in row.items()}


PAIRS = {
    name: [texts_of(json.loads(line)) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]
    for name in ("train", "eval")
}


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(("name", "at_least"), [("train", 96), ("eval", 32)])
def test_rows(name, at_least):
    assert len(PAIRS[name]) >= at_least
    for row in PAIRS[name]:
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert all(text == text.strip() for text in row.values()), row
        assert 5 <= words(row["prompt"]) <= 40, row
        assert all(10 <= words(row[key]) <= 60 for key in ("chosen", "rejected")), row


@pytest.mark.parametrize("keys", [("prompt",), ("chosen", "rejected")], ids=["prompts", "answers"])
def test_nothing_occurs_twice(keys):
    texts = [row[key].casefold() for rows in PAIRS.values() for row in rows for key in keys]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", PAIRS)
def test_length_does_not_give_the_answer_away(name):
    rows = PAIRS[name]
    longer = sum(words(row["chosen"]) > words(row["rejected"]) for row in rows) / len(rows)
    means = [sum(words(row[key]) for row in rows) / len(rows) for key in ("chosen", "rejected")]
    assert 0.4 <= longer <= 0.6
    assert max(means) <= 1.1 * min(means)
