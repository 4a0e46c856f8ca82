"""The mutants of a source, the choice of tests, and what a run writes."""

import json

import pytest

pytest.importorskip("tqdm", reason="needs the test extra: tqdm")

from tests.mutants import Mutant, mutants
from tests.mutation import files_for, modules, print_report, wanted_for, written
from tests.mutation_fork import ROOT, run_tests

SOURCE = '''"""A text of 3 words."""
from typing import overload

LIMIT = 4

@overload
def f(x: int = 1) -> int: ...
def f(x, y=None):
    if not x and y is None:
        raise ValueError(f"x: got {x + 1}")
    x = x + LIMIT
    print(x)
    return x <= 2.5
'''
MUTATED = [
    ("constant", "LIMIT = 5"), ("constant", "LIMIT = 3"),
    ("condition", "if True:"), ("condition", "if False:"), ("and or", "if not x or y is None:"),
    ("not", "if (x) and y is None:"), ("comparison", "if not x and y is not None:"),
    ("statement", "pass"),
    ("statement", "pass"), ("arithmetic", "x = x - LIMIT"),
    ("statement", "pass"),
    ("return", "return None"), ("comparison", "return x < 2.5"), ("comparison", "return x > 2.5"),
    ("constant", "return x <= 5.0"),
]  # fmt: skip


def test_mutants_of_a_source():
    """One change each; neither texts, annotations, decorators and overloads nor an error's arguments."""
    found = mutants("f.py", SOURCE)
    assert [(x.kind, x.after) for x in found] == MUTATED
    assert all(x.compiles() for x in found)
    assert [x.line for x in found] == [4, 4, 9, 9, 9, 9, 9, 10, 11, 11, 12, 13, 13, 13, 13]
    for mutant in found:
        assert sum(a != b for a, b in zip(mutant.source.splitlines(), SOURCE.splitlines(), strict=True)) == 1


def test_every_module_of_the_table_has_its_tests():
    names = modules(["*"])
    for name in ("core/batch.py", "core/checks.py", "objectives/asft.py", "kernels/settle.py", "models/seam.py"):
        assert name in names
    for name in names:
        missing = [x for x in files_for(name) if not (ROOT / x).is_file()]
        assert not missing, f"{name}: TESTS in tests/mutation.py names {missing}"
        mutants(f"asft_kernels/{name}", (ROOT / "asft_kernels" / name).read_text())  # each node has its place


def test_tests_that_run_the_line_are_wanted():
    mutant = Mutant("p.py", 3, "not", "", "", "")
    assert wanted_for(mutant, {"a": [["p.py", 3]], "b": [["p.py", 4]], "c": [["q.py", 3]]}) == {"a"}
    assert wanted_for(mutant, {"b": [["p.py", 4]]}) is None


def test_runs_of_tests_in_a_fork(tmp_path):
    """Lines, a test that fails, one that is left out, one that does not end."""
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["-ra"]\n')
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x\n")
    tests = "from double import double\ndef test_one(): assert double(1) == 2\ndef test_two(): assert 2 == 2\n"
    (tmp_path / "test_it.py").write_text(tests)
    good = run_tests(tmp_path, ["test_it.py"], "", traced=["double.py"])
    assert good.ended == "passed"
    assert good.lines == {"test_it.py::test_one": [["double.py", 2]], "test_it.py::test_two": []}
    (tmp_path / "double.py").write_text("def double(x):\n    return 3 * x\n")
    bad = run_tests(tmp_path, ["test_it.py"], "", limit=(60, 60))
    assert (bad.ended, bad.failed) == ("failed", "test_it.py::test_one")
    assert run_tests(tmp_path, ["test_it.py"], "", limit=(60, 60), wanted={"test_it.py::test_two"}).ended == "passed"
    (tmp_path / "double.py").write_text("def double(x):\n    while True: pass\n")
    assert run_tests(tmp_path, ["test_it.py"], "", limit=(1, 60)).ended == "too long"
    (tmp_path / "double.py").write_text("import time\ndef double(x):\n    time.sleep(60)\n")
    assert run_tests(tmp_path, ["test_it.py"], "", limit=(60, 1)).ended == "too long"


def test_what_is_written_is_read_again(tmp_path, capsys):
    row = {"path": "asft_kernels/core/batch.py", "line": 1, "before": "a", "after": "b", "result": "survived"}
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps(row) + "\n" + json.dumps(row | {"result": "killed"}) + "\n" + json.dumps(row)[:20])
    assert [x["result"] for x in written(out).values()] == ["killed"]
    print_report([row, row | {"before": "c", "result": "killed"}])
    said = capsys.readouterr().out
    assert "core                       2       1         1           0       50.0" in said
    assert "asft_kernels/core/batch.py:1 survived\n-   a\n+   b" in said
