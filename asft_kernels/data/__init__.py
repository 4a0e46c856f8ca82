"""Preference pairs from JSON lines to padded batches.

`load_pairs` reads a file into a `datasets.Dataset` of token ids and a `DataReport` that names every
row left out; `PairCollator` makes (2B, T) batches from it, chosen rows first.
"""

from asft_kernels.data.dialogue import Pair, parse_pair, render_pair
from asft_kernels.data.pairs import PairCollator, load_pairs, split_every_nth, tokenize_pair
from asft_kernels.data.rows import BadRow, DataReport, read_rows

__all__ = [
    "BadRow",
    "DataReport",
    "Pair",
    "PairCollator",
    "load_pairs",
    "parse_pair",
    "read_rows",
    "render_pair",
    "split_every_nth",
    "tokenize_pair",
]
