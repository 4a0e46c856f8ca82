"""Damaged checkpoints and run folders: each is named in one line, and an older whole checkpoint is gone on from."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("train_extra")

from asft_kernels.cli import main as asft
from asft_kernels.training import checkpoints
from asft_kernels.training.checkpoints import DIGESTS, find_checkpoint, what_is_broken, what_trained, write_digests
from asft_kernels.training.run_folder import LOCK
from tiny_lm import pairs, saved_tiny_model, write_lines
from train_extra import QUIET

pytestmark = QUIET
ROOT = Path(__file__).parents[1]
OLD, NEW = "checkpoint-1", "checkpoint-2"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Arguments of a run of three steps with a checkpoint each; LMPO has a state of its own (objective.pt)."""
    folder = tmp_path_factory.mktemp("job")
    return [
        *("train", "--model_name_or_path", str(saved_tiny_model(folder / "model"))),
        *("--dataset_name", str(write_lines(folder / "pairs.jsonl", pairs(6))), "--objective", "lmpo"),
        *("--max_length", "64", "--use_cpu", "true", "--max_steps", "2", "--per_device_train_batch_size", "2"),
        *("--save_steps", "1", "--disable_tqdm", "true", "--report_to", "none", "--gradient_checkpointing", "false"),
    ]


