"""Stored tile times: what is chosen, what is ignored, and the command that measures (in the interpreter)."""

import json
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from asft_kernels.backends import triton_fused
from asft_kernels.backends.plan import Plan
from asft_kernels.kernels import tile_choice
from asft_kernels.kernels.configs import Strips, Tile, candidates
from asft_kernels.kernels.tile_choice import Problem, best_form, best_tile, cache_file, store_times, stored_times
from asft_kernels.tools import autotune
from test_triton_backend import DTYPES, GEMMA, PLAIN, check, few
from test_triton_backend import Problem as Whole

DEVICE = torch.device("cuda", 0)  # only its name is asked for
PROBLEM = Problem(torch.bfloat16, 4096, 8192, softcap=False)
TILES = candidates("sm_90", torch.bfloat16, softcap=False)
TIMES = {str(tile): 3.0 - i for i, tile in enumerate(TILES[:3])}  # the third is fastest; the fourth failed


@pytest.fixture(autouse=True)
def _an_h100(monkeypatch, tmp_path):
    """A device that is asked for its name alone, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ASFT_KERNELS_TUNED", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tile_choice, "architecture_of", lambda device: "sm_90")
    stored_times.cache_clear()
    yield
    stored_times.cache_clear()


def choice(problem=PROBLEM, aligned=True) -> Tile:
    return best_tile(DEVICE, problem, aligned=aligned)


def test_the_first_tile_unless_times_are_stored():
    assert choice() is TILES[0]
    path = store_times(DEVICE, PROBLEM, TIMES)
    assert path.name == "tiles-nvidia-h100-80gb-hbm3.json"
    assert {p.name for p in path.parent.iterdir()} <= {path.name, path.with_suffix(".lock").name}  # none temporary
    assert choice() == replace(TILES[2], why="measured: 1.000 ms, the fastest of 3")
    assert stored_times(DEVICE) == {"bfloat16, hidden size 4096, 8192 tokens": TIMES}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"tokens": 5000}, True),  # the same power of 2
        ({"tokens": 4096}, False),
        ({"hidden_size": 2048}, False),
        ({"dtype": torch.float16}, False),
        ({"softcap": True}, False),
    ],
)
def test_a_choice_holds_for_its_problem_alone(change, found):
    store_times(DEVICE, PROBLEM, TIMES)
    problem = replace(PROBLEM, **change)
    first = candidates("sm_90", problem.dtype, softcap=problem.softcap)[0]
    assert (choice(problem) is first) != found


def test_problems_are_added_to_the_file():
    other = replace(PROBLEM, tokens=1024)
    store_times(DEVICE, PROBLEM, TIMES)
    store_times(DEVICE, other, {str(TILES[0]): 1.0})
    assert list(stored_times(DEVICE)) == [str(PROBLEM), str(other)]


def test_what_another_process_stored_meanwhile_stays():
    store_times(DEVICE, PROBLEM, TIMES)
    path = cache_file(DEVICE)
    mine = path.read_text()
    other = replace(PROBLEM, tokens=1024)
    store_times(DEVICE, other, {str(TILES[0]): 1.0})
    theirs = path.read_text()
    path.write_text(mine)
    stored_times.cache_clear()
    assert list(stored_times(DEVICE)) == [str(PROBLEM)]
    path.write_text(theirs)  # by the other process, after this one's look
    store_times(DEVICE, replace(PROBLEM, tokens=256), {str(TILES[0]): 1.0})
    assert len(stored_times(DEVICE)) == 3


def test_two_at_once_lose_nothing():
    """One that comes while another is between reading and replacing waits for it."""
    fcntl = pytest.importorskip("fcntl", reason="no locks here")
    path, other = store_times(DEVICE, PROBLEM, TIMES), replace(PROBLEM, tokens=1024)
    late = threading.Thread(target=store_times, args=(DEVICE, replace(PROBLEM, tokens=256), TIMES))
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = json.loads(path.read_text())
        late.start()
        late.join(0.5)
        assert late.is_alive()
        whole["milliseconds"][str(other)] = TIMES
        path.write_text(json.dumps(whole))
    late.join()
    assert len(stored_times(DEVICE)) == 3


def test_rows_that_are_not_aligned_get_a_tile_of_their_own():
    """They were not measured, and descriptors cannot read them."""
    assert TILES[1].descriptors
    store_times(DEVICE, PROBLEM, {str(TILES[0]): 3.0, str(TILES[1]): 1.0, str(TILES[2]): 2.0})
    assert choice().descriptors
    assert choice(aligned=False) is candidates("sm_90", torch.bfloat16, softcap=True)[0]


def test_the_way_of_the_head_s_gradient():
    """The default by dtype and number of tokens, the fastest where times are stored for just that."""
    many = replace(PROBLEM, tokens=10_000)
    form = partial(best_form, aligned=True)
    assert form(DEVICE, PROBLEM) == "whole"
    assert form(DEVICE, many) == form(DEVICE, replace(PROBLEM, dtype=torch.float16)) == "slices"
    assert best_form(DEVICE, PROBLEM, aligned=False) == "slices"
    store_times(DEVICE, PROBLEM, {"slices": 0.1, "whole": 0.2})  # of the tiles' problem
    assert form(DEVICE, PROBLEM) == "whole"
    store_times(DEVICE, PROBLEM.of_gradient, {"slices": 0.1, "whole": 0.2})
    store_times(DEVICE, many.of_gradient, {"slices": 0.2, "whole": 0.1})  # not to be had for so many
    assert form(DEVICE, PROBLEM) == "slices"
    assert form(DEVICE, many) == "slices"
    assert form(torch.device("cpu"), PROBLEM) == "whole"


def test_the_variable_and_a_cpu_ignore_the_file(monkeypatch):
    store_times(DEVICE, PROBLEM, TIMES)
    assert best_tile(torch.device("cpu"), PROBLEM, aligned=True) is TILES[0]
    with tile_choice.assume_architecture("sm_80"):
        assert choice() is candidates("sm_80", torch.bfloat16, softcap=False)[0]
    monkeypatch.setenv("ASFT_KERNELS_TUNED", "0")
    assert choice() is TILES[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not readable as stored tile times (JSONDecodeError"),
        ("[]", "not readable as stored tile times (TypeError"),
        ('{"device": "x"}', "not readable as stored tile times (KeyError: 'milliseconds')"),
        ("times", "not readable as stored tile times (AttributeError"),
        ("triton", "measured with triton '2.0', here "),
        ("device", "measured with device '2.0', here 'NVIDIA H100 80GB HBM3'"),
        ("table", "measured with table '2.0', here "),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_one_warning(text, reason):
    path = store_times(DEVICE, PROBLEM, TIMES)
    whole = json.loads(path.read_text())
    if text in whole:
        text = json.dumps({**whole, text: "2.0"})
    elif text == "times":
        text = json.dumps({**whole, "milliseconds": [1, 2]})
    elif "device" in text:
        text = json.dumps({key: value for key, value in whole.items() if key != "milliseconds"})
    path.write_text(text)
    stored_times.cache_clear()
    with pytest.warns(UserWarning, match="is ignored") as caught:
        assert choice() is TILES[0]
    assert reason in str(caught[0].message)
    assert "Run `python -m asft_kernels.tools.autotune` again, or delete the file" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice() is TILES[0]  # said once
        store_times(DEVICE, PROBLEM, TIMES)  # the file is written anew
        assert str(choice()) == str(TILES[2])


def test_what_cannot_be_reached_is_nothing_stored(monkeypatch):
    """No home, or a cache folder that this user may not enter: the table's first tile, and no warning."""
    store_times(DEVICE, PROBLEM, TIMES)
    for name, error in (
        ("home", RuntimeError("Could not determine home directory.")),
        ("read_bytes", PermissionError(13, "Permission denied")),
    ):
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            if name == "home":
                patch.delenv("XDG_CACHE_HOME")
            patch.setattr(Path, name, Mock(side_effect=error))
            stored_times.cache_clear()
            assert choice() is TILES[0]
    stored_times.cache_clear()
    assert choice() == replace(TILES[2], why="measured: 1.000 ms, the fastest of 3")


