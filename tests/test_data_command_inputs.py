"""`asft-data` on Parquet, Arrow and saved folders: what JSON lines give, and what is promised of them."""

import bz2
import datetime
import itertools
import json
import lzma
import tracemalloc
import zipfile

import pytest

pytest.importorskip("pyarrow", reason="needs the train extra: pyarrow")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

import datasets
import pyarrow as pa
from pyarrow import parquet

from asft_kernels.cli.data import main
from asft_kernels.data import load_pairs, read_rows
from asft_kernels.data_commands import partial
from asft_kernels.errors import InputError
from tiny_lm import ARROW_KINDS, stored, tiny_tokenizer, write_lines

COUNT = 150  # more than a reader holds at a time
DONE = 78  # rows before an interruption; the last one is no bad row, so that it is committed
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows_for(command: str) -> list[dict]:
    """Rows of the command; one of seven is bad, for a key that is missing."""
    keys = {"rad": "rejected_score", "rso": "rewards", "dnpo": "generated_score", "bmc": "rejected"}
    rows = []
    for i in range(COUNT):
        prompt = [*CHAT, {"role": "user", "content": f"Why {i}?"}]
        pair = {"prompt": prompt, "chosen": f"good {i}", "rejected": f"bad {i}"}
        row = {
            "rad": {**pair, "chosen_score": {"help": i % 10, "truth": 8.5}, "rejected_score": {"help": 3, "truth": 2}},
            "rso": {"prompt": prompt, "responses": ["a", "b", f"c {i}"], "rewards": [0.5, i / 7, -1.0]},
            "dnpo": {"prompt": prompt, "human": "h", "generated": "g", "human_score": 5, "generated_score": i % 10},
            "bmc": pair,
        }[command]
        if i % 7 == 6:
            del row[keys[command]]
        rows.append(row)
    return rows


def options_for(command: str, folder) -> list[str]:
    edits = [{"line": i, "edited": f"better {i}"} for i in range(1, COUNT, 2)]
    return ["--edits", str(stored(edits, folder, "parquet")), "--batch-size", "4"] if command == "bmc" else []


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source, output, *options: str, command: str = "rad", code: int = 0) -> None:
    assert main([command, str(source), str(output), *options]) == code


def interrupt_after(monkeypatch, batches: int) -> None:
    """Ctrl-C once, in the batch after so many; each batch before it is committed."""
    done, counts = partial.Partial.batch_done, itertools.count(1)

    def batch_done(self, number):
        if next(counts) == batches + 1:
            raise KeyboardInterrupt
        done(self, number)

    monkeypatch.setattr(partial, "COMMIT_BYTES", 1)
    monkeypatch.setattr(partial.Partial, "batch_done", batch_done)


@pytest.mark.parametrize("kind", ARROW_KINDS)
@pytest.mark.parametrize("command", ["rad", "rso", "dnpo", "bmc"])
def test_every_command_writes_what_it_writes_of_json_lines(tmp_path, capsys, command, kind):
    (tmp_path / "edits").mkdir()
    options = options_for(command, tmp_path / "edits")
    lines = write_lines(tmp_path / "in.jsonl", rows_for(command))
    run(lines, tmp_path / "lines.jsonl", *options, command=command)
    of_lines = capsys.readouterr().out.splitlines()
    run(stored(rows_for(command), tmp_path, kind), tmp_path / "out.jsonl", *options, command=command)
    report = capsys.readouterr().out.splitlines()
    assert read(tmp_path / "out.jsonl") == read(tmp_path / "lines.jsonl")
    assert f": {COUNT} rows, 21 bad; " in report[0]
    assert report[1:] == [text.replace("(line", "(row") for text in of_lines[1:]]
    assert any("(rows 7, 14, 21, 28, 35, 42, 49, 56, ...)" in text for text in report)


def test_what_is_written_is_read_by_datasets_and_by_training(tmp_path):
    run(stored(rows_for("rad"), tmp_path, "parquet"), tmp_path / "out.jsonl.gz")
    written = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out.jsonl.gz"), split="train", cache_dir=str(tmp_path / "cache")
    )
    limits = {"max_length": 512}
    pairs, report = load_pairs(tmp_path / "out.jsonl.gz", tiny_tokenizer(chat=True), **limits)
    assert len(pairs) == len(written) == 2 * (COUNT - 21)
    assert not report.left_out


