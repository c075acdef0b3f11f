"""Pruned matrices against dense ones: tile-wise, tile-wise on both sides, blocks, and a whole BERT-base encoder.

    python scripts/bench/patterns.py [--isa avx2] [--threads 1 2] [--rows 128 1024] [--sparsity 75] [--dtypes float32]
        [--quick]

One run compares the ways of computing with dense `F.linear` (the encoder: with the stock one), interleaved, medians.
`chosen` is what the layer picks by itself. `nothing pruned` is the native product of a full matrix: how much of a gain
is the native product's own, on this processor, before anything is pruned. The crossover is the sparsity at which sparse
starts to win. ONNX Runtime and OpenVINO multiply the dense fp32 matrix (the stock encoder), ONNX Runtime also in int8.

`--isa avx2` holds PyTorch, OpenVINO and the native product to AVX2 on a processor that has more, and writes
patterns_avx2.json. ONNX Runtime cannot be held, so it has no figures there.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, publish
from transformers import AutoModel, BertConfig, BertModel

from cook.base.device import default_device, wait_for
from cook.sparsity.kernels.sparse_layers import TileWiseLinear
from cook.sparsity.kernels.sparse_native import instructions
from cook.sparsity.kernels.sparse_ways import by, ways
from cook.sparsity.matrices import PrunedMatrix, encoder_matrices
from cook.sparsity.pattern_masks import apply_masks, make_masks
from cook.sparsity.sparse_export import export_sparse
from cook.sparsity.spec import PatternSpec
from cook.sparsity.tiles import sparse_linear, tiles_of

SHAPES = ((768, 768), (768, 3072), (3072, 768))
PATTERNS = {
    "tile-wise K": PatternSpec(type=2),
    "K and N": PatternSpec(type=8),
    "blocks 32": PatternSpec(type=5),
    "vector-wise": PatternSpec(type=4),
}
BARS = {
    ("tile-wise K", "float32"): 3.4,
    ("tile-wise K", "bfloat16"): 2.5,
    ("K and N", "float32"): 3.2,
    ("blocks 32", "float32"): 2.8,
}
HELD_TO_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CC": f"{os.environ.get('CC') or 'cc'} -mno-avx512f",
}
ABSENT = "not installed"


def seconds(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each action after two rounds to warm up; every round in an order of its own.

    What ran just before leaves more or less of the next one's operands in the caches: no action is to have always the
    same predecessor.
    """
    taken: dict[str, list[float]] = {name: [] for name in actions}
    order, chance = list(actions.items()), random.Random(0)
    for turn in range(repeats + 2):
        chance.shuffle(order)
        for name, action in order:
            wait_for(default_device())
            start = time.perf_counter()
            action()
            wait_for(default_device())
            if turn > 1:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def pruned_layer(
    pattern: str, shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: str
) -> tuple[TileWiseLinear, torch.Tensor, torch.Tensor]:
    """A layer with random weights under a pattern, and its dense weight and bias, zeros included."""
    inputs, outputs = shape
    matrix = PrunedMatrix(path="w", role="output", layer=0, shape=(outputs, inputs), head_size=64)
    spec = PATTERNS[pattern]
    mask = make_masks({"w": torch.rand(outputs, inputs)}, (matrix,), spec, sparsity=sparsity)["w"]
    weight = (torch.randn(outputs, inputs) * mask).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    layer = sparse_linear(weight, bias, tiles_of(mask.T, block=32 if pattern == "blocks 32" else None))
    return layer.to(device), weight.to(device), bias.to(device)


def runtimes(
    module: torch.nn.Module, x: torch.Tensor, folder: str, threads: int, isa: str | None
) -> dict[str, Callable[[], Any] | str]:
    """Runs of a dense module by ONNX Runtime, fp32 and int8, and by OpenVINO, or why there are none."""
    names = ("onnxruntime", "onnxruntime int8", "openvino")
    if not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        return dict.fromkeys(names, ABSENT)
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    path, small = f"{folder}/dense.onnx", f"{folder}/int8.onnx"
    with torch.inference_mode(False), torch.no_grad():  # copies count versions, which the export wants
        module, x = copy.deepcopy(module), x.clone()
        torch.onnx.export(module, (x,), path, input_names=["x"], dynamo=True, verbose=False)
    found: dict[str, Callable[[], Any] | str] = {}
    values = {"x": x.numpy()}
    if isa is None:
        quantize_dynamic(path, small)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.add_session_config_entry("session.force_spinning_stop", "1")  # the other runs need the cores
        for name, file in zip(names, (path, small), strict=False):
            session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
            found[name] = lambda session=session: session.run(None, values)
    if importlib.util.find_spec("openvino"):
        import openvino

        exact = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", exact)
        found["openvino"] = lambda: compiled(values)
    else:
        found["openvino"] = ABSENT
    return found


