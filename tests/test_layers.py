"""A module imports only from lower layers; packages on one layer do not import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS: tuple[tuple[str, ...], ...] = (
    ("base",),
    ("config", "text", "models"),
    ("pruning", "data", "report"),
    ("families",),
    ("export",),
    ("sparsity", "distill", "quantization"),
    ("training", "evaluation"),
    ("recipe",),
    ("service",),
    ("commands",),
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
TOP = len(LAYERS)
FAMILY_NAMES = ("cpm_ant", "cpmant", "CpmAnt", "llama", "Llama", "qwen", "gemma", "phi3", "gpt2", "neox", "roberta")
FAMILY_PACKAGES = ("families", "models")
ENTRY_NAMES = ("__main__", "cli", "train", "tasks", "trainer_callback", "learning", "reshaping")
ENTRY_POINTS = tuple(f"cook/{name}.py" for name in ENTRY_NAMES)
"""They may import each other and the public names of the package."""
ENGINE, CHECKS = "cook/training/engine.py", "cook/training/deepspeed_checks.py"
FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "cook").rglob("*.py"))


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports; `from a import b` counts as `a.b`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import climbs from the file's own package.
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What in a file violates the layers, one sentence per import."""
    parts = path.split("/")
    package = parts[1] if len(parts) > 2 else ""
    layer = LAYER_OF.get(package, TOP)
    found = [] if not package or package in LAYER_OF else [f"{path}: the package {package!r} is on no layer"]
    for line, name in imports(path, source):
        words = name.split(".")
        if words[0] == "deepspeed" and path not in (ENGINE, CHECKS):
            found.append(f"{path}:{line} imports {name}; only {ENGINE} and {CHECKS} may")
        if words[0] != "cook" or name == "cook.__version__":
            continue
        other = words[1] if len(words) > 1 else ""
        if other == package and package:
            continue
        if LAYER_OF.get(other, TOP) >= layer and not (layer == TOP and (other in LAYER_OF or path in ENTRY_POINTS)):
            found.append(f"{path}:{line} imports {name} from layer {LAYER_OF.get(other, TOP)} while on layer {layer}")
    return found


def family_words(source: str) -> list[str]:
    """Imports, identifiers, attributes and string constants (docstrings apart) that name a family."""
    tree = ast.parse(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = set()
    for node in ast.walk(tree):
        for child in node.body if isinstance(node, holders) else ():
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                docs.add(id(child.value))
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words.append(node.value)
        elif isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, ast.Import):
            words += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            words += [node.module or "", *(alias.name for alias in node.names)]
    return [word for word in words if any(family in word for family in FAMILY_NAMES)]


def test_the_files_are_found():
    assert len(FILES) > 50 and ENGINE in FILES


@pytest.mark.parametrize("path", FILES)
def test_imports_go_down(path):
    assert violations(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", [f for f in FILES if f.endswith("__init__.py") and f != "cook/__init__.py"])
def test_init_files_are_empty(path):
    assert (ROOT / path).read_text().strip() == ""


@pytest.mark.parametrize("path", [f for f in FILES if f.split("/")[1] not in FAMILY_PACKAGES])
def test_only_families_and_models_know_families(path):
    # The tokenizer names the transformers class that reads what it saves; the config lists the families.
    if path not in ("cook/config/types.py", "cook/text/jieba.py"):
        assert family_words((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "word"),
    [
        ("cook/base/x.py", "import cook.pruning.gates", "cook.pruning.gates"),
        ("cook/models/x.py", "from cook.pruning.gates import Gates", "cook.pruning"),
        ("cook/pruning/x.py", "from cook import families", "cook.families"),
        ("cook/pruning/x.py", "from ..sparsity import tiles", "cook.sparsity.tiles"),
        ("cook/distill/x.py", "from cook.sparsity.tiles import Tiles", "cook.sparsity"),
        ("cook/families/x.py", "from cook.sparsity import tiles", "cook.sparsity.tiles"),
        ("cook/training/x.py", "def f():\n    import deepspeed.comm", "deepspeed"),
        ("cook/recipe/x.py", "from cook.train import main", "cook.train"),
        ("cook/new/x.py", "", "new"),
    ],
)
def test_an_offending_import_is_named(path, source, word):
    found = violations(path, source)
    assert found and word in found[0]


def test_family_names_are_found():
    assert family_words('"""cpm_ant in a docstring"""\nx = "cpm_ant"\ny.CpmAntConfig') == ["cpm_ant", "CpmAntConfig"]
