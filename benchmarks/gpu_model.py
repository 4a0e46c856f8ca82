"""Predicts time and memory of the Triton backend on GPUs, from its schedule. Nothing here is a measurement.

python -m benchmarks.gpu_model            # prints the tables of docs/gpu-model.md, which says what is assumed and why
python -m benchmarks.gpu_model --write    # puts them there

A step of the schedule takes  max(operations / rate * tail, bytes / bandwidth) + LAUNCH + programs * time of one,
tail being the turns in which multiprocessors take its tiles over those that would be full.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from asft_kernels.backends.plan import default_cache_bytes
from asft_kernels.kernels.configs import SLICES, STRIPS, WHOLE, Strips, Tile, tiles
from benchmarks.cases import FROZEN, MODELS, NO_GRADIENT, TRAINABLE
from benchmarks.gpu_schedule import BF16, Call, Step, extra_bytes, schedule
from benchmarks.tables import MIB, markdown

DOC = Path(__file__).parents[1] / "docs" / "gpu-model.md"
BEGIN, END = "<!-- predictions: made by `python -m benchmarks.gpu_model --write` -->", "<!-- /predictions -->"
LAUNCH = 3e-6  # between two kernels of one stream, seconds
PROGRAM = 1.5e-6  # a program that reads two numbers and returns; 16 of them share a multiprocessor
BANDWIDTH_SHARE = 0.9  # of the memory's peak, by a kernel that streams


@dataclass(frozen=True)
class Chip:
    """Peaks of the vendor's data sheet, and the shares of the peak rate that products are assumed to reach."""

    architecture: str
    peak: float  # dense bf16 operations a second
    bandwidth: float  # bytes a second
    multiprocessors: int
    library: float  # share of the peak that a bare cuBLAS or hipBLASLt product reaches
    triton: tuple[float, float]  # that of the GEMM with the exponential epilogue: pessimistic, optimistic


CHIPS = {
    "A100 80 GB SXM": Chip("sm_80", 312e12, 2.039e12, 108, 0.80, (0.60, 0.75)),
    "H100 80 GB SXM": Chip("sm_90", 989.4e12, 3.35e12, 132, 0.725, (0.64, 0.72)),
    "B200": Chip("sm_100", 2250e12, 8.0e12, 148, 0.70, (0.40, 0.60)),
    "MI300X": Chip("gfx942", 1307.4e12, 5.3e12, 304, 0.47, (0.32, 0.42)),
}


def seconds(step: Step, chip: Chip, triton: float) -> float:
    """triton: the share of the peak rate that a Triton GEMM reaches where its tiles fill the chip."""
    rate = chip.peak * (triton if step.engine == "triton" else chip.library)
    turns = step.tiles / chip.multiprocessors
    splits = step.engine == "library" and turns < 1  # the library then cuts the sum, too
    tail = ceil(turns) / turns if turns and not splits else 1.0
    moving = step.bytes / (chip.bandwidth * BANDWIDTH_SHARE)
    return max(step.flops / rate * tail, moving) + LAUNCH + step.programs * PROGRAM / (16 * chip.multiprocessors)


def tile_of(chip: Chip) -> Tile:
    return tiles(chip.architecture, torch.bfloat16, softcap=False)[0]


def predict(call: Call, chip: Chip, triton: float, tile: Tile | Strips | None = None) -> float:
    """tile: the table's first where it is None."""
    return sum(seconds(step, chip, triton) for step in schedule(call, tile or tile_of(chip)))


def bare(call: Call, chip: Chip) -> float:
    """The products that the gradients need, by the library alone."""
    return call.products * 2 * call.N * call.V * call.D / (chip.peak * chip.library)


def share_needed(call: Call, chip: Chip, limit: float) -> float | None:
    """The least share of the peak for the GEMM with the epilogue that keeps within limit * bare, or None."""
    tight, loose = chip.library, 0.05
    if predict(call, chip, tight) > limit * bare(call, chip):
        return None
    for _ in range(40):  # by halves: time falls as the share grows
        middle = (tight + loose) / 2
        tight, loose = (middle, loose) if predict(call, chip, middle) <= limit * bare(call, chip) else (tight, middle)
    return tight


