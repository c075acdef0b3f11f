"""What reads files that others have made, as functions of bytes: right, refused as a user's mistake, or a defect.

Used by `run.py` here for hours with Atheris, and by the tests for seconds with Hypothesis.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.files import read_json, write_json
from cook.base.tensor_files import load_pt, open_pt, open_safetensors_folder
from cook.config.load import load_config
from cook.config.types import RunConfig
from cook.pruning.mask_file import read_mask_file, write_mask_file
from cook.pruning.mask_set import COARSE_KEYS
from cook.training.manifest import MANIFEST, file_entry, seal, steps, verify

LARGEST = 1 << 26
"""Elements that a file of a few kilobytes may unfold to at most."""
SHIPPED = Path(__file__).resolve().parents[2] / "config"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader under test."""

    seeds: Callable[[], list[bytes]]
    """Good files to start from."""
    check: Callable[[bytes], None]
    """Reads the bytes; anything but success or a `UserError` that can be printed is a defect."""


@contextlib.contextmanager
def refused_plainly() -> Iterator[None]:
    """Lets a user's mistake pass that has something to say."""
    try:
        yield
    except UserError as error:
        assert str(error).strip()
        str(error).encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def file_of(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def archive(content: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _configs() -> list[bytes]:
    shipped = sorted(SHIPPED.glob("*.json")) + sorted(SHIPPED.glob("*/*/bmcook.json"))
    return [path.read_bytes() for path in shipped]


def _read_config(content: bytes) -> None:
    with file_of(content, "bmcook.json") as path:
        (path.parent / "l0_pruning.json").write_bytes((SHIPPED / "l0_pruning.json").read_bytes())
        with refused_plainly():
            assert isinstance(load_config(str(path)), RunConfig)
    with file_of(content, "l0_pruning.json") as path:
        (path.parent / "bmcook.json").write_bytes((SHIPPED / "bmcook.json").read_bytes())
        with refused_plainly():
            assert isinstance(load_config(str(path.parent / "bmcook.json")), RunConfig)


MASKS = {
    "self_att_layer_z": torch.tensor([1.0, 0.0, 1.0]),
    "cross_att_layer_z": torch.zeros(0),
    "ffn_layer_z": torch.tensor([0.0, 1.0, 1.0]),
}


def _masks() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_mask_file(Path(folder) / "m.pt", MASKS)
        return [(Path(folder) / "m.pt").read_bytes(), archive({"heads_z": torch.ones(2, 4)}), archive(MASKS | {"x": 1})]


def _read_masks(content: bytes) -> None:
    with file_of(content, "m.pt") as path, refused_plainly():
        read = read_mask_file(path, required=COARSE_KEYS[:1], allowed=COARSE_KEYS)
        for value in read.values():
            assert value.dtype == torch.float32 and value.numel() <= LARGEST
            assert bool(((value == 0) | (value == 1)).all())


def _archives() -> list[bytes]:
    shared = torch.arange(6.0)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(1 << 20))
    return [
        archive({"a": shared, "b": shared[2:], "step": 3, "nested": {"c": [1, "x"]}}),
        archive({"w": torch.ones(3, 4, dtype=torch.bfloat16).t()}),
        packed.getvalue(),
    ]


def _read_archive(content: bytes) -> None:
    with file_of(content, "x.pt") as path:
        for reader in (load_pt, open_pt):
            with refused_plainly():
                read = reader(path)
                assert all(
                    value.untyped_storage().nbytes() <= len(content)
                    for value in read.values()
                    if isinstance(value, torch.Tensor)
                )


def _models() -> list[bytes]:
    from safetensors.torch import save

    return [save({"w": torch.ones(2, 3), "v": torch.zeros(4, dtype=torch.float16)}), save({})]


def _read_model(content: bytes) -> None:
    with file_of(content, "model.safetensors") as path, refused_plainly():
        assert sum(tensor.nbytes for tensor in open_safetensors_folder(path.parent).values()) <= len(content)


FILES = {"engine/model_states.pt": b"weights" * 30, "rng-0.pt": b"generator", "state.json": b"{}"}


def _checkpoint(folder: Path) -> Path:
    step = folder / "step-4"
    for name, content in FILES.items():
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(content)
    manifest = {
        "stage": "pretrain",
        "step": 4,
        "tokens": 100,
        "world_size": 1,
        "fingerprint": "f",
        "layout": {},
        "files": {name: file_entry(step / name) for name in FILES},
    }
    write_json(step / MANIFEST, seal(manifest))
    return step


def _manifests() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        step = _checkpoint(Path(folder))
        good = read_json(step / MANIFEST)
        outside = seal({**good, "files": {**good["files"], "../../x": {"size": 1, "sha256": "0"}}})
        return [(step / MANIFEST).read_bytes(), json.dumps(good).encode(), json.dumps(outside).encode()]


def _read_manifest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        step = _checkpoint(Path(folder))
        (step / MANIFEST).write_bytes(content)
        with refused_plainly():
            accepted = verify(step)
            # What is accepted lists exactly the files that are there, with what they hold.
            assert accepted["files"].keys() == FILES.keys()
            assert all(accepted["files"][name]["size"] == len(held) for name, held in FILES.items())
        assert steps(Path(folder)) == [4]


TARGETS = {
    "config": Target(seeds=_configs, check=_read_config),
    "masks": Target(seeds=_masks, check=_read_masks),
    "pt": Target(seeds=_archives, check=_read_archive),
    "safetensors": Target(seeds=_models, check=_read_model),
    "manifest": Target(seeds=_manifests, check=_read_manifest),
}
