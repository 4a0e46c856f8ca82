"""Score preference pairs under one or more causal language models.

asft score --model_name_or_path org/first --model org/second --dataset_name pairs.jsonl.gz --output_dir scores

Writes log-probabilities of both answers, one Parquet file a model. A run that was stopped goes on when started again.
"""

from collections.abc import Sequence

from asft_kernels.cli import frame


def parser() -> frame.CommandParser:
    """Makes the parser of `asft score`."""
    parser = frame.CommandParser(prog="asft score", description=__doc__)
    frame.add_model_and_data(parser, several_models=True)
    add = parser.add_argument
    add("--output_dir", "--output", dest="output", required=True, metavar="DIR", help="folder for the files")
    add("--batch_size", type=frame.positive, default=8, help="pairs, not rows")
    add("--max_length", type=int, default=1024, help="tokens of prompt and answer; longer answers are cut")
    add("--token_logps", action="store_true", help="also one log-probability a token")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asft score`.

    Args:
        argv: its words; None: those of the process.

    Returns:
        The exit code, as `frame.run` says.
    """
    args = parser().parse_args(argv)

    def body() -> None:
        frame.require(("tqdm", "transformers", "datasets", "trl"))
        frame.make_folder("--output_dir", args.output)
        from asft_kernels.score.run import run

        run(args)

    return frame.run("asft score", body, stopped="what is scored is kept, the same command goes on from there")