def test_a_device_is_looked_up_once(monkeypatch):
    choice()
    monkeypatch.setattr(tile_choice, "cache_file", Mock(side_effect=AssertionError("looked up again")))
    monkeypatch.setattr(tile_choice, "_identity", Mock(side_effect=AssertionError("looked up again")))
    assert choice() is TILES[0]


def test_names_of_tiles_that_the_table_does_not_have():
    store_times(DEVICE, PROBLEM, {"1x1x1 1 warps 1 stages": 0.1})
    assert choice() is TILES[0]


# --- measuring

SMALL = Tile(32, 16, 16, 4, 2, "a test's", GROUP=2)
WIDE = replace(SMALL, BLOCK_V=32)
PERSISTENT = replace(SMALL, descriptors=True, persistent=True)
TINY = Problem(torch.bfloat16, 24, 40, softcap=False)


def measured(tiles, device) -> dict[str, float]:
    clock = iter((3.0, 2.0, 1.0))

    def timer(call):
        call()
        return next(clock)

    return autotune.tune(TINY, 70, torch.device(device), timer, tiles)


@pytest.mark.interpreter
def test_every_candidate_is_timed(device, capsys):
    second = PERSISTENT if device == "cpu" else WIDE  # not every GPU compiles the persistent one
    assert measured((SMALL, second), device) == {str(SMALL): 3.0, str(second): 2.0}
    out = capsys.readouterr().out
    assert "bfloat16, hidden size 24, 64 tokens: 70 vocabulary rows a chunk" in out
    assert f"{second!s:55}     2.000 ms" in out


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_capped_candidate_is_right_by_torch(dtype, device):
    problem = replace(TINY, dtype=dtype, softcap=True)
    assert autotune.tune(problem, 70, torch.device(device), lambda call: 1.0, (SMALL,)) == {str(SMALL): 1.0}


