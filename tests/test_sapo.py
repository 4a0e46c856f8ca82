"""SAPO's parts: segments, replay buffer, moving models, and the negatives that come of them."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asft_kernels.methods.sapo.buffer import ReplayBuffer
from asft_kernels.methods.sapo.ema import MovingModels
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
    n = segment.end - segment.start
    assert n == min(longest, length, room)
    assert segment.start >= 0
    assert segment.end <= min(length, room)
    assert segment.start == 0 or length - segment.end >= 3
    if length <= longest + 3:
        assert segment.start == 0
    assert segment == choose_segment(length, longest=longest, room=room, generator=seeded(seed))


def test_segment_start_is_uniform():
    """m = 10, n = 4: M = 3, t in {0, 1, 2, 3}; chi-squared of 3 degrees passes 16.3 once in a thousand seeds."""
    generator, draws = seeded(), 4000
    starts = Counter(choose_segment(10, longest=4, room=10, generator=generator).start for _ in range(draws))
    assert set(starts) == {0, 1, 2, 3}
    assert sum((n - draws / 4) ** 2 / (draws / 4) for n in starts.values()) < 16.3


def test_segment_whose_bound_is_below_zero_begins_the_answer():
    """The prompt leaves 5 of the answer's 20 tokens: the authors' code raises here."""
    assert choose_segment(20, longest=8, room=5, generator=seeded()) == Segment(0, 5)
    assert choose_segment(20, longest=4, room=5, generator=seeded()).start in (0, 1)


tokens = st.integers(2, 40)


@given(data=st.data(), answer=st.lists(tokens, min_size=1, max_size=30))
def test_splice_leaves_what_stands_around_the_segment(data, answer):
    start = data.draw(st.integers(0, len(answer)))
    segment = Segment(start, data.draw(st.integers(start, len(answer))))
    n = segment.end - segment.start
    written = data.draw(st.lists(st.one_of(tokens, st.just(EOS)), min_size=n, max_size=n + 4))
    result = splice(answer, segment, written, {EOS})
    assert result[:start] == answer[:start]
    if EOS in written[:n]:
        end = written.index(EOS) + 1
        assert result[start:] == written[:end]
    else:
        assert result[start:] == written[:n] + answer[segment.end :]
        assert len(result) == len(answer)
    assert splice(answer, segment, answer[start : segment.end], {EOS}) == answer


def test_splice_by_hand():
    answer = [10, 11, 12, 13, 14, EOS]
    assert splice(answer, Segment(1, 3), [20, 21], {EOS}) == [10, 20, 21, 13, 14, EOS]
    assert splice(answer, Segment(1, 3), [20, EOS], {EOS}) == [10, 20, EOS]
    assert splice(answer, Segment(1, 3), [EOS, 21], {EOS}) == [10, EOS]
    assert splice(answer, Segment(1, 3), [20, 7], {EOS, 7}) == [10, 20, 7]
    assert splice(answer, Segment(3, 6), [13, 14, EOS], {EOS}) == answer


def test_buffer_keeps_the_newest():
    buffer = ReplayBuffer(3)
    for entry in "abcde":
        buffer.push(entry)
    assert buffer.state_dict() == {"entries": ["c", "d", "e"], "times_sampled": [0, 0, 0]}


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


def test_buffer_counts_by_place_and_goes_on_from_its_state():
    """Two equal entries have a count each; what leaves takes its count with it."""
    buffer, entry = ReplayBuffer(2), {"chosen": [1]}
    buffer.push(entry)
    generator = seeded()
    assert buffer.sample(5, generator) == [entry] * 5
    buffer.push(entry)
    assert buffer.state_dict()["times_sampled"] == [5, 0]
    buffer.sample(3, generator)
    later = ReplayBuffer(2)
    later.load_state_dict(buffer.state_dict())
    again = seeded()
    again.set_state(generator.get_state())
    buffer.push("x"), later.push("x")
    assert [buffer.sample(4, generator) for _ in range(3)] == [later.sample(4, again) for _ in range(3)]
    assert buffer.state_dict() == later.state_dict()


def weight(module) -> float:
    return module.weight.item()


def scalar(value: float) -> torch.nn.Linear:
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(linear.weight, value)
    return linear


def test_average_and_reference_by_hand():
    """θ = 1, 3, 5, 7 before steps 0..3, β = 0.5: θ_ema = 1, 2, 3.5, 5.25; the reference follows at 0 and 2."""
    policy = scalar(1.0)
    models = MovingModels(policy, ema_beta=0.5, ref_sync_steps=2)
    averages, references = [], []
    for step, value in enumerate((1.0, 3.0, 5.0, 7.0)):
        torch.nn.init.constant_(policy.weight, value)
        models.update(policy, step)
        averages.append(weight(models.ema))
        references.append(weight(models.reference))
    assert averages == [1.0, 2.0, 3.5, 5.25]
    assert references == [1.0, 1.0, 3.5, 3.5]
    assert not any(p.requires_grad for p in [*models.average.parameters(), *models.reference.parameters()])


@pytest.mark.parametrize(("mode", "expected"), [("policy", [1.0, 1.0, 5.0]), ("fixed", [1.0, 1.0, 1.0])])
def test_other_references(mode, expected):
    policy = scalar(1.0)
    models = MovingModels(policy, ref_update_mode=mode, ref_sync_steps=2)
    references = []
    for step, value in enumerate((1.0, 3.0, 5.0)):
        torch.nn.init.constant_(policy.weight, value)
        models.update(policy, step)
        references.append(weight(models.reference))
    assert references == expected


def test_moving_models_go_on_from_their_state():
    """A third update averages: the state says that it is not the first."""
    policy = scalar(1.0)
    models = MovingModels(policy, ref_sync_steps=2)
    for step in range(2):
        models.update(policy, step)
    later = MovingModels(scalar(9.0), ref_sync_steps=2)
    later.load_state_dict(models.state_dict())
    assert weight(later.reference) == 1.0
    torch.nn.init.constant_(policy.weight, 4.0)
    later.update(policy, 2)
    assert (weight(later.ema), weight(later.reference)) == (2.5, 2.5)
    assert MovingModels(policy, needs_reference=False).state_dict()["reference"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_beta": 1.0}, r"ema_beta: got 1.0, need a number from 0 to below 1"),
        ({"ema_beta": math.nan}, r"ema_beta: got nan"),
        ({"ref_sync_steps": 0}, r"ref_sync_steps: got 0, need at least 1 step"),
        ({"ref_update_mode": "both"}, r"ref_update_mode: got 'both', need one of 'ema', 'policy', 'fixed'"),
    ],
)
def test_moving_models_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        MovingModels(scalar(1.0), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_generate_length": 0}, r"token_generate_length: got 0, need at least 1 token"),
        ({"temperature": 0.0}, r"temperature: got 0.0, need a number > 0: negatives are sampled"),
        ({"top_p": 0.0}, r"top_k, top_p: got 50, 0.0; need"),
    ],
)
def test_regeneration_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Regeneration(max_length=8, **options)


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
        {"prompt": [1], "chosen": list(range(50, 70))},
        {"prompt": [2, 2], "chosen": [60, 61, EOS]},
        {"prompt": [3] * 20, "chosen": [70, 71]},
    ]
    writer = Echo()
    made = Regeneration(max_length=24, token_generate_length=8).negatives(rows, writer, seeded(3))
    (first, asked, *sampling), (second, least, *_) = writer.calls
    start = len(first[0]) - 1
    assert 0 < start <= 9
    assert first == [[1, *range(50, 50 + start)], [2, 2]]
    assert second == [[3] * 20]
    assert (asked, least) == (8, 2)
    assert sampling == [0.7, 50, 0.95]
    assert made[0] == [*range(50, 50 + start), *[101] * 8, *range(58 + start, 70)]
    assert made[1:] == [[102] * 3, [103] * 2]
