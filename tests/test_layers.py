"""Imports point one way, optional packages stay out, and the tree names nothing that is not its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "asft_kernels"
LAYERS = [  # each may import those before it
    "errors files",
    "locks",
    "kernels reference",
    "backends",
    "memory",
    "core",
    "cost objectives",
    "outputs",
    "token_loss",
    "functional",
    "nn liger",
    "models data",
    "score data_commands",
    "evaluation",
    "training",
    "methods",
    "tools",
    "cli",
    "demo",
]
CORE = [  # the same inside of core
    "checks",
    "batch sharded_linear",
    "sequence distributed",
    "sequence_parallel tensor_parallel options",
    "heads linear_logps",
    "token_logps",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
RANK_IN_CORE = {name: rank for rank, names in enumerate(CORE) for name in names.split()}


def upward_imports_in_core(source: str, here: str) -> list[str]:
    """The modules of asft_kernels.core that its module `here` must not import."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("asft_kernels.core"):
            named = (node.module or "").split(".")[2:3] or [a.name for a in node.names]
            bad += [name for name in named if not RANK_IN_CORE[name] < RANK_IN_CORE[here]]
    return bad


def upward_imports(source: str, here: str) -> list[str]:
    """The asft_kernels modules that a module of layer `here` must not import."""
    bad = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad += [a.name for a in node.names if a.name.startswith("asft_kernels.")]  # use from-imports
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "asft_kernels":
                inner = parts[1:2] or [a.name for a in node.names]
                public = not parts[1:] and RANK[here] > RANK["nn"]  # trainers use the public names
                bad += [n for n in inner if n != here and not public and not RANK[n] < RANK[here]]
    return bad


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    assert here in RANK, f"{here}: add it to LAYERS in {Path(__file__).name}, above what it imports"
    assert upward_imports(path.read_text(), here) == []
    if here == "reference":
        assert "asft_kernels" not in path.read_text().replace("asft_kernels.reference", ""), "the oracle stands alone"
    if here == "core" and path.name != "__init__.py":
        assert upward_imports_in_core(path.read_text(), path.stem) == []


def test_the_layer_check_can_fail():
    assert upward_imports("from asft_kernels.objectives import ASFT", "kernels") == ["objectives"]
    assert upward_imports("import asft_kernels.nn", "kernels") == ["asft_kernels.nn"]
    assert upward_imports_in_core("from asft_kernels.core import checks, heads", "batch") == ["heads"]
    assert upward_imports_in_core("from asft_kernels.core.heads import Head", "heads") == ["heads"]


OPTIONAL = ["triton", "transformers", "trl", "peft", "datasets", "matplotlib", "numpy.testing"]
LOADED = "import sys, {module}; print([m for m in {names} if m in sys.modules])"


@pytest.mark.parametrize("module", ["asft_kernels", "asft_kernels.reference"])
def test_import_leaves_optional_packages_out(module):
    code = LOADED.format(module=module, names=OPTIONAL)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout


def test_the_optional_import_check_can_fail():
    code = LOADED.format(module="matplotlib, asft_kernels", names=OPTIONAL)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "matplotlib" in out.stdout if not out.returncode else "No module named" in out.stderr


def test_works_from_a_bare_checkout(tmp_path):
    """No metadata of an installation is looked up."""
    code = (
        "import torch, asft_kernels as a; h = torch.randn(2, 4, 8, requires_grad=True);"
        "a.fused_asft_loss(h, torch.randn(9, 8), torch.randint(9, (2, 4))).backward(); print(a.__version__)"
    )
    link = tmp_path / "asft_kernels"
    link.symlink_to(PACKAGE)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("module", ["functional", "nn", "cost"])
def test_docstring_examples(module):
    import doctest
    import importlib

    import torch

    loaded = importlib.import_module(f"asft_kernels.{module}")
    result = doctest.testmod(loaded, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0
