"""`asft-data`: what each command writes, odd rows, interrupted runs, memory."""

import gzip
import itertools
import json
import math
import sys
import tracemalloc
from collections import Counter
from random import Random

import pytest

pytest.importorskip("transformers", reason="needs the train extra: transformers")
pytest.importorskip("pyarrow", reason="needs the train extra: pyarrow")

from asft_kernels.cli.data import main
from asft_kernels.data import load_pairs, parse_pair
from asft_kernels.data_commands import partial
from asft_kernels.methods.bmc import data_command as bmc
from asft_kernels.methods.rad.data_command import condition_prompt, goal_text
from asft_kernels.methods.rso import data_command as rso
from asft_kernels.models.generation import PromptTooLong
from tiny_lm import saved_tiny_model, tiny_tokenizer, write_lines

USER = {"role": "user", "content": "Why is the sky blue?"}


def scored(index: int = 0, high: object = 8, low: object = 3, **more: object) -> dict:
    return {
        "prompt": f"Why {index}?",
        "chosen": f"good {index}",
        "rejected": f"bad {index}",
        "chosen_score": high,
        "rejected_score": low,
        **more,
    }


def candidates(index: int = 0, rewards=(0.1, 2.0, -1.0, 0.7, 0.4, 1.1)) -> dict:
    return {
        "prompt": f"Why {index}?",
        "responses": [f"answer {i}" for i in range(len(rewards))],
        "rewards": list(rewards),
    }


