"""The `asft` command: what its options are called, and the one way in which every command fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asft_kernels import cli
from asft_kernels.cli import data, frame, score
from asft_kernels.errors import InputError

ROOT = Path(__file__).parents[1]


def raising(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("x: got 1, need 2"), 2, "asft test: x: got 1, need 2\n"),
        (KeyboardInterrupt(), 130, "asft test: stopped; the same command goes on from there\n"),
        (torch.OutOfMemoryError("no more\ndetails"), 2, "asft test: the device has too little memory (no more)"),
        (ModuleNotFoundError(name="sacrebleu"), 2, 'asft test: sacrebleu: not installed; pip install -e ".[tr'),
        (ModuleNotFoundError(name="rouge_score.x"), 2, "asft test: rouge_score: not installed"),
    ],
)
def test_what_the_user_can_mend_is_one_line(capsys, error, code, said):
    assert frame.run("asft test", raising(error)) == code
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    "bug",
    [ValueError("a"), KeyError("b"), RuntimeError("c"), OSError("d"), ModuleNotFoundError(name="asft_kernels.nosuch"),
     ImportError("cannot import name", name="transformers")],
)  # fmt: skip
def test_a_bug_is_never_one_line(bug):
    with pytest.raises(type(bug)) as caught:
        frame.run("asft test", raising(bug))
    assert caught.value is bug


def test_a_bug_ends_the_process_with_its_traceback():
    code = "from asft_kernels.cli import frame; raise SystemExit(frame.run('asft test', lambda: {}['x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'x'" in done.stderr


def test_the_exit_code_is_the_bodys():
    assert frame.run("asft test", lambda: None) == 0
    assert frame.run("asft test", lambda: 1) == 1


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"], ["eval", "--help"], ["doctor", "--help"], ["x"]])
def test_help_needs_no_torch(words):
    code = (
        "import sys; from asft_kernels.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def shown_help(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_every_help_shows_what_it_has(capsys):
    pytest.importorskip("train_extra")
    assert all(f" {name} {text}" in shown_help(capsys) for name, text in cli.COMMANDS.items())
    assert "(default: float32)" in shown_help(capsys, "score")
    assert "(default: 256)" in shown_help(capsys, "eval")
    assert "(default: auto)" in shown_help(capsys, "doctor")
    streams = shown_help(capsys, "data")
    for name in data.parser()[1]:
        assert f" {name} " in streams


def test_every_default_stands_in_the_help():
    pytest.importorskip("train_extra")
    _, commands = data.parser()
    assert {"sae", "features"} <= set(commands)
    for name, module in commands.items():
        parser = frame.CommandParser(prog=name)
        module.add_arguments(parser)
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            if action.option_strings and action.dest != "help" and not isinstance(action.default, bool | None):
                assert f"(default: {action.default})" in text, (name, action.dest)


@pytest.mark.parametrize(
    "words",
    [
        [
            "--model_name_or_path",
            "a",
            "--model",
            "b",
            "--dataset_name",
            "c",
            "d",
            "--output_dir",
            "e",
            "--batch_size=3",
        ],
        ["--model-name-or-path", "a", "--model", "b", "--data", "c", "d", "--output", "e", "--batch-size", "3"],
    ],
)
def test_names_of_trl_and_of_old_dashes_and_underscores(words):
    args = score.parser().parse_args([*words, "--token-logps"])
    assert (args.model, args.data, args.output, args.batch_size) == (["a", "b"], ["c", "d"], "e", 3)
    assert args.token_logps
    assert args.dtype == "float32"


def test_options_are_not_guessed(capsys):
    for words, said in (
        (["--tok"], "unrecognized arguments: --tok"),
        (["--batch_size", "0"], "argument --batch_size: got '0', need a whole number of at least 1"),
    ):
        with pytest.raises(SystemExit) as end:
            score.main(["--model", "a", "--data", "b", "--output", "c", *words])
        assert end.value.code == 2
        assert capsys.readouterr().err == f"asft score: {said}\n"  # without the usage of all options


def test_a_value_keeps_its_dashes():
    parser = frame.CommandParser()
    parser.add_argument("--the_name")
    assert parser.parse_args(["--the-name=--a_b-c"]).the_name == "--a_b-c"


def test_the_old_names_are_installed():
    text = (ROOT / "setup.py").read_text()
    modules = {"asft": "cli", "asft-score": "cli.score", "asft-data": "cli.data", "asft-train": "cli.train"}
    for name, module in modules.items():
        assert f'"{name} = asft_kernels.{module}:main"' in text


def test_what_a_command_cannot_use_names_the_command(capsys, tmp_path):
    pytest.importorskip("train_extra")
    assert cli.main(["score", "--model", "no-such", "--data", "x", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("asft score: --model: got 'no-such', no such folder")
    assert cli.main(["data", "rad", "no.jsonl", "out.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("asft data: input: got 'no.jsonl'")


@pytest.mark.parametrize("folder", ["file", "file/inner"])
@pytest.mark.parametrize("command", ["score", "eval", "data"])
def test_an_output_that_cannot_be_made_is_one_line_ahead_of_all_work(capsys, tmp_path, command, folder):
    pytest.importorskip("train_extra")
    (tmp_path / "file").touch()
    output = str(tmp_path / folder)
    named = ["--model", "no-such", "--data", "no.jsonl", "--output_dir", output]
    assert cli.main([command, *(["rad", "no.jsonl", f"{output}/out.jsonl"] if command == "data" else named)]) == 2
    argument = "output" if command == "data" else "--output_dir"
    said = capsys.readouterr().err
    assert said.startswith(f"asft {command}: {argument}: {output} is no folder and cannot be made one (")
    assert said.count("\n") == 1


def test_version_and_a_command_that_is_not_named(capsys):
    import asft_kernels

    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"asft_kernels {asft_kernels.__version__}\n"
    assert cli.main([]) == 2
    listed = capsys.readouterr().err
    assert all(f"  {name}" in listed and text in listed for name, text in cli.COMMANDS.items())


def test_the_package_names_what_it_has():
    import asft_kernels

    assert set(asft_kernels.__all__) <= set(dir(asft_kernels))
    assert all(getattr(asft_kernels, name) for name in asft_kernels.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        _ = asft_kernels.nosuch


def test_transformers_word_on_mtime_is_left_out():
    import logging

    from asft_kernels.cli.train import quiet

    quiet()
    quiet()
    logger = logging.getLogger("transformers.trainer_utils")
    assert len(logger.filters) == 1
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, "mtime may not be reliable on this", (), None)
    assert not logger.filter(record)
    record.msg = "another"
    assert logger.filter(record)
