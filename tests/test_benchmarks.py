"""The benchmark's machinery: wrong answers have no speed, nothing that a contestant does stops a run."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch

from asft_kernels import reference
from asft_kernels.backends import triton_fused
from benchmarks import accuracy, estimate, machine, run
from benchmarks.calls import gradients, ours, per_token, plain_torch
from benchmarks.cases import FROZEN, NO_GRADIENT, TRAINABLE, WORKS, Case, cpu_cases, gpu_cases, make_inputs, smoke_cases
from benchmarks.contestants import BARE, CONTESTANTS, Contestant, contestants_of
from benchmarks.losses import IGNORE, LOSSES
from benchmarks.machine import GIB
from benchmarks.measure import extra_memory
from benchmarks.oracle import compare, exact_answer, refusal, tolerance
from benchmarks.runner import Prepared, measure_case
from benchmarks.worker import Contender
from cases import gemms

CASE = Case("test", TRAINABLE, N=40, M=64, D=16, V=200, rounds=2)
MIB = 2**20
COUNTED = MIB  # Linux counts resident pages per CPU and adds them up in batches: either reading is off by some dozens


def right(case, inputs):
    return per_token(plain_torch, case, inputs)


def without_mask(case, inputs):
    labels = inputs.labels.clamp(min=0)
    return per_token(plain_torch, case, inputs._replace(labels=labels))


def scaled_gradient(case, inputs):
    loss, grad_hidden, grad_weight = right(case, inputs)
    assert grad_weight is not None
    return loss, grad_hidden, grad_weight * (1 + 1e-4)


def nan_in_one_place(case, inputs):
    loss, grad_hidden, grad_weight = right(case, inputs)
    assert grad_hidden is not None
    grad_hidden[0, 0, 0] = torch.nan
    return loss, grad_hidden, grad_weight


def raises(case, inputs):
    raise RuntimeError("no such kernel\nand a long story")


def dies(case, inputs):
    os._exit(3)


def hangs(case, inputs):
    time.sleep(60)


def takes_64_mib(case, inputs):
    torch.ones(16 * MIB)
    return right(case, inputs)


def takes_too_much(case, inputs):
    torch.empty(2**50, dtype=torch.uint8)


def named(function) -> Contestant:
    return Contestant(function.__name__, "torch", function)


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr("benchmarks.runner.gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("benchmarks.runner.package_import_seconds", lambda module: 0.0)
    inputs = Prepared()
    yield inputs
    inputs.close()


def test_what_fails_has_its_reason_and_no_time_and_the_rest_goes_on(prepared):
    """One case, all kinds of contestants, in processes of their own."""
    functions = [right, without_mask, scaled_gradient, nan_in_one_place, raises, dies, takes_64_mib, takes_too_much]
    rows = {r["contestant"]: r for r in measure_case(CASE, [named(f) for f in functions], prepared)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok", "without_mask": "refused", "scaled_gradient": "refused", "nan_in_one_place": "refused",
        "raises": "failed", "dies": "failed", "takes_64_mib": "ok", "takes_too_much": "failed",
    }  # fmt: skip
    for row in rows.values():
        assert (row["seconds"] is not None) == (row["status"] == "ok") == (row["reason"] == "") == (row["rounds"] == 2)
    assert rows["without_mask"]["reason"].startswith("loss is off by")
    assert rows["scaled_gradient"]["err_dw"] == pytest.approx(1e-4, rel=1e-2)
    assert rows["raises"]["reason"] == "RuntimeError: no such kernel"
    assert rows["dies"]["reason"] == "the process died: exit status 3"
    assert rows["takes_too_much"]["reason"].startswith("out of memory under a limit of ")
    assert all(row["memory_limit"] > 0 for row in rows.values())
    few = 8 * MIB  # the call's own small tensors, and code that is paged in
    assert 64 * MIB - COUNTED <= rows["takes_64_mib"]["extra_bytes"] <= 64 * MIB + few
    assert rows["right"]["extra_bytes"] <= few


def test_a_call_that_never_ends_is_given_up(prepared):
    (row,) = measure_case(CASE, [named(hangs)], prepared, limit=0.4)
    assert (row["status"], row["reason"]) == ("failed", "no answer within 2 s")


def test_ratios_are_to_the_bare_products(prepared):
    bare = next(c for c in CONTESTANTS if c.name == BARE)
    rows = measure_case(CASE, [bare, named(right)], prepared)
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] == rows[1]["seconds"] / rows[0]["seconds"]
    flops = 3 * 2 * CASE.N * CASE.V * CASE.D
    assert rows[1]["gemm_share"] == pytest.approx(flops / rows[1]["seconds"] / 1e9)


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """What has a row at this commit is not measured again; a line that was cut off does not count as one."""
    measured, status = [], "refused"

    def fake(case, contestants, prepared, *, limit):
        measured.append((case.id, [c.name for c in contestants]))
        return [
            {
                "kind": "cost",
                **case.row,
                "contestant": c.name,
                "package": c.package,
                "status": status,
                "version": c.version,
                "reason": "fake",
            }
            for c in contestants
        ]

    monkeypatch.setattr(run, "measure_case", fake)
    monkeypatch.setattr(run, "gemm_rate", lambda device, dtype: 1e9)
    cases = [replace(CASE, contestants=(BARE, "plain torch")), replace(CASE, N=48, contestants=(BARE, "plain torch"))]
    path, facts = tmp_path / "rows.jsonl", {"commit": "abc"}
    run.run(cases, [], path, facts, limit=1)
    complete = path.read_text()
    assert [row["contestant"] for row in map(json.loads, complete.splitlines())] == [BARE, "plain torch"] * 2
    path.write_text(complete[:-20])  # killed while it wrote the last row

    measured.clear()
    run.run(cases, [], path, facts, limit=1)
    assert measured == [(cases[1].id, [BARE, "plain torch"])]  # with the yardstick, which the ratio needs
    assert len(run.rows_of(path)) == 5  # with the yardstick of that run
    run.run(cases, [], path, facts, limit=1)
    assert len(measured) == 1
    status = "failed"  # a peer that was not installed, a GPU that others held: again
    assert run.run(cases, [], path, {"commit": "def"}, limit=1) == 0
    assert run.run(cases, [], path, {"commit": "def"}, limit=1) == 0
    assert len(measured) == 5
    ours = [replace(CASE, contestants=(BARE, "asft_kernels torch"))]
    assert run.run(ours, [], path, {"commit": "ghi"}, limit=1) == 1


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, False),
        ({"commit": "def"}, True),
        ({"torch": "2.14"}, True),
        ({"triton": "4.0"}, True),
        ({"failed_checks": "parity"}, True),
        ({"tuned": ""}, True),
        ({"stored_tiles": "other"}, False),  # which nobody takes under ASFT_KERNELS_TUNED=0
        ({"started": "later", "date": "2030-01-03"}, False),
    ],
)
def test_what_makes_a_measurement_another_one(change, again):
    case, facts = replace(CASE, contestants=(BARE, "plain torch")), {"commit": "abc", "torch": "2.13", "tuned": "0"}
    plain = contestants_of(case)[1]
    row = {"kind": "cost", **case.row, "contestant": plain.name, "version": plain.version, "about": facts}
    assert run.has_row("cost", case, plain, {run.key(row)}, facts | change) != again
    assert not run.has_row("cost", case, plain, {run.key(row | {"version": "0.0"})}, facts)
    tuned = next(c for c in CONTESTANTS if c.name == "asft_kernels triton, tuned")
    stale = row | {"contestant": tuned.name, "version": tuned.version, "about": facts | {"stored_tiles": "one"}}
    assert run.has_row("cost", case, tuned, {run.key(stale)}, facts | {"stored_tiles": "one"})
    assert not run.has_row("cost", case, tuned, {run.key(stale)}, facts | {"stored_tiles": "two"})


def test_who_is_measured_later_has_our_default_beside_it():
    case, facts = replace(CASE, contestants=(BARE, "asft_kernels torch", "plain torch")), {"commit": "abc"}
    rows = [
        {"kind": "cost", **case.row, "contestant": c.name, "version": c.version, "about": facts}
        for c in contestants_of(case)
    ]
    names = [c.name for c in run.missing(case, [], {run.key(r) for r in rows[:2]}, facts)]
    assert names == [BARE, "asft_kernels torch", "plain torch"]
    assert run.missing(case, [], {run.key(r) for r in rows}, facts) == []


def test_the_tuned_one_takes_part_only_by_name():
    tuned = next(c for c in CONTESTANTS if c.name == "asft_kernels triton, tuned")
    assert [run.asked_for(tuned, names) for names in ([], ["triton"], ["tuned"], ["triton, tuned"])] == [
        False, False, True, True
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("work", "expected"), list(zip(WORKS, (1, 2, 3), strict=True)))
def test_bare_products_are_as_many_as_the_case_says(work, expected, dtype):
    case = replace(CASE, work=work, dtype=dtype, V=3000)
    inputs = make_inputs(case)
    bare = next(c for c in CONTESTANTS if c.name == BARE)
    assert bare.products(case) == expected
    assert gemms(lambda: bare.run(case, inputs), case.N, case.V, case.D) == pytest.approx(expected, rel=1e-9)


class Noted:
    """In a worker's place: notes whom it asked for a time."""

    turns: ClassVar[list[str]] = []
    processes: ClassVar[int] = 0

    def __init__(self, make, contestant, *args, **options):
        self.name = contestant.name
        Noted.processes += 1

    def ask(self, step, *args, limit):
        if step == "time":
            self.turns.append(self.name)
        return {"check": {}, "tile": None}.get(step, 1.0)

    def close(self, patience=0.0): ...


