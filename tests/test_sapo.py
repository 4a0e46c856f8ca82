"""SAPO's parts: segments, replay buffer, moving weights, and the negatives that come of them."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="needs the train extra: transformers")

from asft_kernels.methods.sapo.buffer import ReplayBuffer
from asft_kernels.methods.sapo.ema import MovingWeights
from asft_kernels.methods.sapo.negatives import Regeneration
from asft_kernels.methods.sapo.segments import Segment, choose_segment, splice

EOS = 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    length=st.integers(1, 600), longest=st.integers(1, 300), room=st.integers(1, 700), seed=st.integers(0, 2**31)
)  # fmt: skip
def test_segment_lies_in_the_answer_and_in_the_room(length, longest, room, seed):
    segment = choose_segment(length, longest=longest, room=room, generator=seeded(seed))
    assert segment.end - segment.start == min(longest, length, room)
    assert 0 <= segment.start <= segment.end <= min(length, room)
    assert segment.start == 0 or length - segment.end >= 3


def test_segment_start_is_uniform():
    """m = 10, n = 4: t in {0, 1, 2, 3}; chi-squared of 3 degrees passes 16.3 once in a thousand seeds."""
    generator, draws = seeded(), 4000
    starts = Counter(choose_segment(10, longest=4, room=10, generator=generator).start for _ in range(draws))
    assert set(starts) == {0, 1, 2, 3}
    assert sum((n - draws / 4) ** 2 / (draws / 4) for n in starts.values()) < 16.3
    # The prompt leaves 5 of the answer's 20 tokens: the authors' code raises here.
    assert choose_segment(20, longest=8, room=5, generator=seeded()) == Segment(0, 5)


def test_splice_by_hand():
    answer = [10, 11, 12, 13, 14, EOS]
    assert splice(answer, Segment(1, 3), [20, 21, 22], {EOS}) == [10, 20, 21, 13, 14, EOS]
    assert splice(answer, Segment(1, 3), [20, EOS], {EOS}) == [10, 20, EOS]
    assert splice(answer, Segment(1, 3), [EOS, 21], {EOS}) == [10, EOS]
    assert splice(answer, Segment(1, 3), [20, 7], {EOS, 7}) == [10, 20, 7]
    assert splice(answer, Segment(3, 6), [13, 14, EOS], {EOS}) == answer


def test_buffer_draws_what_was_drawn_less():
    """Counts 0, 1, 3: probabilities 1/1.75, 0.5/1.75, 0.25/1.75; 5 sigma of n = 7000 draws."""
    buffer = ReplayBuffer(3)
    drawn: Counter[str] = Counter()
    for seed in range(7000):
        buffer.load_state_dict({"entries": ["a", "b", "c"], "times_sampled": [0, 1, 3]})
        (entry,) = buffer.sample(1, seeded(seed))
        drawn[entry] += 1
    for entry, p in (("a", 4 / 7), ("b", 2 / 7), ("c", 1 / 7)):
        assert abs(drawn[entry] - 7000 * p) < 5 * math.sqrt(7000 * p * (1 - p))


def test_buffer_keeps_the_newest_and_counts_by_place():
    """Two equal entries have a count each; what leaves takes its count with it."""
    buffer, entry = ReplayBuffer(2), {"chosen": [1]}
    buffer.push(entry)
    assert buffer.sample(5, seeded()) == [entry] * 5
    buffer.push(entry)
    assert buffer.state_dict()["times_sampled"] == [5, 0]
    buffer.push("x")
    assert buffer.state_dict() == {"entries": [entry, "x"], "times_sampled": [0, 0]}


MOVES = [("ema", [1.0, 1.0, 3.5, 3.5]), ("policy", [1.0, 1.0, 5.0, 5.0]), ("fixed", [1.0] * 4)]


@pytest.mark.parametrize(("mode", "expected"), MOVES)
def test_average_and_reference_by_hand(mode, expected):
    """θ = 1, 3, 5, 7 before steps 0..3, β = 0.5: θ_ema = 1, 2, 3.5, 5.25; the reference follows at 0 and 2."""
    policy = torch.nn.Linear(1, 2)
    policy.bias.requires_grad_(False)
    torch.nn.init.ones_(policy.weight)
    moving = MovingWeights(policy, ema_beta=0.5, ref_update_mode=mode, ref_sync_steps=2, needs_reference=True)
    averages, references = [], []
    for step, value in enumerate((1.0, 3.0, 5.0, 7.0)):
        torch.nn.init.constant_(policy.weight, value)
        moving.update(step)
        with moving.used(moving.average):
            averages.append(policy.weight[0].item())
            assert not policy.training
        with moving.used(moving.reference):
            references.append(policy.weight[1].item())
        assert policy.training
        assert (policy.weight == value).all()
    assert (averages, references) == ([1.0, 2.0, 3.5, 5.25], expected)
    assert moving.average.keys() == {"weight"}  # what is not trained is not kept


def test_autocast_sees_the_weights_that_are_used():
    """It keeps the cast of a parameter until its context ends."""
    policy = torch.nn.Linear(1, 1)
    moving = MovingWeights(policy, ema_beta=0.5, ref_update_mode="ema", ref_sync_steps=1, needs_reference=False)
    torch.nn.init.constant_(policy.weight, 8.0)
    one = torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        before = policy(one)
        with moving.used(moving.average):
            assert policy(one) != before
        assert policy(one) == before


class Echo:
    """Writes token 100 + row, as many as asked for, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def generate_ids(self, encoded, *, max_new_tokens, temperature, top_k, top_p, seed):
        self.calls.append((encoded, max_new_tokens, temperature, top_k, top_p))
        assert all(len(ids) + max_new_tokens <= 24 for ids in encoded), "past the model's positions"
        return [[100 + ids[0]] * max_new_tokens for ids in encoded]

    def ends(self):
        return {EOS}


def test_negatives_continue_each_beginning():
    """The third row's prefix leaves no room for the longest segment, 8: it is asked for its own 2 apart."""
    rows = [
        {"prompt_ids": [1], "chosen_ids": list(range(50, 70))},
        {"prompt_ids": [2, 2], "chosen_ids": [60, 61, EOS]},
        {"prompt_ids": [3] * 20, "chosen_ids": [70, 71]},
    ]
    writer = Echo()
    made = Regeneration(max_length=24, token_generate_length=8).negatives(rows, writer, seeded(3))
    (first, asked, *sampling), (second, least, *_) = writer.calls
    start = len(first[0]) - 1
    assert 0 < start <= 9
    assert first == [[1, *range(50, 50 + start)], [2, 2]]
    assert second == [[3] * 20]
    assert (asked, least, sampling) == (8, 2, [0.7, 50, 0.95])
    assert made[0] == [*range(50, 50 + start), *[101] * 8, *range(58 + start, 70)]
    assert made[1:] == [[102] * 3, [103] * 2]
