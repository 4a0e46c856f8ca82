"""tests/run.py on small test trees of its own: what it counts, and what it calls a failure."""

from pathlib import Path

import pytest

import run  # tests/run.py

INI = """
[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = ["-ra", "-m", "not compile and not emulated"]
markers = ["compile: x", "emulated: x", "interpreter: x", "slow: x"]
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes test files into a fresh tree and points the runner at it."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "2")  # on any machine
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # no other is needed here: faster
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv(run.EMULATOR_DIR, raising=False)
    (tmp_path / "pyproject.toml").write_text(INI)

    def write(**files: str) -> Path:
        (tmp_path / "tests").mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / "tests" / f"{name}.py").write_text(f"import os, pytest\n{text}\n")
        return tmp_path

    return write


def test_counts_each_test_once_and_a_crash_by_its_test(tree):
    tree(
        test_a="""
@pytest.fixture
def broken():
    yield
    raise RuntimeError
def test_passes(): pass
def test_fails_twice(broken): assert False
def test_fails_late(broken): pass
def test_skips(): pytest.skip("no such thing")
@pytest.mark.xfail
def test_known(): assert False
""",
        test_b='pytest.skip("not here", allow_module_level=True)',
        test_c="def test_dies(): os.abort()\ndef test_goes_on(): pass",
    )
    result = run.run_part("plain")
    assert result.passed == 2
    assert sorted(result.failed) == [
        "plain: tests.test_a::test_fails_late",
        "plain: tests.test_a::test_fails_twice",
        "plain: tests.test_c::test_dies",
    ]
    assert result.skipped == {"no such thing": 1, "expected to fail:": 1, "test_b.py: not here": 1}


def test_a_process_that_dies_at_import_is_a_failure(tree):
    tree(test_a="os.abort()", test_b="def test_lives(): pass")
    assert run.run_part("plain").failed


def test_a_part_without_tests_fails(tree):
    tree(test_a="def test_plain(): pass")
    assert run.run_part("compile").failed == ["compile: no test was collected"]


def test_an_import_error_fails(tree):
    tree(test_a="import nothing_of_that_name", test_b="def test_plain(): pass")
    assert run.run_part("plain").failed == ["plain: tests.test_a"]


def test_skipped_emulated_tests_fail_in_ci_if_the_emulator_is_there(tree, monkeypatch):
    tree(
        test_a='@pytest.mark.emulated\ndef test_a(): pytest.skip("no clang")',
        test_b='pytest.skip("no emulator", allow_module_level=True)',
    )
    monkeypatch.setenv(run.EMULATOR_DIR, "somewhere")
    at_home = run.run_part("emulated")
    assert at_home.failed == []
    assert at_home.skipped == {"test_b.py: no emulator": 1, "no clang": 1}
    monkeypatch.setenv("CI", "true")
    result = run.run_part("emulated")
    assert sorted(line.rsplit(": ", 1)[1] for line in result.failed) == ["no clang", "no emulator"]
    assert not result.skipped


def test_every_part_is_some_tests_of_their_own():
    """What a test is marked with puts it into one part; `quick` repeats some of `plain`."""
    kinds = ("slow", "compile", "emulated")
    for marks in ((), *((kind,) for kind in kinds), ("slow", "compile"), ("slow", "emulated")):
        values = {kind: kind in marks for kind in (*kinds, "interpreter")}
        chosen = [part for part, selections in run.PARTS.items() for s in selections if eval(s, {}, values)]
        assert len(chosen) == (1 if marks else 2), marks


def test_last_line_and_exit_code(tree, monkeypatch, capsys):
    tree(test_a="def test_plain(): pass\n@pytest.mark.compile\ndef test_c(): assert False")
    monkeypatch.setattr("sys.argv", ["run.py", "compile"])
    assert run.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"
    monkeypatch.setattr("sys.argv", ["run.py", "plain"])
    assert run.main() == 0
