"""What MkDocs does not do by itself for this site (mkdocs.yml names this file as its hook).

Pages stand on the site where they stand in the repository, README.md as the front page, so that a relative link means
the same on both. A link to a file that is no page of the site leads into the repository if mkdocs.yml has a repo_url;
without one its path is shown in its place. In the navigation a pattern stands for the pages that no other line names.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = (
    "*.md", "docs/**/*.md", "docs/**/*.svg", "docs/**/*.png", "docs/**/*.css", "bench_results/**/*.md",
    "bench_results/**/*.png",
)  # fmt: skip
CODE = r"^```.*?^```|`[^`\n]+`"
LINK = r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)"


def shown() -> list[str]:
    return sorted({str(path.relative_to(ROOT)) for pattern in SHOWN for path in ROOT.glob(pattern)})


def on_config(config):
    config.nav = expanded(config.nav, [name for name in shown() if name.endswith(".md")])
    return config


def expanded(nav, pages: list[str]):
    """The navigation with the pages that a pattern stands for in its place."""
    named = set(re.findall(r"'([^'*]+\.md)'", repr(nav)))

    def resolve(entry):
        if isinstance(entry, dict):
            return [{title: resolve_all(value)} for title, value in entry.items()]
        if "*" not in entry:
            return [entry]
        return [page for page in pages if Path(page).match(entry) and page not in named]

    def resolve_all(value):
        return [page for entry in value for page in resolve(entry)] if isinstance(value, list) else value

    return resolve_all(nav)


def on_files(files, config):
    theme = [file for file in files if file.page is None and file.generated_by is None and not is_ours(file)]
    return Files([*theme, *(File.generated(config, name, abs_src_path=str(ROOT / name)) for name in shown())])


def is_ours(file) -> bool:
    return Path(file.abs_src_path or "/").is_relative_to(ROOT / "docs")


def on_page_markdown(markdown, page, config, files):
    """Links to files that are not on the site."""
    folder = (ROOT / page.file.src_uri).parent

    def replaced(match):
        text, target, anchor = match["text"], match["target"], match["anchor"]
        if target is None or re.match(r"[a-z]+:", target):  # code, or another site
            return match[0]
        path = (folder / target).resolve()
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else target
        if files.get_file_from_path(name):
            return match[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: link to {target}, which is not there")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{name}{anchor or ''})"
        return f"`{name}`" if text.strip("`") in (name, path.name) else f"{text}: `{name}`"

    return re.sub(f"{CODE}|{LINK}", replaced, markdown, flags=re.MULTILINE | re.DOTALL)
