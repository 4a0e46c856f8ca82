"""What runs on this machine, and with a model: one paste for a bug report.

asft doctor --model_name_or_path FOLDER
asft doctor --kernels    # compiles the core's kernels, too, for the GPU that is here or, without one, for four chips

Prints versions, device and backend, compares a small fused loss and its gradients with plain float64, and, for a
model, its head, whether fused log-probabilities are those of its own logits, and what a batch takes. Exit code 1 if a
line says FAILED.
"""

import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from asft_kernels.cli import frame
from asft_kernels.errors import PACKAGE

PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "bitsandbytes",
    "liger-kernel",
)  # fmt: skip
GIB = 2**30
Line = tuple[str, str, bool]  # what, finding, whether all is well


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `asft doctor`.

    Args:
        argv: its words; None: those of the process.

    Returns:
        0 if all is well, 1 if a check failed; else as `frame.run` says.
    """
    parser = frame.CommandParser(prog="asft doctor", description=__doc__)
    parser.add_argument("--model_name_or_path", "--model", dest="model", help="folder or hub name of a model to check")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "auto"], default="auto", help="of its weights")
    parser.add_argument(
        "--kernels",
        nargs="*",
        metavar="ARCH",
        help="also compile the core's kernels, for this GPU or those named: up to a minute each",
    )
    args = parser.parse_args(argv)

    def body() -> int:
        failed = []
        for what, finding, well in lines(args.model, args.dtype, args.kernels):
            print(f"{what:<22} {finding if well else 'FAILED: ' + finding}", flush=True)
            failed += [] if well else [what]
        print(f"not well: {', '.join(failed)}" if failed else "all is well")
        return int(bool(failed))

    return frame.run("asft doctor", body, stopped="nothing was changed")


def lines(model: str | None, dtype: str, kernels: Sequence[str] | None = None) -> Iterator[Line]:
    """Finds out, line by line.

    Args:
        model: folder or hub name; None: the machine alone.
        dtype: of the model's weights: "float32", "bfloat16", "auto".
        kernels: architectures to compile the kernels for; empty: the GPU's, without one all of the table; None
            (default): nothing is compiled.

    Yields:
        (what, finding, whether all is well).

    Raises:
        InputError: for a model that cannot be loaded, or an architecture that the table does not have.
    """
    yield from _versions()
    yield from _machine()
    yield from _kernel_checks()
    if kernels is not None:
        yield from _compiled(kernels)
    if model is not None:
        yield from _model(model, dtype)


def _versions() -> Iterator[Line]:
    from asft_kernels import __version__

    commit = _commit()
    yield "asft_kernels", f"{__version__}, commit {commit}" if commit else __version__, True
    yield "Python", f"{platform.python_version()}, {platform.platform()}", True
    for package in PACKAGES:
        try:
            yield package, version(package), True
        except PackageNotFoundError:
            yield package, "not installed", True


def _commit() -> str:
    """Of the git checkout that the package lies in; "" elsewhere, and where git has packed the branch's name away."""
    git = Path(PACKAGE).parent / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref: "):
            head = (git / head.removeprefix("ref: ")).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return head[:12]


def _machine() -> Iterator[Line]:
    import torch

    from asft_kernels.backends import choose_backend

    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB" if os.name == "posix" else "?"
    yield "CPU", f"{platform.machine()}, {torch.get_num_threads()} threads, {memory}", True
    yield "GPUs", str(torch.cuda.device_count()), True
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        chip = getattr(found, "gcnArchName", "") if torch.version.hip else f"sm_{found.major}{found.minor}"
        free = torch.cuda.mem_get_info(index)[0]
        yield f"GPU {index}", f"{found.name}, {chip}, {free / GIB:.1f} of {found.total_memory / GIB:.1f} GiB free", True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield "backend", f"{choose_backend(None, device, torch.float32)} on {device.type}", True
    yield "torch.distributed", ", ".join(_distributed_backends()) or "not built into this torch", True


def _distributed_backends() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    return [name for name in dist.Backend.backend_list if name != "undefined" and dist.is_backend_available(name)]


def _kernel_checks() -> Iterator[Line]:
    """A fused loss with its gradients beside plain float64, for each backend and dtype that runs here."""
    import torch

    from asft_kernels.backends import HAS_TRITON, triton_runs_on_cpu

    on_gpu = torch.cuda.is_available()
    backends = ["torch", *(["triton"] if HAS_TRITON and (on_gpu or triton_runs_on_cpu()) else [])]
    for backend in backends:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            what = f"{backend}, {str(dtype).removeprefix('torch.')}"
            try:
                errors = loss_errors(backend, dtype, "cuda" if on_gpu else "cpu")
            except Exception as error:  # whatever a compiler or a driver throws is the finding
                yield what, frame.first_line(error), False
                continue
            shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            allowed = _allowed(dtype)
            well = all(error <= allowed for error in errors.values())  # NaN is not well
            yield what, f"relative errors: {shown} (at most {allowed:.0e})", well
    if "triton" not in backends:
        reason = "Triton is not installed" if not HAS_TRITON else "no GPU"
        yield "triton", f"not run here: {reason}; the torch backend computes the same", True


