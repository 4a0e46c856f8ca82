"""Autoencoders of `asft data sae`, its defaults but for --l1: the table in docs/objectives/fpo.md.

    python -m benchmarks.autoencoder --model FOLDER --data pairs.jsonl.gz    # trains, adds rows, draws the table
    python -m benchmarks.autoencoder                                         # draws it from the rows that are there

Rows go to bench_results/autoencoder/rows.jsonl: what the command itself writes beside each autoencoder.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import about, require
from benchmarks.method_files import asft, run
from benchmarks.run import append, rows_of
from benchmarks.tables import markdown, sources

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "bench_results" / "autoencoder" / "rows.jsonl"
PAGE = ROOT / "docs" / "objectives" / "fpo.md"
BEGIN, END = "<!-- figures: drawn by `python -m benchmarks.autoencoder` -->", "<!-- /figures -->"
PATHS = ("model", "data", "output")  # settings that are paths of the machine that measured
HEADER = ["`--l1`", "explained variance", "features a token", "dead"]


def measure(model: Path, data: Path, l1: float, work: Path) -> dict[str, Any]:
    output = work / "sae.safetensors"
    given = ("--model", str(model), "--data", str(data), "--output", str(output), "--l1", f"{l1:g}")
    run(asft("data", "sae", *given), work / "log")
    made = json.loads(output.with_name(output.name + ".json").read_text())
    made["settings"] = {name: value for name, value in made["settings"].items() if name not in PATHS}
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    return {"model": model.name, "data": data.name, "data_sha256": digest, **made}


def line(row: dict[str, Any]) -> list[str]:
    held_out = row["held_out"]
    return [
        f"{row['settings']['l1']:g}",
        f"{held_out['explained_variance']:.3f}",
        f"{held_out['l0']:.0f}",
        f"{held_out['dead']:.1%}",
    ]


def text(rows: list[dict[str, Any]]) -> str:
    """The table, what it was measured on, and where. The rows differ in --l1 alone."""
    if not rows:
        return "Explained variance, features a token and dead features: not measured yet."
    first = rows[0]
    same = [{**row["settings"], "l1": None, **{name: row[name] for name in ("model", "data_sha256")}} for row in rows]
    if any(settings != same[0] for settings in same):
        raise ValueError(f"rows: got {same}, need rows that differ in --l1 alone")
    settings = first["settings"]
    layer = "input of the head" if settings["layer"] < 0 else f"output of block {settings['layer']}"
    return "\n".join(
        [
            f"{first['model']}, {layer}, on {first['data']} (sha256 {first['data_sha256'][:12]}…): "
            f"{settings['features']:,} features, {first['training_tokens']:,} tokens, {first['steps_done']} steps of "
            f"{settings['batch_size']:,}. Figures of {first['held_out']['tokens']:,} tokens of held-out pairs.",
            "",
            *markdown(HEADER, [line(row) for row in sorted(rows, key=lambda row: -row["settings"]["l1"])], words=1),
            "",
            sources([{**row, "file": ROWS.name} for row in rows], "../../bench_results/autoencoder/"),
        ]
    )


def written(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text(rows)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="preference pairs, as the command takes them")
    parser.add_argument("--l1", type=float, nargs="+", default=[5.0, 2.0], help="one row each; default 5 2")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model, --data: got one of them, need both to measure, or neither to draw")
    if args.model is not None:
        require("transformers", "datasets")
        words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]  # names for paths
        facts = about("cpu", "benchmarks.autoencoder", words)
        done = {row["settings"]["l1"] for row in rows_of(ROWS)}
        for l1 in (l1 for l1 in args.l1 if l1 not in done):
            with tempfile.TemporaryDirectory() as work:
                append(ROWS, [{**measure(args.model, args.data, l1, Path(work)), "about": facts}])
    PAGE.write_text(written(PAGE.read_text(), rows_of(ROWS)))
    print(f"{PAGE} is written")


if __name__ == "__main__":
    main()