def read(path) -> list[dict]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def call(tmp_path, capsys, command: str, rows: list, *options: str, code: int = 0):
    """(rows written, what was printed) of one command on these rows."""
    source = write_lines(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    assert main([command, str(source), str(output), "--overwrite", *options]) == code
    printed = capsys.readouterr()
    return (read(output) if code == 0 else []), (printed.err if code else printed.out)


# The stream that all commands share


def test_bad_rows_are_named_by_kind(tmp_path, capsys):
    rows = [scored(), "", "{", "[1]", scored(high="8"), scored(high=math.nan), {"prompt": "a"}, scored(1), "", ""]
    written, text = call(tmp_path, capsys, "rad", rows)
    assert len(written) == 4
    assert "in.jsonl: 8 rows, 6 bad; 4 rows written" in text
    for kind in (
        "empty line: 1 (line 2)",
        "unreadable JSON: 1 (line 3)",
        "not a JSON object: 1 (line 4)",
        "wrong type: 1 (line 5)",
        "number that is not finite: 1 (line 6)",
        "missing key 'chosen': 1 (line 7)",
    ):
        assert f"bad, {kind}" in text


def test_strict_names_the_row_and_goes_on_once_it_is_mended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(partial, "COMMIT_BYTES", 1)
    rows = [scored(0), scored(1), scored(2, high=True), scored(3)]
    _, text = call(tmp_path, capsys, "rad", rows, "--strict", code=2)
    assert "line 3: wrong type: chosen_score: got a boolean, need a number; --strict is on" in text
    assert not (tmp_path / "out.jsonl").exists()
    rows[2] = scored(2)
    written, text = call(tmp_path, capsys, "rad", rows, "--strict")
    assert "goes on after line 2" in text
    assert "4 rows, 0 bad; 8 rows written" in text
    assert [row["prompt"][1]["content"] for row in written[::2]] == [f"Why {i}?" for i in range(4)]


def test_strict_sees_the_bad_rows_of_the_run_that_it_goes_on_with(tmp_path, capsys, monkeypatch):
    interrupt_after(monkeypatch, 3)
    rows = [scored(0), "{", *map(scored, range(2, 9))]
    call(tmp_path, capsys, "rad", rows, code=130)
    _, text = call(tmp_path, capsys, "rad", rows, "--strict", code=2)
    assert "line 2: unreadable JSON" in text


def interrupt_after(monkeypatch, batches: int) -> None:
    """Ctrl-C once, in the batch after so many; each batch before it is committed."""
    done, counts = partial.Partial.batch_done, itertools.count(1)

    def batch_done(self, line):
        if next(counts) == batches + 1:
            raise KeyboardInterrupt
        done(self, line)

    monkeypatch.setattr(partial, "COMMIT_BYTES", 1)
    monkeypatch.setattr(partial.Partial, "batch_done", batch_done)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
@pytest.mark.parametrize("command", ["rad", "rso"])
def test_an_interrupted_run_continues_to_the_same_output(tmp_path, capsys, monkeypatch, command, name):
    make = {"rad": scored, "rso": candidates}[command]
    rows = [make(i) if i % 7 else "{" for i in range(40)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    whole, parts = tmp_path / f"whole-{name}", tmp_path / name
    assert main([command, str(source), str(whole)]) == 0
    report = capsys.readouterr().out
    interrupt_after(monkeypatch, 17)
    assert main([command, str(source), str(parts)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    partial_path = tmp_path / f"{name}.partial"
    partial_path.write_bytes(partial_path.read_bytes() + b"more than the state knows" * 10_000)
    assert not parts.exists()
    assert main([command, str(source), str(parts)]) == 0
    text = capsys.readouterr().out
    assert text == f"goes on after line 17 of {source}\n{report}"
    assert read(parts) == read(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", whole.name, name])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("options", "was begun with {'keep_ties': False}, and now it is {'keep_ties': True}; remove"),
        ("input", "was begun from another input than"),
        ("shorter input", "was begun from another input than"),
        ("partial", "is shorter than the"),
        ("state", "cannot be read"),
    ],
)
def test_an_interrupted_run_of_something_else_is_refused(tmp_path, capsys, monkeypatch, change, text):
    interrupt_after(monkeypatch, 3)
    rows = [scored(i) for i in range(6)]
    call(tmp_path, capsys, "rad", rows, code=130)
    options = ["--keep-ties"] if change == "options" else []
    if change == "input":
        rows[1] = scored(9)
    elif change == "shorter input":
        rows = rows[:2]
    elif change == "partial":
        (tmp_path / "out.jsonl.partial").write_bytes(b"{")
    elif change == "state":
        (tmp_path / "out.jsonl.state").write_text("{")
    assert text in call(tmp_path, capsys, "rad", rows, *options, code=2)[1]
    (tmp_path / "out.jsonl.partial").unlink()
    assert len(call(tmp_path, capsys, "rad", rows, *options)[0]) == 2 * len(rows), "anew, as the message says"


def test_files_that_cannot_be_used(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", [scored()])
    output = tmp_path / "out.jsonl"

    def error(*words: object) -> str:
        assert main(["rad", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "no such file; need a file of JSON lines" in error(tmp_path / "nowhere", output)
    assert "is a folder" in error(tmp_path, output)
    assert "a folder or the input itself" in error(source, source, "--overwrite")
    output.write_text("kept")
    assert "is there already; add --overwrite" in error(source, output)
    assert output.read_text() == "kept"
    assert main(["rad", str(source), str(output), "--overwrite"]) == 0
    assert len(read(output)) == 2
    write_lines(source, [scored(high="x")])
    assert "gave a row to write; first bad row: line 1: wrong type" in error(source, tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))
    source.write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-20])
    assert "is the copy complete?" in error(source, tmp_path / "cut.jsonl")


def test_gzip_in(tmp_path):
    (tmp_path / "in").write_bytes(gzip.compress(json.dumps(scored()).encode()))
    assert main(["rad", str(tmp_path / "in"), str(tmp_path / "new" / "out.jsonl")]) == 0
    assert len(read(tmp_path / "new" / "out.jsonl")) == 2


def test_memory_does_not_grow_with_the_file(tmp_path):
    """25,000 rows, of which 250 are long pairs, 12,250 ties and 12,500 bad: 4.5 MB out.

    Held back are at most 1 MiB of output and one row; 40 bytes kept of each row would show.
    """
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for i in range(25_000):
            row = scored(i, low=8) if i % 100 else scored(i, chosen="x" * 9000, rejected="y" * 9000)
            file.write(("{" if i % 2 else json.dumps(row)) + "\n")
    output = tmp_path / "out.jsonl"
    tracemalloc.start()
    try:
        assert main(["rad", str(source), str(output)]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 19, f"{peak / 2**20:.1f} MiB"
    with output.open("rb") as file:
        assert sum(1 for _ in file) == 500


# rad


def test_goal_text():
    assert goal_text(7.0).endswith("1 (worst) to 10 (best).\nOverall score: 7.")
    assert goal_text(7.25).endswith("\nOverall score: 7.25.")
    assert goal_text({"honesty": 2, "instruction_following": 8.5}).endswith(
        "\nHonesty score: 2.\nInstruction following score: 8.5."
    )


def test_condition_prompt():
    text, system = goal_text(10), {"role": "system", "content": "Be brief."}
    stated = {"role": "user", "content": f"{text}\n\n{USER['content']}"}
    assert condition_prompt([USER], 10) == [{"role": "system", "content": text}, USER]
    assert condition_prompt(USER["content"], 10) == [{"role": "system", "content": text}, USER]
    assert condition_prompt([system, USER], 10) == [{"role": "system", "content": f"{text}\n\nBe brief."}, USER]
    assert condition_prompt([USER], 10, system_role=False) == [stated]
    assert condition_prompt([system, USER, USER], 10, system_role=False) == [system, stated, USER]
    assert condition_prompt(USER["content"], 10, system_role=False) == stated["content"]
    with pytest.raises(ValueError, match="prompt: has no user turn to write the goal into"):
        condition_prompt([system], 10, system_role=False)


@pytest.mark.parametrize("options", [[], ["--no-system-role"]], ids=["system", "user"])
def test_the_low_goal_swaps_the_answers(tmp_path, capsys, options):
    """Also without a system role, where the released code leaves the good answer under the low goal."""
    for prompt in ("Why 0?", [{"role": "user", "content": "Why 0?"}]):
        written, _ = call(tmp_path, capsys, "rad", [scored(prompt=prompt)], *options)
        conditioned = [condition_prompt(prompt, goal, system_role=not options) for goal in (8, 3)]
        assert [row["prompt"] for row in written] == conditioned
        texts = [[parse_pair(row).text(side) for side in ("chosen", "rejected")] for row in written]
        assert texts == [["good 0", "bad 0"], ["bad 0", "good 0"]]
        assert [(row["chosen_score"], row["rejected_score"]) for row in written] == [(8, 3), (3, 8)]


def test_chats_dialogues_and_other_field_names(tmp_path, capsys):
    turn = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    dialogue = {"good": f"{turn} So.", "bad": f"{turn} No.", "up": 9, "down": 2.5}
    names = ["--chosen-field=good", "--rejected-field=bad", "--chosen-score-field=up", "--rejected-score-field=down"]
    written, _ = call(tmp_path, capsys, "rad", [dialogue], *names)
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    assert written[0]["prompt"] == [{"role": "system", "content": goal_text(9)}, *chat]
    assert written[0]["chosen"] == [{"role": "assistant", "content": "So."}]
    assert written[1]["prompt"][0]["content"] == goal_text(2.5)
    assert written[1]["chosen"] == [{"role": "assistant", "content": "No."}]
    _, text = call(tmp_path, capsys, "rad", [dialogue], *names[1:], code=2)
    assert "missing key 'chosen'" in text


def test_what_rad_writes_trains(tmp_path, capsys):
    """Read by load_pairs: as chats, and as texts for a tokenizer without a chat template."""
    pytest.importorskip("datasets", reason="needs the train extra: datasets")
    for chat, options in ((True, []), (False, ["--no-system-role"])):
        written, _ = call(tmp_path, capsys, "rad", [scored(i) for i in range(3)], *options)
        pairs, report = load_pairs(tmp_path / "out.jsonl", tiny_tokenizer(chat=chat))
        assert (len(pairs), report.left_out) == (len(written), 0)


def test_several_attributes_and_ties(tmp_path, capsys):
    rows = [
        scored(0, {"help": 8, "truth": 2}, {"truth": 9, "help": 4}),  # better in one: kept
        scored(1, {"help": 4, "truth": 2}, {"help": 4, "truth": 3}),  # nowhere better
        scored(2, {"help": 4}, {"help": 4.0}),
        scored(3, 5, 5),
        scored(4, 4, 5),
        scored(5, {"help": 4}, {"truth": 4}),
        scored(6, {"help": 4}, 4),
        scored(7, {}, {}),
        scored(8, {"help": "N/A"}, {"help": 1}),
        scored(9, 12, 0.5),
    ]
    written, text = call(tmp_path, capsys, "rad", rows)
    assert len(written) == 4
    assert written[0]["prompt"][0]["content"].endswith("\nHelp score: 8.\nTruth score: 2.")
    assert written[1]["prompt"][0]["content"].endswith("\nTruth score: 9.\nHelp score: 4.")
    assert "left out, equal scores: 2 (lines 3, 4)" in text
    assert "left out, rejected has the better score: 2 (lines 2, 5)" in text
    assert "answers scored by different attributes: 2 (lines 6, 7)" in text
    assert "score without a name: 1 (line 8)" in text
    assert "wrong type: 1 (line 9)" in text
    assert "goals outside the stated 1 to 10, written as they are: 2 (line 10)" in text
    written, text = call(tmp_path, capsys, "rad", rows[3:5], "--keep-ties")
    assert len(written) == 2
    assert "kept ties: 1 (line 1)" in text


def test_goal_conditions_prompts_and_keeps_all_else(tmp_path, capsys):
    rows = [
        {"prompt": "Why?", "id": 7, "odd": "\ud800"},
        {"prompt": [USER]},
        {"prompt": None},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:"},
    ]
    written, text = call(tmp_path, capsys, "rad", rows, "--goal", "10")
    assert written[0] == {"prompt": condition_prompt("Why?", 10), "id": 7, "odd": "\ud800"}
    assert [row["prompt"] for row in written[1:]] == [
        condition_prompt([USER], 10),
        condition_prompt([{"role": "user", "content": "Hi"}], 10),
    ]
    assert "wrong type: 1 (line 3)" in text
    written, _ = call(tmp_path, capsys, "rad", rows[:1], "--goal", '{"help": 10}', "--no-system-role")
    assert written[0]["prompt"] == condition_prompt("Why?", {"help": 10}, system_role=False)
    for wrong in ("ten", "NaN", '"10"', "{}", "true"):
        with pytest.raises(SystemExit):
            main(["rad", "a", "b", "--goal", wrong])
        assert f"argument --goal: got {wrong!r}, need a number" in capsys.readouterr().err


# rso

REWARDS = [0.3, -1.0, 2.0, 1.2, 0.0, 1.9, -0.4]


def test_beta_0_takes_the_best_and_beta_infinite_the_first():
    top = sorted(range(7), key=REWARDS.__getitem__, reverse=True)
    for beta in (0.0, 1e-6):
        assert rso.accept(REWARDS, 4, beta, Random(1)) == top[:4]
    for beta in (math.inf, 1e9):
        assert rso.accept(REWARDS, 4, beta, Random(1)) == [0, 1, 2, 3]
    assert rso.accept([1.0, 2.0, 2.0, 2.0], 2, 0.0, Random(1)) == [1, 2], "ties in order"


def test_a_draw_of_0_accepts_nothing_that_has_no_chance():
    class Zero(Random):
        def random(self):
            return 0.0

    assert rso.accept([1.0, 2.0], 1, 0.0, Zero()) == [1]


def test_more_than_there_are_takes_all_and_the_best_is_always_accepted():
    for seed in range(50):
        assert sorted(rso.accept(REWARDS, 99, 0.5, Random(seed))) == list(range(7))
        # One pass in which nothing else is accepted still accepts the best.
        assert 2 in rso.accept(REWARDS, 4, 0.1, Random(seed))


def test_acceptance_follows_the_theory():
    """Every outcome of Algorithm 1 has an exact probability: in a pass each candidate is accepted by itself.

    Enumerating the accept/reject patterns of each pass gives it; 20,000 draws are held against it by
    chi-square, within 5 standard deviations of its mean.
    """
    rewards, beta, n, draws = [0.0, 1.0, 0.4, 0.9], 0.5, 2, 20_000
    exact: Counter = Counter()

    def passes(remaining, accepted, probability):
        best = max(rewards[i] for i in remaining)
        chances = [math.exp((rewards[i] - best) / beta) for i in remaining]
        for pattern in itertools.product((True, False), repeat=len(remaining)):
            chance = probability * math.prod(c if yes else 1 - c for c, yes in zip(chances, pattern, strict=True))
            taken = (accepted + [i for i, yes in zip(remaining, pattern, strict=True) if yes])[:n]
            if chance and len(taken) == n:
                exact[tuple(taken)] += chance
            elif chance:
                passes([i for i in remaining if i not in taken], taken, chance)

    passes([0, 1, 2, 3], [], 1.0)
    assert math.isclose(sum(exact.values()), 1)
    random = Random(0)
    seen = Counter(tuple(rso.accept(rewards, n, beta, random)) for _ in range(draws))
    assert set(seen) <= set(exact)
    chi_square = sum((seen[outcome] - draws * p) ** 2 / (draws * p) for outcome, p in exact.items())
    freedom = len(exact) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), (chi_square, freedom)


def test_expected_acceptance_rate():
    """Theorem 1: a candidate is accepted at the rate E exp((r - r_max) / beta).

    With the best one last, all that is accepted up to it is the first pass; candidates are accepted
    independently, so their number has the variance sum p (1 - p). Within 5 standard deviations.
    """
    rewards, beta, draws = [0.3, -1.0, 1.2, 0.0, 1.9, -0.4, 2.0], 0.5, 4000
    chances = [math.exp((reward - 2.0) / beta) for reward in rewards]
    random = Random(0)
    accepted = sum(rso.accept(rewards, 7, beta, random).index(6) + 1 for _ in range(draws))
    deviation = math.sqrt(sum(p * (1 - p) for p in chances) / draws)
    assert abs(accepted / draws - sum(chances)) < 5 * deviation


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.5, 500.0, 1e300, math.inf])
def test_extreme_rewards(beta):
    rewards = [500.0, -500.0, 1e308, -1e308, 0.0]
    assert sorted(rso.accept(rewards, 9, beta, Random(0))) == [0, 1, 2, 3, 4]


def test_rankings():
    for seed, n in itertools.product(range(20), (2, 5, 8)):
        chosen, rewards = list(range(n)), [float(i) for i in range(n)]
        pairs = rso.first_round(chosen, rewards, Random(seed))
        assert len({i for pair in pairs for i in pair}) == 2 * len(pairs) == n // 2 * 2
        games = rso.tournament(chosen, rewards, Random(seed))
        losers = [min(game) for game in games]
        assert sorted(losers) == list(range(n - 1)), "each but the best loses once"
    assert len({tuple(rso.first_round([0, 1, 2, 3], [0.0] * 4, Random(seed))) for seed in range(50)}) > 10


@pytest.mark.parametrize(("ranking", "count"), [("first-round", 2), ("tournament", 3)])
def test_rso_pairs(tmp_path, capsys, ranking, count):
    rows = [candidates(i) for i in range(30)]
    options = ["--accept", "4", "--ranking", ranking]
    written, _ = call(tmp_path, capsys, "rso", rows, *options)
    assert len(written) == 30 * count
    for row in written:
        assert row["chosen_score"] > row["rejected_score"]
        rewards = dict(zip(rows[0]["responses"], rows[0]["rewards"], strict=True))
        assert (rewards[row["chosen"]], rewards[row["rejected"]]) == (row["chosen_score"], row["rejected_score"])
    assert call(tmp_path, capsys, "rso", rows, *options)[0] == written
    assert call(tmp_path, capsys, "rso", rows, *options, "--seed", "1")[0] != written
    assert len({(row["chosen"], row["rejected"]) for row in written}) > count, "lines draw for themselves"
    (tmp_path / "out.jsonl").rename(tmp_path / "pairs.jsonl")
    assert main(["rad", str(tmp_path / "pairs.jsonl"), str(tmp_path / "rad.jsonl")]) == 0, "rad reads them"


def test_rso_odd_rows(tmp_path, capsys):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "x", " ", "y"], "rewards": [1, 2, 3, 4, 5]},
        {"prompt": "a", "responses": ["x", "y", "z"], "rewards": [1, 1, 1]},
        {"prompt": "a", "responses": ["x", "y"], "rewards": [1, math.nan]},
        {"prompt": "a", "responses": ["x", "y"], "rewards": [1, -math.inf]},
        {"prompt": "a", "responses": ["x", "y"], "rewards": [1]},
        {"prompt": "a", "responses": ["x", "x"], "rewards": [1, 2]},
        {"prompt": "a", "responses": ["x", None], "rewards": [1, 2]},
        {"prompt": "a", "responses": "x", "rewards": [1, 2]},
        {"prompt": 3, "responses": ["x", "y"], "rewards": [1, 2]},
        {"responses": ["x", "y"], "rewards": [1, 2]},
        {"prompt": [USER], "responses": ["x", "y"], "rewards": [500, -500]},
        {"prompt": "a", "responses": ["x", "\ud800"], "rewards": [1, 2]},
        {"prompt": "a", "responses": ["x", "y"], "rewards": [1, 10**400]},
    ]
    written, text = call(tmp_path, capsys, "rso", rows)
    assert written == [
        {"prompt": "a", "chosen": "y", "rejected": "x", "chosen_score": 2, "rejected_score": 1},
        {"prompt": [USER], "chosen": "x", "rejected": "y", "chosen_score": 500, "rejected_score": -500},
    ]
    for said in (
        "13 rows, 10 bad; 2 rows written",
        "bad, number that is not finite: 3 (lines 3, 4, 13)",
        "bad, responses and rewards differ in number: 1 (line 5)",
        "bad, fewer than two different responses: 1 (line 6)",
        "bad, wrong type: 3 (lines 7, 8, 9)",
        "bad, missing key 'prompt': 1 (line 10)",
        "bad, text with half a surrogate pair, which no tokenizer can encode: 1 (line 12)",
        "duplicate responses removed: 2 (line 1)",
        "empty responses removed: 1 (line 1)",
        "pairs left out, equal rewards: 1 (line 2)",
        "fewer candidates than --accept, all taken: 3 (lines 1, 2, 11)",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("option", "value", "need"),
    [
        ("--accept", "1", "a whole number of at least 2"),
        ("--accept", "x", "a whole number of at least 2"),
        ("--beta", "-1", "a number >= 0"),
        ("--beta", "nan", "a number >= 0"),
    ],
)
def test_rso_options(capsys, option, value, need):
    with pytest.raises(SystemExit):
        main(["rso", "a", "b", option, value])
    assert f"argument {option}: got {value!r}, need {need}" in capsys.readouterr().err


