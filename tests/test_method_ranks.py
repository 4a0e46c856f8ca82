"""KTO, BMC and FPO in two processes: as in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from asft_kernels.methods.fpo.hooks import Arguments, Hooks
from asft_kernels.objectives import BMC, FPO
from test_method_hooks import logs, made, model, pytestmark, reference  # noqa: F401
from tiny_lm import saved_sae

WORKER = """
import os, sys, torch
from test_method_hooks import FPO, BMC, Arguments, Hooks, logs, made, reference

sae = Hooks(Arguments(sae=sys.argv[1] + "/sae.npz"))
found = []
for objective, method in (("kto", None), (BMC("dpo"), None), (FPO(alpha=50.0, top_k=4), sae)):
    trainer = made(sys.argv[1] + "/ranks", sys.argv[2], objective, method=method, ref_model=reference(5),
        max_steps=2, per_device_train_batch_size=4, ddp_backend="gloo", learning_rate=1e-2)
    found.append([row["loss"] for row in logs(trainer)])
if trainer.args.process_index == 0:
    torch.save(found, sys.argv[1] + "/found.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way
"""


def test_two_processes_are_one(tmp_path, model):  # noqa: F811
    """Also that of kto's reference point, which is of all ranks' rows."""
    sae, tests = Hooks(Arguments(sae=str(saved_sae(tmp_path / "sae.npz")))), Path(__file__).parent
    objectives = (("kto", None), (BMC("dpo"), None), (FPO(alpha=50.0, top_k=4), sae))
    given = {"max_steps": 2, "learning_rate": 1e-2}
    alone = [
        logs(made(tmp_path / "alone", model, objective, method=method, ref_model=reference(5), **given))
        for objective, method in objectives
    ]
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path), model], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (tmp_path / "found.pt").is_file(), done.stderr[-3000:]
    for own, ranks in zip(alone, torch.load(tmp_path / "found.pt"), strict=True):
        # The second step's weights differ by roundings of the first's gradient.
        assert ranks == pytest.approx([row["loss"] for row in own], rel=1e-4)
