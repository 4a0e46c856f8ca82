"""The README's figures are those of bench_results/, and its first code runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import report

README = Path(__file__).parents[1] / "README.md"


def test_figures_are_drawn_from_the_rows():
    files = report.row_files()
    if not files:
        pytest.skip("bench_results/ has no rows yet: make bench")
    assert report.newest_rows(files), f"no rows in {', '.join(path.name for path in files)}"
    text = README.read_text()
    assert report.written(text, files) == text, "run `python -m benchmarks.report --write`"
    full = report.RESULTS / "REPORT.md"
    assert full.read_text() == report.report(files), "run `python -m benchmarks.report --write`"


def test_drop_in_call_runs():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    assert code
    states = torch.randn(4, 6, 16, requires_grad=True)
    model = SimpleNamespace(
        model=lambda ids, mask: SimpleNamespace(last_hidden_state=states), lm_head=nn.Linear(16, 50, bias=False)
    )
    names = {"model": model, "input_ids": None, "attention_mask": None, "labels": torch.randint(50, (4, 6))}
    exec(code.group(1), names)
    assert names["loss"].isfinite()
    assert states.grad is not None
