"""Labels -> tokens: shift, borders, masks, packing."""

import pytest
import torch

from asft_kernels import fused_linear_logps
from asft_kernels.core.batch import pack
from cases import IGNORE


def packed_rows(labels, cu_seqlens=None, shift=True, **more):
    batch = pack(labels, vocab=10, cu_seqlens=cu_seqlens, shift=shift, ignore_index=IGNORE, num_valid=None, **more)
    return batch.rows.tolist(), batch.labels.tolist(), batch.offsets.tolist()


def test_shift_padded():
    labels = torch.tensor([[1, 2, IGNORE, 3], [IGNORE, 4, IGNORE, IGNORE]])
    assert packed_rows(labels) == ([0, 2, 4], [2, 3, 4], [0, 2, 3])


def test_labels_that_the_caller_shifted():
    labels = torch.tensor([[1, 2, IGNORE, 3], [IGNORE, 4, IGNORE, IGNORE]])
    assert packed_rows(labels, shift=False) == ([0, 1, 3, 5], [1, 2, 3, 4], [0, 3, 4])


def test_a_label_never_crosses_a_border():
    """Position 1 ends the first sequence: the next sequence's first label is not its to predict."""
    labels = torch.tensor([1, 2, 3, 4, 5])
    assert packed_rows(labels, torch.tensor([0, 2, 5])) == ([0, 2, 3], [2, 4, 5], [0, 1, 3])


@pytest.mark.parametrize(
    ("borders", "rows", "offsets"),
    [
        ([0, 0, 2, 5], [0, 2, 3], [0, 0, 1, 3]),  # empty first
        ([0, 2, 2, 2, 5], [0, 2, 3], [0, 1, 1, 1, 3]),  # empty in between
        ([0, 2, 5, 5], [0, 2, 3], [0, 1, 3, 3]),  # empty last
        ([0, 0, 1, 1, 5], [1, 2, 3], [0, 0, 0, 0, 3]),  # empty around one of length 1: nothing to predict
    ],
)
def test_empty_and_short_sequences(borders, rows, offsets):
    got_rows, _, got_offsets = packed_rows(torch.arange(1, 6), torch.tensor(borders, dtype=torch.int32))
    assert (got_rows, got_offsets) == (rows, offsets)


def test_another_ignore_index():
    batch = pack(torch.tensor([[7, 0, 3]]), vocab=10, cu_seqlens=None, shift=False, ignore_index=0, num_valid=None)
    assert batch.labels.tolist() == [7, 3]


def test_bound_fills_up_with_distinct_masked_rows():
    labels = torch.tensor([[1, IGNORE, 3, IGNORE]])
    batch = pack(labels, vocab=10, cu_seqlens=None, shift=False, ignore_index=IGNORE, num_valid=3)
    assert batch.labels.tolist() == [1, 3, -1]
    assert sorted(batch.rows.tolist())[:1] == [0]
    assert len(set(batch.rows.tolist())) == 3
    assert batch.offsets.tolist() == [0, 2]


def test_two_label_sets_make_a_union():
    labels, more = torch.tensor([[IGNORE, 2, 3]]), torch.tensor([[1, 2, IGNORE]])
    assert packed_rows(labels, shift=False, extra_labels=more)[1] == [1, 2, 3]
    with pytest.raises(ValueError, match="nll_labels: got another label than labels"):
        packed_rows(labels, shift=False, extra_labels=torch.tensor([[1, 9, IGNORE]]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int64], ids=str)
def test_integer_dtypes(dtype):
    labels = torch.tensor([[1, 2, 3]]).to(dtype)
    assert packed_rows(labels)[1] == [2, 3]


def test_spread_returns_to_the_callers_shape():
    labels = torch.tensor([[1, IGNORE, 3], [IGNORE, 2, IGNORE]])
    batch = pack(labels, vocab=10, cu_seqlens=None, shift=False, ignore_index=IGNORE, num_valid=None)
    assert batch.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 0, 2], [0, 3, 0]]


def test_values_at_labels_follow_the_shift():
    labels = torch.tensor([[IGNORE, 5, 6]])
    batch = pack(labels, vocab=10, cu_seqlens=None, shift=True, ignore_index=IGNORE, num_valid=None)
    assert batch.take_at_labels(torch.tensor([[0.1, 0.5, 0.6]])).tolist() == pytest.approx([0.5, 0.6])


def test_logps_stand_at_the_predicting_position():
    """Label t+1's log-probability at index t; the last of each sequence 0."""
    hidden, weight = torch.randn(7, 3), torch.randn(10, 3)
    labels, cu_seqlens = torch.randint(10, (7,)), torch.tensor([0, 3, 7])
    got = fused_linear_logps(hidden, weight, labels, cu_seqlens=cu_seqlens)
    every = (hidden @ weight.T).log_softmax(-1)
    for t in range(7):
        expected = 0.0 if t in (2, 6) else every[t, labels[t + 1]].item()
        assert got[t].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 77, 3, 4]}, "labels: got a value outside 0 to 9"),
        ({"labels": [1, -5, 3, 4]}, "labels: got a value outside 0 to 9"),
        ({"cu_seqlens": [0, 3, 2, 4]}, "cu_seqlens: got borders that do not go in order"),
        ({"cu_seqlens": [0, 2, 3]}, "cu_seqlens: got borders that do not go in order"),
        ({"cu_seqlens": [0, 2, 9]}, "cu_seqlens: got borders that do not go in order"),
        ({"cu_seqlens": [1, 2, 4]}, "cu_seqlens: got borders that do not go in order"),
        ({"extra_labels": [1, 2, 4, 4]}, "nll_labels: got another label than labels"),
        ({"num_valid": 2}, "num_valid: got a bound below the number of valid labels"),
    ],
)
def test_the_same_checks_without_a_read(change, message):
    """With num_valid given they are assertions on the device."""
    inputs = {"labels": [1, 2, 3, 4], "cu_seqlens": [0, 2, 4]}
    inputs = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in (inputs | change).items()}
    with pytest.raises(RuntimeError, match=message):
        pack(**({"num_valid": 4, "vocab": 10, "shift": False, "ignore_index": IGNORE} | inputs))


def test_everything_masked_with_a_bound():
    labels = torch.full((2, 3), IGNORE)
    batch = pack(labels, vocab=10, cu_seqlens=None, shift=True, ignore_index=IGNORE, num_valid=2)
    assert batch.offsets.tolist() == [0, 0, 0]
