"""examples/: each runs as it stands, from a folder of its own, and shows what it says."""

import re
import runpy
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_first_steps(tmp_path, monkeypatch, capsys):
    for package in ("trl", "datasets", "matplotlib"):
        pytest.importorskip(package, reason=f"needs the train extra: {package}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = runpy.run_path(str(EXAMPLES / "first_steps.py"))
    assert names["hidden"].grad.abs().sum() > 0
    # Two layers and a head in fp32: some hundred roundings of logits of a few units.
    assert (names["fused"].log_probs - names["plain"]).abs().max() < 1e-5
    assert names["after"]["eval_loss"] < names["before"]["eval_loss"]
    assert len(names["rows"]) == 5
    said = capsys.readouterr().out
    assert re.search(r"^eval_loss: \d", said, re.M)
    (picture,) = tmp_path.glob("first_steps-*/first_steps.png")
    assert said.endswith(f"{picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "here").iterdir()) == []  # it leaves nothing where it is started


def test_cells_have_titles():
    text = (EXAMPLES / "first_steps.py").read_text()
    assert len(re.findall(r"^# %% \S", text, re.M)) == len(re.findall(r"^# %%", text, re.M)) >= 5
