"""Chosen answers -> negatives: the segment of each that a generator writes anew."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from asft_kernels.errors import InputError
from asft_kernels.methods.sapo.segments import Segment, choose_segment, splice


class IdGenerator(Protocol):
    """What SAPO asks of a generator; `asft_kernels.models.generation.TransformersGenerator` is one."""

    def generate_ids(
        self,
        encoded: Sequence[list[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> list[list[int]]: ...

    def ends(self) -> Collection[int]:
        """Ids that end an answer."""
        ...


@dataclass(frozen=True)
class Regeneration:
    """How negatives are written; the defaults are those of the authors' runs.

    token_generate_length: tokens of a segment; shorter answers are written anew as a whole.
    max_length: tokens of prompt and answer together; a segment lies within them.
    """

    max_length: int
    token_generate_length: int = 256
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.token_generate_length < 1:
            raise InputError(f"token_generate_length: got {self.token_generate_length}, need at least 1 token")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature: got {self.temperature}, need a number > 0: negatives are sampled")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"top_k, top_p: got {self.top_k}, {self.top_p}; need top_k >= 0 (0: off) and 0 < top_p <= 1 (1: off)"
            )

    def negatives(
        self, rows: Sequence[dict[str, Any]], writer: IdGenerator, generator: torch.Generator
    ) -> list[list[int]]:
        """Returns for each row the answer with one segment written anew; it may come out as it was.

        Args:
            rows: prompt_ids and chosen_ids, token ids.
            generator: of segments and seeds.
        """
        segments = [
            choose_segment(
                len(row["chosen_ids"]),
                longest=self.token_generate_length,
                room=self.max_length - len(row["prompt_ids"]),
                generator=generator,
            )
            for row in rows
        ]
        placed = list(zip(rows, segments, strict=True))
        begun = [row["prompt_ids"] + row["chosen_ids"][: segment.start] for row, segment in placed]
        written = self._write(begun, segments, writer, generator)
        ends = writer.ends()
        return [
            splice(row["chosen_ids"], segment, new, ends) for (row, segment), new in zip(placed, written, strict=True)
        ]

    def _write(
        self, begun: list[list[int]], segments: list[Segment], writer: IdGenerator, generator: torch.Generator
    ) -> list[list[int]]:
        """All that fit at the longest segment's length in one call, the rest by length."""
        lengths = [segment.end - segment.start for segment in segments]
        longest = max(lengths, default=0)
        groups: dict[int, list[int]] = defaultdict(list)
        for index, length in enumerate(lengths):
            fits = len(begun[index]) + longest <= self.max_length
            groups[longest if fits else length].append(index)
        written: list[list[int]] = [[] for _ in begun]
        for length, members in groups.items():
            texts = writer.generate_ids(
                [begun[index] for index in members],
                max_new_tokens=length,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=int(torch.randint(2**31, (), generator=generator)),
            )
            for index, text in zip(members, texts, strict=True):
                written[index] = text
        return written
