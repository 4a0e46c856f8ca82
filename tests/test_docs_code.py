"""Every ```python block of the pages in docs/ runs, those of a page one after the other with the same names.

And `asft train` understands each of its commands there.

What a page does not make itself is in GIVEN. A block that cannot run here has a comment before it in its page:
<!-- not run: reason -->. Signatures on docs/api.md are drawn from the code (test_api_page.py).
"""

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```", re.S | re.M)
# Blocks that another test runs: it holds their values against others, too.
ELSEWHERE = {"quickstart.md": 3, "grpo.md": 1}  # test_readme.py, test_grpo_example.py
ROWS, POSITIONS, HIDDEN, VOCAB = 4, 9, 16, 259


def blocks(page: Path) -> list[tuple[str, str | None]]:
    return [(found["code"], found["reason"]) for found in BLOCK.finditer(page.read_text())]


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.name != "api.md" and blocks(page)]


def batch() -> dict[str, Any]:
    """Two pairs from hidden states, policy's and reference's."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (ROWS, POSITIONS), generator=draw)
    labels[:, :3] = -100
    hidden, ref_hidden = torch.randn(2, ROWS, POSITIONS, HIDDEN, generator=draw)
    return {
        "hidden": hidden.requires_grad_(),
        "lm_head": torch.nn.Linear(HIDDEN, VOCAB),
        "labels": labels,
        "ref_hidden": ref_hidden,
        "ref_lm_head": torch.nn.Linear(HIDDEN, VOCAB),
        "ref_sums": -30 * torch.rand(ROWS, generator=draw),
    }


def model_and_ids() -> dict[str, Any]:
    from tiny_lm import pairs, tiny_model, tiny_tokenizer, write_lines

    write_lines(Path("pairs.jsonl"), pairs(6))
    ids = torch.randint(3, VOCAB, (ROWS, POSITIONS))
    return {
        "model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "ids": ids,
        "mask": torch.ones_like(ids),
        "labels": ids.clone(),
    }


def fpo() -> dict[str, Any]:
    from tiny_lm import saved_sae

    saved_sae(Path("sae.safetensors"), features=64)
    return batch()


def kto() -> dict[str, Any]:
    sums = -30 * torch.rand(2, ROWS)
    desirable = torch.tensor([True, False, True, True])
    return {**batch(), "mismatched_sums": sums[0], "mismatched_ref_sums": sums[1], "desirable": desirable}


def liger() -> dict[str, Any]:
    given = batch()
    head, ref_head = given["lm_head"], given["ref_lm_head"]
    return {
        "hidden": given["hidden"],
        "ref_hidden": given["ref_hidden"],
        "target": given["labels"],
        "lin_weight": head.weight,
        "bias": head.bias,
        "ref_weight": ref_head.weight,
    }


def scored() -> dict[str, Any]:
    """Two references' files, and the model that is trained."""
    from asft_kernels.cli.score import main
    from asft_kernels.models import PreferenceModel
    from tiny_lm import saved_tiny_model

    given = model_and_ids()
    Path("pairs.jsonl").rename("pairs.jsonl.gz")
    for name in ("first", "second"):
        saved_tiny_model(Path("org") / name, seed=len(name))
        command = ["--model", f"org/{name}", "--dataset_name", "pairs.jsonl.gz", "--output_dir", "scores"]
        assert main([*command, "--token_logps"]) == 0
    return {**given, "preference": PreferenceModel(given["model"], "mrpo")}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "liger.md": liger,
    "models.md": model_and_ids,
    "moving.md": model_and_ids,
    "objectives/fpo.md": fpo,
    "objectives/kto.md": kto,
    "objectives/bmc.md": lambda: {**batch(), "marks": torch.rand(ROWS, POSITIONS)},
    "objectives/orpo.md": lambda: (given := batch()) | {"prompt_and_answer": given["labels"][:2].clamp(min=0)},
    "objectives/poft.md": lambda: {**batch(), "rbar": -torch.rand(ROWS)},
    "score.md": scored,
}


@pytest.fixture
def _as_before(tmp_path, monkeypatch):
    """An empty folder, and TRL's trainers as they come."""
    pytest.importorskip("train_extra")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    yield
    from asft_kernels.training import unpatch_trl

    unpatch_trl()


@pytest.mark.usefixtures("_as_before")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_code_of_a_page_runs(page, capsys):
    found, name = blocks(page), name_of(page)
    if name in ELSEWHERE:
        assert len(found) == ELSEWHERE[name], "a block that no test runs"
        return
    names = GIVEN.get(name, batch)()
    capsys.readouterr()
    for code, reason in found:
        if reason is None:
            exec(code, names)
    if "loss" in names:
        assert names["loss"].isfinite()
    printed = re.findall(r"```text\n(.*?)```", page.read_text(), re.S)  # what a page says that its code prints
    if printed:
        assert capsys.readouterr().out == "".join(printed)


def test_what_is_not_run_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n```python\n1 / 0\n```\n\n<!-- not run: too big -->\n```python\nx\n```\n```sh\ny\n```\n")
    assert blocks(page) == [("1 / 0\n", None), ("x\n", "too big")]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_commands_of_training_are_understood():
    pytest.importorskip("trl", reason="needs the train extra: trl")
    from asft_kernels.cli.train import parse
    from asft_kernels.training.hooks import installed

    of_methods = {name: kind.Arguments for name, kind in installed().items() if kind.Arguments is not None}
    texts = [page.read_text() for page in (DOCS.parent / "README.md", *DOCS.rglob("*.md"))]
    code = "".join(block for text in texts for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S))
    commands = re.findall(r"^asft train (.*)", code.replace("\\\n", " "), re.M)
    assert len(commands) > 20
    for command in commands:
        parse(shlex.split(command, comments=True), of_methods)


def test_the_pictures_are_drawn():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec
    assert spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    there = {path.name: path.read_text() for path in pictures.FOLDER.iterdir()}
    assert there == pictures.pictures(), "run `python docs/pictures.py --write`"
