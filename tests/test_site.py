"""The docs site: builds strictly, shows every page, with pictures as drawn, and asks no other host for anything."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
for package in ("mkdocs", "material"):
    pytest.importorskip(package, reason="needs the docs extra: mkdocs-material")

from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` builds it, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_every_page_is_there_and_in_the_navigation(site, hooks):
    front = (site / "index.html").read_text()
    for name in hooks.shown():
        if name.endswith(".md"):
            place = Path(name).with_suffix("") if Path(name).name != "README.md" else Path(name).parent
            assert (site / place / "index.html").exists(), name
            assert name == "README.md" or f'href="{place}/"' in front, f"{name} is not in the navigation"


def test_nothing_is_asked_of_other_hosts(site):
    """No fonts, scripts or pictures from elsewhere: a link is the reader's choice."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?://[^\"\s>]+)", page.read_text())
        assert not loaded, page


def test_a_link_into_the_code_is_a_path_until_there_is_a_repository(hooks):
    files = SimpleNamespace(get_file_from_path=lambda name: name == "docs/cost.md")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="docs/numerics.md"))
    text = "[cost](cost.md#x), [counted](../tests/test_cost.py), [`bounds.py`](../tests/bounds.py), `[a](b)`, [w](https://x.y)"

    def seen(url):
        return hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=url), files)

    rest = "`[a](b)`, [w](https://x.y)"
    assert seen(None) == f"[cost](cost.md#x), counted: `tests/test_cost.py`, `tests/bounds.py`, {rest}"
    assert "[counted](https://h/o/n/blob/HEAD/tests/test_cost.py), [`bounds.py`](" in seen("https://h/o/n/")
    with pytest.raises(PluginError, match=r"docs/numerics.md: link to gone.py, which is not there"):
        hooks.on_page_markdown("[a](gone.py)", page, SimpleNamespace(repo_url=None), files)


def test_a_pattern_stands_for_the_pages_that_no_line_names(hooks):
    nav = [{"A": ["docs/a.md", "docs/o/*.md", "docs/none*.md"]}, {"B": "docs/o/x.md"}]
    pages = ["docs/a.md", "docs/o/w.md", "docs/o/x.md", "docs/o/y.md"]
    assert hooks.expanded(nav, pages) == [{"A": ["docs/a.md", "docs/o/w.md", "docs/o/y.md"]}, {"B": "docs/o/x.md"}]
