"""`asft doctor`: a line for each finding, and an exit code that says whether all is well."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from asft_kernels.backends import triton_fused
from asft_kernels.cli import doctor, main
from asft_kernels.models import check
from tiny_lm import saved_tiny_model


@pytest.fixture
def torch_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_machine_and_a_model(tmp_path, capsys, torch_only):
    folder = saved_tiny_model(tmp_path / "model", vocab_size=300)
    assert main(["doctor", "--model", str(folder)]) == 0
    said = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in said.splitlines() if line[:1].isalpha())
    assert lines["torch"] == torch.__version__ or torch.__version__ in said
    assert f"backend                {'triton on cuda' if torch.cuda.is_available() else 'torch on cpu'}" in said
    assert lines["GPUs"] == str(torch.cuda.device_count())
    assert "gloo" in lines["torch.distributed"].split(", ")
    assert lines["deepspeed"]
    for dtype in ("float32", "bfloat16", "float16"):
        assert f"torch, {dtype}" in said
    assert "head                   torch.Linear, 300 words of 16, tied" in said
    assert "tokenizer              259 of 300 embeddings" in said
    assert "scale, cap             1, none" in said
    assert "log-probabilities      differ from its own by at most" in said
    assert "typical batch          4,096 tokens of 8,192 positions, D 16, V 300, float32, " in said
    assert "  frozen head          2.00 products, " in said
    assert "  LoRA of rank 16 on it " in said
    assert "  trainable head       3.00 products, " in said
    assert "accumulators of dH " in said
    assert said.endswith("all is well\n")
    assert "FAILED" not in said


def test_a_wrong_kernel_is_found(capsys, monkeypatch, torch_only):
    right = doctor.loss_errors
    monkeypatch.setattr(
        doctor, "loss_errors", lambda *a: {**right(*a), "head": float("nan")} if a[1] == torch.float16 else right(*a)
    )
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "torch, float16         FAILED: relative errors: " in said
    assert said.endswith("not well: torch, float16\n")


def test_errors_are_those_of_the_backend(monkeypatch):
    from asft_kernels.backends import torch_chunked

    assert max(doctor.loss_errors("torch", torch.float32, "cpu").values()) < doctor._allowed(torch.float32)
    backward = torch_chunked.backward

    def doubled(*args, **options):
        found = backward(*args, **options)
        return found._replace(hidden=2 * found.hidden)

    monkeypatch.setattr(torch_chunked, "backward", doubled)
    errors = doctor.loss_errors("torch", torch.float32, "cpu")
    assert errors["hidden"] == pytest.approx(1, rel=1e-5)
    assert errors["head"] < doctor._allowed(torch.float32)


@pytest.mark.interpreter
def test_triton_is_run_where_it_can(capsys, monkeypatch):
    monkeypatch.setattr(triton_fused, "forward", None)  # as a compiler that throws
    assert main(["doctor"]) == 1
    assert "triton, float32        FAILED: 'NoneType' object is not callable" in capsys.readouterr().out


def test_a_model_that_computes_something_else(tmp_path, capsys, monkeypatch, torch_only):
    monkeypatch.setattr(check, "_rounding", lambda *_: torch.full((8,), -1.0, dtype=torch.float64))
    assert main(["doctor", "--model", str(saved_tiny_model(tmp_path / "model"))]) == 1
    said = capsys.readouterr().out
    assert "fuse                   FAILED: LlamaForCausalLM: log-probabilities from hidden states" in said
    assert main(["doctor", "--model", "no-such"]) == 2
    assert "asft doctor: --model: got 'no-such'" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_embedding(tmp_path, capsys, torch_only):
    assert main(["doctor", "--model", str(saved_tiny_model(tmp_path / "model", vocab_size=200))]) == 1
    assert "tokenizer              FAILED: 259 of 200 embeddings" in capsys.readouterr().out


def test_kernels_that_are_not_compiled(capsys, monkeypatch):
    """An architecture that the table does not have is refused; an interpreting process has nothing to compile."""
    assert main(["doctor", "--kernels", "sm_70"]) == 2
    assert "asft doctor: --kernels: got 'sm_70', need some of sm_80, sm_90, sm_100, gfx942" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(doctor, "_kernel_checks", lambda: ())
    assert main(["doctor", "--kernels"]) == 0
    assert "kernels                not compiled: TRITON_INTERPRET is set; unset it" in capsys.readouterr().out


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    from asft_kernels.cli import doctor

    monkeypatch.setattr(doctor, "PACKAGE", str(tmp_path / "asft_kernels"))
    assert doctor._commit() == ""
    (tmp_path / ".git" / "refs").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/main\n")
    assert doctor._commit() == ""  # packed
    (tmp_path / ".git" / "refs" / "main").write_text("0123456789abcdef\n")
    assert doctor._commit() == "0123456789ab"
