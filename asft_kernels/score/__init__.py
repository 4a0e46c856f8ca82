"""`asft-score`: log-probabilities of preference pairs under reference models, once, ahead of training.

asft-score --data pairs.jsonl.gz --model FOLDER --model org/name --output scores

scoring (one model, batch by batch) -> unfinished (rows so far, on disk) -> table (Parquet files, and
`load_scores` and `mean_avg_logps` for those who train with them); run puts them together.
"""

import sys
from collections.abc import Sequence

from asft_kernels.score.arguments import parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input (said on stderr), 130 stopped by Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        import datasets  # noqa: F401
        import tqdm  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        print(f'asft-score: {error}; pip install "asft_kernels[train]"', file=sys.stderr)
        return 2
    import torch

    from asft_kernels.errors import InputError
    from asft_kernels.score.run import run

    try:
        run(args)
    except InputError as error:
        print(f"asft-score: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            f"asft-score: --batch-size: got {args.batch_size}, more than the device has memory for; need a smaller "
            "one: the command then goes on where it stopped",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("asft-score: stopped; what is scored is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0