# bmc


def pair(index: int = 0) -> dict:
    return {"prompt": f"Why {index}?", "chosen": f"good {index}", "rejected": f"bad {index}"}


class Echo:
    """Gives the draft in capitals, and keeps what it was asked."""

    def __init__(self, too_long=()):
        self.asked, self.too_long = [], too_long

    def generate(self, prompts, **options):
        for index, prompt in enumerate(prompts):
            if any(word in str(prompt) for word in self.too_long):
                raise PromptTooLong(index, 900, options["max_new_tokens"], 256)
        self.asked.append((prompts, options))
        texts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        return [text.split("[Draft]\n")[1].split("\n\n")[0].upper() for text in texts]


def bridged(rows: list[dict], generator, **options):
    report = bmc.Report("rows")
    editor = bmc.GenerationEditor(generator, **options)
    return list(bmc.bridged(list(enumerate(rows, start=1)), report, bmc.edits_by(editor))), report


def test_bridging_asks_for_an_edit_of_the_rejected_answer():
    generator = Echo()
    written, _ = bridged([pair(0)], generator, max_new_tokens=9)
    assert written == [[{"prompt": "Why 0?", "chosen": "BAD 0", "rejected": "bad 0", "original_chosen": "good 0"}]]
    [(prompts, options)] = generator.asked
    assert options == {"max_new_tokens": 9}, "greedy is the default of generate"
    assert [message["role"] for message in prompts[0]] == ["user"]
    text = prompts[0][0]["content"]
    assert text.index("[Request]\nWhy 0?") < text.index("[Draft]\nbad 0") < text.index("[Reference]\ngood 0")
    bridged([pair(0)], generator, chat=False)
    assert generator.asked[1][0] == [text]


