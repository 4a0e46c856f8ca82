"""Which tokens of two answers differ: the marks of BMC (arXiv 2408.07471)."""

from collections.abc import Collection, Sequence
from difflib import SequenceMatcher


def diff_marks(
    chosen: Sequence[int], rejected: Sequence[int], never: Collection[int] = ()
) -> tuple[list[int], list[int]]:
    """(marks of chosen, marks of rejected): 1 at a token of a block that the other answer lacks, else 0.

    chosen, rejected: token ids of the answers alone, without prompt and padding.
    never: ids that are not marked wherever they stand, such as stop words (a set: it is asked once a token).
    """
    # difflib's heuristic for "popular" elements would drop most anchors of answers of 200 tokens or more.
    matcher = SequenceMatcher(None, rejected, chosen, autojunk=False)
    chosen_marks, rejected_marks = ([int(i not in never) for i in ids] for ids in (chosen, rejected))
    for block in matcher.get_matching_blocks():
        rejected_marks[block.a : block.a + block.size] = [0] * block.size
        chosen_marks[block.b : block.b + block.size] = [0] * block.size
    return chosen_marks, rejected_marks
