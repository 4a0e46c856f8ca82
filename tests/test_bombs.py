"""Files and chat templates made to fill memory or to take for ever: named, and neither held nor waited for."""

import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from asft_kernels.cli import main as asft
from asft_kernels.data import BadRow, limits, load_pairs, read_rows
from asft_kernels.data.tokens import PairTokenizer
from asft_kernels.errors import InputError
from tiny_lm import CHAT_TEMPLATE, pairs, stored, tiny_tokenizer, write_lines

GOOD = pairs(3)
LIMIT = 1000


@pytest.fixture
def small(monkeypatch):
    """Limits a few thousand times smaller."""
    monkeypatch.setattr(limits, "ROW_BYTES", LIMIT)
    monkeypatch.setattr(limits, "LINE_BYTES", 50 * LIMIT)
    monkeypatch.setattr(limits, "ARRAY_BYTES", 50 * LIMIT)
    monkeypatch.setattr(limits, "GZIP_BYTES", 5 * LIMIT)
    monkeypatch.setattr(limits, "BAD_ROWS", 20)


def padded(row, size):
    """The row as JSON of that many bytes."""
    return json.dumps({**row, "pad": "x" * (size - len(json.dumps({**row, "pad": ""})))})


def problems(path):
    return {number: str(row) for number, row in read_rows(path) if isinstance(row, BadRow)}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_line_over_the_limit_is_a_bad_row_and_the_next_ones_are_read(tmp_path, small, zipped):
    """At the limit, one byte over it, several times it, and unfinished at the end of the file."""
    sizes = [LIMIT, LIMIT + 1, 4 * LIMIT + 7, LIMIT]
    lines = [padded(GOOD[0], size) for size in sizes]
    content = ("\n".join(lines) + "\n" + "x" * (2 * LIMIT)).encode()
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert problems(path) == {
        2: f"row over 1,000 bytes: {LIMIT + 2:,}",
        3: f"row over 1,000 bytes: {4 * LIMIT + 8:,}",
        5: f"row over 1,000 bytes: {2 * LIMIT:,}",
    }
    kept, report = load_pairs(path, tiny_tokenizer())
    assert kept["line"][:] == [1, 4]
    assert "left out, row over 1,000 bytes: 3 (lines 2, 3, 5)" in str(report)


def test_a_data_command_names_a_line_over_the_limit_and_goes_on(tmp_path, small, capsys):
    rows = [{**row, "chosen_score": 9, "rejected_score": 2} for row in GOOD]
    source = write_lines(tmp_path / "in.jsonl", [rows[0], padded(rows[1], 2 * LIMIT), rows[2]])
    assert asft(["data", "rad", str(source), str(tmp_path / "out.jsonl")]) == 0
    assert "bad, row over 1,000 bytes: 1 (line 2)" in capsys.readouterr().out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream", "folder"])
def test_a_stored_row_over_the_limit_is_a_bad_row(tmp_path, small, kind):
    rows = [GOOD[0], {**GOOD[1], "chosen": "x" * (2 * LIMIT)}, GOOD[2]]
    path = stored(rows, tmp_path, kind)
    assert [*problems(path)] == [2]
    assert [row for _, row in read_rows(path) if isinstance(row, dict)] == [GOOD[0], GOOD[2]]


def test_a_row_of_an_array_over_the_limit_is_a_bad_row(tmp_path, small):
    path = tmp_path / "pairs.json"
    path.write_text(f" [{json.dumps(GOOD[0])} ,\n{padded(GOOD[1], 2 * LIMIT)}, {json.dumps(GOOD[2])} ] \n")
    assert problems(path) == {2: f"row over 1,000 bytes: {2 * LIMIT:,}"}


ARRAYS = ["[]", "[ ]", "[1]", '[1, {"a": [2]}]', "[1,]", "[1 2]", "[1", "[", "[1]x", "[,1]", "[1,,2]", "[1]]", "[nul]"]