@pytest.fixture
def noted(monkeypatch, tmp_path):
    """Inputs for measure_case, whose workers are of the class Noted."""
    monkeypatch.setattr("benchmarks.runner.Worker", Noted)
    monkeypatch.setattr("benchmarks.runner.gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("benchmarks.runner.package_import_seconds", lambda module: 0.0)
    monkeypatch.setattr("benchmarks.runner.fit_together", lambda *args: True)
    monkeypatch.setattr(Noted, "turns", [])
    monkeypatch.setattr(Noted, "processes", 0)
    inputs: Any = Mock()
    inputs.folder_of.return_value = tmp_path
    return inputs


def test_turns_go_back_and_forth(noted):
    measure_case(replace(CASE, rounds=3), [named(f) for f in (right, raises, dies)], noted)
    there, back = ["right", "raises", "dies"], ["dies", "raises", "right"]
    assert Noted.turns == [*there, *back, *there]
    assert Noted.processes == 3


def test_rounds_apart_have_processes_of_their_own(noted):
    """One for the check and one a round, whose first call is not counted."""
    rows = measure_case(replace(CASE, rounds=3, apart=True), [named(f) for f in (right, raises)], noted)
    assert Noted.processes == 2 * (1 + 3)
    assert Noted.turns == ["right"] * 2 + ["raises"] * 4 + ["right"] * 4 + ["raises"] * 2
    assert [row["rounds"] for row in rows] == [3, 3]
    assert all(row["apart"] for row in rows)


def takes_3_gib(case, inputs):
    torch.empty(3 * GIB, dtype=torch.uint8)  # asked for, never touched
    return right(case, inputs)


def test_the_limit_of_memory_is_really_set(prepared, monkeypatch):
    """What the machine grants, a limit below it refuses."""
    if machine.available_memory("cpu") < 5 * GIB:
        pytest.skip("needs 5 GiB of available memory")
    for limit, status in ((24 * GIB, "ok"), (2 * GIB, "failed")):
        monkeypatch.setattr("benchmarks.runner.MEMORY_LIMIT", limit)
        (row,) = measure_case(replace(CASE, rounds=1), [named(takes_3_gib)], prepared)
        assert row["status"] == status, row["reason"]
    assert row["reason"].startswith("out of memory under a limit of 2.0 GiB")


def test_a_missing_peer_says_how_to_get_it(prepared):
    (row,) = measure_case(replace(CASE, rounds=1), [replace(named(right), package="no_such_peer")], prepared)
    assert row["status"] == "failed"
    assert row["reason"] == 'RuntimeError: no_such_peer is not installed: pip install -e ".[bench]"'


@pytest.mark.interpreter
def test_rows_of_our_kernels_name_their_tile(prepared, monkeypatch):
    """In the interpreter the table's first; a stored one is told apart, and one that is not stored is an error."""
    triton = next(c for c in CONTESTANTS if c.name == "asft_kernels triton, tuned")
    case = replace(CASE, work=NO_GRADIENT, N=4, M=8, V=16, rounds=1)
    folder = prepared.folder_of(case)
    contender = Contender(triton, case, folder)
    contender.load(case, folder)
    with pytest.raises(RuntimeError, match="no stored tile for this problem"):
        contender.tile()
    contender.contestant = replace(triton, tuned=False)
    first = contender.tile()
    chosen = triton_fused.best_tile
    monkeypatch.setattr(triton_fused, "best_tile", lambda *a, **of: replace(chosen(*a, **of), why="measured: 1 ms"))
    contender.contestant = triton
    assert contender.tile() == f"tuned: {first}"
    contender.contestant = named(right)
    assert contender.tile() is None


def test_every_contestant_has_an_accuracy_row():
    for device in ("cpu", "cuda"):
        cases = [case for case, _ in accuracy.accuracy_cases(None, device)]
        there = {c.name for case in cases for c in accuracy.answering(case)}
        settings = {c.name for c in CONTESTANTS if c.name.startswith(("asft_kernels torch, ", "asft_kernels triton, "))}
        wanted = {c.name for c in CONTESTANTS if c.checked and device in c.devices} - settings
        assert there == wanted


@pytest.mark.parametrize("loss", LOSSES)
def test_oracle(loss):
    """ASFT against the package's own reference; of the other losses the gradients against autograd on full logits."""
    case = replace(CASE, loss=loss)
    inputs = make_inputs(case)
    hidden, weight = (x.double().requires_grad_() for x in inputs[:2])
    value: Any
    if loss == "asft":
        value = reference.fused_asft_loss(hidden, weight, inputs.labels, shift=False)
    else:
        logps = reference.fused_linear_logps(hidden, weight, inputs.labels, shift=False)
        value = LOSSES[loss](logps, inputs.labels)
    grad_hidden, grad_weight = torch.autograd.grad(value, (hidden, weight))
    errors = compare((value, grad_hidden, grad_weight), exact_answer(case, inputs))
    assert max(e for e in errors if e is not None) < 1e-13  # both are float64: some hundred roundings


def test_ours_is_held_to_its_own_claim_and_no_multiple_of_plain_torch():
    exact = exact_answer(CASE, make_inputs(CASE))._replace(plain_loss=1e-5, plain_grad=1e-5)
    ours, others = (tolerance(CASE, exact, package) for package in ("asft_kernels", "torch"))
    assert ours.grad < 2e-5 < 1e-4 < others.grad
    assert ours.loss < 2e-5 < 1e-4 < others.loss


def test_losses_by_hand():
    """Two pairs with averages (-1, -2) and (-0.5, -0.5), lengths 2 and 1."""
    labels = torch.tensor([[1, 1], [1, IGNORE], [1, 1], [1, IGNORE]])
    logps = torch.tensor([[-1.5, -0.5], [-0.5, 0.0], [-2.5, -1.5], [-0.5, 0.0]])

    def sigmoid(x):
        return torch.tensor(x, dtype=torch.float64).sigmoid().log()

    odds = 1.0 - torch.log(-torch.expm1(torch.tensor(-1.0))) + torch.log(-torch.expm1(torch.tensor(-2.0)))
    expected = {
        "simpo": -(sigmoid(0.1 * 1.0 - 0.5) + sigmoid(-0.5)) / 2,
        "dpo": -(sigmoid(0.1 * 2.0) + sigmoid(0.0)) / 2,
        "orpo": 2.5 / 3 - 0.1 * (sigmoid(odds.item()) + sigmoid(0.0)) / 2,
    }
    for name, value in expected.items():
        assert LOSSES[name](logps, labels).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_installed_contestants_pass_the_gate(loss, dtype):
    """Those that need no compiler; the others go through the whole runner in `benchmarks.run smoke`."""
    pytest.importorskip("trl", reason="needs the test extra: trl")
    for work in WORKS:
        case = replace(CASE, work=work, loss=loss, dtype=dtype, N=16, M=24, V=48)  # some are interpreted
        inputs = make_inputs(case)
        exact = exact_answer(case, inputs)
        for contestant in contestants_of(case):
            if contestant.checked and not contestant.compiles:
                result = contestant.run(case, inputs)
                assert [x is not None for x in result] == [True, work != NO_GRADIENT, work == TRAINABLE]
                allowed = tolerance(case, exact, contestant.package)
                assert refusal(compare(result, exact), allowed) == "", contestant.name


@pytest.mark.parametrize("name", ["SimPO", "DPO", "ORPO"])
def test_liger_computes_the_losses_written_here(name, monkeypatch):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="needs the test extra: liger-kernel")
    monkeypatch.setattr(torch, "compile", lambda function: function)  # it is the mathematics that is compared
    assert chunked_loss
    contestant = next(c for c in CONTESTANTS if c.name == f"Liger-Kernel {name}")
    for work, pairs in ((FROZEN, 2), (TRAINABLE, 4)):
        case = replace(CASE, work=work, pairs=pairs, loss=name.lower())
        inputs = make_inputs(case)
        exact = exact_answer(case, inputs)
        assert refusal(compare(contestant.run(case, inputs), exact), tolerance(case, exact, "torch")) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_too_many_is_refused(dtype):
    case = replace(CASE, dtype=dtype)
    inputs = make_inputs(case)
    exact = exact_answer(case, inputs)
    labels = inputs.labels.clone()
    labels[0, 0] = 5
    assert inputs.labels[0, 0] == IGNORE
    result = partial(ours, backend="torch")(case, inputs._replace(labels=labels))
    assert "dH is off" in refusal(compare(result, exact), tolerance(case, exact, "torch"))


