"""DNPO, Dynamic Noise Preference Optimization, arXiv 2502.05400, on pairs of human and generated answers.

    python -m asft_kernels.methods.dnpo --model FOLDER --data pairs.jsonl --max-steps 40 --output-dir run

One iteration: the reference is the model as it came. Answers are generated beforehand, labelled by
`asft-data dnpo`; --model of the next iteration is --output-dir of this one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asft_kernels.train import missing_extra

NEEDED = ("transformers", "datasets", "accelerate", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input (said on stderr), 130 stopped by Ctrl-C."""
    options = _parser().parse_args(argv)
    if problem := missing_extra(NEEDED):
        print(f"dnpo: {problem}", file=sys.stderr)
        return 2
    from asft_kernels.methods.dnpo.run import run

    try:
        return 0 if run(options) else 130
    except ValueError as error:  # of arguments, data, model and objective, each with its text
        print(f"dnpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "dnpo: interrupted; --resume goes on from the last checkpoint, if it came to one",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m asft_kernels.methods.dnpo",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=formatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of a causal language model: the start, and the reference")
    add("--data", required=True, help="pairs of preferred and other answers, in any format that asft-train reads")
    add(
        "--output-dir",
        type=Path,
        default=Path("dnpo-run"),
        help="model, tokenizer, metrics, settings, checkpoint",
    )
    add("--max-steps", type=_positive, help="steps of model and noise; None: one pass over the pairs")
    add("--save-steps", type=_positive, default=100, help="steps between checkpoints: what a killed run may lose")
    add("--resume", action="store_true", help="go on from the checkpoint in --output-dir, with the same settings")
    add("--batch-size", type=_positive, default=4, help="pairs in a step")
    add("--eval-every-nth", type=int, help="N: hold out every Nth line of --data")
    add("--learning-rate", type=float, default=2e-5, help="of the model")
    add("--noise-learning-rate", type=float, default=1e-4, help="of the noise")
    add("--lam", type=float, default=0.1, help="scale of the margin")
    add("--alpha", type=float, default=1.0, help="weight of the noise's mean square")
    add("--max-length", type=int, default=1024, help="tokens of prompt and answer; longer answers are cut")
    add("--max-prompt-length", type=int, default=512, help="tokens; pairs with a longer prompt are left out")
    add("--seed", type=int, default=0, help="of the order of pairs, the noise and dropout")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, need at least 1")
    return value