def test_braces_and_earlier_turns_stand_in_the_request_as_they_are():
    generator = Echo()
    turns = [{"role": "user", "content": "{chosen}"}, {"role": "assistant", "content": "{0}"}, USER]
    bridged([{**pair(0), "prompt": turns}], generator)
    request = "User: {chosen}\n\nAssistant: {0}\n\nUser: Why is the sky blue?"
    assert f"[Request]\n{request}\n\n[Draft]" in generator.asked[0][0][0][0]["content"]


def test_dialogues_keep_their_form(tmp_path):
    pytest.importorskip("datasets", reason="needs the train extra: datasets")
    turn = "\n\nHuman: Why?\n\nAssistant:"
    [[row]], _ = bridged([{"chosen": f"{turn} so.", "rejected": f"{turn} no."}], Echo())
    assert row == {"prompt": turn, "chosen": " NO.", "rejected": " no.", "original_chosen": " so."}
    assert parse_pair(row).prompt == turn
    pairs, _ = load_pairs(write_lines(tmp_path / "rows.jsonl", [row]), tiny_tokenizer())
    assert len(pairs) == 1


def test_rows_too_long_for_the_model_are_bad_and_the_others_go_on():
    written, _ = bridged([pair(i) for i in range(5)], Echo(too_long=["Why 1?", "Why 4?"]))
    assert [w[0]["chosen"] if isinstance(w, list) else w.kind for w in written] == [
        "BAD 0",
        "too long for the model that edits",
        "BAD 2",
        "BAD 3",
        "too long for the model that edits",
    ]


