"""Predicts time, bytes on the wire and memory of the lm_head's step on 1 to 1024 H100s. Nothing here is a measurement.

python -m benchmarks.distributed_model            # prints the tables of docs/distributed.md, which says what is assumed
python -m benchmarks.distributed_model --write    # puts them there, and draws its pictures
"""

import argparse
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import MODELS
from benchmarks.collectives import INFINIBAND, NODE, NVLINK, Group, packed
from benchmarks.distributed_schemes import (
    FP32,
    MEGATRON,
    OPTIMISTIC,
    SCHEMES,
    TOKENS,
    TWICE,
    VOCABULARY,
    Step,
    megatron_lm,
    tensor_parallel,
    vocabulary,
)
from benchmarks.gpu_model import H100
from benchmarks.gpu_schedule import BF16
from benchmarks.plots import COLOURS, MARKERS, plain
from benchmarks.tables import GIB, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOC = Path(__file__).parents[1] / "docs" / "distributed.md"
BEGIN = "<!-- predictions: made by `python -m benchmarks.distributed_model --write` -->"
END = "<!-- /predictions -->"
HEADS = {"Llama-3-8B": MODELS["Llama-3-8B"], "Llama-3-70B": (128256, 8192)}  # vocabulary, hidden size
LARGE = "Llama-3-70B"
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TABLED = (1, 8, 64, 1024)
GROUP_TOKENS = 16384  # of the one group whose size grows
MEMORY_PICTURE, TIME_PICTURE = "distributed-memory.png", "distributed-time.png"
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": COLOURS[i % len(COLOURS)] if i < len(COLOURS) else "0.45", "marker": MARKERS[i]}
    for i, name in enumerate(SCHEMES)
}