H100 = CHIPS["H100 80 GB SXM"]
SHAPES = (("Qwen3", 8192), ("Llama-3-8B", 8192), ("Gemma-3", 8192), ("Qwen3", 512), ("Qwen3", 65536))
DEFAULT = default_cache_bytes("cuda")
EVERYTHING = 2**62  # cache_bytes that hold the exponentials of any shape
WANTED = {  # gradients wanted, cache_bytes
    NO_GRADIENT: (NO_GRADIENT, DEFAULT),
    FROZEN: (FROZEN, DEFAULT),
    TRAINABLE: (TRAINABLE, DEFAULT),
    f"{TRAINABLE}, all of E kept": (TRAINABLE, EVERYTHING),
    f"{TRAINABLE}, none kept": (TRAINABLE, 0),
}
TARGETS = {  # on an H100 at the first shape: times the bare products, bytes
    FROZEN: (1.2, 512 * MIB),
    TRAINABLE: (1.2, 4096 * MIB),
}


def calls(model: str, N: int, chip: Chip) -> dict[str, Call]:
    return {
        name: Call(N, *MODELS[model], *wanted, multiprocessors=chip.multiprocessors) for name, wanted in WANTED.items()
    }


def span(values: Iterable[float], style: str) -> str:
    return "–".join(dict.fromkeys(format(value, style) for value in sorted(values)))


def target_table() -> list[str]:
    lines = []
    for name, (limit, memory) in TARGETS.items():
        call = calls(*SHAPES[0], H100)[name]
        share, extra = share_needed(call, H100, limit), extra_bytes(call, tile_of(H100))
        lines.append([
            name,
            span((predict(call, H100, s) / bare(call, H100) for s in H100.triton), ".2f"),
            "**out of reach**" if share is None else f"{share * H100.peak / 1e12:.0f} TFLOP/s",
            f"{extra / MIB:.0f}" if extra <= memory else f"**{extra / MIB:.0f}**",
            f"{memory / MIB:.0f}",
        ])  # fmt: skip
    return markdown(["wanted", "× bare", f"rate needed for {limit} ×", "extra MiB", "target MiB"], lines, words=1)


def step_table() -> list[str]:
    """All of E kept, at the optimistic share."""
    call = calls(*SHAPES[0], H100)[f"{TRAINABLE}, all of E kept"]
    found: dict[tuple[int, str], list[Step]] = {}
    for step in schedule(call, tile_of(H100)):
        found.setdefault((step.phase, step.name), []).append(step)
    lines = [
        [
            str(phase), name, str(len(steps)), f"{sum(s.flops for s in steps) / 1e12:.1f}",
            f"{sum(s.bytes for s in steps) / 1e9:.1f}",
            f"{1e3 * sum(seconds(s, H100, H100.triton[1]) for s in steps):.2f}",
        ]
        for (phase, name), steps in found.items()
    ]  # fmt: skip
    return markdown(["phase", "step", "launches", "TFLOP", "GB", "ms"], lines)


def schedule_table() -> list[str]:
    """What each choice of the schedule changes, at the pessimistic and the optimistic share, all of E kept."""
    before = {"form": SLICES, "multiprocessors": 0}
    choices: tuple[tuple[str, dict, Tile | Strips | None], ...] = (
        ("chunks by bytes, dW in slices", before, None),
        ("chunks that fill the chip, dW in slices", {"form": SLICES}, None),
        ("**default**: they and dW whole", {"form": WHOLE}, None),
        ("the same, each label 4 times", {"form": WHOLE, "distinct": 0.25}, None),
        ("default, logits in strips", {"form": WHOLE}, STRIPS[0]),
    )
    lines = []
    for N in (8192, 2048, 512, 256):
        for name, changed, tile in choices:
            cells = []
            for work in (NO_GRADIENT, FROZEN, TRAINABLE):
                call = replace(calls("Qwen3", N, H100)[work], **changed)
                times = [predict(call, H100, share, tile) for share in H100.triton]
                cells.append(span((t / bare(call, H100) for t in times), ".2f"))
            call = replace(calls("Qwen3", N, H100)[TRAINABLE], **changed)
            steps = list(schedule(call, tile or tile_of(H100)))
            times = [predict(call, H100, share, tile) for share in H100.triton]
            extra = [extra_bytes(replace(call, work=work), tile or tile_of(H100)) / MIB for work in (FROZEN, TRAINABLE)]
            lines.append([
                f"{N}", name, str(len(steps)), span((1e3 * t for t in times), ".2f"), *reversed(cells),
                *(f"{x:.0f}" for x in reversed(extra)),
            ])  # fmt: skip
    head = ["N", "schedule", "launches", "ms", TRAINABLE, FROZEN, NO_GRADIENT, "extra MiB", "frozen"]
    return markdown(head, lines, words=2)