def test_edits_from_a_file(tmp_path, capsys):
    edits = [
        {"line": 1, "edited": "better 0"},
        {"line": 3, "edited": " bad 2 "},
        {"line": 4, "edited": "  "},
        {"line": 5, "edited": "better 4"},
        {"line": 6, "edited": "\ud800"},
        {"line": 7, "edited": "better 6"},
    ]
    path = write_lines(tmp_path / "edits.jsonl", edits)
    rows = [pair(0), pair(1), pair(2), pair(3), {"prompt": "a"}, pair(5), pair(6)]
    for size in ("1", "3", "8"):
        written, text = call(tmp_path, capsys, "bmc", rows, "--edits", str(path), "--batch-size", size)
        assert [row["chosen"] for row in written] == ["better 0", "better 6"]
        assert "left out, no edit in the file: 1 (line 2)" in text
        assert "left out, edit without a change: 1 (line 3)" in text
        assert "left out, empty edit: 1 (line 4)" in text
        assert "bad, missing key 'chosen': 1 (line 5)" in text
        assert "bad, edit, text with half a surrogate pair, which no tokenizer can encode: 1 (line 6)" in text


@pytest.mark.parametrize(
    ("edits", "text"),
    [
        (["{"], "line 1: unreadable JSON"),
        ([{"line": "1", "edited": "a"}], "line 1: got line as a string, edited as a string; need a whole number"),
        ([{"line": 1}], "got line as a number, edited as null"),
        ([{"line": 0, "edited": "a"}], "got line 0 after 0, need numbers from 1 that rise"),
        ([{"line": 1, "edited": "a"}, {"line": 1, "edited": "b"}], "line 2: got line 1 after 1"),
        # Beyond the input's end, too: what stands behind a number out of order would never be reached.
        ([{"line": 9, "edited": "a"}, {"line": 2, "edited": "b"}], "line 2: got line 2 after 9, need numbers from 1"),
    ],
)
def test_edits_that_cannot_be_used(tmp_path, capsys, edits, text):
    path = write_lines(tmp_path / "edits.jsonl", edits)
    assert text in call(tmp_path, capsys, "bmc", [pair(0), pair(1)], "--edits", str(path), code=2)[1]