@pytest.mark.parametrize("text", ARRAYS)
def test_arrays_are_read_as_json_reads_them(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    try:
        whole = json.loads(text)
    except ValueError:
        with pytest.raises(InputError, match="cannot be read beyond"):
            list(read_rows(path))
    else:
        assert len(list(read_rows(path))) == len(whole)


REFUSED = {
    "a line without end": (b"x" * (60 * LIMIT), "a line of more than 50,000 bytes"),
    "an array without end": (b"[" + b"1," * (30 * LIMIT), "a JSON array of more than 50,000 bytes"),
    "empty lines": (b"\n" * 30, "more than 20 empty lines up to line 21"),
    "lines of blanks": (b" \t\r\n" * 30, "more than 20 empty lines up to line 21"),
    "zipped line": (gzip.compress(b"x" * (40 * LIMIT)), "more than 200 times as large"),
    "zipped lines": (gzip.compress(b"{}\n" * (20 * LIMIT)), "more than 200 times as large"),
    "zipped array": (gzip.compress(b"[" + b" " * (40 * LIMIT) + b"]"), "more than 200 times as large"),
    "numbers": (b"0\n" * 30, "more than 20 rows up to 21 that cannot be read (the last: not a JSON object: got a num"),
}


@pytest.mark.parametrize("bomb", REFUSED)
def test_a_file_of_nothing_else_is_refused(tmp_path, small, bomb):
    content, message = REFUSED[bomb]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_pairs(path, tiny_tokenizer())
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


def test_a_chat_template_that_loops_is_refused(monkeypatch):
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = LOOPS
    began = time.monotonic()
    with pytest.raises(InputError, match=r"processing_class: the chat template takes more than 0\.2 s for one chat"):
        PairTokenizer(tokenizer)
    assert time.monotonic() - began < 30  # on a machine that is busy


def test_a_chat_at_which_a_template_loops_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.5)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if 'violet' in messages[0]['content'] %}" + LOOPS + "{% endif %}"
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in GOOD]
    path = write_lines(tmp_path / "chats.jsonl", chats)
    with pytest.raises(InputError, match="data: line 3: the chat template takes more than"):
        load_pairs(path, tokenizer)


def test_the_alarm_leaves_no_trace_and_ends_no_tokenizer(monkeypatch):
    """A handler and a timer of the user's stand as before; what is slow outside of a template goes on."""
    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.05)
    mine = []
    before = signal.signal(signal.SIGALRM, lambda *_: mine.append(1))
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with limits.rendering():
            time.sleep(0.2)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
        assert not mine
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_thread_renders_without_an_alarm():
    failed = []

    def work():
        try:
            with limits.rendering():
                pass
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


REAL = """
import resource, sys, time
from asft_kernels.data import load_pairs
from tiny_lm import tiny_tokenizer
tokenizer = tiny_tokenizer()
began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    said = str(load_pairs(sys.argv[1], tokenizer)[1])
except ValueError as error:
    said = str(error)
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(said.replace(chr(10), " "), int(more / 1024), time.monotonic() - began, sep="|")
"""


def bomb_of_real_size(kind, path):
    good = (json.dumps(GOOD[0]) + "\n").encode()
    if kind == "a line of 200 MB":
        path.write_bytes(good + b'{"prompt": "' + b"x" * 200_000_000 + b'"}\n' + good)
    elif kind == "200 MiB of empty lines":
        path.write_bytes(good + b"\n" * (200 << 20))
    else:  # a gzip of 1 GiB
        with gzip.GzipFile(path, "wb", compresslevel=1) as file:
            for _ in range(1024):
                file.write(b"x" * (1 << 20))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a line of 200 MB", "200 MiB of empty lines", "a gzip of 1 GiB in one line"])
def test_bombs_of_real_size(tmp_path, kind):
    """64 MiB: a row at the limit is held a few times while it is read; the interpreter's own growth besides."""
    path = tmp_path / "bomb"
    bomb_of_real_size(kind, path)
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(path)], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    said, mebibytes, seconds = done.stdout.strip().rsplit("|", 2)
    print(kind, said[:200], mebibytes, "MiB", seconds, "s")
    assert "4,194,304 bytes: 1 (line 2)" in said or "empty lines" in said or "200 times" in said
    assert int(mebibytes) < 64
    assert float(seconds) < 60
