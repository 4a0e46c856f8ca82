"""Draws docs/pictures/*.svg: the two phases, matrix products and memory. `python docs/pictures.py --write` writes them.

Counts and bytes are those of the benchmarks' own tables (benchmarks/contestants.py, benchmarks/growth.py). Each picture
lies on a light card of its own, readable on a dark page, and is narrow enough for a telephone.
"""

import math
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

from benchmarks.cases import WORKS
from benchmarks.contestants import CONTESTANTS
from benchmarks.growth import documented_bytes

FOLDER = Path(__file__).with_name("pictures")
WIDTH = 480
INK, FAINT, CARD, LINE = "#1f2430", "#5b6270", "#f7f8fa", "#c4c9d2"
OURS, THEIRS, KEPT, HEAD = "#d55e00", "#8a919e", "#dcebf7", "#fdeadb"
KIB, MIB, GIB = 2**10, 2**20, 2**30
VOCAB, HIDDEN = 151936, 4096  # Qwen3-8B's head


def text(
    x: float, y: float, words: str, size: int = 14, colour: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    style = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"' + ' font-weight="600"' * bold
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def note(x: float, y: float, words: str, anchor: str = "start") -> str:
    return text(x, y, words, size=12, colour=FAINT, anchor=anchor)


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = LINE, radius: int = 6) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="{radius}" fill="{fill}" stroke="{edge}"/>'


def arrow(x: float, y: float, to: float) -> str:
    """Downwards."""
    return f'<path d="M{x:g} {y:g}V{to - 6:g}m-4 0h8l-4 6z" stroke="{FAINT}" fill="{FAINT}"/>'


def card(height: int, title: str, parts: Iterable[str]) -> str:
    """A picture of this height; its title is what is read out."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
            f'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            box(0.5, 0.5, WIDTH - 1, height - 1, CARD, radius=10),
            *parts,
            "</svg>\n",
        ]
    )


def two_phases() -> str:
    def panel(y: float, height: float, name: str, when: str) -> list[str]:
        return [
            box(16, y, WIDTH - 32, height, "#ffffff"),
            text(30, y + 24, name, bold=True),
            note(WIDTH - 30, y + 24, when, "end"),
        ]

    def step(y: float, what: str, cost: str, fill: str = "#ffffff") -> list[str]:
        return [
            box(30, y, WIDTH - 60, 30, fill),
            text(42, y + 20, what),
            product(y + 20, cost) if cost.startswith("product") else note(WIDTH - 42, y + 20, cost, "end"),
        ]

    def product(y: float, cost: str) -> str:
        return text(WIDTH - 42, y, cost, size=12, colour=OURS, anchor="end", bold=True)

    middle = WIDTH / 2
    return card(
        606,
        "Phase 1 walks over the vocabulary, the objective sees log-probabilities, phase 2 makes gradients",
        [
            box(30, 16, 200, 34, KEPT),
            text(130, 38, "hidden states H  (N, D)", anchor="middle"),
            box(250, 16, 200, 34, HEAD),
            text(350, 38, "output head W  (V, D)", anchor="middle"),
            arrow(130, 50, 66),
            arrow(350, 50, 66),
            *panel(66, 208, "Phase 1", "chunk by chunk of the vocabulary"),
            *step(100, "z = H · Wᵀ", "product 1"),
            *step(134, "E = exp(z − z of the label),  s += Σ E", "in place"),
            *step(168, "O += E · W", "product 2, if H wants a gradient"),
            text(42, 222, "kept: s (N), O (N, D)", size=13),
            text(42, 244, "and E up to cache_bytes, if the head trains", size=13),
            text(42, 264, "gone: the chunk's logits", size=13, colour=FAINT),
            arrow(middle, 274, 292),
            box(16, 292, WIDTH - 32, 70, "#ffffff"),
            text(30, 316, "Objective", bold=True),
            note(WIDTH - 30, 316, "per-token numbers only", "end"),
            text(42, 344, "logp (N)  →  loss  →  g = ∂loss/∂logp (N)"),
            arrow(middle, 362, 380),
            *panel(380, 152, "Phase 2", "the backward"),
            *step(414, "dH = g · ((1 − p) · W of the label − O / total)", "no product", KEPT),
            *step(448, "dW = Eᵀ · diag(−g / total) · H  + label rows", "product 3", HEAD),
            text(42, 500, "E comes from the cache; what was not kept is computed again:", size=13),
            product(520, "up to product 4"),
            note(30, 556, "N tokens with a label, D hidden size, V vocabulary."),
            note(30, 574, "A frozen head ends at dH: two products, nothing kept of size N × V."),
            note(30, 592, "A product is 2·N·V·D floating-point operations."),
        ],
    )


def products() -> str:
    """A square a product, as the benchmarks' table of contestants has them."""
    shown = ("plain torch", "cut-cross-entropy torch_compile", "TRL ChunkedLogProbFunction", "asft_kernels torch")
    extra = "asft_kernels torch, cache_bytes=0"
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    parts, y = [], 30
    for work, gradients in zip(range(len(WORKS)), WORKS, strict=True):
        parts.append(text(20, y, gradients, bold=True))
        y += 12
        for name in (*shown, extra) if gradients == "trainable head" else shown:
            contestant = by_name[name]
            count = 4 if name == extra else contestant.gemms[work]  # by its plan; with nothing kept always 4
            colour = OURS if name.startswith("asft_kernels") else THEIRS
            parts.append(text(246, y + 14, name, size=13, anchor="end"))
            of_all = contestant.positions == "all"
            parts += [box(256 + 24 * i, y, 20, 18, "none" if of_all else colour, colour, 3) for i in range(count)]
            y += 24
        y += 22
    parts += [
        note(20, y, "Filled: a product of the tokens with a label. Outlined: of all positions."),
        text(
            20,
            y + 18,
            "With all of E in cache_bytes 3 products, with nothing in it 4.",
            size=12,
            colour=FAINT,
        ),
    ]
    return card(y + 34, "Matrix products with the head, by contestant and by the gradients wanted", parts)


