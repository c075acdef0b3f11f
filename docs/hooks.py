"""Hooks of mkdocs: pages may link to figures and pages of the repository outside `docs/`, as on a code host."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("results/bench/**/*.png", "SECURITY.md", "CONTRIBUTING.md", "config/*/README.md")
"""Files outside `docs/` that the site contains; they are copied when it is built."""
FOLDER = "repository"
"""Where they are in the site."""
SETTINGS = "reference/settings.md"
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of the repository, and a page in place of the settings reference where it was not generated."""
    for pattern in OUTSIDE:
        for file in sorted(ROOT.glob(pattern)):
            name = f"{FOLDER}/{file.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(file)))
    if files.get_file_from_path(SETTINGS) is None:
        text = "# Settings\n\nThis page is generated: `python -m cook.config` writes it.\n"
        files.append(File.generated(config, SETTINGS, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turns a link out of `docs/` into a link to the copy in the site."""
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[2]))
        if target.startswith("docs/"):
            return match[0]
        return match[1] + posixpath.relpath(f"{FOLDER}/{target}", here or ".")

    return _LINK.sub(rewritten, markdown)
