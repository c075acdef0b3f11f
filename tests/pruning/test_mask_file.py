from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cook.base.errors import UserError
from cook.pruning.mask_file import read_mask_file, read_masks, write_mask_file
from cook.pruning.mask_set import COARSE_KEYS, FINE_KEYS, coarse_to_tensors, fine_to_tensors
from tests.tiny_pruning import random_masks, tiny_space

SPACE = tiny_space()
COARSE = {
    "self_att_layer_z": torch.tensor([1.0, 0, 1]),
    "cross_att_layer_z": torch.zeros(0),
    "ffn_layer_z": torch.tensor([0.0, 1, 1]),
}
HEADS = {"heads_z": torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])}
DIMS = {"dimff_z": (torch.arange(40).reshape(2, 20) % 3 == 0).float()}


def saved(path, content, **options):
    torch.save(content, path, **options)
    return str(path)


@pytest.fixture
def files(tmp_path):
    write_mask_file(tmp_path / "coarse.pt", COARSE)
    write_mask_file(tmp_path / "heads.pt", HEADS)
    write_mask_file(tmp_path / "dimff.pt", HEADS | DIMS)
    return {name: str(tmp_path / f"{name}.pt") for name in ("coarse", "heads", "dimff")}


def test_files_are_in_the_guides_layout_with_a_twin(files, tmp_path):
    for name, wanted in (("coarse", COARSE), ("heads", HEADS), ("dimff", HEADS | DIMS)):
        plain = torch.load(files[name], weights_only=True)
        twin = load_file(tmp_path / f"{name}.safetensors")
        assert set(plain) == set(twin) == set(wanted)
        for key, tensor in wanted.items():
            assert plain[key].dtype == torch.float32
            assert torch.equal(plain[key], tensor) and torch.equal(twin[key], tensor)
    assert len(list(tmp_path.iterdir())) == 6


def test_hidden_dims_have_one_number_each(tmp_path, files):
    masks = {"hidden": (torch.arange(24) % 3 > 0).float()}
    write_mask_file(tmp_path / "hidden.pt", fine_to_tensors(SPACE, masks))
    assert set(torch.load(tmp_path / "hidden.pt", weights_only=True)) == {"hidden_z"}
    assert torch.equal(read_masks(SPACE, hidden=str(tmp_path / "hidden.pt"))["hidden"], masks["hidden"])
    for wrong in (torch.ones(23), torch.zeros(24), torch.ones(1, 24)):
        write_mask_file(tmp_path / "wrong.pt", {"hidden_z": wrong})
        with pytest.raises(UserError, match="hidden_z does not fit the model"):
            read_masks(SPACE, hidden=str(tmp_path / "wrong.pt"))
    write_mask_file(tmp_path / "both.pt", HEADS | {"hidden_z": torch.ones(24)})
    with pytest.raises(UserError, match="hold different hidden_z"):
        read_masks(SPACE, coarse=files["coarse"], heads=str(tmp_path / "both.pt"), hidden=str(tmp_path / "hidden.pt"))


def test_the_layout_of_a_whole_model(tmp_path):
    masks = random_masks(SPACE, 3)
    masks |= {f"layers.{i}.{site}": torch.ones(1) for i in range(2) for site in ("att", "ffn")}
    write_mask_file(tmp_path / "c.pt", coarse_to_tensors(SPACE, masks))
    write_mask_file(tmp_path / "f.pt", fine_to_tensors(SPACE, masks))
    coarse, fine = (torch.load(tmp_path / name, weights_only=True) for name in ("c.pt", "f.pt"))
    assert coarse["self_att_layer_z"].shape == coarse["ffn_layer_z"].shape == (3,)
    assert fine["heads_z"].shape == (int(coarse["self_att_layer_z"].sum()), 4)
    assert fine["dimff_z"].shape == (int(coarse["ffn_layer_z"].sum()), 20)
    back = read_masks(SPACE, coarse=str(tmp_path / "c.pt"), dimff=str(tmp_path / "f.pt"))
    for name, mask in back.items():
        assert torch.equal(mask, masks[name])
    dead = {g.name for g in SPACE.groups if g.kind != "layer" and not masks[SPACE.block(g).name]}
    assert set(back) == set(masks) - dead


def test_three_files_make_one_set_of_masks(files):
    masks = read_masks(SPACE, **files)
    assert masks["layers.1.att"].item() == 0 and masks["layers.0.ffn"].item() == 0
    assert masks["layers.0.heads"].tolist() == [1, 0, 0, 1] and masks["layers.2.heads"].tolist() == [0, 1, 1, 0]
    assert masks["layers.1.dimff"].tolist() == DIMS["dimff_z"][0].tolist()
    assert "layers.1.heads" not in masks and "layers.0.dimff" not in masks
    assert read_masks(SPACE) == {}


