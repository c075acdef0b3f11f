"""Hooks of mkdocs.

Pages may link to figures and pages of the repository outside `docs/`, as on a code host, and name what is documented as
users import it: `::: cook.plan`.
"""

from __future__ import annotations

import functools
import importlib.util
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
_PUBLIC = re.compile(r"(^::: |\]\(#)cook\.(\w+)(?=$|\))", re.MULTILINE)
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of the repository."""
    for pattern in OUTSIDE:
        for file in sorted(ROOT.glob(pattern)):
            name = f"{FOLDER}/{file.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turns links out of `docs/` into links inside the site, and public names of `cook` into those of their modules."""
    here = posixpath.dirname(page.file.src_uri)
    markdown = _PUBLIC.sub(lambda found: f"{found[1]}{_homes()[found[2]]}.{found[2]}", markdown)

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, match[2]))
        if target.startswith("docs/"):
            return match[0]
        return match[1] + posixpath.relpath(f"{FOLDER}/{target}", here or ".")

    return _LINK.sub(rewritten, markdown)


@functools.cache
def _homes() -> dict[str, str]:
    """The module of each public name; `cook/__init__.py` imports nothing else, so this costs nothing."""
    spec = importlib.util.spec_from_file_location("cook_names", ROOT / "cook" / "__init__.py")
    assert spec is not None and spec.loader is not None
    names = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(names)
    return names._HOMES
