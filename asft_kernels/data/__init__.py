"""Preference pairs from files or the hub to token ids as TRL's trainers take them.

`load_pairs` reads names of data into a `datasets.Dataset` of ids and a `DataReport` that names every row left out.
splits finds files, rows and stored read them, pair understands a row, tokens encodes it, reference keeps what it says
of a reference model, report counts, pairs puts them together.
"""

from asft_kernels.data.pair import Pair, parse_pair
from asft_kernels.data.pairs import load_pairs, pair_id, split_every_nth, with_labels
from asft_kernels.data.report import DataReport
from asft_kernels.data.rows import BadRow, read_rows
from asft_kernels.data.tokens import PairTokenizer, Tokens

__all__ = [
    "BadRow",
    "DataReport",
    "Pair",
    "PairTokenizer",
    "Tokens",
    "load_pairs",
    "pair_id",
    "parse_pair",
    "read_rows",
    "split_every_nth",
    "with_labels",
]
