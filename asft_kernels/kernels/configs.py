"""Tiles of the GEMM kernel (logits_exp), by architecture and dtype.

The first row of a key is used unless `python -m asft_kernels.tools.autotune` has measured that another is
faster on this device; the others are its candidates. sm_90's in bf16 without a softcap were timed on an H100
(docs/gpu-model.md), nothing else was: rows were chosen from compiled code (docs/kernels.md has the figures,
`python -m asft_kernels.tools.compile_report --tiles` makes them), by these rules in this order:

1. It fits: no spilled register, no more shared memory than a program may have, whatever the epilogue.
2. Operations per operand byte, BLOCK_M * BLOCK_V / (BLOCK_M + BLOCK_V) in bf16 and half that in fp32, reach
   what a multiprocessor does while L2 gives it one: about 40 in bf16 on sm_80 and gfx942. The matrix units
   of sm_90 and sm_100 ask for more than any tile has that fits: there the largest comes first.
3. Something overlaps the epilogue: a second program on the multiprocessor, or warps of its own.
4. Few instructions in the main loop beside the products.

Elsewhere descriptors and persistence are candidates only, as Triton's newest paths should not run before they were
compared with the plain one on the chip itself: autotune does, and drops a candidate whose results differ. Persistent
tiles with specialised warps are none on sm_90: Triton 3.6 compiles them, and on an H100 they did not end.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One program computes BLOCK_M tokens x BLOCK_V vocabulary rows, BLOCK_D of hidden at a time."""

    BLOCK_M: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    why: str
    GROUP: int = 8  # token tiles that share a vocabulary tile in L2 before the next one is read
    descriptors: bool = False  # operands come as boxes by the tensor memory accelerator (sm_90, sm_100)
    persistent: bool = False  # a program a multiprocessor, warps specialised; needs descriptors
    one_loop: bool = False  # a program a multiprocessor, tiles and D in one loop, where the epilogue leaves it room
    triton: tuple[int, int] = (3, 6)  # the oldest release that compiles it
    until: tuple[int, int] = (99, 0)  # the first that compiles it with spills

    def in_one_loop(self, stored: torch.dtype | None, bias: bool) -> bool:
        """Whether a launch takes tiles and D in one loop. stored: of the exponentials that it writes, None without.

        A tile that waits to be written takes registers beside the next one's sums: no room for a bias as well, and in
        fp32 none in shared memory.
        """
        return self.one_loop and (stored is None or (stored == torch.bfloat16 and not bias))

    def __str__(self) -> str:
        flags = ["descriptors"] * self.descriptors + ["persistent"] * self.persistent + ["one loop"] * self.one_loop
        shape = f"{self.BLOCK_M}x{self.BLOCK_V}x{self.BLOCK_D}"
        return " ".join([shape, f"{self.num_warps} warps", f"{self.num_stages} stages", *flags])


@dataclass(frozen=True)
class Strips:
    """The library makes the logits of a strip of vocabulary rows, in fp32, and a pass takes their exponentials.

    A program of the pass takes BLOCK_M tokens x BLOCK_V vocabulary rows. mib: of a strip's logits.
    """

    mib: int
    BLOCK_M: int
    BLOCK_V: int
    num_warps: int
    why: str

    def rows(self, n_tokens: int, width: int) -> int:
        """Vocabulary rows of a strip: a multiple of BLOCK_V, or all of the chunk."""
        fit = self.mib * 2**20 // (4 * max(n_tokens, 1)) // self.BLOCK_V * self.BLOCK_V
        return min(max(fit, self.BLOCK_V), width)

    def __str__(self) -> str:
        return f"library in strips of {self.mib} MiB {self.BLOCK_M}x{self.BLOCK_V} {self.num_warps} warps"


