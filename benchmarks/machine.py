"""What stands in every row about where it was measured, and whether this machine has what a command needs."""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import date, datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def require(*modules: str) -> None:
    """Ends the program in one line where one of these is missing: all come with the extra [bench]."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; run: pip install -c constraints.txt -e '.[bench]'")


class NoBar:
    """Stands in for tqdm's bar, where that is not installed: the lines alone."""

    def __init__(self, items: Iterable = (), **options: Any):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def write(self, text: str) -> None:
        print(text, flush=True)

    def update(self, steps: float) -> None: ...

    def close(self) -> None: ...


def progress(*items: Iterable, **options: Any) -> Any:
    """tqdm's bar, or none."""
    try:
        from tqdm import tqdm
    except ImportError:
        return NoBar(*items, **options)
    return tqdm(*items, **options)


def about(device: str, module: str, arguments: list[str]) -> dict:
    """Date, commit, command, machine, versions. module, arguments: of the command that is running.

    started: tells this invocation from every other one. commit, sources: of the functions of these names.
    failed_checks: tests that failed on this machine before it, as benchmarks/gpu.sh says in
    ASFT_BENCHMARK_FAILED_CHECKS. tuned, stored_tiles: ASFT_KERNELS_TUNED ("" if not set) and a digest of the times that
    autotune stored for this GPU.
    """
    facts = {
        "date": str(date.today()),
        "started": datetime.now(timezone.utc).isoformat(),
        "commit": commit(),
        "sources": sources(),
        "command": " ".join(["python -m", module, *arguments]),
        "machine": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(_total_memory() / GIB, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "machine": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            "driver": _driver(),
            "triton": package_version("triton"),
            "tuned": os.environ.get("ASFT_KERNELS_TUNED", ""),
            "stored_tiles": _stored_tiles(),
        }
    failed = os.environ.get("ASFT_BENCHMARK_FAILED_CHECKS", "").strip()
    return facts | ({"failed_checks": failed} if failed else {})


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _stored_tiles() -> str:
    try:
        from asft_kernels.kernels.tile_choice import stored_times
    except ImportError:  # no Triton
        return ""
    times = stored_times(torch.device("cuda", 0))
    return hashlib.sha256(json.dumps(times, sort_keys=True).encode()).hexdigest()[:8] if times else ""


def device_slug(device: str) -> str:
    """The part of a result file's name: "cpu", or the GPU's name in lower case."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


def commit() -> str:
    """Of the tree the package is in; where its sources have changes, with their digest.

    Outside git what ASFT_BENCHMARK_COMMIT names, which nobody checks, or "unknown" with the digest. A row's `sources`
    tells whether it was that commit: there sources() answers the same.
    """
    root = Path(__file__).parents[1]
    described = _git(root, "describe", "--always")
    if not described:
        return os.environ.get("ASFT_BENCHMARK_COMMIT", "").strip() or f"unknown-{sources()}"
    changed = _git(root, "status", "--porcelain", "--", *map(str, _source_folders(root)))
    return f"{described}-dirty-{sources()}" if changed else described


def sources() -> str:
    """A digest of the Python files of package and benchmarks, as they are now."""
    digest = hashlib.sha256()
    for file in sorted(f for folder in _source_folders(Path(__file__).parents[1]) for f in folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _source_folders(root: Path) -> list[Path]:
    return [root / "asft_kernels", root / "benchmarks"]


def _git(root: Path, *arguments: str) -> str:
    """What git answers; "" where it is missing or this is no repository."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()


def available_memory(device: str) -> int:
    """Bytes that can still be taken."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return _total_memory()


def import_seconds(module: str) -> float | None:
    """In a process of its own, torch aside; None where it is missing."""
    code = f"import time, torch; began = time.perf_counter(); import {module}; print(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().partition("\n")[0] or "unknown"
