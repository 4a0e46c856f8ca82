"""benchmarks.autoencoder: the page of fpo shows what the rows say, and rows hold what the command wrote."""

import json
from pathlib import Path

import pytest

pytest.importorskip("train_extra")

from asft_kernels.cli.frame import CommandParser
from asft_kernels.methods.fpo import sae_command
from benchmarks import autoencoder
from benchmarks.run import rows_of

ABOUT = {
    "machine": "chip", "python": "3",
    "torch": "2", "commit": "c", "command": "python -m benchmarks.autoencoder", "date": "2030-01-02",
}  # fmt: skip


def row(l1, **settings):
    return {
        "model": "tiny", "data": "pairs.jsonl", "data_sha256": "ab" * 32, "training_tokens": 60000, "steps_done": 600,
        "settings": {"layer": -1, "features": 4096, "batch_size": 1024, "l1": l1, **settings},
        "held_out": {"explained_variance": 0.5 + l1 / 1000, "l0": 12.6, "dead": 0.0125, "tokens": 6000},
        "about": ABOUT,
    }  # fmt: skip


def test_the_page_shows_the_rows():
    page = autoencoder.PAGE.read_text()
    assert autoencoder.written(page, rows_of(autoencoder.ROWS)) == page, "run `python -m benchmarks.autoencoder`"


def test_what_the_table_says():
    lines = autoencoder.text([row(2.0), row(5.0)]).splitlines()
    assert lines[0] == (
        "tiny, input of the head, on pairs.jsonl (sha256 abababababab…): 4,096 features, 60,000 tokens, 600 steps of "
        "1,024. Figures of 6,000 tokens of held-out pairs."
    )
    assert lines[2] == "| `--l1` | explained variance | features a token | dead |"
    assert lines[4:6] == ["| 5 | 0.505 | 13 | 1.2% |", "| 2 | 0.502 | 13 | 1.2% |"]
    assert "commit c" in lines[-1]
    assert "output of block 3," in autoencoder.text([row(2.0, layer=3)])
    assert autoencoder.text([]).endswith("not measured yet.")


def test_rows_of_other_settings_share_no_table():
    with pytest.raises(ValueError, match="need rows that differ in --l1 alone"):
        autoencoder.text([row(2.0), row(5.0, features=1024)])


def test_a_row_is_what_the_command_wrote_without_its_paths(monkeypatch, tmp_path):
    made = {"settings": {}, "steps_done": 3, "held_out": {"l0": 1.0}}

    def run(command, log):
        parser = CommandParser()
        sae_command.add_arguments(parser)
        assert command[1:5] == ["-m", "asft_kernels.cli", "data", "sae"]
        options = vars(parser.parse_args(command[5:]))
        assert options["l1"] == 2.5
        assert {**options, "l1": 5.0} == vars(parser.parse_args([*command[5:-2]])), "its defaults but for --l1"
        Path(f"{options['output']}.json").write_text(json.dumps({**made, "settings": options}))

    monkeypatch.setattr(autoencoder, "run", run)
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    written = autoencoder.measure(tmp_path / "model", data, 2.5, tmp_path)
    assert (written["model"], written["data"], written["steps_done"]) == ("model", "pairs.jsonl", 3)
    assert str(tmp_path) not in json.dumps(written)
