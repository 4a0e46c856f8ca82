"""A model that transformers shards over tensor-parallel ranks trains as one process; what cannot be is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("train_extra")

from accelerate import ParallelismConfig
from safetensors.torch import load_file

from asft_kernels.cli import main as asft
from asft_kernels.errors import InputError
from asft_kernels.objectives import DPO
from asft_kernels.training import PreferenceConfig
from asft_kernels.training.figures import BEFORE, Evaluation
from asft_kernels.training.tensor_parallel import check_parallelism, check_tensor_parallel, sharded_at_load
from tiny_lm import pairs, saved_tiny_model, write_lines
from train_extra import QUIET

pytestmark = QUIET
TESTS = Path(__file__).parent
LIMIT = 240  # seconds: ranks that wait for ever are ended
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
EXAMPLE = TESTS.parent / "examples" / "accelerate" / "tp2fsdp-1x8.yaml"
OF_CLOCKS = ("runtime", "per_second", "epoch", "preparation")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Three steps of 4 pairs each in two micro-batches; 7 pairs held out, which no number of ranks divides."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    model = saved_tiny_model(
        folder / "model", initializer_range=0.3, tie_word_embeddings=False, num_key_value_heads=2, vocab_size=260
    )
    data = write_lines(folder / "pairs.jsonl", pairs(28))
    return [
        *(
            "--model_name_or_path",
            str(model),
            "--dataset_name",
            str(data),
            "--eval_every_nth",
            "4",
            "--use_cpu",
            "true",
        ),
        *("--max_length", "64", "--max_steps", "3", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant"),
        *("--optim", "adamw_torch", "--disable_tqdm", "true", "--report_to", "none", "--gradient_checkpointing"),
        *("false", "--save_only_model", "true", "--per_device_eval_batch_size", "2"),
    ]


def on_ranks(words, count, launcher=TORCHRUN, **more):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(count)]
    return subprocess.run(
        [*command, str(TESTS / "tensor_parallel_trainer_worker.py"), *words, "--ddp_backend", "gloo"],
        env=environment, timeout=LIMIT, capture_output=True, text=True, **more,
    )  # fmt: skip


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(clock in k for clock in OF_CLOCKS)} for row in lines]


SIZES = [(2, 1, "dpo"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1, "asft"), (2, 2, "dpo")))]


@pytest.mark.parametrize(("tp", "dp", "objective"), SIZES)
def test_ranks_with_the_same_pairs_train_as_one_process(words, tmp_path, tp, dp, objective):
    """Losses, counts, figures before and after, each pair's own, weights.

    Bounds: rel 1e-5 and abs 2e-6 for figures, fp32's 2^-24 in sums of some 60 of size 6, in another order; AdamW moves
    a weight by lr g / (|g| + eps), which a gradient near 0 turns to noise: 5e-5 is a twentieth of one step.
    """
    more = ["--objective", objective, "--gradient_accumulation_steps", "2"]
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert asft(["train", *words, *more, "--per_device_train_batch_size", "2", "--output_dir", str(alone)]) == 0
    sizes = json.dumps({"distributed_config": {"tp_size": tp, "fsdp_size": dp}})
    batch = ["--per_device_train_batch_size", str(2 // dp), "--model_init_kwargs", sizes]
    launcher = TORCHRUN
    if dp > 1:  # by the example's config, on the ranks that are here
        here = EXAMPLE.read_text().replace("use_cpu: false", "use_cpu: true")
        (tmp_path / "here.yaml").write_text(here.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
        launcher = ("accelerate.commands.launch", "--config_file", str(tmp_path / "here.yaml"), "--num_processes")
    done = on_ranks([*words, *more, *batch, "--output_dir", str(several)], tp * dp, launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "output head: checked at the first batch" in done.stdout
    assert done.stdout.count(f"tensor parallel {tp} x data parallel {dp}\n") == 1
    found, expected = rows(several), rows(alone)
    assert [row["kind"] for row in found] == ["eval", "train", "train", "train", "eval"]
    assert found[1]["pairs"] == 4
    assert found[0]["pairs"] == 7
    for row, other in zip(found, expected, strict=True):
        assert set(row) == set(other)
        for name in row.keys() - {"kind"}:
            value = row[name]
            assert value == pytest.approx(other[name], rel=1e-5, abs=2e-6), name
    tables = [Evaluation.load(folder / BEFORE).table for folder in (several, alone)]
    assert tables[0].shape == tables[1].shape
    assert tables[0] == pytest.approx(tables[1], rel=1e-5, abs=2e-6, nan_ok=True)
    weights = load_file(several / "model.safetensors")
    for name, value in load_file(alone / "model.safetensors").items():
        assert (value - weights[name]).abs().max() <= 5e-5, name


def test_sizes_that_shard_nothing_are_said(words, tmp_path, capsys):
    more = ["--model_init_kwargs", '{"distributed_config": {}}', "--dry_run", "--output_dir", str(tmp_path / "out")]
    assert asft(["train", *words, *more]) == 0
    assert capsys.readouterr().out.count("tensor parallel 1 x data parallel 1\n") == 1


@pytest.mark.slow
def test_a_dry_run_counts_shared_pairs_once(words, tmp_path):
    sizes = ["--model_init_kwargs", json.dumps({"distributed_config": {"tp_size": 2}})]
    more = ["--per_device_train_batch_size", "2", "--dry_run", "--output_dir", str(tmp_path / "out")]
    done = on_ranks([*words, *sizes, *more], 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps: 3 of 2 pairs" in done.stdout
    assert done.stdout.count("first pair, chosen") == 1


@pytest.mark.slow
def test_a_checkpoint_to_resume_from_is_refused(words, tmp_path):
    """transformers does not save the optimizer of a model that it shards."""
    sizes = ["--model_init_kwargs", json.dumps({"distributed_config": {"tp_size": 2}})]
    at = words.index("--save_only_model")
    done = on_ranks([*words[:at], *words[at + 2 :], *sizes, "--output_dir", str(tmp_path / "out")], 2)
    assert done.returncode != 0
    assert "Resuming is not supported for models sharded at load time" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed/run.py")[0].rsplit("Traceback", 1)[0]


def given():
    return SimpleNamespace(parallelism_config=None, model_init_kwargs=None, fsdp=None)


def test_accelerates_sizes_become_transformers(monkeypatch):
    args: Any = given()
    check_parallelism(args)
    assert args.model_init_kwargs is None
    args.parallelism_config = ParallelismConfig(tp_size=2, dp_shard_size=4)
    check_parallelism(args)
    loads = {"distributed_config": {"tp_size": 2, "fsdp_size": 4}, "device_map": None}
    assert args.model_init_kwargs == loads
    check_parallelism(args)  # again, as a second trainer of the same arguments does
    assert args.model_init_kwargs == loads
    args.parallelism_config = ParallelismConfig(tp_size=4)
    with pytest.raises(InputError, match=r"got .*'tp_size': 4.* there and .*'tp_size': 2.* in model_init_kwargs"):
        check_parallelism(args)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    launched: Any = given()
    check_parallelism(launched)
    assert launched.model_init_kwargs["distributed_config"] == {"tp_size": 2, "fsdp_size": 1}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="fsdp: got accelerate's with tp_size 2, need model_init_kwargs="):
        check_parallelism(launched)


def test_pieces_of_sequences_and_replicas_are_refused():
    sizes: Any
    for sizes, text in (
        ({"cp_size": 2, "dp_shard_size": 2}, r"got cp_size 2, .* train on pieces of them with PreferenceModel"),
        ({"sp_size": 4}, r"got sp_size 4, .* train on pieces of them with PreferenceModel"),
        (
            {"tp_size": 2, "dp_replicate_size": 2, "dp_shard_size": 2},
            r"dp_replicate_size 2 with tp_size 2, need dp_shard",
        ),
    ):
        args: Any = given()
        args.parallelism_config = ParallelismConfig(**sizes)
        with pytest.raises(InputError, match=text):
            check_parallelism(args)


REFUSED = [
    ({"is_fsdp_enabled": True}, "fsdp, deepspeed: got one of them with tp_size 2, need model_init_kwargs="),
    ({"is_distributed_loading_by_transformers": False}, "model: got one that transformers did not shard"),
    ({"model": SimpleNamespace(peft_config={})}, "peft_config: got True with tp_size 2, need none"),
    ({"model": SimpleNamespace(is_quantized=True)}, "quantization_config: got True"),
    (
        {"_state_of_objective": lambda: {"mean": 0}},
        r"objective: got DPO\(.*\) with tp_size 2, need one without statistics",
    ),
    ({"method": SimpleNamespace(name="sapo", of_rank=("random",))}, "method: got 'sapo' with tp_size 2"),
    ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end: got True"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED, ids=[text.partition(":")[0] for _, text in REFUSED])
def test_what_would_be_wrong_on_ranks_that_share_pairs_is_refused(changes, text):
    args = SimpleNamespace(precompute_ref_log_probs=False, sync_ref_model=False, load_best_model_at_end=False)
    trainer: Any = SimpleNamespace(
        args=args, get_tp_size=lambda: 2, is_fsdp_enabled=False, is_deepspeed_enabled=False, objective=DPO(),
        _state_of_objective=dict,
        is_distributed_loading_by_transformers=True, model=SimpleNamespace(),
        method=SimpleNamespace(name="", of_rank=()),
    )  # fmt: skip
    check_tensor_parallel(trainer)
    for name, value in changes.items():
        setattr(args if hasattr(args, name) else trainer, name, value)
    with pytest.raises(InputError, match=text):
        check_tensor_parallel(trainer)
    trainer.get_tp_size = lambda: 1
    check_tensor_parallel(trainer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distributed_config": {"tp_sise": 2}}, r"got 'tp_sise', need .*did you mean 'tp_size'\?"),
        ({"distributed_config": {"tp_size": "two"}}, "tp_size: got 'two', need an integer >= 1"),
        ({"distributed_config": {"tp_size": 0}}, "tp_size: got 0, need an integer >= 1"),
        ({"distributed_config": 2}, "got 2, need a mapping, as in"),
        ({"distributed_config": {"pp_size": 2}}, "pp_size: got 2, need 1"),
        ({"distributed_config": {"tp_plan": "all"}}, "tp_plan: got 'all', need 'auto', or a mapping"),
        ({"distributed_config": {"tp_plan": "auto"}}, "tp_plan: got 'auto', need more ranks than 1 .* torchrun --np"),
        ({"distributed_config": {"tp_size": 2}}, "got .*, need 2 ranks for it, not 1: start it by torchrun --nproc-pe"),
        ({"tp_plan": "auto"}, "got 'tp_plan', need it in distributed_config"),
        ({"dtype": "float33"}, "dtype: got 'float33', need one of float32, bfloat16"),
        ({"torch_dtype": "bfloat16"}, "got 'torch_dtype', need its name of today, 'dtype'"),
        ("tp_size=2", "got 'tp_size=2', need a mapping, on the command line as JSON"),
    ],
)
def test_keywords_of_the_model_that_would_be_dropped(given, message, tmp_path):
    with pytest.raises(InputError, match=f"model_init_kwargs: (distributed_config: )?{message}"):
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, model_init_kwargs=given)


def test_transformers_that_never_shards():
    """5.17 has no such attribute."""
    assert not sharded_at_load(SimpleNamespace())
    assert sharded_at_load(SimpleNamespace(is_distributed_loading_by_transformers=True))
