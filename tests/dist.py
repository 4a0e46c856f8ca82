"""Tests what `make dist` built: wheel and source distribution, each installed in a fresh environment, away from here.

The core's tests of the source distribution run against the installed package, which must know its version, its command
and its data.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from run import CORE

ROOT = Path(__file__).resolve().parent.parent
OF_A_CHECKOUT = ("layers",)  # reads the sources
CHECK = """
import importlib.metadata, pathlib, sys
import asft_kernels
assert pathlib.Path(asft_kernels.__file__).is_relative_to(sys.prefix), asft_kernels.__file__
assert importlib.metadata.version("asft_kernels") == asft_kernels.__version__ == sys.argv[1]
folder = pathlib.Path(asft_kernels.__file__).parent
assert (folder / "py.typed").is_file() and (folder / "demo_data" / "train.jsonl").is_file()
print("asft_kernels", asft_kernels.__version__, "from", folder)
"""


def main() -> None:
    (wheel,), (source,) = ((ROOT / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory(prefix="asft-dist-") as name:
        folder = Path(name)
        run = {"cwd": folder, "check": True, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], **run)
        python = str(folder / "venv" / "bin" / "python")
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", ROOT / "constraints.txt"]
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = folder.glob("asft_kernels-*")
        (unpacked / "asft_kernels").rename(folder / "sources")  # what is tested is what is installed
        files = [f"tests/test_{file}.py" for file in CORE if file not in OF_A_CHECKOUT]
        subprocess.run([*install, wheel, "hypothesis", "numpy", "pytest"], **run)
        for built in (wheel, source):
            print(f"== {built.name}", flush=True)
            subprocess.run([*install, "--force-reinstall", "--no-deps", built], **run)
            subprocess.run([python, "-c", CHECK, version], **run)
            subprocess.run([folder / "venv" / "bin" / "asft", "--version"], **run)
            subprocess.run([python, "-m", "pytest", "-q", *files, "-m", "not slow and not interpreter"],
                           **{**run, "cwd": unpacked})  # fmt: skip


if __name__ == "__main__":
    main()
