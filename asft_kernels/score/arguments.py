"""The arguments of `asft-score`."""

import argparse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="asft-score",
        description="Score preference pairs under one or more causal language models: log-probabilities of both "
        "answers, one Parquet file a model. A run that was stopped goes on when started again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--data", required=True, help="pairs: JSON lines (.gz too), Parquet, Arrow, or a folder of datasets")
    p.add_argument("--model", required=True, action="append", help="folder or hub name; once for each model")
    p.add_argument("--output", required=True, help="folder for the files")
    p.add_argument("--batch-size", type=_positive, default=8, help="pairs, not rows")
    p.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and answer; longer answers are cut")
    p.add_argument("--max-prompt-length", type=int, default=512, help="tokens; pairs with a longer prompt are left out")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "auto"], default="float32", help="of the weights")
    p.add_argument("--token-logps", action="store_true", default=False, help="also one log-probability a token")
    return p


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least 1")
    return int(text)