def time_table() -> list[str]:
    lines = []
    for chip_name, chip in CHIPS.items():
        for model, N in SHAPES:
            every = calls(model, N, chip)
            cells = [span((predict(c, chip, s) / bare(c, chip) for s in chip.triton), ".2f") for c in every.values()]
            lines.append([chip_name, f"{model}, N = {N}", f"{1e3 * bare(every[NO_GRADIENT], chip):.2f}", *cells])
    return markdown(["chip", "shape", "one product, ms", *WANTED], lines)


def rest(call: Call, chip: Chip, triton: float) -> float:
    """Share of the predicted time that is no product and no rounding of dW: vectors, and all launches."""
    large = ("logits_exp", "product", "copy", "label_gradient")
    times = [LAUNCH if step.name in large else seconds(step, chip, triton) for step in schedule(call, tile_of(chip))]
    return sum(times) / predict(call, chip, triton)


def rest_sentence() -> str:
    N = SHAPES[0][1]
    models = [model for model, tokens in SHAPES if tokens == N]
    found = []
    for name, chip in CHIPS.items():
        every = [call for model in models for call in calls(model, N, chip).values()]
        shares = [100 * rest(call, chip, share) for call in every for share in chip.triton]
        found.append(f"{span((min(shares), max(shares)), '.1f')} % on {name}")
    return (
        f"*Predicted.* Vectors, label rows and launches together, of the time at N = {N}, least to most of "
        f"the shapes and gradients above: {', '.join(found)}."
    )


def memory_table() -> list[str]:
    lines = [
        [
            f"{model}, N = {N}",
            *(f"{extra_bytes(call, tile_of(H100)) / MIB:.0f}" for call in calls(model, N, H100).values()),
        ]
        for model, N in SHAPES
    ]
    return markdown(["shape", *WANTED], lines, words=1)


def tables() -> str:
    (model, N), tile = SHAPES[0], tile_of(H100)
    plan = calls(model, N, H100)[TRAINABLE].plan
    slow, fast = (share * H100.peak / 1e12 for share in H100.triton)
    blocks = [
        f"*Predicted.* The targets on an H100 ({model}, N = {N}), the GEMM with the epilogue at "
        f"{slow:.0f} to {fast:.0f} TFLOP/s in tiles of {tile.BLOCK_M} × {tile.BLOCK_V} × {tile.BLOCK_D}:",
        "\n".join(target_table()),
        f"There E is {BF16 * N * plan.vocab / MIB:.0f} MiB in {len(plan.slices)} chunks of {plan.chunk} rows of the "
        f"head; the default `cache_bytes` ({DEFAULT / MIB:.0f} MiB) keeps {plan.cached} of them.",
        f"*Predicted.* The steps there with all of E kept, at {fast:.0f} TFLOP/s:",
        "\n".join(step_table()),
        "*Predicted.* What the schedule's choices bring on an H100 (Qwen3): launches, time and memory of a trainable "
        "head, and times in units of the bare products that the gradients need (3, 2 or 1):",
        "\n".join(schedule_table()),
        "*Predicted.* Time in units of the bare products that the gradients need (1, 2 or 3):",
        "\n".join(time_table()),
        "*Predicted.* Extra memory in MiB, the gradients returned included, on an H100:",
        "\n".join(memory_table()),
        rest_sentence(),
    ]
    return "\n\n".join(blocks)


def written(document: str) -> str:
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{DOC.name}")
    if parser.parse_args().write:
        DOC.write_text(written(DOC.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