@pytest.mark.interpreter
@pytest.mark.parametrize("wrong", [None, "slices", "whole"])
def test_ways_of_the_head_s_gradient_are_timed_and_compared(wrong, device, monkeypatch, capsys):
    def broken(form):
        class Broken(form):
            def finish(self):
                out = super().finish()
                out[-1, 5] += 0.02 * out.abs().max()  # of the last chunk
                return out

        return Broken

    if wrong:
        monkeypatch.setitem(autotune.GRADIENTS, wrong, broken(autotune.GRADIENTS[wrong]))
    make_plan = autotune.make_plan
    monkeypatch.setattr(
        autotune, "make_plan", lambda *sizes, **options: replace(make_plan(*sizes, **options), chunk=32)
    )
    times = autotune.tune_gradient(TINY, 70, torch.device(device), lambda call: 1.0)
    assert set(times) == {"whole", "slices"} - {wrong}
    assert ("left out: differs" in capsys.readouterr().out) == bool(wrong)
    assert autotune.tune_gradient(replace(TINY, dtype=torch.float16), 70, torch.device(device), lambda call: 1.0) == {}


@pytest.mark.interpreter
def test_wrong_and_failing_candidates_are_left_out(device, monkeypatch, capsys):
    failing, wrong, late = (replace(SMALL, num_stages=n) for n in (3, 4, 5))
    right = autotune.logits_exp

    def broken(exps, *arguments, tile, **options):
        if tile == failing:
            raise RuntimeError("out of shared memory")
        sums = right(exps, *arguments, tile=tile, **options)
        if tile == wrong:
            exps[3, 5] *= 1.05  # two bf16 roundings are 1.6 %
        if tile == late:
            exps[-1, -1] = torch.nan
        return sums

    monkeypatch.setattr(autotune, "logits_exp", broken)
    assert list(measured((SMALL, failing, wrong, late), device)) == [str(SMALL)]
    out = capsys.readouterr().out
    assert "left out: RuntimeError: out of shared memory" in out
    assert "left out: differs from torch's by 5.0e-02" in out or "left out: differs from torch's by 4." in out
    assert "left out: differs from torch's by nan" in out
    assert list(measured((late, wrong, SMALL), device)) == [str(SMALL)], "the first is no truth"


@pytest.mark.interpreter
def test_nothing_is_tried_on_a_device_that_is_lost(device, monkeypatch, capsys):
    """An illegal address fails every later call of the process: those candidates are not to be called wrong."""
    bad, after = (replace(SMALL, num_stages=n) for n in (3, 4))
    right, called = autotune.logits_exp, []

    def broken(*arguments, tile, **options):
        called.append(tile)
        if tile == bad:
            raise RuntimeError("an illegal memory access was encountered")
        return right(*arguments, tile=tile, **options)

    monkeypatch.setattr(autotune, "logits_exp", broken)
    monkeypatch.setattr(autotune, "answers", lambda device: bad not in called)
    with pytest.raises(autotune.DeviceLost, match=f"no more after {bad}: RuntimeError: an illegal memory") as lost:
        measured((SMALL, bad, after), device)
    assert lost.value.times == {str(SMALL): 3.0}
    assert after not in called
    assert "left out" not in capsys.readouterr().out


def test_what_was_timed_before_a_lost_device_is_stored(monkeypatch, capsys):
    tried = []

    def tune(problem, *args):
        tried.append(problem.tokens)
        raise autotune.DeviceLost("no answer", dict(TIMES) if problem.tokens == 1024 else {})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(autotune, "tune", tune)
    arguments = ["--hidden-size", "4096", "--vocab", "70", "--tokens"]
    with pytest.raises(SystemExit, match="no answer\nonly the candidates before it are stored"):
        autotune.main([*arguments, "1024", "2048"])
    assert tried == [1024]
    with pytest.raises(SystemExit, match="no answer\nnothing is stored for it"):
        autotune.main([*arguments, "2048"])
    assert stored_times(torch.device("cuda")) == {str(replace(PROBLEM, tokens=1024)): TIMES}