def test_edits_beyond_the_input_are_named(tmp_path, capsys):
    path = write_lines(tmp_path / "edits.jsonl", [{"line": i, "edited": f"better {i}"} for i in (1, 2, 3, 99)])
    written, text = call(tmp_path, capsys, "bmc", [pair(0), pair(1)], "--edits", str(path))
    assert len(written) == 2
    assert "2 more, beyond the input's last row (lines 3, 99)" in text


def test_a_continued_run_of_edits(tmp_path, capsys, monkeypatch):
    path = write_lines(tmp_path / "edits.jsonl", [{"line": i, "edited": f"better {i}"} for i in range(1, 21)])
    options = ["--edits", str(path), "--batch-size", "3"]
    rows = [pair(i) for i in range(20)]
    whole, _ = call(tmp_path, capsys, "bmc", rows, *options)
    interrupt_after(monkeypatch, 2)
    call(tmp_path, capsys, "bmc", rows, *options, code=130)
    written, text = call(tmp_path, capsys, "bmc", rows, *options)
    assert "goes on after line 6" in text
    assert written == whole


def test_bmc_with_a_model(tmp_path, capsys):
    folder = saved_tiny_model(tmp_path / "model", max_position_embeddings=1024, initializer_range=0.5)
    rows = [*(pair(i) for i in range(3)), {**pair(3), "prompt": "long " * 300}]
    options = ["--model", str(folder), "--max-new-tokens", "4", "--batch-size", "2"]
    written, text = call(tmp_path, capsys, "bmc", rows, *options)
    assert all(set(row) == {"prompt", "chosen", "rejected", "original_chosen"} for row in written)
    assert "bad, too long for the model that edits: 1 (line 4)" in text
    assert [row["original_chosen"] for row in written] == ["good 0", "good 1", "good 2"]
    assert (
        "--model: got 'nowhere', no such folder" in call(tmp_path, capsys, "bmc", rows, "--model", "nowhere", code=2)[1]
    )


def test_bmc_says_what_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = call(tmp_path, capsys, "bmc", [pair()], "--model", str(tmp_path), code=2)[1]
    assert text == 'asft data: transformers: not installed; pip install -e ".[train]" in the checkout\n'


def test_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("rad", "rso", "bmc"))
    with pytest.raises(SystemExit):
        main(["bmc", "a", "b"])
    assert "one of the arguments --model --edits is required" in capsys.readouterr().err
