"""Inputs of the data commands, made by the model itself: scored pairs, and sampled answers with rewards.

    python -m benchmarks.method_data scored PAIRS OUT --scores FILE         # for asft data rad
    python -m benchmarks.method_data candidates PAIRS OUT --model FOLDER    # answers two by two, for asft score
    python -m benchmarks.method_data rewarded PAIRS OUT --scores FILE       # of those: for asft data rso

No reward model is at hand. In its place stands p, the geometric mean of an answer's token probabilities under the model
as it came, on the scale of reward-augmented data: 1 + 9 p. That is enough to run the commands on real texts; what comes
of training on such rewards says nothing of the methods' worth.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asft_kernels.data import BadRow, parse_pair, read_rows

SIDES = ("chosen", "rejected")
CANDIDATES, NEW_TOKENS = 4, 32  # sampled for each prompt, and tokens of one at most
TOGETHER = 8  # prompts in a batch
SAMPLING = {"temperature": 0.7, "top_k": 40}  # of RSO's authors

Row = dict[str, Any]


def rewards(scores: Path) -> dict[int, list[float]]:
    """Of chosen and rejected, by the line of the pair; scores: a file of asft score."""
    from pyarrow import parquet

    return {
        row["line"]: [1 + 9 * math.exp(row[f"{side}_logps"] / row[f"{side}_length"]) for side in SIDES]
        for row in parquet.read_table(scores).to_pylist()
        if all(row[f"{side}_length"] for side in SIDES)
    }


def scored(pairs: Path, scores: Path) -> Iterator[Row]:
    """The pairs that have scores, with them."""
    found = rewards(scores)
    for line, row in read_rows(pairs):
        if not isinstance(row, BadRow) and line in found:
            yield row | dict(zip((f"{side}_score" for side in SIDES), found[line], strict=True))


def candidates(pairs: Path, model: str) -> Iterator[Row]:
    """CANDIDATES answers to the prompt of every pair, two in a row."""
    from tqdm import tqdm

    from asft_kernels.models.generation import TransformersGenerator

    prompts = []
    for _, row in read_rows(pairs):
        try:
            if not isinstance(row, BadRow):
                prompts.append(parse_pair(row).messages)
        except BadRow:
            continue
    generator = TransformersGenerator.from_pretrained(model, batch_size=CANDIDATES * TOGETHER)
    for start in tqdm(range(0, len(prompts), TOGETHER), "candidates"):
        asked = [prompt for prompt in prompts[start : start + TOGETHER] for _ in range(CANDIDATES)]
        texts = generator.generate(asked, max_new_tokens=NEW_TOKENS, seed=start, **SAMPLING)
        for i in range(0, len(texts), len(SIDES)):
            yield {"prompt": asked[i], **dict(zip(SIDES, texts[i : i + len(SIDES)], strict=True))}


def rewarded(pairs: Path, scores: Path) -> Iterator[Row]:
    """What `candidates` wrote, a row a prompt, with rewards; rows without scores (an empty answer) are left out."""
    found = rewards(scores)
    prompts: dict[str, Row] = {}
    for line, row in read_rows(pairs):
        if isinstance(row, BadRow) or line not in found:
            continue
        of_prompt = prompts.setdefault(
            json.dumps(row["prompt"]), {"prompt": row["prompt"], "responses": [], "rewards": []}
        )
        of_prompt["responses"] += [row[side] for side in SIDES]
        of_prompt["rewards"] += found[line]
    yield from prompts.values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scored", "candidates", "rewarded"))
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--scores", type=Path, help="file of asft score for these pairs")
    given.add_argument("--model", help="folder or hub name of the model that answers")
    args = parser.parse_args()
    if (args.what == "candidates") != (args.scores is None):
        parser.error("candidates takes --model, the others take --scores")
    if args.what == "candidates":
        rows = candidates(args.pairs, args.model)
    else:
        rows = {"scored": scored, "rewarded": rewarded}[args.what](args.pairs, args.scores)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