@cache
def steps() -> dict[tuple[str, str, int], Step]:
    """By model, scheme and ranks: what tables and pictures are drawn from."""
    return {
        (model, name, ranks): scheme(D, V, ranks)
        for model, (V, D) in HEADS.items()
        for name, scheme in SCHEMES.items()
        for ranks in RANKS
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def columns(lines: list[list[float]], style: str) -> list[list[str]]:
    """Figures as printed, the smallest of each column bold."""
    printed = [[format(x, style) for x in line] for line in lines]
    least = [min(column, key=float) for column in zip(*printed, strict=True)]
    return [[f"**{x}**" if x == best else x for x, best in zip(line, least, strict=True)] for line in printed]


def memory_table() -> list[str]:
    """Terms on the ranks of a node, and totals."""
    of = {(name, ranks): steps()[LARGE, name, ranks].memory for name in SCHEMES for ranks in TABLED}
    at_node = [of[name, NODE] for name in SCHEMES]
    parts = [[m.weights, m.gradient, m.exponentials, m.buffers] for m in at_node]
    totals = columns([[of[name, ranks].total / GIB for ranks in TABLED] for name in SCHEMES], ".2f")
    lines = [
        [name, *(f"{x / GIB:.2f}" for x in terms), *total]
        for name, terms, total in zip(SCHEMES, parts, totals, strict=True)
    ]
    head = ["scheme", "weights", "gradient", "exponentials", "buffers", *(f"all on {ranks}" for ranks in TABLED)]
    return markdown(head, lines, words=1)


def time_table(model: str) -> list[str]:
    of = {(name, ranks): steps()[model, name, ranks] for name in SCHEMES for ranks in TABLED}
    times = columns([[1e3 * of[name, ranks].seconds for ranks in TABLED] for name in SCHEMES], ".1f")
    wires = columns([[of[name, ranks].wire / 1e9 for ranks in TABLED[1:]] for name in SCHEMES], ".2f")
    compute = [f"{1e3 * of[name, NODE].compute:.1f}" for name in SCHEMES]
    lines = [[name, c, *t, *w] for name, c, t, w in zip(SCHEMES, compute, times, wires, strict=True)]
    head = ["scheme", f"compute on {NODE}, ms", *(f"step on {ranks}, ms" for ranks in TABLED)]
    return markdown([*head, *(f"GB on the wire, {ranks}" for ranks in TABLED[1:])], lines, words=1)


def group_table() -> list[str]:
    """One group whose tokens stay the same, of more and more ranks: ours, Megatron-LM's."""
    lines = []
    for model, (V, D) in HEADS.items():
        for size in RANKS:
            both = [step(GROUP_TOKENS, D, V, packed(size), Group(1, 1)) for step in (vocabulary, megatron_lm)]
            cells = [[f"{1e3 * s.seconds:.1f}", f"{s.wire / 1e6:.0f}", f"{s.memory.total / GIB:.2f}"] for s in both]
            lines.append([model, f"{size}", *cells[0], *cells[1]])
    head = [f"{who}{what}" for who in ("", "Megatron-LM, ") for what in ("ms", "MB on the wire", "GiB")]
    return markdown(["model", "ranks", *head], lines, words=1)


def peer_sentence() -> str:
    """Vocabulary parallel on a node beside Megatron-LM, at both rates of our product with the epilogue."""
    found = []
    N, group, replicas = tensor_parallel(NODE)
    for model, (V, D) in HEADS.items():
        slow = steps()[model, VOCABULARY, NODE].seconds
        fast = vocabulary(N, D, V, group, replicas, share=OPTIMISTIC).seconds
        peer = steps()[model, MEGATRON, NODE].seconds
        found.append(f"{model} {1e3 * fast:.1f} to {1e3 * slow:.1f} ms, Megatron-LM's {1e3 * peer:.1f}")
    return (
        f"*Predicted.* Vocabulary parallel on {NODE} ranks, from the optimistic to the pessimistic rate of "
        f"[gpu-model.md](gpu-model.md): {'; '.join(found)}."
    )


def hidden_from() -> str:
    """Tokens a rank from which a chunk's collective takes no longer than its products: N R D operations, R D bytes."""
    rate = H100.peak * H100.library
    come = rate * BF16 / (2 * 2 * NVLINK)  # two products
    leave = rate * FP32 / (2 * NVLINK)  # one
    return (
        f"*Predicted.* Inside a node, products at the library's rate hide the chunks of a streamed head from "
        f"{come:.0f} tokens a rank on and those of dW, in fp32, from {leave:.0f}, whatever V and D."
    )


def tables() -> str:
    blocks = [
        f"*Predicted.* GiB a rank for the head of {LARGE}, {TOKENS} tokens a rank: what it is made of on {NODE} ranks, "
        f"and all of it on {', '.join(map(str, TABLED))}:",
        "\n".join(memory_table()),
        f"![memory a rank]({MEMORY_PICTURE})",
    ]
    for model in HEADS:
        blocks += [
            f"*Predicted.* {model}, {TOKENS} tokens a rank: products and passes, the whole step of the head, and what "
            "a rank sends:",
            "\n".join(time_table(model)),
        ]
    blocks += [
        f"![time of a step]({TIME_PICTURE})",
        peer_sentence(),
        hidden_from(),
        f"*Predicted.* One vocabulary-parallel group of {GROUP_TOKENS} tokens, of more and more ranks:",
        "\n".join(group_table()),
        f"Rates of a ring: {NVLINK / 1e9:.1f} GB/s inside a node, {min(NVLINK, NODE * INFINIBAND) / 1e9:.1f} through "
        f"all {NODE} adapters of each node, {INFINIBAND / 1e9:.0f} through one.",
    ]
    return "\n\n".join(blocks)


# --- pictures ---------------------------------------------------------------------------------------------------------


def memory_picture() -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    panel = figure.subplots()
    for name in SCHEMES:
        if name != TWICE:  # lies on the other
            panel.plot(RANKS, [steps()[LARGE, name, r].memory.total / GIB for r in RANKS], label=name, **STYLES[name])
    panel.set_ylim(0)
    panel.set_ylabel("GiB a rank, predicted")
    axis_of_ranks(panel)
    panel.set_title(f"{LARGE}: the head's step, {TOKENS} tokens a rank", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def time_picture() -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    panels = figure.subplots(1, len(HEADS))
    for panel, model in zip(panels, HEADS, strict=True):
        for name in SCHEMES:
            panel.plot(RANKS, [1e3 * steps()[model, name, r].seconds for r in RANKS], label=name, **STYLES[name])
        panel.set_ylim(8, 100)  # streaming leaves it upwards
        panel.set_yscale("log")
        panel.set_yticks((10, 20, 50, 100), ("10", "20", "50", "100"))
        axis_of_ranks(panel)
        panel.set_title(model, fontsize=10)
    panels[0].set_ylabel("ms, predicted")
    figure.suptitle(f"Time of the head's step, {TOKENS} tokens a rank", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def axis_of_ranks(panel: Any) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(RANKS, [str(r) for r in RANKS])
    panel.minorticks_off()
    panel.set_xlabel("ranks")
    plain(panel)


def written(document: str) -> str:
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put tables and pictures into docs/, for {DOC.name}")
    if not parser.parse_args().write:
        print(tables())
        return
    DOC.write_text(written(DOC.read_text()))
    for name, figure in ((MEMORY_PICTURE, memory_picture()), (TIME_PICTURE, time_picture())):
        figure.savefig(DOC.parent / name, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