# (architecture, low): low says that the operands are bf16 or fp16, else they are fp32.
Table = dict[tuple[str, bool], tuple[Tile, ...]]
TILES: Table = {
    ("sm_80", True): (  # all fit sm_86, sm_89 and sm_120, too, which have 99 KiB
        Tile(128, 128, 32, 4, 4, "two programs, the fewest instructions beside products"),
        Tile(128, 128, 64, 8, 3, "two programs, half the loop's turns"),
        Tile(128, 256, 32, 8, 3, "a quarter fewer bytes, but a single program"),
    ),
    ("sm_90", True): (
        Tile(
            128,
            256,
            64,
            8,
            3,
            "on an H100 3 to 9 % faster than the second: a tile is written while the next one's operands come",
            descriptors=True,
            one_loop=True,
            until=(3, 9),
        ),
        Tile(128, 256, 64, 8, 3, "on an H100 up to 12 % faster than the fourth", descriptors=True),
        Tile(256, 128, 64, 8, 4, "a little faster than the second at D = 2048", descriptors=True),
        Tile(128, 256, 64, 8, 3, "as the second, operands loaded by threads"),
        Tile(128, 128, 64, 8, 3, "two programs, but a third more bytes", descriptors=True),
    ),
    ("sm_100", True): (
        Tile(128, 256, 64, 8, 3, "the largest without spills; a single program"),
        Tile(
            128,
            128,
            64,
            8,
            4,
            "some warps write a tile while others multiply the next; 128 x 256 spills from Triton 3.8 on",
            descriptors=True,
            persistent=True,
            triton=(3, 7),  # 3.6 fails to specialise the warps
        ),
        Tile(128, 256, 64, 8, 4, "as the first, operands copied without threads", descriptors=True),
        Tile(128, 128, 64, 8, 3, "two programs, but a third more bytes"),
    ),
    ("gfx942", True): (
        Tile(128, 128, 64, 4, 2, "two programs, few instructions beside products"),
        Tile(256, 128, 64, 8, 2, "a quarter fewer bytes, but a single program"),
        Tile(256, 256, 32, 8, 2, "half the bytes, the fewest instructions beside products, but a single program"),
    ),
    # fp32 products run on FMA units (MFMA on gfx942), which a small tile feeds.
    ("sm_80", False): (
        Tile(64, 64, 32, 4, 3, "the most programs"),
        Tile(128, 64, 32, 8, 3, "a quarter fewer bytes"),
    ),
    ("sm_90", False): (
        Tile(64, 64, 32, 4, 3, "the most programs"),
        Tile(128, 64, 32, 8, 3, "a quarter fewer bytes"),
    ),
    ("sm_100", False): (
        Tile(64, 64, 32, 4, 3, "the most programs"),
        Tile(128, 64, 32, 8, 3, "a quarter fewer bytes"),
    ),
    ("gfx942", False): (
        Tile(64, 64, 32, 4, 2, "the most programs"),
        Tile(128, 128, 32, 4, 2, "half the bytes, two programs"),
    ),
    # Interpreted, emulated, or a chip that the table does not know: anything can run these.
    ("other", True): (Tile(32, 32, 32, 4, 2, "small: half the registers of any chip", GROUP=2),),
    ("other", False): (Tile(32, 32, 16, 4, 1, "small: half the registers of any chip", GROUP=2),),
}
# A softcap's epilogue takes a second array of registers and twice the instructions: other rows where the ones
# above would spill, or would leave a single program, whose products wait for it.
SOFTCAP_TILES: Table = {
    ("sm_80", True): (Tile(128, 64, 64, 8, 3, "two programs; 128 x 128 leaves one"),),
    ("sm_90", True): (
        Tile(128, 64, 64, 8, 3, "two programs; 128 x 128 leaves one, 128 x 256 spills"),
        Tile(128, 64, 64, 8, 4, "two programs, operands copied without threads", descriptors=True),
        Tile(128, 128, 64, 8, 4, "a third fewer bytes, but a single program", descriptors=True),
    ),
    ("sm_100", True): (
        Tile(128, 64, 64, 8, 3, "two programs; 128 x 128 leaves one, 128 x 256 spills"),
        Tile(
            128,
            64,
            64,
            8,
            4,
            "some warps write a tile while others multiply the next; 128 x 128 spills from Triton 3.8 on",
            descriptors=True,
            persistent=True,
            triton=(3, 7),  # 3.6 fails to specialise the warps
        ),
    ),
    ("gfx942", True): (
        Tile(128, 64, 64, 8, 2, "two programs; 128 x 128 leaves one"),
        Tile(128, 128, 64, 8, 2, "a third fewer bytes, but a single program"),
    ),
    ("sm_80", False): (Tile(64, 64, 32, 8, 3, "half the registers of 4 warps"),),
    ("sm_90", False): (Tile(64, 64, 32, 8, 3, "4 warps spill"),),
    ("sm_100", False): (Tile(64, 64, 16, 8, 3, "what no Triton from 3.6 to 3.9 spills"),),
}
STRIPS = (
    Strips(32, 4, 512, 4, "where the library's product and a pass over its logits take less than a Triton product"),
)
# How dW is rounded (triton_fused.py). "whole" needs bf16, rows of multiples of 16 elements, a buffer of N * min(N, V)
# elements, 128 MiB at WHOLE_TOKENS; beyond them what slices cost besides their product, which N does not change, is
# little.
WHOLE, SLICES = FORMS = ("whole", "slices")
WHOLE_TOKENS = 8192
# Of label_gradient: BLOCK_L, BLOCK_D, BLOCK_T, warps, stages. Two or three programs on a multiprocessor, no spills.
LABEL_TILE = (64, 128, 32, 4, 3)
LABEL_TILES = {"sm_90": (128, 128, 32, 4, 4), "other": (32, 32, 32, 4, 1)}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def candidates(architecture: str, dtype: torch.dtype, *, softcap: bool) -> tuple[Tile | Strips, ...]:
    """What may make a call's exponentials: the table's rows that this Triton compiles without spills, the default
    first, and the library's products in strips."""
    return *tiles(architecture, dtype, softcap=softcap), *STRIPS


def tiles(architecture: str, dtype: torch.dtype, *, softcap: bool) -> tuple[Tile, ...]:
    key = (architecture, dtype != torch.float32)
    rows = SOFTCAP_TILES.get(key, TILES[key]) if softcap else TILES[key]
    return tuple(tile for tile in rows if tile.triton <= triton_release() < tile.until)


@cache
def triton_release() -> tuple[int, int]:
    import triton  # here, as the table itself needs none

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def forms(dtype: torch.dtype, n_tokens: int) -> tuple[str, ...]:
    """The ways to round dW that are to be had for a call, the default first."""
    return FORMS if dtype == torch.bfloat16 and n_tokens <= WHOLE_TOKENS else (SLICES,)


def architecture_of(device: torch.device) -> str:
    """The table's name for a device: its own, or that of the nearest chip whose row it can run."""
    if device.type != "cuda":
        return "other"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith(("gfx942", "gfx950")) else "other"
    major, _ = torch.cuda.get_device_capability(device)
    # 8.6, 8.9 and 12.x have less shared memory than their data-centre sisters: sm_80's row fits them.
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}.get(major, "other")


def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; 0 off one, and for a fake tensor's where there is none."""
    here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if here else 0
