"""benchmarks.seeds_report: figures over seeds by hand, what it says of the claim, its picture."""

import sys

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra: matplotlib")

from benchmarks import seeds_report
from benchmarks.seeds_report import by_method, claim, moved, speed_table, speed_text, table, text
from test_methods import ABOUT, SETTINGS
from tiny_lm import write_lines

# Of two pairs chosen and rejected before (margins 1 and -1), and after training with two seeds.
BEFORE = [[-2.0, -3.0], [-4.0, -3.0]]
AFTER = {0: [[-1.0, -3.5], [-3.0, -4.0]], 1: [[-1.5, -4.0], [-2.5, -3.5]]}
OF_RUN = {"every_nth": 8, "epochs": 1, "bf16": True}


def row(method, seed, held_out=()):
    answers = [[*before, *after] for before, after in zip(BEFORE, AFTER[seed], strict=True)]
    return {
        "method": method, "seed": seed, "steps": 126, "jobs": 5, "answers": answers, "held_out": [*held_out],
        "about": ABOUT, "settings": SETTINGS | OF_RUN,
    }  # fmt: skip


def speed(name, rate, **changes):
    return {
        "contestant": name, "note": "what it is", "seconds": 0.25, "tokens_per_second": rate, "peak_bytes": 3 * 2**30,
        "losses": [0.7, 0.5], "V": 100, "D": 3, "parameters": 1200, "steps": 32, "pairs": 16, "length": 512,
        "dtype": "bfloat16 autocast", "package": "trl", "version": "1.16.0", "about": ABOUT, **changes,
    }  # fmt: skip


def test_errors_are_over_pairs_and_spread_is_over_seeds():
    """Chosen: pairs move by 1, 1 (seed 0) and 0.5, 1.5 (seed 1). Rejected by -0.5, -1 and -1, -0.5."""
    rows = [row("asft", seed) for seed in (0, 1)]
    mean, error, by_seed = moved(rows, "chosen")
    assert (mean, by_seed) == (1.0, [1.0, 1.0])
    assert error == pytest.approx(0.25)  # of pairs' means 0.75 and 1.25: sd 0.354, by the root of 2
    assert moved(rows, "rejected") == (-0.75, 0.0, [-0.75, -0.75])
    mean, error, by_seed = moved(rows, "accuracy")
    assert (mean, error, by_seed) == (50.0, 50.0, [50.0, 50.0])
    lines = table(by_method([*rows[::-1], row("sft", 0)]))
    assert lines[2] == "| *before* |  | 50.0 |  | +0.000 |  | from -3.000 | from -3.000 |"
    assert lines[3] == (
        "| asft | 2 | 100.0 | +50.0 ± 50.0 (0.0) | +1.750 | +1.750 ± 0.250 (0.000) | +1.000 ± 0.250 (0.000) | "
        "-0.750 ± 0.000 (0.000) |"
    )
    assert lines[4].startswith("| sft | 1 | 100.0 | +50.0 ± 50.0 | +1.750 | +1.750 ± ")


def test_claim_is_held_against_every_seed():
    rows = [row("dpo", seed) for seed in (0, 1)]
    assert claim({"dpo": rows}) == [
        "- dpo: chosen +1.000 ± 0.250, rejected -0.750 ± 0.000 nats a token; rejected moved 0.75, 0.75 times as far, "
        "seed by seed. Rejected fell, and faster than chosen moved: in 0 of 2 seeds."
    ]
    # In seed 1 chosen stays where it was, rejected falls by 1.
    rows[1]["answers"] = [[*before, before[0], before[1] - 1.0] for before in BEFORE]
    (line,) = claim({"dpo": rows})
    assert "moved 0.75, inf times" in line
    assert line.endswith("in 1 of 2 seeds.")


def test_speed_is_beside_full_logits():
    rows = [
        speed("ours", 400.0),
        speed("ours", 600.0, seconds=0.2),
        speed("TRL DPO, full logits", 200.0),
        speed("bad", 0, failed="OutOfMemoryError: x"),
    ]
    assert speed_table(rows)[2:] == [
        "| ours | what it is | 0.7000 to 0.5000 | 250, 200 | 500 | 2.50 | 3072 |",
        "| TRL DPO, full logits | what it is | 0.7000 to 0.5000 | 250 | 200 | 1.00 | 3072 |",
        "| bad | what it is | failed: OutOfMemoryError: x |  |  |  |  |",
    ]
    assert "V = 100 and D = 3, 25% of the parameters" in "\n".join(speed_text(rows))
    assert speed_text([rows[-1]]) == []


def test_page_and_picture_are_drawn_from_the_rows_alone(tmp_path, monkeypatch, capsys):
    points = [[0, -2.0, -2.0], [16, -1.5, -1.8], [126, -1.0, -2.5]]
    rows = [row(name, seed, points) for name in ("asft", "dpo") for seed in (0, 1)]
    write_lines(tmp_path / "rows.jsonl", [*rows, row("sft", 0)])
    write_lines(tmp_path / "speed.jsonl", [speed("ours", 500.0)])
    monkeypatch.setattr(sys, "argv", ["seeds_report", "--rows", str(tmp_path / "rows.jsonl")])
    seeds_report.main()
    page = (tmp_path / "README.md").read_text()
    assert "1 pass over the training pairs, 4 pairs a step, 126 steps, bf16 autocast" in page
    assert "every 8th line, 2 pairs" in page
    assert "5 trainings shared the machine" in page
    assert "500 | – |" in page
    assert page == text([*rows, row("sft", 0)], [speed("ours", 500.0)])
    drawn = (tmp_path / "likelihoods.png").read_bytes()
    seeds_report.main()
    assert (tmp_path / "likelihoods.png").read_bytes() == drawn
    assert len(drawn) > 1000
