"""`asft train` under torchrun and accelerate launch: two ranks, one of them killed or at fault."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("train_extra")

from safetensors.torch import save_file

from asft_kernels.errors import InputError
from asft_kernels.training.checkpoints import find_checkpoint
from rank_processes import launch
from tiny_lm import pairs, saved_tiny_model, write_lines

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
    # Restarted ranks else find the addresses of those before (pytorch/pytorch issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT = 60  # seconds in which an error of one rank is one of all
SCRIPT = "import sys, test_launch\nsys.exit(test_launch.watched(*sys.argv[1:3], sys.argv[3:]))"


def watched(folder, end, words):
    """Trains and writes down which pairs each step has; in its first life rank 1 ends in the fourth step.

    end: well, killed (-9) or wrong (an error).
    """
    from asft_kernels.cli import main
    from asft_kernels.training.trainer import PreferenceTrainer

    life, rank = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), os.environ["RANK"]
    step = PreferenceTrainer.training_step

    def seen_step(self, model, inputs, *rest):
        chosen = inputs["input_ids"].chunk(2)[0]
        with open(f"{folder}/seen{rank}.jsonl", "a") as file:
            file.write(json.dumps([life, self.state.global_step, chosen.tolist()]) + "\n")
        if rank == "1" and life == 0 and self.state.global_step == 3:
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "wrong":
                raise InputError("labels: got a bad row, need another")
        return step(self, model, inputs, *rest)

    PreferenceTrainer.training_step = seen_step
    return main(words)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Six steps over two epochs of 12 pairs, 4 a step; dropout, so that the generators' states matter too."""
    folder = tmp_path_factory.mktemp("job")
    model = saved_tiny_model(folder / "model", attention_dropout=0.1)
    data = write_lines(folder / "pairs.jsonl", pairs(12))
    return [
        *("train", "--model_name_or_path", str(model), "--dataset_name", str(data), "--max_length", "64"),
        *("--learning_rate", "1e-2", "--disable_dropout", "false", "--use_cpu", "true", "--max_steps", "6"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_steps", "2"),
        *("--disable_tqdm", "true", "--report_to", "none", "--gradient_checkpointing", "false", "--resume", "auto"),
    ]


def launched(folder, words, end, *options):
    """(finished process, folder of the run)."""
    folder.mkdir()
    script = folder / "watched.py"
    script.write_text(SCRIPT)
    command = [*TORCHRUN, *options, str(script), str(folder), end, *words, "--output_dir", str(folder / "out")]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240), folder / "out"


def seen(folder):
    """[(life, step, pairs)] of both ranks; a pair is known by its tokens."""
    lines = [line for rank in (0, 1) for line in (folder / f"seen{rank}.jsonl").read_text().splitlines()]
    return [(life, step, [tuple(x for x in row if x) for row in rows]) for life, step, rows in map(json.loads, lines)]


def to_the_end(rank, world, folder, words):
    return watched(folder, "well", words)


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert launch(2, to_the_end, folder, [*words, "--output_dir", str(folder / "out")]) == [0, 0]
    return folder / "out"


def test_a_killed_rank_loses_nothing(words, undisturbed, tmp_path):
    """Elastic restart: the run goes on from the checkpoint of the second step, inside of an epoch."""
    done, out = launched(tmp_path / "run", words, "killed", "--max-restarts", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"goes on from {out / 'checkpoint-2'}") == 1  # the first rank, in its second life
    there = seen(tmp_path / "run")
    assert {(life, step) for life, step, _ in there} == {(0, 0), (0, 1), (0, 2), (0, 3)} | {(1, i) for i in range(2, 6)}
    kept = [(step, rows) for life, step, rows in there if (life, step) < (0, 2) or life == 1]
    assert sorted(kept) == sorted((step, rows) for _, step, rows in seen(undisturbed.parent))
    for epoch in ((0, 1, 2), (3, 4, 5)):
        of_epoch = [row for step, rows in kept if step in epoch for row in rows]
        assert len(of_epoch) == len(set(of_epoch)) == 12
    # The same programs on the same numbers in the same order.
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_an_error_on_one_rank_ends_all_of_them(words, tmp_path):
    """The other rank waits for its gradients: it is ended, and the message is one line."""
    done, _ = launched(tmp_path / "run", words, "wrong")
    assert time.time() - (tmp_path / "run" / "seen1.jsonl").stat().st_mtime < LIMIT
    assert done.returncode != 0
    assert "asft train [rank 1]: labels: got a bad row, need another\n" in done.stderr
    ours = done.stderr.partition("ChildFailedError")[0]  # what follows, and one traceback, is torchrun's
    assert ours.count("Traceback") <= 1, ours


@pytest.mark.slow
def test_accelerate_launches_the_same_run(words, undisturbed, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*command, "-m", "asft_kernels.cli", *words, "--output_dir", str(tmp_path / "out")],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def checkpoint(folder, step, ranks):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", *(f"rng_state_{rank}.pth" for rank in range(ranks))):
        torch.save({}, path / name)
    save_file({}, path / "model.safetensors")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_auto_begins_where_there_is_no_checkpoint(tmp_path):
    assert find_checkpoint("auto", tmp_path / "fresh", print) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # killed ahead of its first checkpoint
    assert find_checkpoint("auto", tmp_path, print) is None
    first = checkpoint(tmp_path, 2, ranks=2)
    checkpoint(tmp_path, 4, ranks=1)
    assert find_checkpoint("auto", tmp_path, print, 2) == find_checkpoint("last", tmp_path, print, 2) == first
    with pytest.raises(InputError, match=r"checkpoint-4 is no complete checkpoint \(rng_state_1.pth is missing\)"):
        find_checkpoint(str(tmp_path / "checkpoint-4"), tmp_path, print, 2)


def test_auto_overwrites_no_finished_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="resume: no complete checkpoint in"):
        find_checkpoint("auto", tmp_path, print)


CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_example_configs_are_what_their_names_say(path, monkeypatch):
    """As accelerate launch reads them: its parser, what it tells the ranks, and what these make of that."""
    from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    kind, _, size = path.stem.rpartition("-")
    nodes, local = map(int, size.split("x"))
    words = ["--config_file", str(path), "-m", "asft_kernels.cli", "train"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert defaults is not None
    assert (args.num_machines, args.num_processes, args.mixed_precision) == (nodes, nodes * local, "bf16")
    assert args.module
    assert (args.use_deepspeed, args.use_fsdp) == (kind == "zero3", kind == "fsdp2")
    if kind == "zero3":
        assert args.zero_stage == 3
        return
    if kind.startswith("tp"):
        assert args.multi_gpu
        sizes = json.loads(path.read_text().partition("--model_init_kwargs '")[2].partition("'")[0])
        assert sizes == {"distributed_config": {"tp_size": int(kind[2]), "fsdp_size": nodes * local // int(kind[2])}}
        return
    told = prepare_multi_gpu_env(args)
    for name in told.keys() - os.environ.keys():
        monkeypatch.setenv(name, told[name])
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.cpu_ram_efficient_loading) == (2, False)  # else no head is streamed
    parallel = ParallelismConfig()
    assert parallel.total_size == 1
