"""What tests of the train extra begin with: its packages, and the marks of modules that train.

`pytest.importorskip("train_extra")` skips a module where one of the packages is missing, and says which.
"""

import datasets  # noqa: F401
import matplotlib  # noqa: F401
import pytest
import transformers  # noqa: F401
import trl  # noqa: F401

QUIET = [  # peft 0.21 and trl ask for names that transformers renamed; nothing of ours does
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
