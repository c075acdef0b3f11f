from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from cook.base.errors import RunFailed, UserError
from cook.evaluation.equality import largest_difference
from cook.export import pruned_folder as prune
from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.source import load_model, open_model
from cook.pruning.mask_file import read_masks
from cook.pruning.mask_set import without_empty_blocks
from tests.models.cpm_ant_tiny import RAGGED, random_batch
from tests.tiny_families import tiny_source as tiny_stock
from tests.tiny_pruning import ADAPTER, config_of, random_masks, tiny_source, tiny_space

SPACE = tiny_space()


def pruned(tmp_path, masks, **changes):
    model, source = tiny_source(tmp_path / "source", **changes)
    space = source.adapter.space(source.config)
    result = prune_to_folder(source, space, masks, tmp_path / "small")
    mask_model(model, space, masks)
    return model, result


def same(model, other):
    batches = [random_batch(seed, model.config) for seed in range(3)]
    return largest_difference(model, other, batches) <= 1e-5


@pytest.mark.parametrize(
    ("family", "removed"),
    [
        ("CPM-Ant", {"layers.1.att", "layers.0.ffn"}),
        ("llama, tied", {"layers.1.att", "layers.0.ffn"}),
        ("gemma2", {"layers.0.ffn"}),
        ("llama", set()),
        ("gpt2", set()),
        ("opt, norms behind", set()),
    ],
)
def test_a_block_without_units_counts_as_removed_unless_its_bias_acts_on(tmp_path, family, removed):
    source = tiny_source(tmp_path)[1] if family == "CPM-Ant" else tiny_stock(family)
    space = source.adapter.space(source.config)
    masks = {"layers.1.heads": torch.zeros(4), "layers.0.dimff": torch.zeros(20), "layers.2.dimff": torch.eye(20)[3]}
    settled = without_empty_blocks(space, masks)
    assert set(settled) - set(masks) == removed
    learned, held = load_model(source), load_model(source)
    mask_model(learned, space, masks)
    mask_model(held, space, settled)
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids}, {"input_ids": ids.flip(1)}]
    assert largest_difference(learned, held, batches) == 0
    assert largest_difference(held, load_model(reshaped_source(source, space, settled)), batches) <= 1e-5


@pytest.mark.parametrize("changes", [{}, RAGGED])
def test_the_folder_holds_a_model_that_computes_the_same(tmp_path, changes):
    model, result = pruned(tmp_path, random_masks(tiny_space(**changes), 2), **changes)
    names = {path.name for path in result.folder.iterdir()}
    assert {"config.json", "model.safetensors", "modeling_cook_cpm_ant.py", "masks"} <= names
    assert same(model, load_model(open_model(result.folder)))
    assert [p.name for p in tmp_path.iterdir()] == ["small"]  # nothing is left beside it


def test_the_masks_in_the_folder_are_those_of_the_model(tmp_path):
    masks = random_masks(SPACE, 4)
    _, result = pruned(tmp_path, masks)
    folder = result.folder / "masks"
    back = read_masks(SPACE, coarse=str(folder / "coarse.pt"), dimff=str(folder / "fine.pt"))
    assert len(back) >= 6 and all(torch.equal(back[name], masks[name]) for name in back)


@pytest.mark.parametrize(
    "masks",
    [
        {"layers.0.att": torch.zeros(1), "layers.2.ffn": torch.zeros(1)},
        {f"layers.{i}.dimff": (torch.arange(20) % 4 == i).float() for i in range(3)},
        {f"layers.{i}.ffn": torch.zeros(1) for i in range(3)},
        {"layers.1.heads": torch.zeros(4)},
        {
            "hidden": (torch.arange(24) % 3 > 0).float(),
            "head_dims": (torch.arange(6) > 1).float(),
            **{f"layers.{i}.dimff": (torch.arange(20) % 3 == 0).float() for i in range(3)},
        },
    ],
)
def test_cpm_lives_format_is_written_where_it_can_hold_the_model(tmp_path, masks):
    model, result = pruned(tmp_path, masks)
    assert result.live_obstacle is None
    live = json.loads((result.folder / "cpm_live.json").read_text())
    state = torch.load(result.folder / "cpm_live.pt", weights_only=True)
    assert set(state) == set(load_file(result.folder / "model.safetensors"))
    assert "layer_heads" not in live and "model_type" not in live
    # The file is no larger than its tensors: none drags another file's bytes along.
    assert (result.folder / "cpm_live.pt").stat().st_size < 1.5 * sum(t.nbytes for t in state.values()) + 20_000
    for layer, (att, ffn) in enumerate(live["mask_modules"] or [[False, False]] * 3):
        assert att != any(f"layers.{layer}.self_att." in name for name in state)
        assert ffn != any(f"layers.{layer}.ffn." in name for name in state)
    assert same(model, load_model(open_model(result.folder / "cpm_live.pt")))


@pytest.mark.parametrize(
    "masks",
    [
        {"layers.1.heads": torch.tensor([1.0, 0, 1, 1])},
        {"layers.1.dimff": (torch.arange(20) < 3).float()},
    ],
)
def test_what_cpm_lives_format_cannot_hold_is_told(tmp_path, masks):
    model, result = pruned(tmp_path, masks)
    assert result.live_obstacle and "\n" not in result.live_obstacle
    assert not list(result.folder.glob("cpm_live*"))
    assert same(model, load_model(open_model(result.folder)))


