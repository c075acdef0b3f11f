"""Time and memory of `do_prune.py` on large checkpoints, against `cp` of the same bytes.

    python scripts/bench/reshape_cost.py [--gib 8] [--kinds llama cpm_ant zero3] [--folder DIR] [--no-outputs]

Each kind is a checkpoint of about that many GiB, made of random numbers and deleted afterwards: a sharded Llama in
bf16, a CPM-Ant in bf16, and a Llama in the files that DeepSpeed writes at ZeRO 3 on 4 ranks (fp32 weights; the moments,
which are not read, are left out). Half of the heads and FFN dimensions and one block go. Every way reads files that are
not in the page cache, and ends when its result is on the disk: `cp` is followed by `sync`, cook flushes every file.

`anonymous` is the peak of the memory that the system cannot take back; `resident` also counts pages of mapped files.
Both are above those of the same command on a model of one MiB, which are the libraries. `--verify` and `cook eval
--weights disk` keep one layer in memory; their rows are left out with `--no-outputs`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, publish
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cook.base.files import write_json
from cook.base.tensor_files import ShardWriter
from cook.families.registry import by_config
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import coarse_to_tensors, consistent, fine_to_tensors
from cook.pruning.units import PruningSpace
from cook.training.shards import TAG

RANKS = 4
VOCAB = 32_000
POOL = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02


def config_of(kind: str, num_bytes: float) -> dict[str, Any]:
    """A model of about this size: 4096 wide (7B models) from 4 GiB on, else 1024."""
    width, ffn = (4096, 11_008) if num_bytes >= 4 << 30 else (1024, 2816) if num_bytes >= 128 << 20 else (64, 128)
    if kind == "cpm_ant":
        sizes = {"dim_model": width, "dim_ff": ffn, "num_heads": width // 32, "dim_head": 32, "num_layers": 2}
        config = {"model_type": "cook_cpm_ant", "vocab_size": VOCAB if width > 64 else 100, **sizes}
        layers = "num_layers"
    else:
        sizes = {"hidden_size": width, "intermediate_size": ffn, "num_attention_heads": width // 32}
        sizes |= {"num_key_value_heads": width // 128 or 1, "num_hidden_layers": 2, "head_dim": 32}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
        config |= {"vocab_size": VOCAB if width > 64 else 100, "tie_word_embeddings": False}
        layers = "num_hidden_layers"
    item = 4 if kind == "zero3" else 2
    two, three = (numel(space_of(config | {layers: count})) * item for count in (2, 3))
    return config | {layers: max(2, round(2 + (num_bytes - two) / (three - two)))}


def space_of(config: dict[str, Any]) -> PruningSpace:
    adapter = by_config(config)
    native, _ = adapter.read(config, {})
    return adapter.space(native)


def numel(space: PruningSpace) -> int:
    return sum(map(math.prod, space.shapes.values()))


def numbers(space: PruningSpace) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight after the other; ones for norms."""
    for name, shape in space.shapes.items():
        count = math.prod(shape)
        flat = POOL.repeat(-(-count // len(POOL)))[:count] if len(shape) > 1 else torch.ones(count)
        yield name, flat.view(shape)


def make_folder(folder: Path, config: dict[str, Any], space: PruningSpace) -> None:
    with ShardWriter(folder) as writer:
        for name, tensor in numbers(space):
            writer.add(name, tensor.bfloat16())
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    words = [f"w{i}" for i in range(100)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_zero3(folder: Path, config: dict[str, Any], space: PruningSpace) -> None:
    """A checkpoint as DeepSpeed 0.19 writes it at ZeRO 3: a rank's shares of all parameters lie one after the other."""
    (folder / TAG).mkdir(parents=True)
    model = {"module": {}, "buffer_names": [], "frozen_param_shapes": None, "shared_params": {}}
    model |= {"param_shapes": [{name: torch.Size(shape) for name, shape in space.shapes.items()}]}
    shares = [-(-math.prod(shape) // RANKS) for shape in space.shapes.values()]
    for rank in range(RANKS):
        flat = torch.empty(sum(shares))
        for end, share, (_, tensor) in zip(itertools.accumulate(shares), shares, numbers(space), strict=True):
            part = tensor.flatten()[rank * share : (rank + 1) * share]
            flat[end - share : end][: len(part)] = part
        state = {"fp32_flat_groups": [flat], "partition_count": RANKS}
        state |= {"optimizer_state_dict": {"state": {}, "param_groups": []}}
        stem = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(model, folder / TAG / f"{stem}_model_states.pt")
        torch.save({"optimizer_state_dict": state}, folder / TAG / f"{stem}_optim_states.pt")
    (folder / "latest").write_text(TAG)
    write_json(folder / "config.json", config)


def write_masks(folder: Path, space: PruningSpace) -> list[str]:
    """Half of the heads and dims of every layer, chosen at random, and one attention block go; the options."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for group in space.groups:
        if group.kind in ("heads", "dimff"):
            masks[group.name] = (torch.rand(group.size, generator=generator).argsort() % 2).float()
        elif group.kind == "layer":
            masks[group.name] = torch.ones(1) if group.layer or group.site == "ffn" else torch.zeros(1)
    masks = consistent(space, masks)
    write_mask_file(folder / "coarse.pt", coarse_to_tensors(space, masks))
    write_mask_file(folder / "fine.pt", fine_to_tensors(space, masks))
    fine = str(folder / "fine.pt")
    return ["--coarse-mask", str(folder / "coarse.pt"), "--heads-mask", fine, "--dimff-mask", fine]


def evict(folder: Path) -> None:
    """Takes the files out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measured(command: list[str]) -> tuple[dict[str, float], str]:
    """Seconds of a process, its peaks of resident and anonymous memory in MiB, and what it printed."""
    with tempfile.TemporaryFile("w+") as out:
        begin, anonymous = time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True)
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            anonymous = max([anonymous, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.005)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{out.read()[-4000:]}")
        return {"seconds": seconds, "anonymous": anonymous / 1024, "resident": usage.ru_maxrss / 1024}, out.read()


def bench(kind: str, gib: float, root: Path, *, outputs: bool) -> dict[str, Any]:
    config = config_of(kind, gib * 2**30)
    space, source = space_of(config), root / kind
    (make_zero3 if kind == "zero3" else make_folder)(source, config, space)
    masks = write_masks(root, space)
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    row: dict[str, Any] = {"checkpoint": kind, "GiB": size / 2**30}
    row["largest MiB"] = max(map(math.prod, space.shapes.values())) * (4 if kind == "zero3" else 2) / 2**20
    evict(source)
    begin = time.perf_counter()
    shutil.copytree(source, root / "copy", copy_function=lambda a, b: subprocess.run(["cp", a, b], check=True))
    row["cp s"] = time.perf_counter() - begin
    os.sync()
    row["cp and sync s"] = time.perf_counter() - begin
    shutil.rmtree(root / "copy")
    prune = [sys.executable, "do_prune.py", "--model", str(source), *masks, "--output", str(root / "small")]
    evict(source)
    found, _ = measured(prune)
    row |= found
    if outputs:
        evict(source)
        shutil.rmtree(root / "small")
        found, printed = measured([*prune, "--verify"])
        assert "equal to rounding" in printed, printed
        row |= {f"verify {name}": value for name, value in found.items()}
        row["layer by layer"] = "layer by layer" in printed
    if outputs and kind != "zero3":
        (root / "text.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(600)))
        options = ["--data", str(root / "text.txt"), "--window", "128", "--weights", "disk"]
        evict(source)
        found, _ = measured([sys.executable, "-m", "cook", "eval", "--model", str(source), *options])
        row |= {f"eval {name}": value for name, value in found.items()}
    for name in (kind, "small"):
        shutil.rmtree(root / name)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--kinds", nargs="+", default=["llama", "cpm_ant", "zero3"])
    parser.add_argument("--folder", help="where to write: the disk that is measured (default: the temporary folder)")
    parser.add_argument("--no-outputs", action="store_true", help="neither --verify nor cook eval")
    parser.add_argument("--output")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind in options.kinds:
            least = bench(kind, 2**-10, Path(folder), outputs=not options.no_outputs)
            row = bench(kind, options.gib, Path(folder), outputs=not options.no_outputs)
            for name in row:
                if name.endswith(("anonymous", "resident")):
                    row[name] -= least[name]
            row["seconds / cp and sync"] = row["seconds"] / row["cp and sync s"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    publish("reshape_cost", {"GiB": options.gib, "ranks": RANKS}, rows, options.output)


if __name__ == "__main__":
    main()
