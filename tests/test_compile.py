"""Every kernel cross-compiled for every architecture of the tile table: `python -m pytest -m compile`."""

import json
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from asft_kernels.kernels import configs
from asft_kernels.kernels.configs import ARCHITECTURES, SOFTCAP_TILES, TILES
from asft_kernels.tools import compile_report
from asft_kernels.tools.compile_report import DTYPES, Row, describe, launches_for, tile_launch, tile_table
from asft_kernels.tools.machine_code import TYPE_NAMES, Launch, machine_code

pytestmark = pytest.mark.compile

KERNELS = {
    "asft_sequence_grad_kernel",
    "asft_sequence_kernel",
    "close_statistics_kernel",
    "exps_of_logits_kernel",
    "grad_bias_kernel",
    "grad_hidden_kernel",
    "label_columns_kernel",
    "label_gradient_kernel",
    "label_logits_kernel",
    "label_rows_kernel",
    "logits_exp_kernel",
    "pack_labels_kernel",
    "noisy_gradient_kernel",
    "noisy_statistics_kernel",
    "resettle_kernel",
    "row_factors_kernel",
    "scaled_hidden_kernel",
    "settle_kernel",
    "settle_stats_kernel",
    "stats_of_logits_kernel",
    "weigh_exps_kernel",
    "weigh_logits_kernel",
}
# The instruction that makes the tile worth its registers, by chip; fp32 runs on FMA units or fp32 MFMA.
MATRIX = {"sm_80": "HMMA.16816.F32", "sm_90": "HGMMA.64x", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_"}


@cache
def launches(architecture, dtype):
    return launches_for(architecture, dtype, every=False)  # the command compiles every one


def grid(*quick):
    """All chips and dtypes, of which these are quick: they take each way at least once, the others are slow."""
    rest = [row for row in product(ARCHITECTURES, DTYPES) if row not in quick]
    return [*quick, *(pytest.param(*row, marks=pytest.mark.slow) for row in rest)]


@pytest.mark.parametrize(("architecture", "dtype"), grid(("sm_90", torch.bfloat16), ("gfx942", torch.float32)), ids=str)
def test_fits_without_spills_and_uses_matrix_units(architecture, dtype):
    """Neither bias nor softcap, and both; bf16 also with one alone, and in odd shapes."""
    rows = [describe(launch, architecture, dtype) for launch in launches(architecture, dtype)]
    for row in rows:
        assert row.fits, row
        if row.kernel not in ("logits_exp_kernel", "label_gradient_kernel"):
            assert not row.code.matrix, row
        elif dtype != torch.float32:
            assert any(m.startswith(MATRIX[architecture]) for m in row.code.matrix), row
        else:
            # tf32 keeps 10 bits of 23; a product of fp32 on these units would say so in its name.
            assert all(m.startswith("v_mfma_f32_") and m.endswith("_f32") for m in row.code.matrix), row
            assert bool(row.code.matrix) == (architecture == "gfx942"), row
    variants = [row.variant for row in rows if row.kernel == "logits_exp_kernel"]
    # 3 ways to store, times the combinations of bias and softcap; for bf16 of odd shapes, too, but one.
    assert len(set(variants)) == (21 if dtype == torch.bfloat16 else 6)


def test_every_kernel_is_in_the_report():
    seen = {launch.name for dtype in (torch.float32, torch.bfloat16) for launch in launches("sm_90", dtype)}
    assert seen == KERNELS


def test_the_tile_table_has_no_other_rows():
    assert {arch for arch, _ in TILES} == {*ARCHITECTURES, "other"}
    assert [key for key, tiles in TILES.items() if tiles[0].descriptors] == [("sm_90", True)]  # compared on a chip
    for (architecture, low), tiles in (*TILES.items(), *SOFTCAP_TILES.items()):
        unaligned = configs.tiles(architecture, torch.bfloat16 if low else torch.float32, softcap=True)
        assert not unaligned[0].descriptors  # it runs with every stride
        assert len({str(tile) for tile in tiles}) == len(tiles)  # stored times are kept by that name
        assert tiles[0].triton == (3, 6)  # and with every Triton that setup.py admits
        assert all(tile.descriptors or not tile.persistent for tile in tiles)
        assert not any(tile.persistent and tile.one_loop for tile in tiles)


def test_one_loop_only_where_it_does_not_spill(monkeypatch):
    for release, first in (((3, 6), True), ((3, 8), True), ((3, 9), False)):
        monkeypatch.setattr(configs, "triton_release", lambda release=release: release)
        assert [tile.one_loop for tile in configs.tiles("sm_90", torch.bfloat16, softcap=False)][:2] == [first, False]


def test_no_candidate_asks_for_a_newer_triton(monkeypatch):
    for release, persistent in (((3, 6), 0), ((3, 7), 1), ((4, 0), 1)):
        monkeypatch.setattr(configs, "triton_release", lambda release=release: release)
        for softcap, table in ((False, TILES), (True, SOFTCAP_TILES)):
            rows = configs.tiles("sm_100", torch.bfloat16, softcap=softcap)
            assert [tile.persistent for tile in rows].count(True) == persistent
            assert len(rows) == len(table["sm_100", True]) - 1 + persistent


@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize(
    ("architecture", "dtype"), grid(*((architecture, torch.bfloat16) for architecture in ARCHITECTURES)), ids=str
)
def test_every_candidate_fits(architecture, dtype, softcap):
    """With a bias, the longest epilogue, but where tiles and D are one loop, which then is none. Descriptors mean that
    the copies are the accelerator's, persistent that the warps differ: 4 or 8 that write, and some that copy and
    multiply."""
    for tile in configs.tiles(architecture, dtype, softcap=softcap):
        launch = tile_launch(tile, dtype, softcap=softcap, bias=not tile.one_loop)
        code = machine_code(launch, architecture)
        row = Row(launch.name, architecture, TYPE_NAMES[dtype], str(tile), code)
        assert row.fits, row
        # One turn of D, nothing unrolled; of one loop the epilogue, too, which stands in it twice as a branch.
        assert 0 < code.loop_products < code.loop < (4000 if tile.one_loop else 2000), row
        assert code.loop_products * code.outside > 0
        assert (code.num_warps > tile.num_warps) == tile.persistent, row
        if architecture != "gfx942":
            ttgir = launch.compile(architecture).asm["ttgir"]
            assert ("async_tma_copy_global_to_local" in ttgir) == tile.descriptors, row


def test_the_figures_in_the_docs_are_those_of_the_compiler():
    """docs/kernels.md holds the table for one release of Triton; with that one it must come out the same."""
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    release, *_ = re.findall(r"^Triton ([\w.]+),", text, re.MULTILINE)
    if release != triton.__version__:
        pytest.skip(f"docs/kernels.md was made with Triton {release}, not {triton.__version__}")
    made = list(tile_table(("sm_90",)))
    assert made[0] in text
    rows = [line for line in text.splitlines() if line.startswith("| sm_90")]
    assert rows == [line for line in made if line.startswith("| sm_90")]
    lines = [line.split(" | ") for line in text.splitlines() if re.match(r"\| (?:sm_|gfx)", line)]
    named = [
        (arch, ("bf16" if low else "fp32") + suffix, str(tile), tile.why)
        for suffix, table in (("", TILES), (", softcap", SOFTCAP_TILES))
        for (arch, low), tiles in table.items()
        for tile in tiles
        if arch != "other"
    ]
    assert sorted(named) == sorted(
        (line[0][2:], line[1], line[2], line[-1].removesuffix(" |").split("; Triton")[0]) for line in lines
    )


def narrow_row_offsets(ttir: str) -> list[str]:
    """Products of 32 bits with a kernel's argument (a stride, N, D, a width) that reach an address.

    The text is in single-assignment form: each line gives its result's operands, so an address is
    followed back through them.
    """
    operands: dict[str, list[str]] = {}
    narrow: dict[str, str] = {}
    pointers = []
    arguments = set(re.findall(r"(%\w+): (?:i32|i64|f32)", ttir.split("attributes", 1)[0]))
    direct = set(arguments)  # values that are an argument, repeated or widened
    for line in ttir.splitlines():
        found = re.match(r"\s*(%[\w:]+) = \"?([\w.]+)\"?(.*)", line)
        if not found:
            continue
        result, operation, rest = found[1].split(":")[0], found[2], found[3].split(" loc(")[0]
        used = re.findall(r"%\w+", rest)
        operands[result] = used
        if operation in ("tt.splat", "arith.extsi", "tt.expand_dims", "tt.broadcast") and used[0] in direct:
            direct.add(result)
        if operation == "arith.muli" and "i64" not in rest.rsplit(":", 1)[1] and direct & set(used):
            narrow[result] = line.strip()
        if operation == "tt.addptr":
            pointers += used[1:]
    reached, queue = set(), pointers
    while queue:
        value = queue.pop()
        if value not in reached:
            reached.add(value)
            queue = queue + operands.get(value, [])
    return [line for value, line in narrow.items() if value in reached]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_offsets_have_64_bits(dtype):
    """N*V, V*D and N*D pass 2**31 elements: rows times strides must be 64-bit products."""
    for launch in launches("sm_90", dtype):
        ttir = launch.compile("sm_90").asm["ttir"]
        assert "tt.addptr" in ttir
        assert not narrow_row_offsets(ttir), launch.name


def test_narrow_offsets_would_be_found():
    """The check above can fail: on a kernel that multiplies row and stride in 32 bits."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy_kernel(out_ptr, x_ptr, stride, WIDE: tl.constexpr):
        row = tl.program_id(0)
        if WIDE:
            row = row.to(tl.int64)
        at = row * stride + tl.arange(0, 32)
        tl.store(out_ptr + at, tl.load(x_ptr + at))

    for wide in (False, True):
        signature = {"out_ptr": "*fp32", "x_ptr": "*fp32", "stride": "i32", "WIDE": "constexpr"}
        launch = Launch(copy_kernel, tuple(signature.items()), (("WIDE", wide),), (), (("num_warps", 1),))
        assert bool(narrow_row_offsets(launch.compile("sm_90").asm["ttir"])) != wide


def test_the_command_writes_a_table_and_json(tmp_path, monkeypatch, capsys):
    one = launches("sm_90", torch.float32)[0]
    row = describe(one, "sm_90", torch.float32)
    monkeypatch.setattr(compile_report, "report", lambda architectures: iter([row]))
    path = tmp_path / "rows.json"
    compile_report.main(["--arch", "sm_90", "--json", str(path)])
    assert f"sm_90   {TYPE_NAMES[torch.float32]}" in capsys.readouterr().out
    (written,) = json.loads(path.read_text())["rows"]
    assert written["kernel"] == row.kernel
    assert written["code"]["registers"] == row.code.registers > 0


def test_the_command_refuses_an_interpreting_process():
    command = [sys.executable, "-m", "asft_kernels.tools.compile_report"]
    result = subprocess.run(command, env={"TRITON_INTERPRET": "1", "PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_doctor_says_of_each_kernel_whether_it_compiles(monkeypatch):
    """A usual call's kernels, each variant once. One that the compiler refuses is a finding, the others go on."""
    from asft_kernels.cli.doctor import lines

    usual = compile_report.usual_launches("sm_90", torch.float32)
    names = {launch.name for launch in usual}
    assert {"logits_exp_kernel", "settle_kernel", "pack_labels_kernel", "asft_sequence_grad_kernel"} < names < KERNELS
    few = [next(x for x in usual if x.name == name) for name in ("close_statistics_kernel", "resettle_kernel")]
    monkeypatch.setattr(compile_report, "usual_launches", lambda architecture, dtype: few)
    compiles = Launch.compile

    def refused(launch, architecture):
        if launch.name == "resettle_kernel" and architecture == "sm_80":
            raise RuntimeError("no such instruction")
        return compiles(launch, architecture)

    monkeypatch.setattr(Launch, "compile", refused)
    found = {what: (finding, well) for what, finding, well in lines(None, "auto", ["sm_90", "sm_80"])}
    for chip, name in (("sm_90", "close_statistics"), ("sm_90", "resettle"), ("sm_80", "close_statistics")):
        assert found[f"{chip}, {name}"] == ("compiles in 1 variant, 0 spills", True)
    assert found["sm_80, resettle"] == ("no such instruction", False)