def extra_bytes(tokens: int, *, trainable: bool) -> float:
    """Of a call beyond inputs and the head's gradient, on a CPU that is not Intel's."""
    row = {
        "contestant": "asft_kernels torch", "device": "cpu", "N": tokens, "M": tokens, "D": HIDDEN, "V": VOCAB,
        "dtype": "float32", "about": {"machine": "AMD"}, "work": "trainable head" if trainable else "frozen head",
    }  # fmt: skip
    total = documented_bytes(row)
    assert total is not None
    return total - 4 * VOCAB * HIDDEN * trainable


def memory() -> str:
    tokens = [2**k for k in range(9, 17)]
    lines = {
        "one tensor of logits": (THEIRS, [4 * n * VOCAB for n in tokens]),
        "trainable head": (OURS, [extra_bytes(n, trainable=True) for n in tokens]),
        "frozen head": ("#009e73", [extra_bytes(n, trainable=False) for n in tokens]),
    }
    left, right, top, bottom = 74, WIDTH - 20, 66, 330
    low, high = math.log2(32 * MIB), math.log2(64 * GIB)

    def x(n: float) -> float:
        return left + (right - left) * (math.log2(n) - math.log2(tokens[0])) / (len(tokens) - 1)

    def y(size: float) -> float:
        return bottom - (bottom - top) * (math.log2(size) - low) / (high - low)

    parts = [
        text(20, 28, "Bytes beyond inputs and the head's gradient, fp32, on a CPU", bold=True),
        note(20, 48, f"Qwen3-8B's head: V = {VOCAB}, D = {HIDDEN}; both axes logarithmic"),
    ]
    for k in range(5, 17, 2):
        size = 2**k * MIB
        label = f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"
        parts.append(f'<path d="M{left} {y(size):.1f}H{right}" stroke="{LINE}" stroke-width="0.7"/>')
        parts.append(note(left - 8, y(size) + 4, label, "end"))
    for n in tokens[::2]:
        parts.append(note(x(n), bottom + 20, f"{n // KIB}K" if n >= KIB else str(n), "middle"))
    parts.append(note((left + right) / 2, bottom + 40, "tokens with a label, N", "middle"))
    for place, (name, (colour, sizes)) in enumerate(lines.items()):
        points = " ".join(f"{x(n):.1f},{y(size):.1f}" for n, size in zip(tokens, sizes, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        at = ((20, 210, 355)[place], bottom + 68)
        parts.append(f'<path d="M{at[0]} {at[1] - 5}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(at[0] + 32, at[1], name, size=13))
    return card(bottom + 86, "Memory against tokens: one tensor of logits, and this package's terms", parts)


def pictures() -> dict[str, str]:
    return {"two-phases.svg": two_phases(), "products.svg": products(), "memory.svg": memory()}


def main() -> None:
    for name, picture in pictures().items():
        if "--write" in sys.argv[1:]:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / name).write_text(picture)
        else:
            print(picture)


if __name__ == "__main__":
    main()
