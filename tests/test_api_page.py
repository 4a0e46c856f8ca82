"""docs/api.md says what the code says."""

import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def api(monkeypatch):
    pytest.importorskip("transformers", reason="asft_kernels.models needs it")
    monkeypatch.syspath_prepend(str(DOCS))
    import api

    yield api
    del sys.modules["api"]


def test_the_page_is_drawn_from_the_docstrings(api):
    assert api.PAGE.read_text() == api.page(), "run `python docs/api.py --write`"
    assert api.README.read_text() == api.readme(), "run `python docs/api.py --write`"


def test_each_argument_of_each_call_is_explained(api):
    """On the page of a call whose docstring has arguments, each stands in the table."""
    import importlib
    import inspect

    for module in api.MODULES:
        loaded = importlib.import_module(module)
        for name in loaded.__all__:
            thing = getattr(loaded, name)
            _, sections = api.split(inspect.getdoc(thing) or "")
            silent = api.is_error(thing) or (inspect.isfunction(thing) and not inspect.signature(thing).parameters)
            assert sections or silent, f"{module}.{name} has neither Args nor Attributes nor Returns"
            if "Args" not in sections:
                continue
            explained = {arg.lstrip("*") for args, _ in api.items(sections["Args"]) for arg in args.split(", ")}
            own = {p.name for p in inspect.signature(thing).parameters.values()} - {"options", "self", "unknown"}
            own -= api.inherited(thing)
            assert own <= explained, f"{module}.{name}: {own - explained}"