def test_an_earlier_export_is_replaced_whole(tmp_path):
    pruned(tmp_path, {"layers.0.att": torch.zeros(1)})
    (tmp_path / "small" / "old").write_text("x")
    model, result = pruned(tmp_path, {"layers.1.heads": torch.tensor([1.0, 0, 1, 1])})
    assert not (result.folder / "old").exists() and not (result.folder / "cpm_live.pt").exists()
    assert same(model, load_model(open_model(result.folder)))


def test_the_source_is_never_written_over(tmp_path):
    _, source = tiny_source(tmp_path / "first")
    first = prune_to_folder(source, SPACE, {"layers.0.att": torch.zeros(1)}, tmp_path / "model")
    # The source's folder, the folder of its .pt file, and a folder around it.
    for path, output in ((first.folder, "model"), (first.folder / "cpm_live.pt", "model"), (first.folder, "..")):
        opened = open_model(path)
        target = (tmp_path / output).resolve() if output == "model" else tmp_path
        with pytest.raises(UserError, match="would overwrite"):
            prune_to_folder(opened, opened.adapter.space(opened.config), {}, target)
        assert path.exists()


def test_a_folder_or_file_of_something_else_is_not_touched(tmp_path):
    _, source = tiny_source(tmp_path / "source")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match="another folder"):
            prune_to_folder(source, SPACE, {}, tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").exists() and (tmp_path / "file").read_text() == "x"


def test_a_failure_leaves_the_old_export_and_no_rubbish(tmp_path, monkeypatch):
    _, result = pruned(tmp_path, {})
    before = sorted((p.name, p.stat().st_mtime_ns) for p in result.folder.rglob("*"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prune, "write_live_format", full)
    with pytest.raises(RunFailed, match="No space left"):
        pruned(tmp_path, {"layers.0.att": torch.zeros(1)})
    assert sorted((p.name, p.stat().st_mtime_ns) for p in result.folder.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


STRANGER = """
    import sys, torch
    try:
        import cook
    except ImportError:
        pass
    else:
        sys.exit("cook must not be here")
    from transformers import AutoModelForCausalLM
    folder, inputs, outputs = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    batches = torch.load(inputs)
    with torch.no_grad():
        logits = [model(**batch).logits for batch in batches]
    ids = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    torch.save({"logits": logits, "ids": ids, "dtype": str(model.dtype)}, outputs)
"""


def test_the_export_loads_where_cook_is_not_installed(tmp_path):
    model, result = pruned(tmp_path, random_masks(SPACE, 5, blocks=0.8), num_layers=3)
    batches = [random_batch(1, model.config), {"input_ids": torch.tensor([[3, 4, 5]])}]
    torch.save(batches, tmp_path / "in.pt")
    command = [sys.executable, "-I", "-c", textwrap.dedent(STRANGER)]
    paths = [str(path) for path in (result.folder, tmp_path / "in.pt", tmp_path / "out.pt")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *paths], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        for batch, logits in zip(batches, out["logits"], strict=True):
            wanted = model(**batch).logits
            assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        ids = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(ids, out["ids"]) and out["dtype"] == "torch.float32"


PEAK = """
    import dataclasses, sys
    import torch
    from pathlib import Path
    from cook.families.source import open_model
    from cook.export.pruned_folder import prune_to_folder
    from cook.pruning.family import Stored

    def run(path, output, *, eager=False, **kept):
        source = open_model(path)
        space = source.adapter.space(source.config)
        masks = {g.name: (torch.arange(g.size) < kept[g.kind]).float() for g in space.groups if g.kind in kept}
        if eager:
            tensors = {n: t.clone() for n, t in source.tensors.items()}
            source = dataclasses.replace(source, tensors=tensors, stored=Stored({}))
        prune_to_folder(source, space, masks, Path(output))

    def peak():
        # Not getrusage's: that one is inherited from the process that started this one.
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    tiny, big, output = sys.argv[1:]
    run(tiny, output + "-tiny", dimff=4)  # loads and warms all that is not the model
    before = peak()
    run(big, output, heads=1, dimff=128)
    print(peak() - before)
    run(big, output, heads=1, dimff=128, eager=True)
    print(peak() - before)
"""
BIG = dict(vocab_size=64, dim_model=256, dim_ff=4096, num_layers=12, num_heads=8, dim_head=32)


def test_memory_is_the_largest_tensor_and_the_output(tmp_path):
    for name, changes in (("tiny", {}), ("big", BIG)):
        shapes = tiny_space(**changes).shapes
        tensors = ((path, torch.ones(shape)) for path, shape in shapes.items())
        prune.write_model_folder(tmp_path / name, ADAPTER, config_of(**changes), tensors)
    sizes = [4 * torch.Size(shape).numel() for shape in tiny_space(**BIG).shapes.values()]
    paths = [str(tmp_path / name) for name in ("tiny", "big", "small")]
    command = [sys.executable, "-c", textwrap.dedent(PEAK), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lazy, eager = (int(line) * 1024 for line in done.stdout.splitlines())
    output = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert sum(sizes) > 30 * max(sizes) and sum(sizes) > 140 << 20
    # The output is in memory once as a shard and once more while the other format is written.
    assert lazy < 3 * max(sizes) + 3 * output + (16 << 20) < sum(sizes) / 2
    assert eager > 0.8 * sum(sizes), "the measure must see a model that is read whole"