@pytest.mark.parametrize("kind", ARROW_KINDS)
def test_an_interrupted_run_continues_to_the_same_output(tmp_path, capsys, monkeypatch, kind):
    source, whole, parts = stored(rows_for("rso"), tmp_path, kind), tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(source, whole, command="rso")
    report = capsys.readouterr().out
    interrupt_after(monkeypatch, DONE)
    run(source, parts, command="rso", code=130)
    assert not parts.exists()
    run(source, parts, command="rso")
    assert capsys.readouterr().out == f"goes on after row {DONE} of {source}\n{report}"
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("changed", "refused"), [(DONE - 1, True), (DONE, False)])
def test_rows_done_before_must_be_the_same_and_later_ones_may_change(tmp_path, capsys, monkeypatch, changed, refused):
    rows = rows_for("rso")
    source = stored(rows, tmp_path, "parquet")
    interrupt_after(monkeypatch, DONE)
    run(source, tmp_path / "out.jsonl", command="rso", code=130)
    rows[changed]["rewards"] = [1.0, 2.0, 3.0]
    stored(rows, tmp_path, "parquet")
    run(source, tmp_path / "out.jsonl", command="rso", code=2 if refused else 0)
    assert ("was begun from another input than" in capsys.readouterr().err) == refused


def test_fewer_rows_than_were_done_are_another_input(tmp_path, capsys, monkeypatch):
    source = stored(rows_for("rad"), tmp_path, "arrow file")
    interrupt_after(monkeypatch, DONE)
    run(source, tmp_path / "out.jsonl", code=130)
    stored(rows_for("rad")[: DONE - 1], tmp_path, "arrow file")
    run(source, tmp_path / "out.jsonl", code=2)
    assert "was begun from another input than" in capsys.readouterr().err


def test_strict_names_the_row(tmp_path, capsys):
    run(stored(rows_for("rad"), tmp_path, "arrow stream"), tmp_path / "out.jsonl", "--strict", code=2)
    assert ": row 7: missing key 'rejected_score': the row has " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ARROW_KINDS)
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, kind):
    """8,000 rows of 4 kB: 32 MB, and as Python objects as much again. All but one in a hundred are bad: less to write.

    Held are 64 rows and what is read at a time, of Parquet a page and a buffer of 1 MiB for each of 3 columns:
    below a quarter of the file.
    """
    texts = [f"{i} " + "x" * 2000 for i in range(8000)]
    scores = [8 if i % 100 == 0 else None for i in range(8000)]
    columns = {"chosen": texts, "rejected": texts[::-1], "prompt": ["Why?"] * 8000, "chosen_score": scores}
    table = pa.table({**columns, "rejected_score": [3] * 8000})
    source = tmp_path / "in"
    if kind == "parquet":
        parquet.write_table(table, source, use_dictionary=False, compression="none")
    elif kind == "folder":
        datasets.Dataset(table).save_to_disk(source)
    else:
        new = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with new(source, table.schema) as writer:
            writer.write_table(table)
    del table, texts, columns
    before, arrow, done = pa.total_allocated_bytes(), [0], partial.Partial.batch_done

    def batch_done(self, number):
        arrow.append(pa.total_allocated_bytes() - before)
        done(self, number)

    monkeypatch.setattr(partial.Partial, "batch_done", batch_done)
    tracemalloc.start()
    try:
        run(source, tmp_path / "out.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(arrow) == 8001
    assert peak < 4 << 20, f"{peak / 2**20:.1f} MiB of Python"
    assert max(arrow) < 8 << 20, f"{max(arrow) / 2**20:.1f} MiB of Arrow"


@pytest.mark.parametrize("kind", ["lines", *ARROW_KINDS])
def test_the_progress_bar_goes_from_nothing_to_all(tmp_path, monkeypatch, kind):
    import tqdm

    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False, "file": (tmp_path / "bar").open("w")})
            bars.append(self)
            self.seen = []

        def update(self, n=1):
            super().update(n)
            self.seen.append(self.n)

        def close(self):
            super().close()
            self.fp.close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    rows = rows_for("rad")
    source = write_lines(tmp_path / "lines", rows) if kind == "lines" else stored(rows, tmp_path, kind)
    run(source, tmp_path / "out.jsonl")
    (bar,) = bars
    total, unit = (source.stat().st_size, "B") if kind == "lines" else (COUNT, " rows")
    assert (bar.total, bar.unit) == (total, unit)
    assert len(bar.seen) == COUNT
    assert bar.seen == sorted(bar.seen)
    assert bar.seen[-1] == total