def test_a_file_with_both_kinds_speaks_for_both(files):
    # A dims mask is learned under a heads mask: to take the one without the other gives a model that nobody trained.
    both = read_masks(SPACE, coarse=files["coarse"], dimff=files["dimff"])
    three = read_masks(SPACE, **files)
    assert set(both) == set(three) and all(torch.equal(both[name], three[name]) for name in both)


def test_the_twin_serves_as_the_mask_itself(files, tmp_path):
    twins = {name: str(Path(path).with_suffix(".safetensors")) for name, path in files.items()}
    masks, same = read_masks(SPACE, **files), read_masks(SPACE, **twins)
    assert masks.keys() == same.keys() and all(torch.equal(masks[name], same[name]) for name in masks)
    write_mask_file(tmp_path / "own.safetensors", DIMS)  # a run that is told to write its mask there
    assert torch.equal(load_file(tmp_path / "own.safetensors")["dimff_z"], DIMS["dimff_z"])
    assert torch.equal(
        read_mask_file(tmp_path / "own.safetensors", required=(), allowed=("dimff_z",))["dimff_z"], DIMS["dimff_z"]
    )
    for name, content in (("broken", b"{}"), ("a_pt", Path(files["heads"]).read_bytes())):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a safetensors file"):
            read_mask_file(tmp_path / f"{name}.safetensors", required=(), allowed=())
    with pytest.raises(UserError, match="no such mask file"):
        read_mask_file(tmp_path / "absent.safetensors", required=(), allowed=())


def test_files_that_contradict_each_other_are_refused(files, tmp_path):
    other = saved(tmp_path / "other.pt", {"heads_z": 1 - HEADS["heads_z"], **DIMS})
    with pytest.raises(UserError, match="hold different heads_z"):
        read_masks(SPACE, coarse=files["coarse"], heads=files["heads"], dimff=other)


def test_rows_need_the_coarse_mask_that_they_were_learned_under(files):
    with pytest.raises(UserError, match="coarse mask that this mask"):
        read_masks(SPACE, heads=files["heads"])


NAN, HALF = float("nan"), torch.tensor([[1.0, 0.5, 0, 1], [0, 1, 1, 0]])
BAD = {
    "shape": ({"heads_z": torch.ones(3, 4)}, "does not fit"),
    "units": ({"heads_z": torch.ones(2, 5)}, "does not fit"),
    "integers": ({"heads_z": torch.ones(2, 4, dtype=torch.int64)}, "int64"),
    "booleans": ({"heads_z": torch.ones(2, 4, dtype=torch.bool)}, "bool"),
    "complex": ({"heads_z": torch.ones(2, 4, dtype=torch.complex64)}, "complex64"),
    "8 bits": ({"heads_z": torch.ones(2, 4).to(torch.float8_e4m3fn)}, "float8"),
    "sparse": ({"heads_z": torch.ones(2, 4).to_sparse()}, "sparse"),
    "list": ({"heads_z": [[1.0] * 4] * 2}, "list"),
    "half": ({"heads_z": HALF}, "not binary"),
    "nan": ({"heads_z": HALF.clone().fill_(NAN)}, "not binary"),
    "infinite": ({"heads_z": HALF.clone().fill_(float("inf"))}, "not binary"),
    "negative": ({"heads_z": -torch.ones(2, 4)}, "not binary"),
    "missing key": ({}, "lacks 'heads_z'"),
    "missing key, other kind": ({"dimff_z": torch.ones(2, 20)}, "lacks 'heads_z'"),
    "unknown key": ({"heads_z": torch.ones(2, 4), "head_z": torch.ones(2, 4)}, "unknown key 'head_z'"),
    "key of another type": ({"heads_z": torch.ones(2, 4), 7: torch.ones(1)}, "unknown key 7"),
    "coarse for fine": (COARSE, "lacks 'heads_z'"),
    "no dictionary": (torch.ones(2, 4), "contains a Tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_refused_by_name(files, tmp_path, name):
    content, word = BAD[name]
    bad = saved(tmp_path / "bad.pt", content)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="bad.pt") as caught:
        read_masks(SPACE, coarse=files["coarse"], heads=bad)
    assert word in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"self_att_layer_z": torch.ones(4)}, "3 layers"),
        ({"cross_att_layer_z": torch.ones(1)}, "cross_att_layer_z"),
        ({"ffn_layer_z": torch.tensor([1.0, 0.5, 0])}, "0.5"),
        ({"ffn_layer_z": torch.tensor([1.0, NAN, 0])}, "nan"),
    ],
)
def test_bad_coarse_masks_are_refused(tmp_path, change, word):
    bad = saved(tmp_path / "bad.pt", COARSE | change)
    with pytest.raises(UserError, match="bad.pt") as caught:
        read_masks(SPACE, coarse=bad)
    assert word in str(caught.value)


