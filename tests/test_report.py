"""The benchmark report: what it says of rows made by hand, whose right answers are known."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra: matplotlib")

from asft_kernels import estimate
from benchmarks import growth, plots, report, tables
from benchmarks.cases import Case, cpu_cases
from benchmarks.contestants import contestants_of

ABOUT = {
    "date": "2030-01-02", "commit": "abc1234", "command": "python -m benchmarks.run cpu",
    "machine": "Some CPU, 2 cores", "capability": "AVX512", "memory_gib": 24, "threads": 2,
    "python": "3.11.7", "torch": "2.13.0+cpu",
}  # fmt: skip


def documented(row) -> float:
    said = growth.documented_bytes(row)
    assert said is not None
    return said


def row(contestant="asft_kernels torch", package="asft_kernels", **changes):
    """A cost row of the schema, right and timed unless changed."""
    return {
        "kind": "cost", "set": "main", "case": "tiny", "model": "Tiny", "loss": "asft", "work": "frozen head",
        "N": 512, "M": 1024, "D": 64, "V": 8192, "pairs": 4, "dtype": "float32", "device": "cpu",
        "contestant": contestant, "package": package, "version": "1.0", "gemms": 2, "status": "ok", "reason": None,
        "seconds": 2.0, "seconds_min": 1.9, "seconds_max": 2.2, "rounds": 7, "first_call_s": 3.0, "import_s": 1.0,
        "ratio": 1.02, "gemm_share": 0.9, "gemm_flops_per_s": 2e11, "extra_bytes": 20 * 2**20, "err_loss": 1e-7,
        "err_dh": 3e-7, "err_dw": None, "tol_loss": 1e-5, "tol_grad": 1e-5, "file": "2030-01-02-cpu.jsonl",
        "run": None,
        "about": ABOUT, **changes,
    }  # fmt: skip


BARE = row("bare products", "torch", seconds=1.9, ratio=1.0, extra_bytes=2**20, err_loss=None, err_dh=None)
PEER = row("fast peer", "peer-package", version="9.9", seconds=1.5, ratio=0.79, extra_bytes=90 * 2**20, err_dh=5e-7)
WRONG = row(
    "wrong peer", "peer-package", status="refused", reason="dH differs\nby 0.3 | too much", seconds=None, ratio=None
)
MAIN = [BARE, row(), PEER, WRONG]


def grown(set_name, **axis):
    (field, values), = axis.items()  # fmt: skip
    same = {"set": set_name, "work": "trainable head"}
    return [row(**same, **{field: x, "M": max(x, 1024) if field == "N" else 1024}, seconds=1e-3 * x) for x in values]


def accuracy(contestant, package, err_dw, **changes):
    kind = {"kind": "accuracy", "set": "accuracy", "inputs": "real", "source": "SmolLM2", "dtype": "bfloat16"}
    return row(contestant, package, **kind, err_dw=err_dw, rounding_dh=1e-3, rounding_dw=1.6e-3, **changes)


@pytest.fixture
def file(tmp_path) -> Path:
    rows = [*MAIN, *grown("growth-n", N=[256, 512, 1024]), *grown("growth-v", V=[8192, 32768])]
    rows += [row(set="valid-share", N=N, work="trainable head") for N in (266, 512, 1024)]
    rows += [accuracy("asft_kernels torch", "asft_kernels", 1.7e-3, pairs=n) for n in (1, 64)]
    rows += [accuracy("Liger", "liger-kernel", 1e-3 * n, pairs=n) for n in (1, 64)]
    path = tmp_path / "2030-01-02-cpu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def cells(lines, contestant):
    return [c.strip() for c in next(line for line in lines if f"| {contestant} |" in line).strip("|").split("|")]


def test_cost_table_marks_the_best_of_each_column_and_not_the_yardstick():
    table = tables.cost_table(MAIN)
    assert cells(table, "fast peer")[2:5] == ["**1.50**", "**0.79**", "90"]
    assert cells(table, "asft_kernels torch")[2:7] == ["2.00", "1.02", "**20**", "**1e-07**", "**3.0e-07**"]
    assert not any("**" in cell for cell in cells(table, "bare products"))


def test_a_wrong_answer_stands_with_its_reason_and_without_a_time():
    line = next(line for line in tables.cost_table(MAIN) if "wrong peer" in line)
    assert "refused: dH differs by 0.3 \\| too much" in line
    assert line.count("–") == len(tables.COST)
    assert tables.best([WRONG | {"seconds": 0.1}, PEER], lambda r: r["seconds"], ".3g") == "1.5"


def test_peers_that_win_are_named_in_words():
    assert tables.peers_ahead(MAIN) == ["fast peer in time, frozen head (0.75 × ours)"]
    assert tables.peers_ahead([row(), PEER | {"seconds": 2.0}]) == []
    assert "in 1 of 1 cases:" in report.where_peers_win(MAIN)[0]
    shares = [r | {"set": "valid-share"} for r in MAIN]
    assert "in 1 of 1 cases:" in report.where_peers_win(shares)[0]
    grown_too = [r | {"set": "growth-n", "D": 32} for r in MAIN]
    assert "in 2 of 2 cases:" in report.where_peers_win([*MAIN, *grown_too])[0]
    assert [line[:40] for line in report.where_peers_win(grown_too)[2:]] == ["- Tiny: N = 512 of 1024 positions, D = 3"]
    slow = PEER | {"seconds": 2.0}
    nowhere = "In none of the 1 cases does a peer take less time or memory than ours."
    assert report.where_peers_win([row(), slow]) == [nowhere]
    assert "none of the 0" in report.where_peers_win([row(), slow | {"status": "out of memory"}])[0]
    assert tables.verdict([row()]) == "No peer was measured here."


def test_a_case_is_the_same_in_the_sentence_and_in_the_table():
    """A shape, a loss and the gradients wanted; those of a growth set among them."""
    works = [
        r | {"work": work, "set": name} for name in ("main", "growth-v") for work in tables.WORKS for r in MAIN[:3]
    ]
    (line,) = [x for x in tables.peer_table(works) if "fast peer" in x]
    assert line.split("|")[-2].strip() == "6"
    assert "in 6 of 6 cases:" in report.where_peers_win(works)[0]
    assert len(report.where_peers_win(works)) == 2 + 2  # a line a shape


def test_the_summary_takes_growth_sets_in(file):
    slow = [BARE, row(seconds=2.0), PEER | {"seconds": 6.0}]
    ahead = [r | {"set": "growth-n", "work": "trainable head"} for r in (BARE, row(), PEER | {"seconds": 1.3})]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*slow, *ahead]))
    text = report.summary([file])
    assert "| float32 | fast peer | – | 3.00 | **0.65** | 4.50 | 2 |" in text
    assert "in 1 of 2 cases" in text


def test_what_recomputing_costs_is_told_apart(file):
    """Where E passes the default cache the bare products, which keep all, are another schedule's."""
    all_kept = row("asft_kernels torch, all E kept", seconds=1.04, ratio=1.04)
    note = "there E passes `cache_bytes`; with all of it kept 1.04."
    for rows, said in (([BARE, row()], 0), ([BARE, row(), all_kept], 1)):
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert report.summary([file]).count(note) == said