def test_a_device_answers_until_synchronizing_fails(monkeypatch):
    assert autotune.answers(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=RuntimeError("illegal address")))
    assert autotune.answers(torch.device("cpu"))
    assert not autotune.answers(DEVICE)


@pytest.mark.interpreter
@pytest.mark.parametrize("tile", [PERSISTENT, Strips(0, 8, 32, 4, "a test's")], ids=str)
@pytest.mark.parametrize("logits", [PLAIN, GEMMA], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_phases_with_a_chosen_tile(dtype, logits, tile, device, monkeypatch):
    """A stored choice with descriptors, or of strips, reaches both phases, recomputed chunks included.

    fp16 differs by the name of a type; test_kernels.py has such tiles with it.
    """
    if device == "cuda":
        pytest.skip("the tile is the interpreter's: tests/test_kernels.py runs the device's own")
    asked = []

    def chosen(device, problem, *, aligned):
        asked.append((problem, aligned))
        return tile

    monkeypatch.setattr(triton_fused, "best_tile", chosen)
    whole = Whole(dtype, device, N=33, V=56, D=48, logits=logits, bias=True)
    plan = Plan(56, 40, 1)
    saved = whole.forward(plan)
    check(whole, saved, whole.backward(saved, plan), few)
    assert asked == [(Problem(dtype, 48, 33, logits.softcap is not None), True)] * 2


def test_rows_that_are_not_aligned_are_told():
    """D, strides and starts must be multiples of 16 elements, or the head transposed, whose chunks are copied."""
    rows = torch.arange(3)
    hidden, weight = torch.zeros(3, 32, dtype=torch.bfloat16), torch.zeros(10, 50, dtype=torch.bfloat16)
    told = []

    def chosen(device, problem, *, aligned):
        told.append(aligned)
        return SMALL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_fused, "best_tile", chosen)
        wide = torch.zeros(10, 64, dtype=torch.bfloat16)
        for h, w in (
            (hidden, wide[:, :32]),
            (hidden, wide[:, 16:48]),
            (hidden, wide[:, 4:36]),
            (hidden, weight[:, :32]),
            (hidden[:, :24], wide[:, :24]),
            (torch.zeros(3, 40, dtype=torch.bfloat16)[:, :32], wide[:, :32]),
            (hidden, torch.zeros(32, 11, dtype=torch.bfloat16).t()),
        ):
            triton_fused._tile(h, triton_fused.chunks_aligned(w), rows, PLAIN)
    assert told == [True, True, False, False, False, False, True]


@pytest.mark.interpreter
def test_the_command(tmp_path):
    """Interpreted it times what it can, says that this is no measurement, and stores nothing."""
    arguments = ["--hidden-size", "32", "--vocab", "70", "--tokens", "8", "33", "--dtype", "float32"]
    environment = {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path), "PATH": "", "CUDA_VISIBLE_DEVICES": ""}

    def run(arguments, environment):
        command = [sys.executable, "-m", "asft_kernels.tools.autotune", *arguments]
        root = Path(__file__).parents[1]
        return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)

    result = run(arguments, environment)
    assert result.returncode == 0, result.stderr
    assert "float32, hidden size 32, 64 tokens: 70 vocabulary rows a chunk" in result.stdout
    assert result.stdout.count("interpreted on a CPU: no measurement of a device, nothing is stored") == 2
    assert not list(tmp_path.iterdir())
    if not torch.cuda.is_available():
        del environment["TRITON_INTERPRET"]
        result = run(arguments, environment)
        assert result.returncode == 2
        assert "found no CUDA or ROCm device to time; set TRITON_INTERPRET=1" in result.stderr


def test_a_hidden_size_whose_calls_take_nothing_stored(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        autotune.main(["--hidden-size", "4088", "--vocab", "70"])
    assert "--hidden-size: got 4088, need a multiple of 16" in capsys.readouterr().err


def test_help_names_choices_defaults_and_rounding(capsys):
    with pytest.raises(SystemExit):
        autotune.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--dtype {bfloat16,float16,float32} of hidden states and head (default: bfloat16)" in text
    assert "(5000 and 8192 share a choice, 4096 has another) (default: [1024, 2048, 4096, 8192])" in text
    names = [str(replace(PROBLEM, tokens=tokens)) for tokens in (5000, 8192, 4096)]
    assert names[0] == names[1] != names[2]


def test_show(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    autotune.main(["--show"])
    assert "nothing stored: the table's first tile is used for every call" in capsys.readouterr().out
    store_times(torch.device("cuda"), PROBLEM, TIMES)
    autotune.main(["--show"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [str(cache_file(DEVICE)), str(PROBLEM)]
    assert lines[2].split() == [*str(TILES[2]).split(), "1.000", "ms"]