def test_other_floating_types_are_read_as_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        path = saved(tmp_path / "m.pt", {"heads_z": HEADS["heads_z"].to(dtype).requires_grad_()})
        read = read_mask_file(path, required=("heads_z",), allowed=tuple(FINE_KEYS.values()))["heads_z"]
        assert read.dtype == torch.float32 and torch.equal(read, HEADS["heads_z"]) and not read.requires_grad


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, -1])
def test_truncated_files_are_refused(files, tmp_path, cut):
    content = Path(files["heads"]).read_bytes()
    bad = tmp_path / "bad.pt"
    bad.write_bytes(content[: int(cut * len(content)) if isinstance(cut, float) else cut])
    with pytest.raises(UserError, match="bad.pt"):
        read_masks(SPACE, coarse=files["coarse"], heads=str(bad))


def test_flipped_bytes_never_pass_as_another_mask(files, tmp_path):
    content = Path(files["heads"]).read_bytes()
    good = read_masks(SPACE, coarse=files["coarse"], heads=files["heads"])
    bad = tmp_path / "bad.pt"
    for place in range(0, len(content), 7):
        bad.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            masks = read_masks(SPACE, coarse=files["coarse"], heads=str(bad))
        except UserError:
            continue
        assert all(torch.equal(masks[name], good[name]) for name in good), place


HOSTILE = """
    import resource, sys
    import torch  # its own memory comes before the limit
    from cook.base.errors import UserError
    from cook.pruning.mask_file import read_masks
    from cook.pruning.units import PruningSpace
    space = PruningSpace(num_layers=3, shapes={}, groups=(), logits_weight="w")
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
    for path in sys.argv[1:]:
        try:
            read_masks(space, coarse=path)
        except UserError as error:
            print(error)
"""


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def squeezed(path):
    """A gigabyte of zeros in a file of a megabyte."""
    buffer = io.BytesIO()
    torch.save({key: torch.ones(3) for key in COARSE_KEYS}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            if member.filename.endswith("data/0"):
                with new.open(member.filename, "w", force_zip64=True) as out:
                    for _ in range(1 << 10):
                        out.write(bytes(1 << 20))
            else:
                new.writestr(member.filename, old.read(member))


def pickled_file(path, pickled):
    """A file as torch.save writes it around these bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


DOUBLED = b"\x80\x02}" + b")q\x00" + b"h\x00\x86q\x00" * 60
"""A dictionary and a tuple of twice the same tuple, 60 times: 2 to the 60 values for whoever hashes it."""


@pytest.mark.slow
def test_hostile_files_are_harmless(tmp_path):
    canary = tmp_path / "canary"
    pickled, expanded, bomb = (tmp_path / f"{name}.pt" for name in ("pickled", "expanded", "bomb"))
    torch.save(COARSE | {"ffn_layer_z": Bomb(canary)}, pickled)
    torch.save(COARSE | {"ffn_layer_z": torch.zeros(1).expand(10**11)}, expanded)  # 400 GB once it is compared
    squeezed(bomb)
    assert expanded.stat().st_size < 10_000 and bomb.stat().st_size < 10 << 20
    keys, values, sparse = (tmp_path / f"{name}.pt" for name in ("keys", "values", "sparse"))
    pickled_file(keys, DOUBLED + b"Ns.")
    pickled_file(values, b"\x80\x02}" + b"X\x01\x00\x00\x00a" + DOUBLED[3:] + b"s.")
    sparse.write_bytes(b"PK")
    os.truncate(sparse, 100 << 30)
    pipe, device, folder = (tmp_path / name for name in ("pipe.pt", "device.pt", "folder.pt"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    folder.mkdir()
    twins = [tmp_path / f"{path.stem}.safetensors" for path in (pipe, device, folder)]
    for path, twin in zip((pipe, device, folder), twins, strict=True):
        twin.symlink_to(path)
    paths = [str(p) for p in (pickled, expanded, bomb, keys, values, sparse, pipe, device, folder, *twins)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOSTILE), *paths], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path in done.stdout for path in paths)
    assert not canary.exists()


def test_the_safetensors_twin_is_read_like_the_file(files):
    twin = str(Path(files["heads"]).with_suffix(".safetensors"))
    one, other = (read_masks(SPACE, coarse=files["coarse"], heads=path) for path in (files["heads"], twin))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    Path(twin).write_bytes(Path(files["heads"]).read_bytes())
    with pytest.raises(UserError, match="not a safetensors file"):
        read_masks(SPACE, coarse=files["coarse"], heads=twin)
