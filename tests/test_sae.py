"""Sparse autoencoders: encode, files, pooled features and FPO's distance against plain float64 formulas."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors", reason="needs the train extra: transformers, which brings safetensors")

from safetensors.torch import save_file

from asft_kernels.methods.fpo import (
    SparseAutoencoder,
    feature_distance,
    features,
    fpo_inputs,
    pooled_features,
    read_sae,
    write_sae,
)
from cases import IGNORE, make_case, packed

D, F = 24, 40  # 24: the hidden size of make_case


def make_sae(jump=False, D=D, F=F, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    threshold = {"threshold": (0.3 + 0.2 * draw(F).abs()).to(dtype)} if jump else {}
    tensors = {"W_enc": draw(D, F) / D**0.5, "b_enc": 0.1 * draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    return SparseAutoencoder(**{name: x.to(dtype) for name, x in tensors.items()}, **threshold)


def plain_pooled(sae, hidden, labels):
    """Row by row, float64, from the formulas: (R, F)."""
    rows = []
    for h, y in zip(hidden, labels, strict=True):
        kept = h[:-1][y[1:] != IGNORE].double()
        pre = kept @ sae.W_enc.double() + sae.b_enc.double()
        threshold = 0.0 if sae.threshold is None else sae.threshold.double()
        rows.append((pre.clamp(min=0) * (pre > threshold)).sum(0) / max(len(kept), 1))
    return torch.stack(rows)


def plain_distance(pooled, ref, k, union=True):
    """Row by row, by sets of indices."""
    out = []
    for p, r in zip(pooled, ref, strict=True):
        chosen = set(p.topk(k).indices.tolist()) | (set(r.topk(k).indices.tolist()) if union else set())
        out.append(sum((p[i] - r[i]) ** 2 for i in chosen) / k)
    return torch.stack(out)


@pytest.fixture(params=[False, True], ids=["ReLU", "JumpReLU"])
def jump(request):
    return request.param


def test_worked_by_hand():
    sae = SparseAutoencoder(
        torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([0.0, 0.5, 0.0]), torch.tensor([[1.0], [2.0], [4.0]]),
        torch.tensor([10.0]), threshold=torch.tensor([0.0, 0.0, 0.5]),
    )  # fmt: skip
    # h = 1: pre = 1, -0.5, 0.5, and 0.5 does not exceed its threshold 0.5; h = 2: pre = 2, -1.5, 1
    assert sae.encode(torch.tensor([[1.0], [2.0]])).tolist() == [[1, 0, 0], [2, 0, 1]]
    assert sae(torch.tensor([[2.0]])).tolist() == [[10 + 2 + 4]]
    assert not any(p.requires_grad for p in sae.parameters())
    hidden, labels = torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[IGNORE, 5, 5]])
    pooled = pooled_features(sae, hidden, labels)  # two label positions, predicted at positions 0 and 1
    assert pooled.tolist() == [[1.5, 0, 0.5]]
    # k = 1: I = {0} and {2}: D = (1.5 - 1)^2 + (0.5 - 2)^2, over k = 1; without the union 0.25
    ref = torch.tensor([[1.0, 0.0, 2.0]])
    assert feature_distance(pooled, ref, 1).item() == 2.5
    assert feature_distance(pooled, ref, 1, union=False).item() == 0.25


def test_fp32_features_of_any_input(jump):
    """Under autocast and for low-precision hidden states: fp32 sums of D products, each rounded twice."""
    sae = make_sae(jump)
    hidden = torch.randn(50, D).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = sae.encode(hidden)
    pre = hidden.double() @ sae.W_enc.double() + sae.b_enc.double()
    size = hidden.double().abs() @ sae.W_enc.double().abs() + sae.b_enc.double().abs()
    bound = (D + 1) * 2**-24 * size
    clear = (pre - sae.floor).abs() > bound  # elsewhere the gate itself is rounding
    exact = torch.where(pre > sae.floor, pre, 0)
    assert got.dtype == torch.float32
    assert clear.double().mean() > 0.999
    assert ((got - exact).abs() <= bound)[clear].all()


def test_nan_is_not_hidden_by_the_gate():
    sae = make_sae(True)
    assert sae.encode(torch.full((1, D), torch.nan)).isnan().all()


@pytest.mark.parametrize("chunk", [1, 7 * 4 * F, 2**26], ids=["1 token", "7 tokens", "all"])
def test_pooled_features_and_distance_with_gradients(jump, chunk, monkeypatch):
    monkeypatch.setattr(features, "CHUNK_BYTES", chunk)
    sae = make_sae(jump, dtype=torch.float64)
    case = make_case(rows=6, dtype=torch.float64)
    case.labels[2] = IGNORE
    ref = plain_pooled(sae, torch.randn(6, 13, D, dtype=torch.float64), case.labels)
    pooled, exact = pooled_features(sae, case.hidden, case.labels), plain_pooled(sae, case.hidden, case.labels)
    torch.testing.assert_close(pooled, exact, rtol=1e-13, atol=1e-13)  # sums of 24 and 12 terms of size 1
    assert (pooled[2] == 0).all()
    for k, union in ((5, True), (5, False), (F, True)):
        got, right = (f(p, ref, k, union=union) for f, p in ((feature_distance, pooled), (plain_distance, exact)))
        # Of squares of differences, whose terms cancel: some ten roundings of 1.1e-16, and of sums of 24 terms.
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)
        weights = torch.linspace(1, 2, 6, dtype=torch.float64)
        grads = [torch.autograd.grad((x * weights).sum(), case.hidden, retain_graph=True)[0] for x in (got, right)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    assert grads[0].abs().max() > 0


def test_gradcheck(jump, monkeypatch):
    monkeypatch.setattr(features, "CHUNK_BYTES", 5 * 4 * F)
    sae = make_sae(jump, dtype=torch.float64)
    case = make_case(rows=2, T=7, dtype=torch.float64, valid=0.8)
    ref = torch.rand(2, F, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: pooled_features(sae, h, case.labels), case.hidden)
    assert torch.autograd.gradcheck(lambda h: fpo_inputs(sae, h, case.labels, ref, 4)["feature_distance"], case.hidden)


def test_packed_equals_padded(jump):
    sae, case = make_sae(jump, dtype=torch.float64), make_case(rows=5, dtype=torch.float64)
    case.labels[3] = IGNORE
    hidden, labels, borders = packed(case)
    padded = pooled_features(sae, case.hidden, case.labels)
    torch.testing.assert_close(pooled_features(sae, hidden, labels, cu_seqlens=borders), padded, rtol=1e-14, atol=1e-14)
    shifted = torch.cat([case.labels[:, 1:], torch.full((5, 1), IGNORE)], dim=1)
    assert torch.equal(pooled_features(sae, case.hidden, shifted, shift=False), padded)


def test_only_the_rows_own_tokens_and_features_matter():
    sae, case = make_sae(dtype=torch.float64), make_case(rows=4, dtype=torch.float64, valid=0.4)
    ref = torch.rand(4, F, dtype=torch.float64)
    distance = fpo_inputs(sae, case.hidden, case.labels, ref, 3)["feature_distance"]
    (grad,) = torch.autograd.grad(distance[1], case.hidden)
    counted = torch.zeros(4, 13, dtype=torch.bool)
    counted[1, :-1] = case.labels[1, 1:] != IGNORE
    assert (grad[~counted] == 0).all()
    assert grad[counted].abs().sum(-1).gt(0).any()
    # padding at the end changes nothing: the denominator is m
    wider = torch.cat([case.hidden.detach(), torch.full((4, 9, D), torch.nan)], dim=1)
    labels = torch.cat([case.labels, torch.full((4, 9), IGNORE)], dim=1)
    assert torch.equal(fpo_inputs(sae, wider, labels, ref, 3)["feature_distance"], distance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision_leave_fp32_inside(dtype):
    """Sums of m <= 12 features of D products, differences of order 1: 40 roundings; a bf16 gradient has one of 2^-8."""
    sae, case = make_sae(), make_case(rows=4, dtype=dtype)
    ref = torch.rand(4, F)
    with torch.autocast("cpu", torch.bfloat16):
        distance = fpo_inputs(sae, case.hidden, case.labels, ref, 5)["feature_distance"]
        (grad,) = torch.autograd.grad(distance.sum(), case.hidden)
    exact = case.to(torch.float64)
    right = plain_distance(plain_pooled(sae, exact.hidden, exact.labels), ref.double(), 5)
    (right_grad,) = torch.autograd.grad(right.sum(), exact.hidden)
    assert distance.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(distance.double(), right, rtol=1e-5, atol=0)
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    assert (grad - right_grad).abs().max() <= (rounding + 1e-5) * right_grad.abs().max()


def test_errors_name_what_was_wrong():
    sae, case = make_sae(), make_case()
    with pytest.raises(ValueError, match=r"hidden: got size 24 .* need 25, the autoencoder's"):
        pooled_features(make_sae(D=25), case.hidden, case.labels)
    with pytest.raises(ValueError, match=r"labels: got shape \(4, 12\), need \(4, 13\)"):
        pooled_features(sae, case.hidden, case.labels[:, 1:])
    pooled = pooled_features(sae, case.hidden, case.labels)
    with pytest.raises(ValueError, match=r"ref_pooled: got shape \(4, 39\), need \(4, 40\)"):
        feature_distance(pooled, pooled[:, 1:])
    for wrong in (0, 41, 5.0):
        with pytest.raises(ValueError, match=rf"top_k: got {wrong!r}, need an integer from 1 to 40"):
            feature_distance(pooled, pooled, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": torch.zeros(3)}, r"W_enc: got shape \(3,\), need \(D, F\)"),
        ({"b_enc": torch.zeros(5)}, r"b_enc: got shape \(5,\), need \(4,\): W_enc is \(3, 4\)"),
        ({"W_dec": torch.zeros(3, 4)}, r"W_dec: got shape \(3, 4\), need \(4, 3\).*transpose it"),
        ({"b_dec": torch.tensor([0, torch.inf, torch.nan])}, r"b_dec: got 2 of 3 entries not finite"),
        ({"threshold": -torch.ones(4)}, r"threshold: got entries down to -1, need >= 0 \(a log-threshold"),
        ({"b_dec": torch.zeros(3, dtype=torch.int64)}, r"b_dec: got torch.int64, need a floating"),
        ({"b_dec": [0.0, 0.0, 0.0]}, r"b_dec: got list, need a floating"),
    ],
)
def test_wrong_tensors_are_refused(changes, message):
    good = {"W_enc": torch.ones(3, 4), "b_enc": torch.ones(4), "W_dec": torch.ones(4, 3), "b_dec": torch.ones(3)}
    SparseAutoencoder(**good)
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**{**good, **changes})


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_go_round(tmp_path, suffix, jump):
    sae, path = make_sae(jump), tmp_path / ("params" + suffix)
    write_sae(sae, path)
    back = read_sae(path)
    assert list(back.state_dict()) == list(sae.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(back.parameters(), sae.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_gemma_scope_layout(tmp_path):
    """What google/gemma-scope-2b-pt-res holds in each params.npz: five float32 arrays."""
    sae = make_sae(True)
    arrays = {name: tensor.numpy() for name, tensor in sae.named_parameters()}
    assert sorted(arrays) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    np.savez(tmp_path / "params.npz", **arrays)
    assert torch.equal(read_sae(tmp_path / "params.npz").threshold, sae.threshold)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("W_dec"), r"no W_dec among its keys .*W_enc.*, need W_enc, b_enc, W_dec, b_dec"),
        (lambda x: x.update(scaling=torch.ones(1)), r"got the key scaling, which is not computed here, need only"),
        (lambda x: x.update(b_enc=torch.ones(3)), r"b_enc: got shape \(3,\), need \(40,\)"),
        (lambda x: x.update(b_enc=torch.full((F,), torch.nan)), r"b_enc: got 40 of 40 entries not finite"),
    ],
)
def test_wrong_files_are_refused(tmp_path, suffix, change, message):
    tensors = dict(make_sae().state_dict())
    change(tensors)
    path = tmp_path / ("x" + suffix)
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file(tensors, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_sae(path)
    assert str(caught.value).startswith(str(path))


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.pt: got a name that ends in '\.pt', need \.npz or \.safetensors"):
        read_sae(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no such file, need a file of an autoencoder"):
        read_sae(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"got a name that ends in ''"):
        write_sae(make_sae(), tmp_path / "folder")
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / ("broken" + suffix)
        path.write_bytes(b"PK\x03\x04 and then nothing of use")
        with pytest.raises(ValueError, match=rf"broken\{suffix}: cannot be read as \{suffix}"):
            read_sae(path)
    np.savez(tmp_path / "pickled.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"pickled\.npz"):  # never unpickled
        read_sae(tmp_path / "pickled.npz")


MEASURE = """
import json, sys
import torch
from asft_kernels.methods.fpo import SparseAutoencoder, features, fpo_inputs
torch.manual_seed(0)
N, D, F, chunk = json.loads(sys.argv[1])
features.CHUNK_BYTES = chunk
def draw(*shape):
    return torch.randn(shape)
sae = SparseAutoencoder(draw(D, F) / D**0.5, draw(F) - 2, draw(F, D), draw(D))
def run(N):
    hidden = draw(4, N // 4, D).requires_grad_()
    labels = torch.zeros(4, N // 4, dtype=torch.int64)
    ref = draw(4, F).abs()
    fpo_inputs(sae, hidden, labels, ref, 50)["feature_distance"].sum().backward()
def resident(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))
run(8)
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the kernel's own peak, VmHWM, counts from here
run(N)
print(json.dumps(resident("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_knows_no_tokens_times_features():
    """2.25 chunks (pre-activations, their mask, the features); hidden, its copy and both gradients; (R, F) tensors."""
    N, D, F, chunk, MiB = 4096, 64, 8192, 2**24, 2**20
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MiB), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps([N, D, F, chunk])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    extra = json.loads(out.stdout)
    formula = 2.25 * chunk + 5 * 4 * N * D + 10 * 4 * 4 * F + 6 * MiB  # 6: threads' and allocator's own
    print(f"{extra / MiB:.1f} MiB measured, {formula / MiB:.1f} by the formula, {4 * N * F / MiB:.0f} MiB is (N, F)")
    assert chunk < extra <= formula < 4 * N * F
