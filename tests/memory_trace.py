"""What torch's CPU allocator is asked for, and what is multiplied, from the profiler: exact, whatever the machine."""

import gc
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::mm", "aten::addmm"}


def peak_and_operations(call) -> tuple[int, int]:
    """Bytes at the highest point of a call, beyond what was there before it; operations of its matrix products."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, with_flops=True) as prof:
        call()
    seen: Any = prof
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest, sum(e.flops for e in seen.events() if e.name in PRODUCTS)
