"""The README's table of ratios, drawn from the rows under bench_results/.

python -m benchmarks.report            # prints it
python -m benchmarks.report --write    # puts it into README.md
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- ratios: drawn by `python -m benchmarks.report --write` -->", "<!-- /ratios -->"
MIB = 2**20


def newest_rows() -> tuple[Path, list[dict]]:
    """The last file of rows by its date, and its rows."""
    path = max((ROOT / "bench_results").glob("*-cpu-ratios.jsonl"))
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def table() -> str:
    """Markdown: time in units of the bare products, and extra memory, for every contestant and shape."""
    path, rows = newest_rows()
    about = rows[0]
    lines = [
        f"Measured on a CPU ({about['cpu']}, {about['capability']}; torch {about['torch']}, cut-cross-entropy "
        f"{about['cut-cross-entropy']}; commit {about['commit']}; `{about['command']}`), medians of {about['rounds']} "
        f"alternating rounds; rows in [{path.name}](bench_results/{path.name}). The bare products are our schedule's "
        "1, 2, 3 or 4 GEMMs of the N tokens alone, chunk by chunk into fresh memory; every other contestant computes "
        "the same ASFT loss and its gradients. Plain torch forms the logits of all M positions, as a model's forward "
        "does; cut-cross-entropy and we compute the N that carry loss, and `torch_compile` is its implementation that "
        "runs on a CPU. Extra memory is the peak over what was resident before the call, the gradients it returns "
        "included.",
        "",
    ]
    for shape in dict.fromkeys((r["N"], r["M"], r["D"], r["V"]) for r in rows):
        N, M, D, V = shape
        lines += [
            f"N = {N} of {M} positions carry loss, D = {D}, V = {V}, fp32:",
            "",
            "| gradients | contestant | seconds | × bare products | extra MiB |",
            "| --- | --- | --- | --- | --- |",
        ]
        for r in rows:
            if (r["N"], r["M"], r["D"], r["V"]) == shape:
                lines.append(
                    f"| {r['work']} | {r['contestant']} | {r['seconds']:.3f} | {r['ratio']:.2f} "
                    f"| {r['extra_bytes'] / MIB:.0f} |"
                )
        lines.append("")
    return "\n".join(lines)


def written(readme: str) -> str:
    """The README with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    if parser.parse_args().write:
        readme = ROOT / "README.md"
        readme.write_text(written(readme.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
