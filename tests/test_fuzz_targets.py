"""Damaged and generated files: any bytes are read, or refused with a message."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "fuzz" / "targets.py"
specification = importlib.util.spec_from_file_location("fuzz_targets", SCRIPT)
assert specification is not None and specification.loader is not None
targets = importlib.util.module_from_spec(specification)
sys.modules["fuzz_targets"] = targets  # where dataclasses look their annotations up
specification.loader.exec_module(targets)

TOKENS = [b"../", b"NaN", b"1e999", b'"', b"{["]
EXAMPLES = {"config": 60, "masks": 150, "pt": 150, "safetensors": 100, "manifest": 150}


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good file with a few bytes changed, cut out, doubled or put in; now and then only noise."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.sampled_from([1, 1, 2, 8, 100])))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "double", "insert", "truncate", "noise"]))
        if kind == "flip" and end > begin:
            content[begin] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[begin:end]
        elif kind == "double":
            content[begin:begin] = content[begin:end]
        elif kind == "insert":
            content[begin:begin] = draw(st.binary(max_size=8) | st.sampled_from(TOKENS))
        elif kind == "truncate":
            del content[begin:]
        elif kind == "noise":
            content[:] = draw(st.binary(max_size=60))
    return bytes(content)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_whatever_the_bytes_are(name):
    target = targets.TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.check(seed)

    @settings(max_examples=EXAMPLES[name], deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(mutated(seeds))
    def never_another_exception(content: bytes) -> None:
        target.check(content)

    never_another_exception()


def test_a_defect_would_be_seen():
    with pytest.raises(AssertionError), targets.refused_plainly():
        raise AssertionError
    with pytest.raises(KeyError), targets.refused_plainly():
        raise KeyError("a reader's own error")
