"""All packaging metadata. pyproject.toml holds the settings of tools only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
INIT = (HERE / "asft_kernels" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__\s*=\s*["\']([^"\']+)["\']', INIT, re.MULTILINE)
if VERSION is None:
    raise RuntimeError('setup.py: asft_kernels/__init__.py has no line __version__ = "..."')

HAS_TRITON = "sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
TRAIN = [
    "accelerate>=1.1",
    "datasets>=3",
    "gguf>=0.10",  # the demo's model comes as a GGUF file
    "matplotlib>=3.8",
    "numpy",
    "peft>=0.18",  # LoRA
    "pyarrow>=15",  # score files, Parquet and Arrow data; datasets brings it
    "rouge-score>=0.1.2",  # ROUGE-L of asft eval
    "sacrebleu>=2.5",  # BLEU of asft eval
    "tqdm>=4.66",
    "transformers>=5",
    "trl>=1.15,<2",  # the trainer; tried: 1.15.0, 1.16.0
]
DOCS = ["mkdocs-material>=9.7,<10"]  # the last series: security updates until May 2027, then its successor Zensical
PEERS = [  # measured beside ours, and their losses are compared with ours
    f"liger-kernel>=0.8.5; {HAS_TRITON}",
]

setup(
    name="asft_kernels",
    version=VERSION.group(1),
    description="Fused preference losses (ASFT and relatives) straight from hidden states, "
    "without the logits: Triton kernels and chunked torch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The asft_kernels developers",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["asft", "preference optimization", "triton", "language models", "cross entropy"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["asft_kernels", "asft_kernels.*"]),
    package_data={"asft_kernels": ["py.typed", "demo_data/*.jsonl", "demo_data/README.md"]},
    zip_safe=False,
    python_requires=">=3.10",
    # Tried from these up to torch 2.15 with Triton 3.9 (CONTRIBUTING.md): `make oldest`, `make newest`.
    install_requires=["torch>=2.11", f"triton>=3.6; {HAS_TRITON}"],
    extras_require={
        "train": TRAIN,
        "bench": [
            *TRAIN,  # real hidden states, pictures
            *PEERS,
            "cut-cross-entropy>=25.1",  # measured only
        ],
        "test": [
            *TRAIN,  # the trainer's tests
            *PEERS,
            *DOCS,  # the site's links and anchors
            "bitsandbytes>=0.49; platform_system == 'Linux'",  # heads of 4 and 8 bits
            "hypothesis>=6.100",
            "mpmath>=1.3",  # extremes; torch brings it with sympy
            "pytest>=8.4",
            "pytest-xdist>=3.6",
            # Compiled kernels are executed with it; newer and older releases are untested.
            "tinygrad==0.14.0; python_version >= '3.11'",
        ],
        "docs": DOCS,
        # Pinned here and nowhere else: pre-commit, `make lint` and editors use these.
        "dev": ["build>=1.3", "pre-commit==4.7.0", "pyright[nodejs]==1.1.414", "ruff==0.17.6", "twine>=6.2"],
    },
    entry_points={
        "console_scripts": [
            "asft = asft_kernels.cli:main",
            "asft-data = asft_kernels.cli.data:main",  # the last three: names of old
            "asft-score = asft_kernels.cli.score:main",
            "asft-train = asft_kernels.cli.train:main",
        ]
    },
)