def test_rows_of_the_suite_that_are_absent_are_counted_by_set(file, monkeypatch):
    cases = [Case(name, "frozen head", 8, 8, 4, 16, contestants=("bare products", "plain torch")) for name in "ab"]
    monkeypatch.setitem(report.SUITES, "cpu", lambda: cases)
    monkeypatch.setitem(report.SUITES, "floor", lambda: [])
    rows = [row(c.name, set=case.set, case=case.id) for case in cases for c in contestants_of(case)]
    assert report.absent(rows) == ""
    assert report.absent(rows[:2]) == "2 of the 4 rows of the suite have no row here: b 2."
    assert report.absent(rows[1:]) == "1 of the 4 rows of the suite have no row here: a 1."
    for r, said in ((rows, 0), (rows[:2], 1)):
        file.write_text("".join(json.dumps(x) + "\n" for x in r))
        assert report.report([file]).count("of the suite have no row here") == said
        assert report.summary([file]).count("of the suite have no row here") == said


def test_what_is_measured_later_is_compared_within_its_own_run(tmp_path):
    """A peer that failed and was tried again: its ratio, and it over ours, are of the run that has them."""
    first, second = (ABOUT | {"started": f"2030-01-02T0{hour}:00"} for hour in (1, 2))
    failed = {"status": "failed", "seconds": None, "ratio": None}
    early = [BARE, row(), PEER, row("Liger", "liger-kernel", **failed)]
    late = [BARE | {"seconds": 3.8}, row(seconds=4.0), row("Liger", "liger-kernel", seconds=2.0, ratio=0.53)]
    path = tmp_path / "2030-01-02-cpu.jsonl"
    rows = [*(r | {"about": first} for r in early), *(r | {"about": second} for r in late)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = report.newest_rows([path])["cpu"]
    assert [(r["contestant"], r["seconds"], r.get("again", False)) for r in found] == [
        ("bare products", 1.9, False), ("asft_kernels torch", 2.0, False), ("fast peer", 1.5, False),
        ("bare products", 3.8, True), ("asft_kernels torch", 4.0, True), ("Liger", 2.0, False),
    ]  # fmt: skip
    assert tables.peers_ahead(found) == [
        "fast peer in time, frozen head (0.75 × ours)", "Liger in time, frozen head (0.50 × ours)"
    ]  # fmt: skip
    ratios = [cells(tables.peer_table(found), peer)[3] for peer in ("fast peer", "Liger")]
    assert ratios == ["**0.75**", "**0.50**"]
    assert cells(tables.cost_table(found), "bare products, again")[2] == "3.80"
    assert "| 1.02 |" in report.shape_table(found)[2]


def test_who_is_gone_keeps_no_run_alive(tmp_path):
    """A contestant that the package no longer has, or measures on request alone, does not hold old sources."""
    later = ABOUT | {"commit": "def5678"}
    path = tmp_path / "2030-01-02-cpu.jsonl"

    def commits(*contestants):
        old = [row(name, "torch") for name in contestants]
        path.write_text("".join(json.dumps(r) + "\n" for r in [*old, row(seconds=1.0, about=later)]))
        return {r["about"]["commit"] for r in report.newest_rows([path])["cpu"]}

    assert commits("asft_kernels torch", "renamed peer") == {"def5678"}
    assert commits("asft_kernels torch", "asft_kernels triton, tuned") == {"def5678"}
    assert commits("asft_kernels torch", "plain torch") == {"abc1234"}


def test_tiles_rounds_and_failed_checks_are_named(file):
    tuned = row("asft_kernels triton, tuned", tile="tuned: 64x64x32 4 warps 3 stages", round_seconds=0.25)
    assert tables.tiles(MAIN) == []
    assert tables.tiles([*MAIN, tuned]) == ["Tiles: asft_kernels triton, tuned: tuned: 64x64x32 4 warps 3 stages."]
    file.write_text(json.dumps(tuned | {"about": ABOUT | {"failed_checks": "parity"}}) + "\n")
    text = report.report([file])
    assert "Tiles: asft_kernels triton, tuned: tuned: 64x64x32" in text
    assert "median of 7 rounds; in a round shorter calls are repeated for 0.25 s" in text
    assert "**some after failed checks on this machine: parity**" in text
    assert "repeated" not in tables.sources(MAIN)
    assert "failed checks" not in tables.sources(MAIN)


def test_beyond_plain_is_said_to_be_arithmetic(file):
    """Whatever limit the run had."""
    beyond = next(case for case in cpu_cases() if case.set == "beyond-plain")
    assert 3 * 4 * beyond.M * beyond.V >= 24 * 2**30
    file.write_text(json.dumps(row(set="beyond-plain", M=beyond.M, V=beyond.V, memory_limit=2**34)) + "\n")
    text = report.report([file])
    assert "By arithmetic, not measured" in text
    assert "3 · 4 · M · V bytes, 24 GiB" in text
    assert "may take 16.0 GiB" in text


def test_slope_is_the_exponent():
    assert growth.log_slope([(n, 5e-9 * n**2) for n in (256, 512, 4096)]) == pytest.approx(2, abs=1e-9)
    assert growth.log_slope([(256, 1.0), (256, 2.0)]) is None
    assert (
        cells(growth.growth_table(grown("growth-v", V=[8192, 32768]), "growth-v"), "asft_kernels torch")[-1]
        == "1.00 (8192 to 32768)"
    )


def test_memory_is_fitted_beside_the_documented_formula():
    sizes = [256, 512, 1024]
    measured = [row(set="growth-n", N=n, extra_bytes=7 * 2**20 + 3 * 1024 * n) for n in sizes]
    line = cells(growth.memory_table(measured), "asft_kernels torch")
    assert line[4] == "7 MiB + 3.0 KiB · N"
    documented = np.array([growth.documented_bytes(r) for r in measured], dtype=float)
    slope = np.polyfit(sizes, documented, 1)[0] / 1024
    assert line[7].endswith(f"{slope:.1f} KiB · N")
    assert growth.documented_bytes(PEER) is None


def test_documented_memory_is_what_estimate_says_of_the_row_s_machine():
    """dW and dH, accumulators, rows of hidden and their scaled ones, kept or recomputed chunks, numbers of tokens."""
    small = row(N=8, M=16, D=4, V=64, work="trainable head")
    kept = documented(small)
    assert kept == estimate(8, 4, 64, positions=16, head_grad=True).peak
    assert kept > 64 * 4 * 4 + 16 * 4 * 4 + 3 * 4 * 8 * 4 + 4 * 8 * 64
    wide = small | {"V": 2000, "contestant": "asft_kernels torch, cache_bytes=0"}
    on_intel = wide | {"about": {**ABOUT, "machine": "Intel Xeon"}}
    # D = 4 and N = 8 leave a chunk of E 1 MiB or 4 MiB, which hold the vocabulary.
    assert documented(wide) == documented(on_intel)
    long = wide | {"N": 2048, "M": 2048}
    on_intel = long | {"about": {**ABOUT, "machine": "Intel Xeon"}}
    assert documented(on_intel) - documented(long) == 4 * 2048 * (1024 - 512)


def test_accuracy_table_has_the_single_rounding_and_marks_the_best():
    rows = [accuracy("asft_kernels torch", "asft_kernels", 1.7e-3, pairs=n) for n in (1, 64)]
    rows += [accuracy("Liger", "liger-kernel", 1e-3 * n, pairs=n) for n in (1, 64)]
    of_dw = [line for line in tables.accuracy_table(rows) if line.startswith("| dW")]
    assert cells(of_dw, "*the exact gradient, rounded once*")[2:] == ["1.60e-03", "1.60e-03"]
    assert cells(of_dw, "Liger")[2:] == ["**1.00e-03**", "6.40e-02"]
    assert cells(of_dw, "asft_kernels torch")[2:] == ["1.70e-03", "**1.70e-03**"]


def test_every_table_names_its_source(file):
    text = report.report([file])
    described = text.count("<sub>Some CPU, 2 cores, AVX512, 24 GiB, 2 threads; Python 3.11.7, torch 2.13.0+cpu")
    assert described == text.count("\n| --- |") - 1  # the memory table shares its source with the time above it
    assert "peer-package 9.9" in text
    assert "commit abc1234; `python -m benchmarks.run cpu`, 2030-01-02; median of 7 rounds" in text
    assert "rows in [2030-01-02-cpu.jsonl](2030-01-02-cpu.jsonl)" in text


def test_a_device_without_rows_is_said_to_be_unmeasured(file):
    assert "No GPU: not measured yet." in report.report([file])
    assert "GPU: not measured yet; [gpu-model.md]" in report.summary([file])
    assert "CPU: not measured yet" not in report.summary([file])


def test_the_table_at_a_glance(tmp_path):
    """Plain torch, two peers and ours, a line for each machine and kind of head; other models' rows are left out."""
    path = tmp_path / "2030-01-02-cpu.jsonl"
    qwen = {"model": "Qwen3", "set": "main", "work": "frozen head"}
    rows = [
        row(**qwen, seconds=0.5, extra_bytes=3 * 2**20),
        row("plain torch", **qwen, seconds=2.0, extra_bytes=2**30),
        row("cut-cross-entropy torch_compile", **qwen, seconds=1.0, extra_bytes=2**20),
        row("TRL ChunkedLogProbFunction", **qwen, status="failed", seconds=None),
        row(**qwen | {"model": "another"}, seconds=9.0),
        row(**qwen | {"work": "no gradient"}, seconds=9.0),
        row(**qwen | {"work": "trainable head"}, seconds=9.0),  # without the peers
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = report.glance([path])
    assert text.startswith("One ASFT loss (Qwen3: N = ")
    assert ", medians of 7 rounds, 2030-01-02: time and memory" in text
    assert text.count("\n| ") == 3
    assert f"| {ABOUT['machine']}, frozen head | 2.00 s, 1024 MiB | 1.00 s, 1 MiB | failed | 0.500 s, 3 MiB |" in text
    assert f"]({report.RESULTS.name}/{plots.GLANCE})" in text
    gpu = qwen | {"device": "cuda", "set": "headline"}
    refused = row("cut-cross-entropy cce", **gpu, status="refused", seconds=None)
    rows = [
        row("asft_kernels triton", **gpu, seconds=0.0318, extra_bytes=2**30),
        row("plain torch", **gpu, seconds=0.0367, extra_bytes=2**31),
        refused | {"reason": "dH is off by 1.3e-02 of itself, allowed 7.8e-03"},
        row("TRL ChunkedLogProbFunction", **gpu, seconds=0.0484, extra_bytes=2**30),
    ]
    other = tmp_path / "2030-01-02-gpu.jsonl"
    other.write_text("".join(json.dumps(r | {"about": r["about"] | {"machine": "a GPU"}}) + "\n" for r in rows))
    text = report.glance([path, other])
    cells = (
        "a GPU, frozen head",
        "36.7 ms, 2048 MiB",
        "refused: dH is off by 1.3e-02, allowed 7.8e-03",
        "48.4 ms, 1024 MiB",
    )
    assert f"| {' | '.join(cells)} | 31.8 ms, 1024 MiB |" in text
    assert ABOUT["machine"] not in text  # a CPU's rows stand there where no GPU's do
    plots.draw_glance(list(report.at_a_glance([path, other]).values()), report.AT_A_GLANCE, tmp_path)
    assert (tmp_path / plots.GLANCE).read_bytes().startswith(b"\x89PNG")


def test_summary_stands_between_its_marks(file):
    begin, end = report.FIGURES
    page, text = f"before\n{begin}\nstale\n{end}\nafter\n", report.summary([file])
    once = report.written(page, report.FIGURES, text)
    assert once.startswith(f"before\n{begin}\n")
    assert once.endswith(f"{end}\nafter\n")
    assert "stale" not in once
    assert "| float32 | fast peer | – | **0.75** | – | 4.50 | 1 |" in once
    assert "4 pairs, float32 | – | 1.02 | – |" in once
    assert "With a trainable head our time grows as N^1.00 (N from 256 to 1024), V^1.00 (V from 8192 to 32768)." in once
    assert report.written(once, report.FIGURES, text) == once
    assert report.glance([file]) == ""  # no row is of that model


def test_cases_without_a_time_are_counted_by_their_reason():
    failed = PEER | {"status": "failed", "seconds": None, "extra_bytes": None}
    assert tables.outcomes([PEER, failed, WRONG, failed]) == "4, 2 failed, 1 refused"


def test_contestants_are_listed_with_their_notes():
    table = tables.contestant_table([*MAIN, row(first_call_s=4.0), PEER | {"note": "computes all positions"}])
    assert cells(table, "fast peer")[1:3] == ["peer-package 9.9", "computes all positions"]
    assert cells(table, "asft_kernels torch")[3:] == ["1.0", "4.0"]


def test_of_a_repeated_measurement_the_last_counts(file):
    with file.open("a") as out:
        out.write(json.dumps(row(seconds=1.0)) + "\n" + json.dumps(row())[:40])
    again = [r for r in report.read_rows(file) if r["set"] == "main" and r["package"] == "asft_kernels"]
    assert [r["seconds"] for r in again] == [1.0]


def test_peers_are_held_against_our_default_and_other_settings_stand_beside_it():
    """A setting that is faster does not hide that a peer beats the default, nor does one that takes less memory."""
    saving = row("asft_kernels torch, cache_bytes=0", seconds=1.0, extra_bytes=10 * 2**20)
    assert tables.peers_ahead([row(), saving, PEER]) == [
        "fast peer in time, frozen head (0.75 × ours; 1.50 × torch, cache_bytes=0)"
    ]
    failed = row(status="failed", seconds=None, extra_bytes=None)
    assert tables.peers_ahead([failed, PEER])[0] == "fast peer in time, frozen head (ours: failed)"


def test_each_case_comes_from_the_newest_run_that_has_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name, *rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    write("2030-01-02-cpu", row(seconds=9.0), row(set="floor", D=1024), accuracy("Liger", "liger-kernel", 1e-3))
    write("2030-01-10-cpu", row(seconds=1.0))
    rows = report.newest_rows(report.row_files())["cpu"]
    main, other = ("cost", "main", "2030-01-10-cpu.jsonl"), ("accuracy", "accuracy", "2030-01-02-cpu.jsonl")
    floor = ("cost", "floor", "2030-01-02-cpu.jsonl")
    assert [(r["kind"], r["set"], r["file"]) for r in rows] == [main, floor, other]
    later = ABOUT | {"commit": "def5678"}
    peer = PEER | {"contestant": "plain torch"}
    write("2030-01-11-cpu", row(D=128, about=later), peer, row(seconds=3.0, about=later), peer | {"about": later})
    rows = report.newest_rows(report.row_files())["cpu"]
    assert [(r["D"], r["seconds"], r["file"][:10]) for r in rows if r["set"] == "main"] == [
        (64, 3.0, "2030-01-11"),
        (64, 1.5, "2030-01-11"),  # both of the commit that has both: nothing is compared across runs
        (128, 2.0, "2030-01-11"),
    ]
    write("2030-01-12-cpu", row(seconds=5.0))
    assert all(r["file"] != "2030-01-12-cpu.jsonl" for r in report.newest_rows(report.row_files())["cpu"])
    another = write("2030-01-13-cpu", row(seconds=7.0, about=ABOUT | {"machine": "Other CPU"}))
    by_machine = report.newest_rows(report.row_files())
    assert sorted(len(rows) for rows in by_machine.values()) == [1, 5]
    assert all(name.startswith("cpu-") for name in by_machine)
    assert [len({r["about"]["machine"] for r in rows}) for rows in by_machine.values()] == [1, 1]
    another.unlink()
    write("2030-01-01-nvidia-h100", row("asft_kernels triton", device="cuda", set="headline"))
    summary = report.summary(report.row_files())
    assert "**CPU: " in summary
    assert "**GPU: " in summary
    assert "not measured yet;" not in summary


def test_unknown_memory_is_a_dash(file):
    rows = report.read_rows(file)
    unknown = [r | {"extra_bytes": None} for r in rows]
    file.write_text("".join(json.dumps(r) + "\n" for r in unknown))
    assert cells(tables.cost_table([PEER | {"extra_bytes": None}]), "fast peer")[4] == "–"
    assert len(tables.peers_ahead([row(), PEER | {"extra_bytes": None}])) == 1
    assert "| float32 | fast peer | – | **0.75** | – | – | 1 |" in report.summary([file])
    assert "in memory" not in report.report([file]).split("### Where a peer wins")[1]
    assert plots.draw(report.read_rows(file), "cpu", file.parent)


def test_bf16_stands_beside_fp32_where_both_were_measured():
    low = row(set="dtypes", dtype="bfloat16", seconds=2.5)
    assert cells(tables.twin_table([row(set="dtypes"), low]), "asft_kernels torch")[3:] == ["2.00", "2.50", "1.25"]
    assert tables.twin_table([low, row(set="dtypes", N=256), PEER]) == []


def test_memory_limit_is_named():
    limits = [row(memory_limit=int(x * 2**30)) for x in (15.2, 24)] + [row(memory_limit=None)]
    assert "a contestant may take 15.2 to 24.0 GiB" in tables.sources(limits)
    assert "may take" not in tables.sources([row()])


def test_pictures_are_written_and_repeat(file, tmp_path):
    rows = report.read_rows(file)
    paths = plots.draw(rows, "cpu", tmp_path)
    assert [p.name for p in paths] == ["cpu-growth-trainable-head.png", "cpu-gemm-share.png"]
    first = [p.read_bytes() for p in paths]
    assert all(data.startswith(b"\x89PNG") for data in first)
    assert [p.read_bytes() for p in plots.draw(rows, "cpu", tmp_path)] == first
    assert all(f"]({p.name})" in report.report([file]) for p in paths)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command in a repository of its own; what it printed, and its error."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench_results")
    (tmp_path / "bench_results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("{}\nstale\n{}\n".format(*report.GLANCE))
    (tmp_path / "docs" / "benchmarks.md").write_text("{}\nstale\n{}\n".format(*report.FIGURES))

    def run(*arguments) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
        with suppress(SystemExit):
            report.main()
        return capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("none.jsonl", None, "no such file"),
        ("README.md", b"# A title\n3\n", "holds no row of a benchmark"),
        ("pairs.jsonl", b'{"prompt": "Why?"}\n{}\n', "holds no row of a benchmark"),
        ("picture.png", b"\x89PNG\xff", "holds no row of a benchmark"),
    ],
)
def test_a_file_without_rows_is_refused(command, tmp_path, name, content, wrong):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    expected = (
        f"argument FILE: {tmp_path / name}: {wrong}; need a file that benchmarks.run or benchmarks.accuracy wrote"
    )
    assert expected in command(tmp_path / name)[1]


def test_smoke_rows_get_into_no_figure(command, tmp_path):
    smoke = row(set="smoke", seconds=0.0625)
    path = report.RESULTS / "2030-01-02-cpu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (smoke, row())))
    before = "left out: 1 rows of the smoke suite, which are no measurement"
    assert before in command("--write")[1]
    for name in ("docs/benchmarks.md", "bench_results/REPORT.md"):
        text = (tmp_path / name).read_text()
        assert "1.02" in text
        assert "smoke" not in text
    out, err = command(path)
    assert before in err
    assert "smoke" not in out


def test_a_report_elsewhere_leaves_the_pages(command, file, tmp_path):
    """They link the files in bench_results/."""
    elsewhere, page = tmp_path / "else" / "where", (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "REPORT.md and its pictures are written, the pages' figures are not" in command(file, "--out", elsewhere)[0]
    assert sorted(p.name for p in elsewhere.iterdir()) == [
        "REPORT.md", "cpu-gemm-share.png", "cpu-growth-trainable-head.png"
    ]  # fmt: skip
    assert "--write takes no FILE" in command(file, "--write")[1]
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == page
    assert not list(report.RESULTS.iterdir())
