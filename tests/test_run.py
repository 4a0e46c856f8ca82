"""tests/run.py on small test trees of its own: what it counts, and what it calls a failure."""

from pathlib import Path

import pytest

import run  # tests/run.py

INI = """
[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = ["-ra", "-m", "not compile and not emulated"]
markers = ["compile: x", "emulated: x"]
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Writes test files into a fresh tree and points the runner at it."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # nothing here needs one: faster
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv(run.EMULATOR_DIR, raising=False)
    (tmp_path / "pyproject.toml").write_text(INI)

    def write(**files: str) -> Path:
        (tmp_path / "tests").mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / "tests" / f"{name}.py").write_text(f"import os, pytest\n{text}\n")
        return tmp_path

    return write


def test_counts_each_test_once(tree):
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
    )
    result = run.run_part("plain")
    assert result.passed == 1
    assert result.failed == [
        "plain: tests.test_a::test_fails_twice",
        "plain: tests.test_a::test_fails_late",
    ]
    assert result.skipped == {"no such thing": 1, "expected to fail:": 1, "not here": 1}


def test_a_crash_is_one_failure_with_the_file_name(tree, monkeypatch):
    tree(
        test_a="@pytest.mark.emulated\ndef test_dies(): os.abort()",
        test_b="@pytest.mark.emulated\ndef test_lives(): pass\ndef test_plain(): pass",
        test_c="def test_plain(): pass",
    )
    monkeypatch.setenv(run.EMULATOR_DIR, "somewhere")
    result = run.run_part("emulated")
    assert result.passed == 1
    assert result.failed == ["emulated: tests/test_a.py: the process died of SIGABRT"]


def test_a_part_without_tests_fails(tree):
    tree(test_a="def test_plain(): pass")
    assert run.run_part("compile").failed == ["compile: the process: no test was collected"]


def test_an_import_error_fails(tree):
    tree(test_a="import nothing_of_that_name", test_b="def test_plain(): pass")
    assert run.run_part("plain").failed == ["plain: tests.test_a"]


@pytest.mark.parametrize("ci", ["true", ""], ids=["ci", "at-home"])
def test_skipped_emulated_tests_fail_in_ci_if_the_emulator_is_there(tree, monkeypatch, ci):
    tree(
        test_a='@pytest.mark.emulated\ndef test_a(): pytest.skip("no clang")',
        test_b='pytest.skip("no emulator", allow_module_level=True)\n@pytest.mark.emulated\ndef test_b(): pass',
    )
    monkeypatch.setenv("CI", ci)
    assert run.run_part("emulated").failed == []  # no emulator's folder: skipping is right
    monkeypatch.setenv(run.EMULATOR_DIR, "somewhere")
    result = run.run_part("emulated")
    if ci:
        assert [line.rsplit(": ", 1)[1] for line in result.failed] == ["no emulator", "no clang"]
        assert not result.skipped
    else:
        assert result.failed == []
        assert result.skipped == {"test_b.py: no emulator": 1, "no clang": 1}


def test_last_line_and_exit_code(tree, monkeypatch, capsys):
    tree(test_a="def test_plain(): pass\n@pytest.mark.compile\ndef test_c(): assert False")
    monkeypatch.setattr("sys.argv", ["run.py", "plain", "compile"])
    assert run.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed, 0 skipped"
    monkeypatch.setattr("sys.argv", ["run.py", "plain"])
    assert run.main() == 0
