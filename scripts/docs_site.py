"""What ``make docs`` adds to the pages of ``docs/``: a hook of MkDocs (mkdocs.yml).

The pages at the repository's root join the site, and so does the reference (scripts/reference.py).
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))

import reference  # noqa: E402

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
FOLDERS = {"Decisions": "decisions", "Results": "results"}
"""Folders of docs/ whose pages are listed by name, so that a new one needs no line in mkdocs.yml."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the folders' pages."""
    for title, folder in FOLDERS.items():
        found = sorted((DOCS / folder).glob("*.md"), key=lambda path: (path.stem != "README", path))
        pages = [path.relative_to(DOCS).as_posix() for path in found]
        if pages and config.nav is not None:
            config.nav.append({title: pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages and the reference."""
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    try:
        pages = reference.pages((DOCS / "api.md").read_text(encoding="utf-8"))
    except reference.Undescribed as error:
        raise PluginError(str(error)) from error
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between the repository's pages become links of the site; to other files they become their text.

    On whose machine a block of commands runs is for the tests alone: the site's parser takes such a fence for text.
    """
    here = page.file.src_uri
    origin = ROOT if here in ROOT_PAGES.values() else (DOCS / here).parent
    sites = {ROOT / name: uri for name, uri in ROOT_PAGES.items()}

    def replaced(link: re.Match[str]) -> str:
        target = Path(posixpath.normpath(origin / link["path"]))
        uri = sites.get(target) or (target.relative_to(DOCS).as_posix() if target.is_relative_to(DOCS) else None)
        if uri is not None:
            return f"[{link['text']}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{link['anchor'] or ''})"
        return link["text"] if target.exists() else link[0]

    pattern = r"(?<!!)\[(?P<text>[^\]]*)\]\((?!\w+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
    return re.sub(pattern, replaced, re.sub(r"^(```\w+) host=\w+$", r"\1", markdown, flags=re.MULTILINE))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Sphinx's roles in docstrings become plain code."""
    return re.sub(r":\w+:<code>~?", "<code>", html)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that asks others for anything, as hospitals reach none of them, or that shows a fence as text."""
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        html = path.read_text(encoding="utf-8")
        if "```" in html:
            raise PluginError(f"{path}: a block of code is shown as text; expected its fence to be understood")
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html):
            if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag):
                raise PluginError(f"{path}: {tag} is loaded from elsewhere; expected a file of the site")
