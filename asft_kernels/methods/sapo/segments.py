"""Which part of an answer is written anew, and the answer that comes of it: y = A B C -> A B' C.

Everything is on lists of token ids; B' comes from whoever generates. Lengths as in the authors' code
(yinyueqin/SAPO), which the reviews of arXiv 2405.20830 confirm for A B' C.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

KEPT = 3  # a segment that does not reach to the end leaves at least so many tokens behind it


@dataclass(frozen=True)
class Segment:
    """B = answer[start : end]."""

    start: int
    end: int


def choose_segment(length: int, *, longest: int, room: int, generator: torch.Generator) -> Segment:
    """A uniformly placed segment of an answer of `length` tokens, EOS included.

        n = min(longest, length),  t ~ Uniform{0 .. length - 3 - n}, t = 0 where that is empty

    so that answers of up to `longest` tokens are written anew as a whole. room: tokens of answer that the
    context can hold behind the prompt; the segment stays within them.
    """
    n = min(longest, length, room)
    last = min(length - KEPT - n, room - n)
    start = int(torch.randint(last + 1, (), generator=generator)) if last > 0 else 0
    return Segment(start, start + n)


def splice(answer: Sequence[int], segment: Segment, written: Sequence[int], eos_ids: Collection[int]) -> list[int]:
    """A B' C, or A B' up to its first EOS: the rest C is dropped then.

    written: B', of which the first n tokens count. The result equals `answer` where B' = B.
    """
    before, after = list(answer[: segment.start]), list(answer[segment.end :])
    middle = list(written[: segment.end - segment.start])
    end = next((i for i, token in enumerate(middle) if token in eos_ids), None)
    return before + (middle + after if end is None else middle[: end + 1])