def test_tf32_is_refused_in_fp32():
    """Operands of 10 mantissa bits, at a large vocabulary, where sums of fp32 alone leave most room."""
    case = replace(CASE, N=8, M=16, V=131072)
    inputs = make_inputs(case)
    exact = exact_answer(case, inputs)
    hidden, weight = (((x.view(torch.int32) + 2**12) >> 13 << 13).view(torch.float32) for x in inputs[:2])
    errors = compare(right(case, inputs._replace(hidden=hidden, weight=weight)), exact)
    refused = refusal(errors, tolerance(case, exact, "torch"))
    assert "dH is off" in refused
    assert "dW is off" in refused
    assert refusal(compare(right(case, inputs), exact), tolerance(case, exact, "torch")) == ""


def test_one_wrong_token_in_8192_is_refused_in_bfloat16():
    case = replace(CASE, N=8192, M=8192, pairs=4, dtype="bfloat16")
    inputs = make_inputs(case)
    exact = exact_answer(case, inputs)
    labels = inputs.labels.clone()
    labels[0, 0] = (labels[0, 0] + 1) % case.V
    allowed = tolerance(case, exact, "torch")
    assert "dH is off" in refusal(compare(right(case, inputs._replace(labels=labels)), exact), allowed)
    assert refusal(compare(right(case, inputs), exact), allowed) == ""


