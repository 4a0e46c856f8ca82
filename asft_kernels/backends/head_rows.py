"""The head's rows as the backends read them: a tensor, one with low-rank columns beside it, or codes of few bits.

    rows v of the head = [ W[v] | L[v] ]       W (V, D), L (V, r) or none: LoRA is [W | s B] . [h ; A h]
    4 bits: W[v] = table[code] * scale         a byte holds two codes, the higher first; a scale for each block of
                                               entries of the flattened W (bitsandbytes' NF4 and FP4)
    8 bits: W[v] = code * scale[v]             (bitsandbytes' LLM.int8, its 1/127 in the scale)

What is not a plain tensor is assembled chunk by chunk in a buffer, so that W never stands twice, nor ever whole in
floating point.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FOUR_BITS, EIGHT_BITS = "4bit", "8bit"
STREAM = "stream"


def codes_text(kind: str, block: int, dtype: torch.dtype) -> str:
    """How a quantised weight is read, as an operator takes it: kind, entries a scale, dtype of what is read."""
    return f"{kind}/{block}/{str(dtype).removeprefix('torch.')}"


def stream_text(group_name: str, vocab: int) -> str:
    """The placement of a head that is streamed (backends/streaming.py) over a process group."""
    return f"{STREAM}/{group_name}/{vocab}"


class HeadRows(NamedTuple):
    weight: Tensor  # (V, D), streamed (V_r, D); of 4 bits (V, D / 2) uint8, of 8 bits (V, D) int8
    low_rank: Tensor | None = None  # (V, r)
    codes: str = ""  # codes_text of a quantised weight
    scales: tuple[Tensor, ...] = ()  # 4 bits: (blocks,) and the table (256, 2); 8 bits: (V,); fp32
    placement: str = ""  # of rows that stand on several ranks (backends/sharding.py): which are here, and whose group

    @property
    def is_plain(self) -> bool:
        return self.low_rank is None and not self.codes and not self.is_streamed

    @property
    def is_streamed(self) -> bool:
        return self.placement.startswith(STREAM)

    @property
    def columns(self) -> int:
        """D."""
        return self.weight.shape[1] * (2 if self.codes.startswith(FOUR_BITS) else 1)

    @property
    def size(self) -> tuple[int, int]:
        """(V, D + r)."""
        vocab = int(self.placement.split("/")[-1]) if self.is_streamed else self.weight.shape[0]
        return vocab, self.columns + (0 if self.low_rank is None else self.low_rank.shape[1])

    def chunk(self, start: int, stop: int, out: Tensor) -> Tensor:
        """Rows start to stop, written to out (at least that many rows, D + r), in its dtype."""
        return self._write(slice(start, stop), out[: stop - start])

    def take(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, D + r): a row for each label."""
        return self._write(labels, torch.empty(len(labels), self.size[1], dtype=dtype, device=self.weight.device))

    def _write(self, rows: slice | Tensor, out: Tensor) -> Tensor:
        out[:, : self.columns] = self._dequantised(rows) if self.codes else self.weight[rows]
        if self.low_rank is not None:
            out[:, self.columns :] = self.low_rank[rows]
        return out

    def _dequantised(self, rows: slice | Tensor) -> Tensor:
        kind, block, dtype = self.codes.split("/")
        codes, block = self.weight[rows], int(block)
        if kind == EIGHT_BITS:
            return (codes * self.scales[0][rows, None]).to(getattr(torch, dtype))
        of_block, table = self.scales
        D = self.columns
        values = F.embedding(codes.int(), table).view(-1, D)
        if D % block == 0:
            of_row = of_block.view(-1, D // block)[rows]
            scaled = values.view(*of_row.shape, block) * of_row[:, :, None]
        else:  # blocks go over the ends of rows
            v = torch.arange(self.size[0], device=codes.device)[rows]
            scaled = values * of_block[(v[:, None] * D + torch.arange(D, device=codes.device)) // block]
        return scaled.view(-1, D).to(getattr(torch, dtype))