def _compiled(architectures: Sequence[str]) -> Iterator[Line]:
    """Each kernel of a usual call, in each dtype: whether it compiles, and spilled registers.

    All variants: python -m asft_kernels.tools.compile_report.
    """
    import torch

    from asft_kernels.backends import HAS_TRITON
    from asft_kernels.errors import InputError
    from asft_kernels.kernels.configs import ARCHITECTURES, architecture_of

    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown:
        raise InputError(f"--kernels: got {unknown[0]!r}, need some of {', '.join(ARCHITECTURES)}")
    if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
        reason = "TRITON_INTERPRET is set; unset it" if HAS_TRITON else "Triton is not installed"
        yield "kernels", f"not compiled: {reason}", True
        return
    from asft_kernels.tools import compile_report  # here, as it needs triton

    here = architecture_of(torch.device("cuda")) if torch.cuda.is_available() else "other"
    for architecture in architectures or ([here] if here in ARCHITECTURES else ARCHITECTURES):
        variants: dict[str, dict[Any, Any]] = {}
        for dtype in compile_report.DTYPES:
            for launch in compile_report.usual_launches(architecture, dtype):
                variants.setdefault(launch.name.removesuffix("_kernel"), {})[launch] = dtype
        for name, launches in variants.items():
            what = f"{architecture}, {name}"
            try:
                rows = [compile_report.describe(launch, architecture, dtype) for launch, dtype in launches.items()]
            except Exception as error:  # whatever a compiler throws is the finding
                yield what, frame.first_line(error), False
                continue
            spills, well = sum(row.code.spills for row in rows), all(row.fits for row in rows)
            yield what, f"compiles in {len(rows)} variant{'s' * (len(rows) != 1)}, {spills} spills", well


def loss_errors(backend: str, dtype: Any, device: str) -> dict[str, float]:
    """Compares `fused_asft_loss` on a small batch with the plain reference in float64.

    Args:
        backend: "torch" or "triton".
        dtype: torch.dtype of hidden states and head.
        device: where they are.

    Returns:
        Relative errors (Frobenius) of "loss", "hidden" and "head", the latter two of the gradients.
    """
    import torch

    from asft_kernels import fused_asft_loss, reference

    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(*shape, generator=generator) for shape in ((4, 9, 32), (257, 32)))
    labels = torch.randint(257, (4, 9), generator=generator).to(device)
    labels[:, :3] = -100
    given = [tensor.to(device, dtype).requires_grad_() for tensor in (hidden / 4, head)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    loss = fused_asft_loss(given[0], given[1], labels, backend=backend)
    truth: Any = reference.fused_asft_loss(exact[0], exact[1], labels)
    loss.backward()
    truth.backward()
    got = [loss, *(tensor.grad for tensor in given)]
    right = [truth, *(tensor.grad for tensor in exact)]
    return {
        name: ((x.detach().double() - y.detach()).norm() / y.detach().norm()).item()
        for name, x, y in zip(("loss", "hidden", "head"), got, right, strict=True)
    }


def _allowed(dtype: Any) -> float:
    """Relative error that rounding explains, for logits of at most some 10.

    Into 16 bits gradients are rounded once, and exponentials may be, before a product: 2 units, and as much again for
    sums over tokens. In fp32 an error of a logit, some 10 units, goes into every exponential: 2e-6; TF32 products,
    where the user allows them, round their inputs by 2^-11.
    """
    import torch

    from asft_kernels.models.exact import product_unit

    unit = torch.finfo(dtype).eps / 2
    if dtype != torch.float32:
        return 4 * unit
    return max(2e-6, 16 * product_unit(torch.cuda.is_available()))


def _model(name: str, dtype: str) -> Iterator[Line]:
    """Head, scale and cap of a model, and its log-probabilities beside its own."""
    import torch

    from asft_kernels.cli.head_lines import head_lines
    from asft_kernels.core.heads import resolve_head
    from asft_kernels.errors import InputError
    from asft_kernels.models import PreferenceModel
    from asft_kernels.models.loading import load_causal_lm, load_tokenizer
    from asft_kernels.models.seam import causal_lm, output_head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, _ = load_tokenizer(name)
    loaded = load_causal_lm(name, dtype)
    model = loaded if getattr(loaded, "is_quantized", False) else loaded.to(device)
    inner = causal_lm(model)
    yield "model", f"{name}: {type(inner).__name__}, {inner.dtype}, {inner.num_parameters():,} parameters", True
    quantised = getattr(inner, "quantization_method", None)
    yield (
        "adapter, quantisation",
        f"{', '.join(getattr(inner, 'peft_config', {})) or 'none'}, {quantised or 'none'}",
        True,
    )
    try:
        head = output_head(model)
        vocabulary, columns = resolve_head(head).rows.size
        embedding = inner.get_input_embeddings().weight
        tied = "tied" if getattr(head, "weight", None) is embedding else "not tied"
        kind = f"{type(head).__module__.partition('.')[0]}.{type(head).__name__}"
        yield "head", f"{kind}, {vocabulary} words of {columns}, {tied}", True
        yield "tokenizer", f"{len(tokenizer)} of {len(embedding)} embeddings", len(tokenizer) <= len(embedding)
        ids = torch.arange(3, min(19, len(embedding)), device=model.device)[None]
        fused = PreferenceModel(model, "sft")
        worst = fused.check_head({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        assert fused.fused_head.logits is not None, "the check found scale and cap"
        scale, cap = fused.fused_head.logits
        yield "scale, cap", f"{scale:g}, {'none' if cap is None else f'{cap:g}'}", True
        yield from head_lines(resolve_head(head), inner.dtype, torch.device(device), cap)
        checked = fused.fused_head.checked
        finding = f"differ from its own by at most {worst:.1e}" if checked else "none is finite: damaged weights"
        yield "log-probabilities", finding, checked
    except InputError as error:
        yield "fuse", str(error), False
