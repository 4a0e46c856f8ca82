"""Predicts time and memory of the Triton backend on GPUs, from its schedule. Nothing here is a measurement.

python -m benchmarks.gpu_model            # prints the tables of docs/gpu-model.md, which says what is assumed and why
python -m benchmarks.gpu_model --write    # puts them there

A step of the schedule takes  max(operations / rate, bytes / bandwidth) + LAUNCH + programs * time of one.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from asft_kernels.backends.plan import default_cache_bytes
from asft_kernels.kernels.configs import Tile, candidates
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
    "H100 80 GB SXM": Chip("sm_90", 989.4e12, 3.35e12, 132, 0.736, (0.50, 0.65)),
    "B200": Chip("sm_100", 2250e12, 8.0e12, 148, 0.70, (0.40, 0.60)),
    "MI300X": Chip("gfx942", 1307.4e12, 5.3e12, 304, 0.47, (0.32, 0.42)),
}


def seconds(step: Step, chip: Chip, triton: float) -> float:
    """triton: the share of the peak rate that the GEMM with the epilogue reaches."""
    rate = chip.peak * (triton if step.engine == "triton" else chip.library)
    moving = step.bytes / (chip.bandwidth * BANDWIDTH_SHARE)
    return max(step.flops / rate, moving) + LAUNCH + step.programs * PROGRAM / (16 * chip.multiprocessors)


def tile_of(chip: Chip) -> Tile:
    return candidates(chip.architecture, torch.bfloat16, softcap=False)[0]


def predict(call: Call, chip: Chip, triton: float) -> float:
    return sum(seconds(step, chip, triton) for step in schedule(call, tile_of(chip)))


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
    f"{TRAINABLE}, all of E kept": (1.2, 4096 * MIB),
}


def calls(model: str, N: int) -> dict[str, Call]:
    return {name: Call(N, *MODELS[model], *wanted) for name, wanted in WANTED.items()}


def span(values: Iterable[float], style: str) -> str:
    return "–".join(dict.fromkeys(format(value, style) for value in sorted(values)))


def target_table() -> list[str]:
    lines = []
    for name, (limit, memory) in TARGETS.items():
        call = calls(*SHAPES[0])[name]
        share, extra = share_needed(call, H100, limit), extra_bytes(call)
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
    call = calls(*SHAPES[0])[f"{TRAINABLE}, all of E kept"]
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


def time_table() -> list[str]:
    lines = []
    for chip_name, chip in CHIPS.items():
        for model, N in SHAPES:
            every = calls(model, N)
            cells = [span((predict(c, chip, s) / bare(c, chip) for s in chip.triton), ".2f") for c in every.values()]
            lines.append([chip_name, f"{model}, N = {N}", f"{1e3 * bare(every[NO_GRADIENT], chip):.2f}", *cells])
    return markdown(["chip", "shape", "one product, ms", *WANTED], lines)


def rest(call: Call, chip: Chip, triton: float) -> float:
    """Share of the predicted time that is no product and no rounding of dW: vectors, fix-ups, and all launches."""
    large = ("logits_exp", "product", "copy")
    times = [LAUNCH if step.name in large else seconds(step, chip, triton) for step in schedule(call, tile_of(chip))]
    return sum(times) / predict(call, chip, triton)


def rest_sentence() -> str:
    N = SHAPES[0][1]
    models = [model for model, tokens in SHAPES if tokens == N]
    found = []
    for name, chip in CHIPS.items():
        shares = [100 * rest(c, chip, s) for model in models for c in calls(model, N).values() for s in chip.triton]
        found.append(f"{span((min(shares), max(shares)), '.1f')} % on {name}")
    return (
        f"*Predicted.* Vectors, fix-ups, label rows and launches together, of the time at N = {N}, least to most of "
        f"the shapes and gradients above: {', '.join(found)}."
    )


def memory_table() -> list[str]:
    lines = [
        [f"{model}, N = {N}", *(f"{extra_bytes(call) / MIB:.0f}" for call in calls(model, N).values())]
        for model, N in SHAPES
    ]
    return markdown(["shape", *WANTED], lines, words=1)


def tables() -> str:
    (model, N), tile = SHAPES[0], tile_of(H100)
    plan = calls(model, N)[TRAINABLE].plan
    slow, fast = (share * H100.peak / 1e12 for share in H100.triton)
    blocks = [
        f"*Predicted.* The targets on an H100 ({model}, N = {N}), the GEMM with the epilogue at "
        f"{slow:.0f} to {fast:.0f} TFLOP/s in tiles of {tile.BLOCK_M} × {tile.BLOCK_V} × {tile.BLOCK_D}:",
        "\n".join(target_table()),
        f"There E is {BF16 * N * plan.vocab / MIB:.0f} MiB in {len(plan.slices)} chunks of {plan.chunk} rows of the "
        f"head; the default `cache_bytes` ({DEFAULT / MIB:.0f} MiB) keeps {plan.cached} of them.",
        f"*Predicted.* The steps there with all of E kept, at {fast:.0f} TFLOP/s:",
        "\n".join(step_table()),
        "*Predicted.* Time in units of the bare products that the gradients need (1, 2 or 3):",
        "\n".join(time_table()),
        "*Predicted.* Extra memory in MiB, the gradients returned included, on any chip:",
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
