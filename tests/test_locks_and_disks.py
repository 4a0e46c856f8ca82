"""Two writers of one output, disks that are full, folders that cannot be written: one line, and nothing is lost."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("train_extra")

from asft_kernels.cli import frame
from asft_kernels.cli import main as asft
from asft_kernels.errors import InputError
from asft_kernels.files import replacing
from asft_kernels.locks import only_writer
from tiny_lm import pairs, saved_tiny_model, write_lines
from train_extra import QUIET

pytestmark = QUIET
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HOLDS = """
import sys, time
from pathlib import Path
from asft_kernels.locks import only_writer
with only_writer(Path(sys.argv[1]), "output_dir", "it"):
    print("held", flush=True)
    {then}
"""


@pytest.fixture
def holder():
    """Starts another process that holds a lock already."""
    started = []

    def start(lock, then="time.sleep(600)"):
        code = [sys.executable, "-c", HOLDS.format(then=then), str(lock)]
        process = subprocess.Popen(code, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_writer_is_told_of_the_first_until_it_is_killed(tmp_path, holder):
    lock = tmp_path / "lock"
    process = holder(lock)
    message = rf"it is being written by process {process.pid} on .* since 20"
    with pytest.raises(InputError, match=message), only_writer(lock, "output_dir", "it"):
        pass
    assert lock.is_file()  # the second one took nothing away
    process.kill()
    process.wait()
    with only_writer(lock, "output_dir", "it"):
        assert f"process {os.getpid()} on" in lock.read_text()
    assert not lock.exists()


def test_a_forked_worker_that_outlives_its_run_keeps_no_lock(tmp_path, holder):
    then = "import os; os.fork() or (print(os.getpid(), flush=True), time.sleep(600)); time.sleep(600)"
    process = holder(tmp_path / "lock", then)
    worker = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        with only_writer(tmp_path / "lock", "output_dir", "it"):
            os.kill(worker, 0)  # is there
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_removed_while_another_waits_to_take_it(tmp_path, monkeypatch):
    """Opened before its holder removed it, locked after: that file locks nothing."""
    import asft_kernels.locks as module

    lock, taken, times = tmp_path / "lock", module._taken, []

    def removed_first(file):
        times.append(lock.unlink() if not times else None)
        return taken(file)

    monkeypatch.setattr(module, "_taken", removed_first)
    with only_writer(lock, "output_dir", "it"):
        assert lock.is_file()
    assert len(times) == 2


def scored(count):
    return [{**row, "chosen_score": 9, "rejected_score": 2} for row in pairs(count)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return str(saved_tiny_model(folder / "model")), str(write_lines(folder / "pairs.jsonl", scored(6)))


def commands(inputs, folder):
    """Command -> (its words, its lock, what it writes)."""
    model, data = inputs
    train = ["--max_steps", "1", "--max_length", "64", "--use_cpu", "true", "--report_to", "none",
             "--disable_tqdm", "true", "--gradient_checkpointing", "false"]  # fmt: skip
    shared = ["--model", model, "--data", data, "--output_dir", str(folder)]
    from asft_kernels.score.run import score_path

    scores = score_path(folder, model)
    return {
        "train": (["train", *shared, *train], folder / "run.lock", folder),
        "score": (["score", *shared], scores.with_suffix(".lock"), scores),
        "eval": (["eval", *shared, "--no_generate"], folder / "eval.lock", folder),
        "data": (["data", "rad", data, str(folder / "out.jsonl")], folder / "out.jsonl.lock", folder / "out.jsonl"),
    }


@pytest.mark.parametrize("command", ["train", "score", "eval", "data"])
def test_every_command_refuses_an_output_that_another_writes(inputs, tmp_path, capsys, holder, command):
    words, lock, output = commands(inputs, tmp_path)[command]
    process = holder(lock)
    assert asft(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"asft {command}: ")
    assert f"{output} is being written by process {process.pid} on" in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == [lock.name]


DISKS = {
    OSError(errno.ENOSPC, "No space left on device", "a"): (1, "the disk is full ([Errno 28] No space left on device"),
    OSError(errno.EIO, "Input/output error"): (1, "the disk fails ("),
    OSError(errno.EFBIG, "File too large"): (1, "the disk takes no file of that size ("),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"): (1, "the disk is full ("),
    PermissionError(errno.EACCES, "Permission denied", "a/b"): (2, "a/b: Permission denied; name another, or mend it"),
    NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"): (2, "a/b: Not a directory; name another"),
}


@pytest.mark.parametrize("error", DISKS, ids=str)
def test_what_the_disk_refuses_is_one_line(error, capsys):
    def body():
        raise error

    code, message = DISKS[error]
    assert frame.run("asft test", body) == code
    said = capsys.readouterr().err
    assert said.startswith(f"asft test: {message}")
    assert len(said.splitlines()) == 1
    assert "what was complete is kept: make room, and the same command goes on" in said or code == 2


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("unexpected"), OSError("of a library, without a number"), ValueError("a bug")):
        with pytest.raises(type(error)):
            frame.run("asft test", lambda error=error: (_ for _ in ()).throw(error))


@contextmanager
def files_of_at_most(size):
    """The limit of this process: a write beyond it fails as on a full disk, with EFBIG for ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_data_command_on_a_full_disk_goes_on_after_it(tmp_path, capsys):
    """As whole as without the interruption; what was there before under that name stays until then."""
    words = ["data", "rad", str(write_lines(tmp_path / "pairs.jsonl", scored(200))), str(tmp_path / "out.jsonl")]
    assert asft([*words[:-1], str(tmp_path / "whole.jsonl")]) == 0
    (tmp_path / "out.jsonl").write_text("before\n")
    with files_of_at_most((tmp_path / "whole.jsonl").stat().st_size // 2):
        assert asft([*words, "--overwrite"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("asft data: the disk takes no file of that size")
    assert (tmp_path / "out.jsonl").read_text() == "before\n"
    assert asft([*words, "--overwrite"]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_training_on_a_full_disk_leaves_what_was_there(inputs, tmp_path, capsys):
    """The weights are larger than the limit: the first checkpoint stays, and the run goes on from it."""
    folder = tmp_path / "out"
    words, _, _ = commands(inputs, folder)["train"]
    words += ["--save_steps", "1"]
    assert asft(words) == 0
    (folder / "model.safetensors").unlink()
    with files_of_at_most(20_000):
        assert asft([*words, "--resume", "--max_steps", "2"]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("asft train: the disk takes no file of that size")
    assert "--resume auto goes on from the last whole checkpoint" in said
    assert not (folder / "run.lock").exists()
    assert asft([*words, "--resume", "--max_steps", "2"]) == 0
    assert (folder / "checkpoint-2").is_dir()


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fails_halfway():
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fails_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    order, (sync, replace) = [], (os.fsync, os.replace)
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    with replacing(tmp_path / "a") as partial:
        partial.write_text("new")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize("command", ["train", "score", "eval", "data"])
def test_a_folder_that_is_a_file(inputs, tmp_path, capsys, command):
    (tmp_path / "mine").write_text("mine")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "below"):
        words, _, _ = commands(inputs, folder)[command]
        assert asft(words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"asft {command}: ")
        assert str(tmp_path / "mine") in said
    assert (tmp_path / "mine").read_text() == "mine"
