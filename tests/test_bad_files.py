"""Each bad file of `bad_files.py`: its exit code, one line that says what is bad, and no code of its own is run."""

import errno
from pathlib import Path

import pytest

pytest.importorskip("train_extra")
pytest.importorskip("safetensors", reason="needs the train extra: safetensors")

import torch

import bad_files
from asft_kernels.cli import main as asft
from asft_kernels.errors import InputError
from asft_kernels.score.table import load_scores
from train_extra import QUIET

pytestmark = QUIET


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return bad_files.good(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("bad", bad_files.BAD_FILES, ids=lambda bad: f"{bad.kind}: {bad.what}")
def test_a_bad_file_gets_one_line(good, tmp_path, bad):
    code, said, everything = bad_files.outcome(bad, bad_files.fresh(good, tmp_path))
    assert code == bad.code, everything
    assert bad.says in said, everything
    assert "Traceback" not in everything
    assert "the payload ran" not in everything


def test_a_file_without_permission_is_one_line(good, tmp_path, monkeypatch, capsys):
    """As root permissions do not bind: the error that others get is made here."""
    opens = Path.open

    def refuses(self, *args, **options):
        if self == good.data:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opens(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuses)
    assert asft(["score", "--model", str(good.model), "--data", str(good.data), "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert f"data: {good.data} cannot be read beyond line 0 ([Errno 13] Permission denied" in said[-1]
    assert "Traceback" not in "".join(said)


def test_no_bit_of_a_score_file_goes_unseen(good, tmp_path):
    """Every 11th byte with a bit flipped: the scores are those that were written, or the file is refused."""
    from asft_kernels.data import load_pairs
    from tiny_lm import tiny_tokenizer

    whole, path, tokenizer = good.scores.read_bytes(), tmp_path / "scores.parquet", tiny_tokenizer()
    pairs, _ = load_pairs(good.data, tokenizer)
    expected, refused = load_scores(good.scores, pairs, tokenizer), 0
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            assert torch.equal(load_scores(path, pairs, tokenizer), expected), at
        except InputError:
            refused += 1
    assert refused > len(whole) // 11 // 2  # the rest is what nothing reads


def test_the_page_has_them_all():
    table = bad_files.PAGE.read_text().partition(bad_files.START)[2].partition(bad_files.END)[0]
    shown = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert [[kind.removeprefix("| "), what] for kind, what in shown] == [[b.kind, b.what] for b in bad_files.BAD_FILES]