@pytest.fixture(scope="module")
def whole_run(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert asft([*job, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run_folder(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run, tmp_path / "out"))


def flip(path, at=0.5):
    """Flips one bit at this share of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(checkpoint):
    for path in checkpoint.iterdir():
        path.unlink()


SAVED = ("optimizer.pt", "model.safetensors", "rng_state.pth", "trainer_state.json", "objective.pt", "scheduler.pt")
DAMAGED = {
    **{f"bit of {name}": (lambda c, name=name: flip(c / name), name) for name in SAVED},
    **{f"no {name}": (lambda c, name=name: (c / name).unlink(), f"{name} is missing") for name in SAVED},
    "half of model.safetensors": (lambda c: truncate(c / "model.safetensors"), "model.safetensors is damaged"),
    "half of trainer_state.json": (
        lambda c: truncate(c / "trainer_state.json"),
        "trainer_state.json is miss",
    ),
    "state that is no state": (lambda c: (c / "trainer_state.json").write_text("[]"), "trainer_state.json is missing"),
    "half of digests.json": (lambda c: truncate(c / DIGESTS), "digests.json is damaged"),
    "other digests.json": (lambda c: (c / DIGESTS).write_text('{"files": []}'), "digests.json is damaged"),
    "empty folder": (empty, "trainer_state.json is missing"),
    "no folder": (shutil.rmtree, "no such folder"),
    "a file in its place": (lambda c: (shutil.rmtree(c), c.write_text("")), "no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_named_and_so_is_the_newest_whole_one(job, run_folder, capsys, damage):
    damaging, message = DAMAGED[damage]
    newest = run_folder / NEW
    damaging(newest)
    assert message in what_is_broken(newest)
    assert not what_is_broken(run_folder / OLD)
    assert asft([*job, "--output_dir", str(run_folder), "--resume", str(newest)]) == 2
    said = capsys.readouterr().err
    assert f"asft train: resume: {newest} is no complete checkpoint ({message}" in said
    assert said.endswith(f"); whole is {run_folder / OLD}: --resume {run_folder / OLD}\n")
    assert len(said.splitlines()) == 1
    said = []
    assert find_checkpoint("last", run_folder, said.append) == run_folder / OLD
    if newest.is_dir():
        assert said == [f"{newest} is no complete checkpoint ({what_is_broken(newest)}); passed over"]


def test_goes_on_from_the_newest_whole_one_and_ends_as_if_nothing_had_been(job, whole_run, run_folder, capsys):
    flip(run_folder / NEW / "optimizer.pt")
    assert asft([*job, "--output_dir", str(run_folder), "--resume"]) == 0
    assert f"{run_folder / NEW} is no complete checkpoint (optimizer.pt is damaged" in capsys.readouterr().out
    for name in ("model.safetensors", f"{NEW}/optimizer.pt", f"{NEW}/objective.pt"):
        assert (run_folder / name).read_bytes() == (whole_run / name).read_bytes(), name
    assert not what_is_broken(run_folder / NEW)  # saved once more
    assert not (run_folder / LOCK).exists()


WITHOUT_DIGESTS = ["optimizer.pt", "rng_state.pth", "objective.pt"]  # in which each tensor has its CRC


@pytest.mark.parametrize("name", WITHOUT_DIGESTS)
def test_without_digests_the_crcs_of_pt_files_count(run_folder, name):
    (run_folder / NEW / DIGESTS).unlink()
    assert not what_is_broken(run_folder / NEW)  # TRL's own are taken
    flip(run_folder / NEW / name)
    assert name in what_is_broken(run_folder / NEW)


def test_without_digests_lengths_and_shards_count(run_folder):
    (run_folder / NEW / DIGESTS).unlink()
    weights = run_folder / NEW / "model.safetensors"
    whole = weights.read_bytes()
    truncate(weights)
    assert "model.safetensors is damaged" in what_is_broken(run_folder / NEW)
    weights.write_bytes(whole)
    index = run_folder / NEW / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert "model-2.safetensors is missing" in what_is_broken(run_folder / NEW)
    index.write_text("{")
    assert "model.safetensors.index.json is damaged" in what_is_broken(run_folder / NEW)


def test_no_whole_checkpoint_is_one_line(job, run_folder, capsys):
    for name in (OLD, NEW):
        flip(run_folder / name / "model.safetensors")
    assert asft([*job, "--output_dir", str(run_folder), "--resume"]) == 2
    assert f"no complete checkpoint in {run_folder}; {run_folder / NEW} is no" in (said := capsys.readouterr().err)
    assert len(said.splitlines()) == 1


class Payload:
    def __reduce__(self):
        return (print, ("the payload ran",))


@pytest.mark.parametrize("name", ["optimizer.pt", "objective.pt", "scheduler.pt"])
def test_a_checkpoint_with_code_in_it_runs_none(job, run_folder, capsys, name):
    """With digests that fit, as whoever plants it can make them."""
    torch.save({"state": Payload(), "param_groups": []}, run_folder / OLD / name)
    write_digests(run_folder / OLD, str(what_trained(run_folder / OLD)))
    words = [*job, "--output_dir", str(run_folder), "--resume", str(run_folder / OLD)]
    assert asft(words) == 2
    said = capsys.readouterr()
    assert "the payload ran" not in said.out + said.err
    assert said.err.splitlines()[-1].startswith("asft train: resume")
    assert "Traceback" not in said.err


OF_RUN = {
    "run.json": ("{", 2, "run.json is damaged"),
    "metrics.jsonl": ('\x00\n[1]\n{"kind": "train"}\n', 0, ""),
}


@pytest.mark.parametrize("name", OF_RUN)
def test_other_files_of_a_run(job, run_folder, capsys, name):
    text, code, message = OF_RUN[name]
    (run_folder / name).write_text(text)
    assert asft([*job, "--output_dir", str(run_folder), "--resume"]) == code
    assert message in capsys.readouterr().err


def test_digests_stand_for_what_was_saved(run_folder):
    """The file lists every other one, and is written after them."""
    listed = json.loads((run_folder / NEW / DIGESTS).read_text())["files"]
    there = {path.name for path in (run_folder / NEW).iterdir()}
    assert set(listed) == there - {DIGESTS}
    assert set(SAVED) <= set(listed)


def test_files_are_on_the_disk_before_their_digests(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    order = []
    monkeypatch.setattr(checkpoints, "sync", lambda path: order.append(path.name))
    monkeypatch.setattr(checkpoints, "write_json", lambda path, _: order.append(path.name))
    write_digests(tmp_path, "asft")
    assert order == ["a", DIGESTS]


@pytest.mark.slow
def test_the_ranks_of_one_run_share_its_lock_and_its_digests(job, tmp_path):
    """Two processes: files of both are in digests.json, and resuming takes an older checkpoint on both."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "asft_kernels.cli", *job, "--output_dir", str(folder)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more in ([], ["--resume"]):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        listed = json.loads((folder / NEW / DIGESTS).read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(listed)
        assert not what_is_broken(folder / NEW)
        flip(folder / NEW / "rng_state_1.pth")
    assert f"goes on from {folder / OLD}" in done.stdout
