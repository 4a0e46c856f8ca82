"""The cases: shapes and what is wanted of them, in named sets, and their inputs from a seed.

On a CPU the hidden sizes and token counts of the large models are scaled down so that a round ends; the vocabulary,
which is what this package is about, is the model's own. A case says so in its model's name.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.losses import IGNORE

NO_GRADIENT, FROZEN, TRAINABLE = WORKS = ("no gradient", "frozen head", "trainable head")
MODELS = {  # vocabulary, hidden size
    "SmolLM2-135M": (49152, 576),
    "Llama-3-8B": (128256, 4096),
    "Llama-3.2-1B": (128256, 2048),
    "Qwen3": (151936, 4096),
    "Gemma-3": (262144, 2560),
}
OURS = ("bare products", "asft_kernels torch", "asft_kernels triton")
# Without torch's F.linear_cross_entropy, whose default is plain torch again and whose chunks cost twice as much.
MAIN_PEERS = ("plain torch", "cut-cross-entropy torch_compile", "TRL ChunkedLogProbFunction")
UNCACHED = ("asft_kernels torch, cache_bytes=0", "asft_kernels triton, cache_bytes=0")


class Inputs(NamedTuple):
    """What a contestant is given. labels are aligned with the positions that predict them (already shifted)."""

    hidden: Tensor  # (2B, T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (2B, T) int64, -100 where masked


@dataclass(frozen=True)
class Case:
    """One measurement's shape. rounds: timed turns. contestants: display names, () for all that can take the case.

    apart: each round has processes of its own, since where memory lies differs from one process to the next.
    """

    set: str
    work: str
    N: int  # tokens that carry loss
    M: int  # positions, 2 * pairs rows of M / (2 * pairs)
    D: int
    V: int
    model: str = ""
    loss: str = "asft"
    pairs: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 5
    contestants: tuple[str, ...] = ()
    apart: bool = False

    def __post_init__(self):
        if self.M % (2 * self.pairs) or not 2 * self.pairs <= self.N <= self.M:
            raise ValueError(
                f"case of {self.set}: got N={self.N}, M={self.M}, pairs={self.pairs}; "
                "need M in rows of one length and a valid token in each row"
            )

    @property
    def id(self) -> str:
        name = f"{self.model} " if self.model else ""
        shape = f"N{self.N} M{self.M} D{self.D} V{self.V} pairs{self.pairs}"
        return f"{name}{shape} {self.dtype} {self.loss} {self.work}"

    @property
    def row(self) -> dict:
        """The case's part of a result row."""
        fields = asdict(self)
        del fields["rounds"], fields["contestants"]
        return fields | {"case": self.id}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def same_inputs(self) -> "Case":
        """Equal for cases that share inputs and exact answers: those of other works and other sets."""
        return replace(self, set="", model="", work=TRAINABLE, rounds=0, contestants=(), apart=False)

    def tiny(self) -> "Case":
        """A few tokens of it: for the first call, which imports and compiles."""
        return replace(self, N=8, M=16, D=32, V=64, pairs=2)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs: in each row a masked prompt, a response of about N / (2 * pairs) tokens, padding.

    Drawn on the case's device, so that a GPU's are not a CPU's: the head of a large model takes a CPU half a minute.
    """
    place: dict[str, Any] = {"device": case.device, "generator": torch.Generator(case.device).manual_seed(seed)}
    rows, length = 2 * case.pairs, case.M // (2 * case.pairs)
    hidden = torch.randn(rows, length, case.D, **place).to(case.torch_dtype)
    weight = torch.randn(case.V, case.D, **place).mul_(0.02).to(case.torch_dtype)
    labels = torch.randint(case.V, (rows, length), **place)
    for row in range(rows):
        answer = case.N // rows + (row < case.N % rows)
        start = (length - answer) // 2
        labels[row, :start] = IGNORE
        labels[row, start + answer :] = IGNORE
    return Inputs(hidden, weight, labels)


def scaled(model: str, hidden_size: int) -> dict:
    """The fields of a case of the model's vocabulary with another hidden size."""
    V, D = MODELS[model]
    name = model if hidden_size == D else f"{model} with D {D} → {hidden_size}"
    return {"model": name, "V": V, "D": hidden_size}


