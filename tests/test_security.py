"""What no file of the project may do, read from its syntax: open files that run code, or run strings as code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cook.base.environment import OLDEST
from tests.recipe.tiny_run import run

ROOT = Path(__file__).resolve().parents[1]
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
FILES = sorted(path for path in LISTED if not path.startswith("tests/") and (ROOT / path).is_file())

RESTRICTED_READERS = ("cook/data/cpm_live/symbols.py", "cook/base/tensor_files.py")
"""The files that may list a pickle's opcodes, which runs nothing: of CPM-Live's index, and of a `.pt` file."""
PUBLIC_FACE = "cook/__init__.py"
"""Imports lazily what the package's own table of names says."""
OWN_EXPORTS = (
    "cook/families/encoder.py",
    "scripts/bench/four_methods.py",
    "scripts/bench/moefy.py",
    "scripts/bench/patterns.py",
    "scripts/bench/sparse_int8.py",
)
"""Open folders that this project has just written, with its own modeling file, and no others."""

UNPICKLERS = {"pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_STRINGS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
    "yaml.load",
    "yaml.unsafe_load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "runpy.run_path",
    "runpy.run_module",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
}
OPEN_ADDRESSES = re.compile(r"0\.0\.0\.0|::")


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression made of names and attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def offences(path: str, source: str) -> Iterator[str]:
    """What a file does that it must not, a sentence each."""
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in UNPICKLERS and not (path in RESTRICTED_READERS and name == "pickletools"):
                    yield f"{where} imports {name}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "os", "subprocess"):
                for alias in node.names:
                    if alias.name in ("load", "system", "popen", "getoutput"):
                        yield f"{where} hides {node.module}.{alias.name} behind a bare name"
        elif isinstance(node, ast.Call):
            yield from (f"{where} {problem}" for problem in _of_call(path, node))
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args][::-1], [*node.defaults][::-1]
            pairs = [*zip(*named, strict=False), *zip(node.kwonlyargs, node.kw_defaults, strict=True)]
            if any(arg.arg == "trust_remote_code" and is_true(default) for arg, default in pairs):
                yield f"{where} trusts remote code by default"


def _of_call(path: str, call: ast.Call) -> Iterator[str]:
    name = dotted(call.func)
    last = name.rpartition(".")[2]
    if name == "torch.load" and not is_true(keyword(call, "weights_only")):
        yield "calls torch.load without weights_only=True"
    if name in RUNS_STRINGS or name in FORBIDDEN_CALLS:
        yield f"calls {name}"
    if last == "import_module" and path != PUBLIC_FACE:
        argument = call.args[0] if call.args else None
        if not isinstance(argument, ast.Constant):
            yield "imports by a name that is not written here"
    shell = keyword(call, "shell")
    if is_true(shell) or (shell and not isinstance(shell, ast.Constant)):
        yield "starts a shell on a string"
    if is_true(keyword(call, "allow_pickle")):
        yield f"calls {name} with allow_pickle=True"
    if is_true(keyword(call, "trust_remote_code")) and path not in OWN_EXPORTS:
        yield f"calls {name} with trust_remote_code=True"
    if last in ("extractall", "unpack_archive"):
        yield f"calls {name}: members may leave the folder"
    if last == "bind" and call.args and isinstance(call.args[0], ast.Tuple):
        host = call.args[0].elts[0]
        if not (isinstance(host, ast.Constant) and host.value in ("127.0.0.1", "localhost")):
            yield "listens beyond loopback"
    for argument in [*call.args, *(word.value for word in call.keywords)]:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            if OPEN_ADDRESSES.fullmatch(argument.value):
                yield f"names the address {argument.value}"


def test_the_files_are_found():
    assert len(FILES) > 60 and "cook/base/tensor_files.py" in FILES and "do_prune.py" in FILES


@pytest.mark.parametrize("path", FILES)
def test_no_file_runs_what_it_reads(path):
    assert list(offences(path, (ROOT / path).read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "import torch\ntorch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "from torch import load",
        "eval(x)",
        "exec(x)",
        "compile(x, '', 'exec')",
        "__import__(x)",
        "os.system(x)",
        "os.popen(x)",
        "from os import system",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "importlib.import_module(name)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(x)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "def f(trust_remote_code=True): ...",
        "def f(*, x=1, trust_remote_code=True): ...",
        "archive.extractall(p)",
        "s.bind(('', 80))",
        "s.bind((host, 80))",
        "serve('0.0.0.0')",
        "serve(host='::')",
        "torch.hub.load(x)",
    ],
)
def test_each_offence_is_seen(source):
    assert list(offences("cook/x.py", source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p, map_location='cpu', weights_only=True)",
        "model.eval()",
        "re.compile(x)",
        "torch.compile(m)",
        "subprocess.run([x], shell=False)",
        "importlib.import_module('cook.families')",
        "s.bind(('127.0.0.1', 0))",
        "np.load(p)",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=False)",
        "json.load(f)",
        "def f(x=True, trust_remote_code=False): ...",
        "def f(trust_remote_code, x=True): ...",
        "ast.literal_eval(x)",
    ],
)
def test_what_is_harmless_passes(source):
    assert list(offences("cook/x.py", source)) == []


def test_the_exceptions_are_one_file_each():
    assert not list(offences(RESTRICTED_READERS[0], "import pickletools"))
    assert list(offences(RESTRICTED_READERS[0], "torch.load(p)"))
    assert list(offences(RESTRICTED_READERS[1], "import pickle"))
    assert not list(offences(PUBLIC_FACE, "importlib.import_module(x)"))
    assert list(offences(PUBLIC_FACE, "import pickle"))


def test_the_public_face_imports_only_names_that_are_written_in_it():
    tree = ast.parse((ROOT / PUBLIC_FACE).read_text())
    tables = {
        dotted(node.targets[0])
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and all(isinstance(value, ast.Constant) for value in node.value.values)
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func) == "importlib.import_module"]
    assert calls and all(isinstance(c.args[0], ast.Subscript) and dotted(c.args[0].value) in tables for c in calls)


def test_the_pinned_libraries_are_new_enough():
    pins = dict(re.findall(r"^([a-z-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for name, (oldest, _) in OLDEST.items():
        assert tuple(map(int, pins[name].split("."))) >= oldest, name
    loose = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#"]
    assert [line for line in loose if "==" not in line] == ["setuptools<81"], "what is not pinned cannot be audited"


def test_security_md_names_every_exception():
    text = (ROOT / "SECURITY.md").read_text()
    for word in ("DeepSpeed", "trust_remote_code", "weights_only", "loopback", "manifest", *OLDEST):
        assert word in text, word


LISTENING = """
    import psutil, torch
    from cook.training.engine import initialise_processes, leave_processes
    initialise_processes(1)
    import torch.distributed as dist
    dist.all_reduce(torch.ones(1))
    print(*{c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN})
    leave_processes()
"""


@pytest.mark.slow
def test_a_run_of_one_rank_listens_at_loopback_only():
    result = run([sys.executable, "-c", textwrap.dedent(LISTENING)], ROOT)
    assert result.code == 0 and set(result.out.split()) <= {"127.0.0.1", "::1"}, result
