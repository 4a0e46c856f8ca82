"""What a call of the primitive takes beside its inputs: bytes by term at each of its moments, and matrix products.

    moment             torch (backends/torch_chunked.py)            triton (backends/triton_fused.py)
    forward, labels    label rows of a block of tokens              label rows, unless the head is a plain tensor
    forward, chunks    exponentials of a chunk, upcast rows of W    the same, sums of tiles or strips of logits
    backward, labels   label rows as they are assembled, slopes     label rows, unless the head is a plain tensor
    backward, hidden   label rows of all tokens, dH                 dH
    backward, head     dW, H with its factor, a chunk               dW and its rounding, H with its factor, a chunk

What is freed within a moment counts where it is largest. Sizes are what an allocator is asked for: chunks and cache
are those of plan.py and configs.py, which the backends ask, too. Gradients count as if one came to every figure that
may have one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asft_kernels.errors import SHORTAGE, is_out_of_memory
from asft_kernels.memory.sizes import Sizes
from asft_kernels.memory.terms import ADVICE, Terms
from asft_kernels.memory.torch_moments import torch_moments
from asft_kernels.memory.triton_moments import triton_moments


def moments(sizes: Sizes) -> dict[str, Terms]:
    """Bytes by term at each moment of both phases, in order; a call without gradients has no backward."""
    found = (torch_moments if sizes.backend == "torch" else triton_moments)(sizes)
    return {name: {term: size for term, size in terms.items() if size} for name, terms in found.items() if terms}


def largest(found: dict[str, Terms]) -> tuple[str, Terms]:
    """The moment that takes most, and its terms."""
    return max(found.items(), key=lambda moment: sum(moment[1].values()))


def operations(sizes: Sizes) -> dict[str, int]:
    """Floating-point operations of the large products, by kind."""
    product = 2 * sizes.tokens * sizes.width
    whole, of_figures = product * sizes.vocab, sizes.wanted.differentiable if sizes.needs_hidden else ()
    per_column = 2 * sizes.tokens * sizes.vocab
    found = {
        "logits": whole,
        "logits, recomputed": product * (sizes.vocab - sizes.cached) * sizes.needs_exps,
        "gradient of hidden": whole * sizes.needs_hidden,
        "gradient of the head": per_column * sizes.columns * sizes.needs_weight,
        "gradient of the adapter": per_column * sizes.low_rank * sizes.needs_low_rank,
        "gradient of entropy": whole * ("entropy" in of_figures),
        "gradient of mean_logits": whole * (sizes.softcap and "mean_logits" in of_figures),
    }
    return {kind: operations for kind, operations in found.items() if operations}


def shortage(sizes: Sizes, *, phase: str) -> str:
    """What a call that ran out of memory is told: its largest term in that phase ("forward", "backward"), and what
    shrinks it."""
    found = {moment: terms for moment, terms in moments(sizes).items() if moment.startswith(phase)}
    moment, terms = largest(found)
    name, size = max(terms.items(), key=lambda term: term[1])
    return (
        f"{sizes.tokens:,} tokens of {sizes.positions:,} positions, D {sizes.columns:,}, V {sizes.vocab:,}: "
        f"{in_units(sum(terms.values()))} beside the inputs ({moment}), most of it {name}, {in_units(size)}; what "
        f"shrinks it: {ADVICE[name]}"
    )


def in_units(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@contextmanager
def explained(sizes: Callable[[], Sizes], *, phase: str) -> Iterator[None]:
    """Adds to an allocator's error what `shortage` says: the same exception, its own text first, as those who catch it
    by its text (accelerate's find_executable_batch_size) want it."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            error.args = (f"{error}{SHORTAGE}{shortage(sizes(), phase=phase)}",)
        raise
