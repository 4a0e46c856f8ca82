"""SAPO, Self-Augmented Preference Optimization, arXiv 2405.20830: negatives that the model writes itself.

    python -m asft_kernels.methods.sapo --model FOLDER --data chosen.jsonl --objective dpo --output-dir run

(Not Soft Adaptive Policy Optimization, arXiv 2511.20347, an RL loss that other projects call by this name.)
Data: prompts and chosen answers; of pairs, these.
"""

# segments -> negatives -> buffer, ema -> trainer -> run
import sys
from collections.abc import Sequence

from asft_kernels.train import missing_extra


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 done, 2 bad input (said on stderr), 130 stopped by Ctrl-C."""
    if problem := missing_extra():
        print(f"sapo: {problem}", file=sys.stderr)
        return 2
    from asft_kernels.errors import InputError
    from asft_kernels.methods.sapo.arguments import SapoArguments
    from asft_kernels.methods.sapo.run import run
    from asft_kernels.train.parser import training_parser

    parser = training_parser(SapoArguments, prog="python -m asft_kernels.methods.sapo", description=__doc__)
    try:
        job, args = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        print(f"sapo: {error}", file=sys.stderr)
        return 2
    try:
        return 130 if run(job, args) else 0
    except InputError as error:
        print(f"sapo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sapo: interrupted; checkpoints in --output-dir stay, --resume goes on from them", file=sys.stderr)
        return 130
