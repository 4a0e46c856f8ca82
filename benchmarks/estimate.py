"""How long a case will take, before it begins: from its products, a price per logit, and one per process."""

from benchmarks.cases import Case
from benchmarks.contestants import Contestant, contestants_of
from benchmarks.machine import available_memory
from benchmarks.measure import CPU_SECONDS
from benchmarks.runner import fit_together

LOGIT_SECONDS = {"cpu": 6e-9, "cuda": 1e-11}  # all passes over a logit outside of products
START_SECONDS = 1.5  # a process, its inputs, its first call
COMPILE_SECONDS = 4.0  # from the second time on, when its cache on disk helps
CALLS_BEFORE = 2  # the checked one and that for memory
ASSUMED = {"cpu": 200e9, "cuda": 500e12}  # operations a second, where nothing was measured


def seconds(
    case: Case,
    contestants: list[Contestant] | None = None,
    flops_per_s: float | None = None,
    available: int | None = None,
) -> float:
    """Of a whole case: its answer in float64, at half the rate, and in fp32, and every contestant's calls.

    available: bytes of memory, None: those of this machine.
    """
    rate = flops_per_s or ASSUMED[case.device]
    price = LOGIT_SECONDS[case.device]
    product, logits = 2 * case.N * case.V * case.D / rate, case.N * case.V
    contestants = contestants_of(case) if contestants is None else contestants
    together = not case.apart and fit_together(
        case, len(contestants), available_memory(case.device) if available is None else available
    )
    total = 3 * (4 * product + 2 * logits * price) + START_SECONDS
    for contestant in contestants:
        share = case.M / case.N if contestant.positions == "all" else 1
        call = share * (contestant.products(case) * product + contestant.checked * logits * price)
        start = START_SECONDS + COMPILE_SECONDS * contestant.compiles
        timed = max(call, CPU_SECONDS) if case.device == "cpu" else call
        total += CALLS_BEFORE * call + case.rounds * timed + start
        if not together:  # each round starts anew, with an uncounted call
            total += case.rounds * (call + start)
    return total