def growth(device: str, dtype: str, D: int, V: int, N: int) -> list[Case]:
    """Cost against N, V and pairs, one at a time, from the point (N, V, 2 pairs) or near it."""
    shape = {"D": D, "device": device, "dtype": dtype, "rounds": 3}
    against_n = [
        Case("growth-n", work, tokens, tokens, V=V, contestants=(*OURS, *UNCACHED, "plain torch"), **shape)
        for work in (FROZEN, TRAINABLE)
        for tokens in (256, 1024, 4096, 8192)
    ]
    against_v = [
        Case("growth-v", TRAINABLE, N // 2, N // 2, V=vocab, contestants=(*OURS, "plain torch"), **shape)
        for vocab in (8192, 32768, 65536, 131072, 262144)
    ]
    against_pairs = [
        Case(
            "growth-pairs", TRAINABLE, N, N, V=V, loss="simpo", pairs=pairs,
            contestants=(*OURS, "Liger-Kernel SimPO"), **shape,
        )
        for pairs in (1, 4, 16, 64)
    ]  # fmt: skip
    return against_n + against_v + against_pairs


def cpu_cases() -> list[Case]:
    """What `make bench` runs before the accuracy: about 13 minutes on two cores at 200 GFLOP/s (a test holds it)."""
    few = {"rounds": 3, "contestants": (*OURS, *MAIN_PEERS)}
    smollm2 = scaled("SmolLM2-135M", 576)
    # F.linear_cross_entropy's chunks take up to 50 times as long: once is enough to show it.
    others = (*OURS, *UNCACHED, *MAIN_PEERS, "torch F.linear_cross_entropy")
    main = [
        Case("main", work, 256, 512, **smollm2, rounds=3, contestants=() if work == TRAINABLE else others)
        for work in WORKS
    ]
    large = [("Qwen3", 384, WORKS), ("Llama-3-8B", 384, WORKS[2:]), ("Gemma-3", 256, WORKS[2:])]
    main += [Case("main", work, 256, 512, **scaled(name, D), **few) for name, D, works in large for work in works]
    some = {"rounds": 3, "contestants": (*OURS, "plain torch", "cut-cross-entropy torch_compile")}
    share = [Case("valid-share", TRAINABLE, N, 512, **smollm2, **some) for N in (133, 256, 512)]
    shape: dict[str, Any] = {"N": 256, "M": 256, "D": 512, "V": 32000, "rounds": 3}
    low = [Case("dtypes", work, dtype="bfloat16", contestants=(*OURS, *MAIN_PEERS), **shape) for work in WORKS]
    low += [Case("dtypes", work, contestants=OURS, **shape) for work in WORKS]  # what bf16 is to be compared with
    losses = [
        Case(
            "losses", TRAINABLE, 256, 512, **smollm2, loss=loss, rounds=3,
            contestants=(*OURS, f"Liger-Kernel {name}"),
        )
        for loss, name in (("simpo", "SimPO"), ("dpo", "DPO"), ("orpo", "ORPO"))
    ]  # fmt: skip
    # In plain torch the log-softmax of M V logits and two gradients of its size are 24 GiB, before anything else: by
    # arithmetic, whatever limit a run had (report.py says so beside the rows).
    beyond = Case("beyond-plain", TRAINABLE, 2048, 8192, 64, 262144, rounds=2, contestants=(*OURS, "plain torch"))
    return [*main, *share, *low, *losses, *growth("cpu", "float32", 256, 8192, 512), beyond]


def floor_cases() -> list[Case]:
    """How near our schedule comes to its own products: corners of N and V, and a small model's own D.

    Where N and V are both large E exceeds the cache; calls of many seconds need no processes of their own.
    """
    shapes = [
        (256, 49152, 576, 15), (256, 32000, 1024, 15), (256, 262144, 1024, 5), (8192, 32000, 1024, 3),
        (8192, 262144, 512, 3),
    ]  # fmt: skip
    contestants = (*OURS, "asft_kernels torch, all E kept")
    return [
        Case("floor", work, N, N, D, V, rounds=rounds, contestants=contestants, apart=N < 8192)
        for N, V, D, rounds in shapes
        for work in WORKS
    ]


def gpu_cases() -> list[Case]:
    """Full shapes in bf16, the headline first."""
    place = {"device": "cuda", "dtype": "bfloat16", "pairs": 4}

    def full(set_: str, name: str, work: str, N: int, M: int, **more) -> Case:
        V, D = MODELS[name]
        return Case(set_, work, N, M, D, V, model=name, **(place | more))

    peers = ("cut-cross-entropy cce", "cut-cross-entropy cce, filter_eps=None", "TRL ChunkedLogProbFunction")
    few = ("bare products", "asft_kernels triton", "plain torch", *peers)
    headline = [full("headline", "Qwen3", work, 8192, 8192, rounds=3, contestants=few) for work in reversed(WORKS)]
    main = [
        full("main", name, work, 8192, 8192) for name in ("Qwen3", "Llama-3-8B", "Gemma-3") for work in reversed(WORKS)
    ]
    share = [full("valid-share", "Qwen3", work, N, 8192) for N in (2130, 4096) for work in (TRAINABLE, FROZEN)]
    losses = [
        full("losses", "Llama-3-8B", work, 8192, 8192, loss=loss)
        for loss in ("simpo", "dpo", "orpo")
        for work in (TRAINABLE, FROZEN)
    ]
    # N * V passes 2**31, where 32-bit offsets would wrap; plain torch's fp32 log-softmax would be 37 GiB and more.
    large = [full("large", "Qwen3", work, 65536, 65536, rounds=3, contestants=(*OURS, "plain torch")) for work in WORKS]
    single = [full("dtypes", "Llama-3-8B", work, 2048, 2048, dtype="float32", rounds=3) for work in WORKS]
    return [*headline, *main, *share, *losses, *large, *single, *growth("cuda", "bfloat16", 4096, 128256, 8192)]


def smoke_cases() -> list[Case]:
    """Seconds in all: tests, and trying the whole machinery where there is nothing to measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = {"N": 24, "M": 48, "D": 32, "V": 256, "rounds": 2, "device": device}
    return [
        *(Case("smoke", work, **small) for work in WORKS),
        Case("smoke", TRAINABLE, dtype="bfloat16", **small),
        *(
            Case("smoke", TRAINABLE, loss=loss.lower(), contestants=(*OURS, f"Liger-Kernel {loss}"), **small)
            for loss in ("SimPO", "DPO", "ORPO")
        ),
    ]


SUITES = {"cpu": cpu_cases, "gpu": gpu_cases, "floor": floor_cases, "smoke": smoke_cases}


def select(names: list[str], device: str) -> list[Case]:
    """The cases of suites (cpu, gpu, floor, smoke) and of single sets (main, growth-n, ...) of the device's suite."""
    cases = []
    own = SUITES["gpu" if device == "cuda" else "cpu"]()
    sets = list(dict.fromkeys(case.set for case in own))
    for name in names:
        if name not in SUITES and name not in sets:
            raise ValueError(f"set: got {name!r}, need one of {', '.join([*SUITES, *sets])}")
        cases += SUITES[name]() if name in SUITES else [case for case in own if case.set == name]
    return list(dict.fromkeys(cases))