@torch.inference_mode()
def matrix_rows(options: argparse.Namespace, threads: int, device: str) -> list[dict[str, Any]]:
    """A line a pattern, shape, number of rows and precision."""
    rows = []
    for dtype in (getattr(torch, name) for name in options.dtypes):
        name = str(dtype).removeprefix("torch.")
        for pattern in PATTERNS:
            for shape in SHAPES:
                for count in options.rows:
                    layer, weight, bias = pruned_layer(pattern, shape, options.sparsity, dtype, device)
                    others = pattern == "tile-wise K" and dtype == torch.float32 and device == "cpu"
                    found = compare(layer, weight, bias, count, options, threads=threads if others else None)
                    rows.append(
                        {
                            "threads": threads,
                            "dtype": name,
                            "pattern": pattern,
                            "K × N": f"{shape[0]} × {shape[1]}",
                            "rows": count,
                            "sparsity": 1 - layer.plan().share,
                            **found,
                            "bar": BARS.get((pattern, name)),
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def compare(
    layer: TileWiseLinear,
    weight: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    options: argparse.Namespace,
    threads: int | None = None,
) -> dict[str, Any]:
    """Speed-ups over dense `F.linear` of the layer as it is (activations transposed, and not), and of every way.

    Given `threads`, also of the other runtimes.
    """
    x = torch.randn(count, layer.in_features, device=weight.device).to(weight.dtype)
    x_KM, plan = x.T.contiguous(), layer.plan()
    out = torch.empty(layer.out_features, count, dtype=x.dtype, device=x.device)
    layer.columns(x_KM, out=out)
    right = F.linear(x, weight, bias).float()
    difference = float((out.T.float() - right).abs().max() / right.abs().max())
    assert difference < (2**-7 if x.dtype == torch.bfloat16 else 1e-5), difference  # bf16: an ulp or two
    actions: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.linear(x, weight, bias),
        "speed-up": lambda: layer.columns(x_KM, out=out),
        "not transposed": lambda: layer(x),
    }
    open_ways = ways(plan, x_KM)
    for name, way in open_ways.items():
        if name != "dense":
            actions[name] = lambda way=way: by(way, plan, x_KM, transposed=True, out=out)
    if "native" in open_ways:
        every = torch.ones(layer.in_features, layer.out_features, dtype=torch.bool)
        full = sparse_linear(torch.randn(every.T.shape).to(x.dtype), bias, tiles_of(every)).plan()
        actions["nothing pruned"] = lambda: by(open_ways["native"], full, x_KM, transposed=True, out=out)
    words: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if threads is not None:
            module = torch.nn.Linear(layer.in_features, layer.out_features)
            module.load_state_dict({"weight": weight, "bias": bias})
            sort_out(runtimes(module, x, folder, threads, options.isa), actions, words)
        taken = seconds(actions, options.repeats)
    found = {name: taken["dense"] / time for name, time in taken.items() if name != "dense"} | words
    chosen = next(way for key, way in plan.chosen.items() if key[1])
    picked = next(name for name, way in open_ways.items() if way is chosen)
    return {"dense ms": 1e3 * taken["dense"], **found, "chosen": picked}


def sort_out(
    found: dict[str, Callable[[], Any] | str], actions: dict[str, Callable[[], Any]], words: dict[str, str]
) -> None:
    """The runs to `actions`, and why there is none to `words`."""
    for name, run in found.items():
        if isinstance(run, str):
            words[name] = run
        else:
            actions[name] = run


class Hidden(torch.nn.Module):
    """A model from ids to its last hidden state, as other runtimes want it."""

    def __init__(self, model: BertModel):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, T]` to `[B, T, D]`"""
        return self.model(input_ids=ids).last_hidden_state


@torch.inference_mode()
def encoder_rows(options: argparse.Namespace, threads: int, device: str) -> list[dict[str, Any]]:
    """BERT-base from ids to hidden states, against the stock model with the dense weights."""
    config = BertConfig(num_hidden_layers=options.layers)
    dense = BertModel(config, add_pooling_layer=False).eval()
    matrices = encoder_matrices({n: tuple(p.shape) for n, p in dense.named_parameters()}, head_size=64)
    rows = []
    for pattern in ("tile-wise K", "K and N"):
        masks = make_masks(
            {m.path: torch.rand(m.shape) for m in matrices}, matrices, PATTERNS[pattern], sparsity=options.sparsity
        )
        masked = BertModel(config, add_pooling_layer=False).eval()
        masked.load_state_dict(dense.state_dict())
        apply_masks(masked, masks)
        with tempfile.TemporaryDirectory() as folder:
            masked.save_pretrained(f"{folder}/masked")
            export_sparse(f"{folder}/masked", f"{folder}/small", masks)
            small = AutoModel.from_pretrained(f"{folder}/small", trust_remote_code=True, add_pooling_layer=False)
        for dtype in (getattr(torch, name) for name in options.dtypes):
            pair = {"stock": masked.to(device, dtype), "small": small.eval().to(device, dtype)}
            for count in options.rows:
                ids = torch.randint(0, config.vocab_size, (max(1, count // 128), min(128, count)), device=device)
                outputs = [model(ids).last_hidden_state.float() for model in pair.values()]
                actions = {name: lambda m=m, i=ids: m(i) for name, m in pair.items()}
                words: dict[str, str] = {}
                with tempfile.TemporaryDirectory() as folder:
                    if pattern == "tile-wise K" and dtype == torch.float32 and device == "cpu":
                        found = runtimes(Hidden(pair["stock"]), ids, folder, threads, options.isa)
                        sort_out(found, actions, words)
                    taken = seconds(actions, max(3, options.repeats // 3))
                others = {n: taken["stock"] / t for n, t in taken.items() if n not in pair}
                rows.append(
                    {
                        "threads": threads,
                        "dtype": str(dtype).removeprefix("torch."),
                        "pattern": f"encoder, {pattern}",
                        "K × N": f"{options.layers} layers",
                        "rows": count,
                        "sparsity": options.sparsity / 100,
                        "dense ms": 1e3 * taken["stock"],
                        "speed-up": taken["stock"] / taken["small"],
                        **others,
                        **words,
                        "bar": 2.5 if dtype == torch.float32 else None,
                        "difference": float((outputs[0] - outputs[1]).abs().max()),
                    }
                )
                print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def crossover(options: argparse.Namespace, device: str) -> dict[str, list[tuple[float, float]]]:
    """Speed-up over sparsity, fp32, 768 × 3072, without the fall-back to dense."""
    curves = {}
    for pattern in PATTERNS:
        points = []
        for sparsity in options.crossover:
            layer, weight, bias = pruned_layer(pattern, (768, 3072), sparsity, torch.float32, device)
            found = compare(layer, weight, bias, options.rows[0], options)
            fixed = {"dense ms", "speed-up", "not transposed", "nothing pruned", "chosen"}
            points.append((sparsity, max(value for name, value in found.items() if name not in fixed)))
        curves[pattern] = points
    return curves


def draw(curves: dict[str, list[tuple[float, float]]], path: Path, used: str) -> None:
    """The curves, and where each crosses 1; the title names the instructions that were used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for pattern, points in curves.items():
        start = crossing(points)
        label = pattern if start is None else f"{pattern}: from {start:.0f}%"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="sparsity, %", ylabel="speed-up over dense F.linear", title=f"768 × 3072, fp32, {used}")
    axes.legend()
    figure.savefig(path, dpi=120)


def crossing(points: list[tuple[float, float]]) -> float | None:
    """The sparsity at which the speed-up first passes 1, between two measured ones on a straight line."""
    for (s0, v0), (s1, v1) in zip(points, points[1:], strict=False):
        if v0 < 1 <= v1:
            return s0 + (1 - v0) / (v1 - v0) * (s1 - s0)
    return points[0][0] if points[0][1] >= 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--sparsity", type=float, default=75.0)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--crossover", type=float, nargs="+", default=[10, 20, 30, 40, 50, 60, 70, 80, 90])
    parser.add_argument("--quick", action="store_true", help="one thread, few repeats, two layers: a trial")
    parser.add_argument("--isa", choices=["avx2"], help="vector instructions to hold everything to")
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.isa and os.environ.get("ATEN_CPU_CAPABILITY") != options.isa:  # read once, when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HELD_TO_AVX2})
    if options.quick:
        options.threads, options.repeats, options.layers, options.crossover = [1], 5, 2, [10, 40, 70]
    device = default_device().type
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for threads in options.threads if device == "cpu" else [1]:
        torch.set_num_threads(threads)
        rows += matrix_rows(options, threads, device) + encoder_rows(options, threads, device)
        curves = curves or crossover(options, device)
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in columns} for row in rows]
    settings = vars(options) | {"crossover": {name: crossing(points) for name, points in curves.items()}}
    used = {"PyTorch": torch.backends.cpu.get_cpu_capability(), "native product": instructions() or "none"}
    name = "patterns" if options.isa is None else f"patterns_{options.isa}"
    output = options.output or str(ROOT / "results" / "bench" / f"{name}.json")
    publish(name, settings | {"instructions": used, "curves": curves}, rows, output)
    picture = Path(output).with_suffix(".png")
    draw(curves, picture, ", ".join(f"{what}: {isa}" for what, isa in used.items()))
    print(f"written: {picture}")


if __name__ == "__main__":
    main()