def test_inputs_have_the_tokens_that_the_case_says():
    for case in (CASE, replace(CASE, N=41, pairs=4), replace(CASE, N=64)):
        inputs = make_inputs(case)
        assert (inputs.labels != IGNORE).sum() == case.N
        assert (inputs.labels != IGNORE).any(1).all()
        assert inputs.hidden.shape == (2 * case.pairs, case.M // (2 * case.pairs), case.D)
        assert all(torch.equal(a, b) for a, b in zip(inputs, make_inputs(case), strict=True))


def test_cpu_suite_fits_into_its_time():
    """20 minutes for `make bench`, of which accuracy and report take a few."""
    assert sum(estimate.seconds(case, available=16 * GIB) for case in cpu_cases()) < 13.5 * 60


def test_estimate_counts_the_processes_of_every_round():
    """Without memory for idle workers a round starts each anew, with a call that is not counted."""
    case = replace(CASE, contestants=(BARE, "plain torch"), rounds=10)
    extra = estimate.seconds(case, available=1) - estimate.seconds(case, available=16 * GIB)
    assert extra == pytest.approx(2 * 10 * estimate.START_SECONDS, rel=0.01)


def test_ctrl_c_leaves_what_was_timed(prepared, tmp_path, monkeypatch):
    """In the second round: the one that had a turn in the first is written, and only the other is measured again."""
    timed = []

    def interrupted(entry, *args):
        if timed:
            raise KeyboardInterrupt
        timed.append(entry)
        entry.seconds.append(1.0)

    monkeypatch.setattr("benchmarks.runner._time", interrupted)
    monkeypatch.setattr(run, "gemm_rate", lambda device, dtype: 1e9)
    case, path = replace(CASE, contestants=(BARE, "plain torch")), tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run.run([case], [], path, {"commit": "abc"}, limit=60)
    assert [(row["contestant"], row["rounds"]) for row in run.rows_of(path)] == [(BARE, 1)]
    assert timed[0].worker is None


def test_products_of_ours_are_those_of_its_plan():
    """E of 2048 x 262,144 in fp32 is 2 GiB, of which the default keeps one; in Triton's bf16 it is 1 GiB."""
    case = replace(CASE, N=2048, M=2048, V=262144, dtype="bfloat16")
    products = {c.name: c.products(case) for c in CONTESTANTS}
    assert products["asft_kernels torch"] == 3.5
    assert products["asft_kernels triton"] == 3
    assert products["asft_kernels torch, cache_bytes=0"] == 4
    assert products["asft_kernels torch, all E kept"] == 3


def test_uncommitted_sources_are_another_commit(tmp_path, monkeypatch):
    """So that a run does not go on from rows of other code: outside git, too, where the caller names the commit."""
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "benchmarks" / "machine.py"))
    monkeypatch.delenv("ASFT_BENCHMARK_COMMIT", raising=False)
    commits, keys = [], []
    for text in ("a = 1\n", "a = 2\n"):
        (tmp_path / "benchmarks" / "a.py").write_text(text)
        commits.append(machine.commit())
        monkeypatch.setenv("ASFT_BENCHMARK_COMMIT", "abc123")
        facts = machine.about("cpu", "benchmarks.run", [])
        assert facts["commit"] == "abc123"
        keys.append(run.key({"kind": "cost", "set": "main", "case": "a", "contestant": "b", "about": facts}))
        monkeypatch.delenv("ASFT_BENCHMARK_COMMIT")
    assert all(commit.startswith("unknown-") for commit in commits)
    assert commits[0] != commits[1]
    assert keys[0] != keys[1]


