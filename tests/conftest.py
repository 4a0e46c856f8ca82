"""Which of three kinds of process this is, seeds, NaN in every fresh tensor, and helpers that all tests share.

`python -m pytest` runs the plain tests and the kernels under Triton's interpreter (the compiled kernels
where there is a GPU); `-m compile` cross-compiles; `-m emulated` executes compiled code on the CPU. The
three cannot share a process: a kernel decorated under TRITON_INTERPRET=1 can be neither compiled nor emulated.
"""

import os

import pytest
import torch

import emulator
from asft_kernels.backends import HAS_TRITON, interpreter_fault

KINDS = ("compile", "emulated")
EMULATOR = os.environ.get("ASFT_KERNELS_EMULATOR_DIR")


def _selects(config, marker: str) -> bool:
    expression = config.getoption("-m") or ""
    return marker in expression and f"not {marker}" not in expression


def pytest_configure(config):
    os.environ["ASFT_KERNELS_TUNED"] = "0"  # what autotune stored here must not change what is tested
    if _selects(config, "compile"):
        os.environ.pop("TRITON_INTERPRET", None)
    elif _selects(config, "emulated"):
        os.environ.pop("TRITON_INTERPRET", None)
        if EMULATOR:
            os.environ["ASFT_KERNELS_EMULATOR"] = "1"
            emulator.install(EMULATOR)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path, config):
    """Two kinds stand in few files, which say so; the others need not be imported for them."""
    for kind in KINDS:
        if _selects(config, kind) and collection_path.suffix == ".py" and kind not in collection_path.read_text():
            return True
    return None


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(config, items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.get_closest_marker("emulated") and parameters.get("dtype") == torch.float16:
            item.add_marker("slow")  # differs from bf16 by the name of a type
        for kind in KINDS:
            assert not item.get_closest_marker(kind) or kind in item.path.read_text(), (
                f"{item.path} holds tests marked {kind}"
            )
    if not EMULATOR:
        skip = pytest.mark.skip(reason="ASFT_KERNELS_EMULATOR_DIR is not set: no emulator to execute compiled kernels")
        for item in items:
            if "emulated" in item.keywords:
                item.add_marker(skip)
    if os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON:
        if fault := interpreter_fault():
            skip = pytest.mark.skip(reason=fault)
            for item in items:
                if "interpreter" in item.keywords:
                    item.add_marker(skip)
        else:
            _patch_language_once_a_launch()


def _patch_language_once_a_launch():
    """Triton's interpreter looks through all of triton.language at each call of a device function, to put in what is
    there already: a quarter of its time."""
    from triton.language import core
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if core.is_builtin(core.load):  # as Triton has it
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def _seed_and_poison():
    """Same numbers every time; memory that nobody wrote shows as NaN."""
    torch.manual_seed(0)
    poisons = not torch.cuda.is_available()  # on a GPU the switch also warns of what torch itself runs there
    torch.use_deterministic_algorithms(poisons, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_processor(monkeypatch):
    """The same chunks whatever machine the tests run on."""
    monkeypatch.setattr("asft_kernels.backends.processor.INTEL", False)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The torch backend takes the branches that it takes on a GPU: none that looks at a value."""
    monkeypatch.setattr("asft_kernels.backends.torch_chunked.looking_is_free", lambda x: False)
