"""Tiles of the GEMM kernel (logits_exp), by architecture and dtype: a fixed table, no autotuning.

Fixed, so that results repeat bit by bit from run to run. Every row says how it was chosen:
"compiled only" means compiled for that chip without spills and within its shared memory
(python -m asft_kernels.compile_report), never timed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


# (architecture, low): low says that the operands are bf16 or fp16, else they are fp32.
TILES: dict[tuple[str, bool], Tile] = {
    ("sm_80", True): Tile(128, 128, 64, 8, 3, "compiled only: 64 KiB, fits sm_86 and sm_120, too"),
    ("sm_90", True): Tile(128, 128, 64, 8, 3, "compiled only: 96 KiB, 128 registers: 2 on an SM"),
    ("sm_100", True): Tile(128, 128, 64, 8, 3, "compiled only: as sm_90; 4 warps spill"),
    ("gfx942", True): Tile(128, 128, 64, 8, 2, "compiled only: 32 KiB, 2 on a CU"),
    ("sm_80", False): Tile(64, 64, 32, 4, 3, "compiled only: ieee products run on FMA units"),
    ("sm_90", False): Tile(64, 64, 32, 4, 3, "compiled only: as sm_80; 128 x 128 spills"),
    ("sm_100", False): Tile(64, 64, 32, 4, 3, "compiled only: as sm_90; 8 warps spill"),
    ("gfx942", False): Tile(64, 64, 32, 4, 2, "compiled only: MFMA has fp32 products of its own"),
    # Interpreted, emulated, or a chip that the table does not know: anything can run these.
    ("other", True): Tile(32, 32, 32, 4, 2, "small: half the registers of any chip", GROUP=2),
    ("other", False): Tile(32, 32, 16, 4, 1, "small: half the registers of any chip", GROUP=2),
}
# With a softcap the epilogue takes a second array of registers: other rows where that one would spill, or
# would leave a single program on an SM.
SOFTCAP_TILES: dict[tuple[str, bool], Tile] = {
    ("sm_80", True): Tile(128, 64, 64, 8, 3, "compiled only: 128 registers: 2 on an SM; 128 x 128 needs 250"),
    ("sm_90", True): Tile(128, 64, 64, 8, 3, "compiled only: 128 registers: 2 on an SM; 128 x 128 needs 255"),
    ("sm_100", True): Tile(128, 64, 64, 8, 3, "compiled only: 127 registers: 2 on an SM; 128 x 128 needs 255"),
    ("gfx942", True): Tile(128, 64, 64, 8, 2, "compiled only: 86 registers: 2 on a CU; 128 x 128 needs 151"),
    ("sm_80", False): Tile(64, 64, 32, 8, 3, "compiled only: 80 registers; as sm_90"),
    ("sm_90", False): Tile(64, 64, 32, 8, 3, "compiled only: 80 registers; 4 warps spill"),
}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_assumed: list[str] = []


def best_tile(device: torch.device, dtype: torch.dtype, *, softcap: bool) -> Tile:
    """The tables' row for this device, the operands' dtype, and logits with or without a softcap."""
    key = (_assumed[-1] if _assumed else architecture_of(device), dtype != torch.float32)
    return SOFTCAP_TILES.get(key, TILES[key]) if softcap else TILES[key]


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


@contextmanager
def assume_architecture(name: str) -> Iterator[None]:
    """Within it best_tile answers for that architecture, whatever the device: for compile_report."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()
