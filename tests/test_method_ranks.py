"""KTO, BMC and FPO in two processes: as in one."""

import pytest

pytest.importorskip("trl", reason="needs the train extra: trl")
pytest.importorskip("datasets", reason="needs the train extra: datasets")

from asft_kernels.methods.fpo.hooks import Arguments, Hooks
from asft_kernels.objectives import BMC, FPO
from rank_processes import launch
from test_method_hooks import logs, made, model, pytestmark, reference  # noqa: F401
from tiny_lm import saved_sae


def losses(rank, world, folder, model, **options):  # noqa: F811
    sae = Hooks(Arguments(sae=str(folder / "sae.npz")))
    found = []
    for objective, method in (("kto", None), (BMC("dpo"), None), (FPO(alpha=50.0, top_k=4), sae)):
        trainer = made(
            folder / f"of {world}", model, objective, method=method, ref_model=reference(5), max_steps=2,
            learning_rate=1e-2, per_device_train_batch_size=8 // world, ddp_backend="gloo" if world > 1 else None,
        )  # fmt: skip
        found.append([row["loss"] for row in logs(trainer)])
    return found


def test_two_processes_are_one(tmp_path, model):  # noqa: F811
    """Also that of kto's reference point, which is of all ranks' rows."""
    saved_sae(tmp_path / "sae.npz")
    ranks = launch(2, losses, tmp_path, model)[0]
    for own, of_two in zip(losses(0, 1, tmp_path, model), ranks, strict=True):
        # The second step's weights differ by roundings of the first's gradient.
        assert of_two == pytest.approx(own, rel=1e-4)