def test_a_null_is_a_missing_key_inside_of_rows_too(tmp_path, capsys):
    """Rows with scores of other names share one type, and a null stands for what a row lacks."""
    named = [{"role": "user", "content": "Why?", "name": "Ann"}]
    pair = {"prompt": [{**named[0], "name": None}], "chosen": "good", "rejected": "bad"}
    rows = [
        {**pair, "chosen_score": {"help": 8, "truth": None}, "rejected_score": {"help": 3, "truth": None}},
        {
            **pair,
            "prompt": named,
            "chosen_score": {"help": None, "truth": 9},
            "rejected_score": {"help": None, "truth": 4},
        },
    ]
    source = stored(rows, tmp_path, "parquet")
    assert [row["chosen_score"] for _, row in read_rows(source)] == [{"help": 8}, {"truth": 9}]
    assert [row["prompt"] for _, row in read_rows(source)] == [[{"role": "user", "content": "Why?"}], named]
    run(source, tmp_path / "out.jsonl", "--strict")
    assert len(read(tmp_path / "out.jsonl")) == 4
    rewards = [{"prompt": "a", "responses": ["x", "y"], "rewards": [1.0, None]}]
    run(stored(rewards, tmp_path, "parquet"), tmp_path / "rso.jsonl", command="rso", code=2)
    assert "row 1: wrong type: rewards[1]: got null, need a number" in capsys.readouterr().err


def test_values_that_json_lacks(tmp_path, capsys):
    day = datetime.date(2030, 1, 2)
    table = pa.table({"prompt": ["a", "b"], "day": [day] * 2, "at": [datetime.datetime(2030, 1, 2, 3)] * 2})
    parquet.write_table(table, tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out.jsonl", "--goal", "10")
    assert [(row["day"], row["at"]) for row in read(tmp_path / "out.jsonl")] == [
        ("2030-01-02", "2030-01-02T03:00:00")
    ] * 2
    parquet.write_table(table.append_column("image", pa.array([b"x", None], pa.binary())), tmp_path / "in")
    run(tmp_path / "in", tmp_path / "two.jsonl", "--goal", "10")
    assert "bad, value that JSON lacks: 1 (row 1)" in capsys.readouterr().out
    assert [row["prompt"][1]["content"] for row in read(tmp_path / "two.jsonl")] == ["b"], "the row is left out whole"
    scores = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "chosen_score": [day], "rejected_score": [3]}
    parquet.write_table(pa.table(scores), tmp_path / "in")
    run(tmp_path / "in", tmp_path / "none.jsonl", code=2)
    assert "row 1: wrong type: chosen_score: got date, need a number" in capsys.readouterr().err


LINE = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            bz2.compress(LINE),
            "is compressed with bzip2; need a file of JSON lines or a JSON array (plain or gzipped), Parquet or Arrow",
        ),
        (lzma.compress(LINE), "is compressed with xz; need a file of JSON lines"),
        (b"\x28\xb5\x2f\xfd" + LINE, "is compressed with Zstandard; need a file of JSON lines"),
        (b"\xef\xbb\xbf [\n" + LINE, "cannot be read beyond row 0 ("),
        (LINE.decode().encode("utf-16"), "is a binary file or UTF-16; need a file of JSON lines"),
        (b"PAR1" + LINE, "cannot be read beyond row 0 ("),
    ],
    ids=["bzip2", "xz", "zstd", "array", "UTF-16", "no Parquet"],
)
def test_files_of_other_kinds(tmp_path, capsys, content, text):
    path = tmp_path / "in"
    path.write_bytes(content)
    run(path, tmp_path / "out.jsonl", code=2)
    said = capsys.readouterr().err
    assert said.startswith(f"asft data: input: {path} {text}")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(InputError, match=r"^data: "):
        list(read_rows(path))


def test_folders_and_archives(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("in.jsonl", LINE)
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows_for("rad")) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    for source, text in (
        ("in.zip", "in.zip is a ZIP archive; need"),
        ("splits", "splits holds the splits test, train; name the folder of one of them"),
        (".", "is a folder that datasets did not save; need a file of"),
        (
            "nowhere",
            "no such file; need a file of JSON lines or a JSON array (plain or gzipped), Parquet or",
        ),
    ):
        run(tmp_path / source, tmp_path / "out.jsonl", code=2)
        assert text in capsys.readouterr().err
    run(tmp_path / "splits" / "test", tmp_path / "out.jsonl")


def test_only_json_lines_are_written(tmp_path, capsys):
    source = stored(rows_for("rad"), tmp_path, "parquet")
    run(source, tmp_path / "out.parquet", code=2)
    assert "out.parquet', need a name of JSON lines: .jsonl, or .jsonl.gz" in capsys.readouterr().err


def test_help_names_the_kinds(capsys):
    with pytest.raises(SystemExit):
        main(["rad", "--help"])
    assert "Parquet or Arrow" in " ".join(capsys.readouterr().out.split())
