"""Hold one or several models against preference pairs, in one report.

asft eval --model_name_or_path BEFORE --model AFTER --dataset_name pairs.jsonl --output_dir evaluation

Preference accuracy, margins, lengths, and BLEU-4 and ROUGE-L of greedily generated answers against the chosen ones,
with standard errors; several models are compared pair by pair. Writes report.md, report.json and pictures. What is
scored and generated stays on disk: the same command goes on where a run stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from asft_kernels.cli import frame
from asft_kernels.locks import only_writer


def parser() -> frame.CommandParser:
    """Makes the parser of `asft eval`."""
    parser = frame.CommandParser(prog="asft eval", description=__doc__)
    frame.add_model_and_data(parser, several_models=True)
    add = parser.add_argument
    add("--split", default="train", help="of data sets that have several")
    add("--output_dir", "--output", dest="output", required=True, metavar="DIR", help="folder for rows and report")
    add("--max_pairs", type=frame.positive, help="the first so many pairs; default: all")
    add("--batch_size", type=frame.positive, default=8, help="pairs scored, or prompts continued, together")
    add("--max_length", type=int, default=1024, help="tokens of prompt and answer; longer answers are cut")
    add("--max_new_tokens", type=frame.positive, default=256, help="of a generated answer; longer ones are cut")
    add("--no_generate", dest="generate", action="store_false", help="log-probabilities and lengths alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asft eval`.

    Args:
        argv: its words; None: those of the process.

    Returns:
        The exit code, as `frame.run` says.
    """
    args = parser().parse_args(argv)

    def body() -> None:
        frame.require(("tqdm", "transformers", "datasets", "trl", "matplotlib", "sacrebleu", "rouge_score"))
        frame.make_folder("--output_dir", args.output)
        from asft_kernels.evaluation.run import run

        with only_writer(Path(args.output) / "eval.lock", "--output_dir", args.output):
            run(args)

    return frame.run("asft eval", body, stopped="what is scored and generated is kept, the same command goes on")