def test_git_knows_better_than_the_caller(monkeypatch):
    """Its answer is made up here: a source distribution has no git."""
    monkeypatch.setenv("ASFT_BENCHMARK_COMMIT", "abc123")
    monkeypatch.setattr(machine, "_git", lambda root, *arguments: "def456" * (arguments[0] == "describe"))
    assert machine.commit() == "def456"
    monkeypatch.setattr(machine, "_git", lambda root, *arguments: "def456")
    assert machine.commit() == f"def456-dirty-{machine.sources()}"


def test_inputs_are_drawn_where_they_are_needed(device):
    """A CPU's are those that published rows were measured on: the same numbers in the same order."""
    case = replace(CASE, device=device)
    inputs = make_inputs(case)
    assert {x.device.type for x in inputs} == {device}
    generator = torch.Generator(device).manual_seed(0)
    for got, scale in ((inputs.hidden, 1.0), (inputs.weight, 0.02)):
        assert torch.equal(got, torch.randn(got.shape, generator=generator, device=device) * scale)


def test_suites_are_whole():
    for suite in (cpu_cases(), gpu_cases(), smoke_cases()):
        assert len({(case.set, case.id) for case in suite}) == len(suite)
        names = {contestant.name for contestant in CONTESTANTS}
        for case in suite:
            assert set(case.contestants) <= names
            assert contestants_of(case)[0].name == BARE


