"""The C of `sparse_source.py` and `sparse_int8_source.py`, built by the machine's own compiler at the first call.

An export carries this file along. What is built is kept in the user's cache folder, by source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .sparse_source import SOURCE

LOG = logging.getLogger(__name__)
COMPILERS = (("cc",), ("gcc",), ("clang",))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wl,-z,defs", "-nodefaultlibs")


@functools.cache
def library(source: str = SOURCE) -> ctypes.CDLL | None:
    """The functions of a source; None where they cannot be had, or `COOK_NATIVE` is 0."""
    if os.environ.get("COOK_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return None
    reasons = []
    try:
        openmp = _openmp()
        named = shlex.split(os.environ.get("CC", ""))
        for compiler in [named] if named else COMPILERS:
            try:
                return _opened(source, compiler, openmp)
            except subprocess.CalledProcessError as error:
                reasons.append(f"{compiler[0]}: {error.stderr.strip()[-300:]}")
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(f"{compiler[0]}: {error}")
    except (OSError, ValueError) as error:
        reasons.append(str(error))
    LOG.warning(
        "pruned layers run on PyTorch's products, which are slower: ours in C cannot be built (%s); CC names a "
        "compiler, COOK_NATIVE=0 ends this message",
        "; ".join(reasons),
    )
    return None


def _openmp() -> str:
    """The OpenMP library that PyTorch has loaded: a second one's threads would fight with its own for the cores."""
    loaded = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", Path("/proc/self/maps").read_text(errors="replace"))
    own = Path(torch.__file__).parent
    loaded.sort(key=lambda path: not path.startswith((f"{own}/", f"{own}.libs/")))
    if not loaded:
        raise ValueError("PyTorch has loaded no OpenMP")
    return loaded[0]


def _opened(source: str, compiler: tuple[str, ...] | list[str], openmp: str) -> ctypes.CDLL:
    facts = Path("/proc/cpuinfo").read_text(errors="replace")
    processor = sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", facts, re.MULTILINE)))
    made_of = "\n".join([source, *compiler, *FLAGS, openmp, *platform.libc_ver(), *processor])
    name = f"sparse_{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
    folder = _folder()
    if folder is not None:
        try:
            return ctypes.CDLL(str(_kept(folder / name, source, compiler, openmp)))
        except OSError:
            pass  # a damaged file, or a folder from which nothing may be run
    with tempfile.TemporaryDirectory(prefix="cook-") as scratch:
        return ctypes.CDLL(str(_built(Path(scratch) / name, source, compiler, openmp)))


def _kept(target: Path, source: str, compiler: tuple[str, ...] | list[str], openmp: str) -> Path:
    if not _is_own(target):
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = _built(Path(scratch) / target.name, source, compiler, openmp)
            try:
                os.link(made, target)  # the first one stays: another process may have it open already
            except OSError:  # there is one, or this file system knows no links
                if not _is_own(target):
                    made.replace(target)
    return target


def _built(made: Path, source: str, compiler: tuple[str, ...] | list[str], openmp: str) -> Path:
    command = [*compiler, *FLAGS, "-x", "c", "-", "-x", "none", openmp, "-lm", "-lc", "-o", str(made)]
    subprocess.run(command, input=source, text=True, errors="replace", check=True, capture_output=True, timeout=120)
    made.chmod(0o700)
    return made


def _is_own(library: Path) -> bool:
    """Whether a library is a file of the user's own that nobody else may write."""
    try:
        found = library.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _folder() -> Path | None:
    """A folder of the user's own, where nobody else may put a library; None if there is none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cook"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # a home that cannot be written, or is not known
        return None
    return folder if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK) else None
