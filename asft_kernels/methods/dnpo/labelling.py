"""Dynamic sample labelling, DNPO's data step: of a human and a generated answer the better one is chosen."""

from typing import TypeVar

Answer = TypeVar("Answer")


def label_pair(
    human: Answer, generated: Answer, human_score: float, generated_score: float
) -> tuple[Answer, Answer, str]:
    """(chosen, rejected, where the chosen one is from: "human" or "generated"). The higher score wins.

    Equal scores: the human answer, which SPIN, DNPO's base, always prefers; the paper names no rule [our decision].

    >>> label_pair("a", "b", 3.0, 4.0)
    ('b', 'a', 'generated')
    """
    if generated_score > human_score:
        return generated, human, "generated"
    return human, generated, "human"
