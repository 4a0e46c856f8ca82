"""Fields of rows and values of options that several data commands read."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from asft_kernels.data import BadRow, Pair, parse_pair
from asft_kernels.data.pair import Text
from asft_kernels.data.rows import json_type


def field_of(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRow(f"missing key '{name}'", f"the row has {', '.join(row) or 'none'}")
    return row[name]


def finite(value: Any, name: str) -> float:
    """`value` if it is a finite number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("wrong type", f"{name}: got {json_type(value)}, need a number")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        is_finite = False
    if not is_finite:
        raise BadRow("number that is not finite", f"{name}: got {str(value)[:20]}")
    return value


def prompt_of(pair: Pair) -> Text:
    """A plain prompt as its text; chats and dialogues as messages."""
    return pair.messages if pair.is_dialogue else pair.prompt


def parse_prompt(prompt: Any) -> Pair:
    """A prompt without answers, understood and checked as one that has them."""
    if prompt is None:
        raise BadRow("wrong type", "prompt: got null, need a string or a list of messages")
    return parse_pair({"prompt": prompt, "chosen": "-", "rejected": "-"})


def whole(least: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least {least}")
        return value

    return parse
