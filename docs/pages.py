"""The site's pages: all Markdown pages of the repository, so that links between them work as they do in it.

A hook of mkdocs (mkdocs.yml), which by itself takes the files of docs/ alone.
"""

import re
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "kernels", "kernels/*", "tests", "benchmarks/results")


class _Indents(Extension):
    """Lists within lists are indented by two spaces, as on GitHub, not by four."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's name
        md.tab_length = 2
        md.build_parser()  # its parts have copied the length


def on_config(config: MkDocsConfig) -> None:
    """Read Markdown as GitHub does."""
    config.markdown_extensions.insert(0, _Indents())  # others add to the parser that it builds
    config.mdx_configs["toc"] = {"slugify": _anchor}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages, and the files that they link to, under their paths in the repository."""
    pages = {page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md")}
    linked = {(page.parent / path).resolve() for page in pages for path in _links(page)}
    shown = pages | {path for path in linked if path.is_file()} | {ROOT / path for path in config.extra_css}
    paths = sorted(path.relative_to(ROOT).as_posix() for path in shown)
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*of_theme, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths)])


def _links(page: Path) -> list[str]:
    """Paths of a page's links to files."""
    return re.findall(r"\]\(([^)#:]+)", page.read_text(encoding="utf-8"))


def _anchor(heading: str, separator: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", separator)