def test_memory_is_that_of_the_call_alone():
    kept = torch.ones(32 * MIB // 4)

    def call():
        return torch.ones(48 * MIB // 4)

    assert kept.sum() == len(kept)
    measured = extra_memory(call, "cpu")
    assert measured is None or abs(measured - 48 * MIB) <= COUNTED


def test_gradients_follow_the_work():
    inputs = make_inputs(CASE)
    for work, expected in zip(WORKS, ((False, False), (True, False), (True, True)), strict=True):
        _, *grads = gradients(replace(CASE, work=work), inputs, lambda h, w: h.sum() + w.sum())
        assert tuple(g is not None for g in grads) == expected


def test_accuracy_measures_random_and_given_states(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr("benchmarks.accuracy.answering", lambda case: [named(right)])
    inputs = make_inputs(replace(CASE, pairs=4, N=64))
    stored: dict[str, torch.Tensor] = dict(zip(("hidden", "weight", "labels"), inputs, strict=True))
    file = Path(tmp_path) / "states.pt"
    torch.save(stored, file)
    monkeypatch.setattr(accuracy, "LOSSES", {"asft": (2,)})
    cases = [case for case, kind in accuracy.accuracy_cases(stored, "cpu") if kind == "real"]
    case = next(c for c in cases if c.dtype == "bfloat16" and c.loss == "asft")
    workers = accuracy.Workers(limit=60)
    real = Prepared(partial(accuracy.real_inputs, source=file))
    try:
        (row,) = accuracy.measure(case, accuracy.answering(case), real, workers)
    finally:
        real.close()
        workers.close()
    assert ((inputs.labels[[0, 1, 4, 5]] != IGNORE).sum(), CASE.D, CASE.V) == (case.N, case.D, case.V)
    assert row["status"] == "ok"
    # One rounding to bf16: 0 to u, evenly spread over the binades: 1.65e-3 in the mean square.
    assert row["rounding_dw"] == pytest.approx(1.65e-3, rel=0.1)
    assert row["rounding_dw"] < row["err_dw"] < 4 * row["rounding_dw"]


def test_accuracy_without_the_model_goes_on_with_random_inputs(tmp_path, monkeypatch, capsys):

    def offline(*args):
        raise accuracy.ModelUnavailable("no network")

    asked = []
    monkeypatch.setattr(accuracy, "hidden_states", offline)
    monkeypatch.setattr(accuracy, "accuracy_cases", lambda stored, device: asked.append(stored) or [])
    monkeypatch.setattr("sys.argv", ["accuracy", "--out", str(tmp_path / "rows.jsonl")])
    accuracy.main()
    assert asked == [None]
    assert "random inputs alone: no network" in capsys.readouterr().out


def test_without_tqdm_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    bar = machine.progress(total=3, disable=None)
    bar.write("a line")
    bar.update(1)
    bar.close()
    assert capsys.readouterr().out == "a line\n"
    assert list(machine.progress([1, 2], unit="case")) == [1, 2]


def test_without_the_extra_the_report_says_what_to_install(tmp_path):
    """In a process of its own, in which none of these can be found."""
    code = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
missing = ("tqdm", "numpy", "matplotlib")
sys.modules.update(dict.fromkeys(missing))  # importing one raises ImportError
importlib.util.find_spec = lambda name: None if name in missing else find_spec(name)
sys.argv = ["report"]
runpy.run_module("benchmarks.report", run_name="__main__")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(machine.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    *_, last = done.stderr.splitlines()  # after torch's own warning, as numpy is missing
    assert last == "not installed: numpy, matplotlib; run: pip install -c constraints.txt -e '.[bench]'"
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--contestants", "torch", "nosuch"],
            "argument --contestants: got 'nosuch', need part of one of these names:",
        ),
        (["--rounds", "0"], "argument --rounds: got 0, need a whole number, 1 or more"),
        (["--limit", "0"], "argument --limit: got 0, need a finite number of seconds above 0"),
        (["--limit", "nan"], "argument --limit: got nan, need a finite number of seconds above 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "smoke", *arguments])
    monkeypatch.setattr(run, "run", lambda *args: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        run.main()
    error = capsys.readouterr().err
    assert expected in error
    assert ("Liger-Kernel SimPO" in error) == ("nosuch" in arguments)


def test_contestants_are_listed_with_where_they_run():
    here, elsewhere = CASE, replace(CASE, device="cuda", dtype="bfloat16")
    lines = run.contestant_lines(["plain", "cce", "SimPO"], [here, elsewhere], "cpu")
    marks = {line.split("  ")[0]: line for line in lines}
    assert list(marks) == ["plain torch", *(n for n in marks if n.startswith("cut-cross")), "Liger-Kernel SimPO"]
    assert "  runs here  " in marks["plain torch"]
    assert "  in none of these cases  " in marks["Liger-Kernel SimPO"] or "not installed" in marks["Liger-Kernel SimPO"]
    assert "  needs cuda  " in marks["cut-cross-entropy cce"] or "not installed" in marks["cut-cross-entropy cce"]
    assert len({line.index(c.note) for line, c in zip(lines, asked(lines), strict=True)}) == 1  # aligned


def test_what_is_not_installed_is_marked(monkeypatch):
    absent = Contestant("absent", "no-such-package", right)
    monkeypatch.setattr(run, "CONTESTANTS", [absent])
    assert "  not installed" in run.contestant_lines([], [CASE], "cpu")[0]


def asked(lines: list[str]) -> list[Contestant]:
    return [c for c in CONTESTANTS if any(line.startswith(f"{c.name}  ") for line in lines)]


def test_help_lists_the_sets_of_each_suite():
    lines = run.sets_of_suites().splitlines()
    assert "  gpu    headline, main, valid-share, losses, large, dtypes, growth-n, growth-v, growth-pairs" in lines
    assert [line.split()[0] for line in lines[1:]] == ["cpu", "gpu", "floor", "smoke"]


def test_smoke_says_that_it_is_no_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure_case", lambda *args, **limits: [])
    monkeypatch.setattr(run, "gemm_rate", lambda device, dtype: 1e9)
    for case, said in ((CASE, False), (replace(CASE, set="smoke"), True)):
        run.run([case], [], tmp_path / "rows.jsonl", {"commit": "abc"}, limit=1)
        assert ("no measurement" in capsys.readouterr().out) == said
