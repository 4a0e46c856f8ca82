"""Pairs of earlier steps, sampled again: a first-in first-out buffer that prefers what was sampled least."""

from collections import deque
from typing import Any

import torch


class ReplayBuffer:
    """At most `maximum` entries, the oldest out first.

    An entry is drawn with probability proportional to 1 / (times sampled + 1), with replacement. Counts belong
    to the entry's place, so that they survive a checkpoint; two equal entries have one each.
    """

    def __init__(self, maximum: int):
        self.entries: deque[Any] = deque(maxlen=maximum)
        self.times_sampled: deque[int] = deque(maxlen=maximum)

    def __len__(self) -> int:
        return len(self.entries)

    def push(self, entry: Any) -> None:
        self.entries.append(entry)
        self.times_sampled.append(0)

    def sample(self, count: int, generator: torch.Generator) -> list[Any]:
        """`count` entries of one draw; the weights change after it."""
        weights = 1 / (torch.tensor(self.times_sampled, dtype=torch.float64) + 1)
        drawn = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
        for index in drawn:
            self.times_sampled[index] += 1
        return [self.entries[index] for index in drawn]

    def state_dict(self) -> dict[str, list[Any]]:
        return {"entries": list(self.entries), "times_sampled": list(self.times_sampled)}

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """The newest `maximum` entries of a buffer that may have been larger."""
        self.entries = deque(state["entries"], self.entries.maxlen)
        self.times_sampled = deque(state["times_sampled"], self.times_sampled.maxlen)
