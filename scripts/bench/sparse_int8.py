"""A pruned BERT in int8 against ONNX Runtime's int8 on the same pruned encoder, in one run.

    pip install onnx onnxruntime onnxscript
    python scripts/bench/sparse_int8.py [--threads 1 2] [--shapes 1x128 8x128] [--layers 12] [--sparsity 75]
    python scripts/bench/sparse_int8.py --isa avx2      # PyTorch's and our products held to AVX2; ONNX Runtime is not

BERT-base with random weights under a pattern. Medians of turns in a random order. ONNX Runtime runs the masked model
with its dynamic quantization: as exported, and with its own fused operators for attention and for norms with their
residuals. `against ONNX Runtime` is the faster one's time over that of our int8.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from typing import Any

import torch
from common import publish
from patterns import HELD_TO_AVX2, PATTERNS, Hidden, seconds
from transformers import AutoModel, BertConfig, BertModel

from cook.sparsity.kernels.sparse_int8 import int8_levels
from cook.sparsity.matrices import encoder_matrices
from cook.sparsity.pattern_masks import apply_masks, make_masks
from cook.sparsity.sparse_export import export_sparse
from cook.sparsity.spec import PatternSpec

KINDS = {
    "tile_wise_k": PatternSpec(type=7),
    "granularity": PATTERNS["tile-wise K"],
    "tile_wise_kn": PATTERNS["K and N"],
}


class Joined(torch.nn.Module):
    """BERT without a mask, with ONNX Runtime's operator for attention; it can only be exported."""

    def __init__(self, model: BertModel):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, T]` to `[B, T, D]`"""
        x = self.model.embeddings(ids)
        for layer in self.model.encoder.layer:
            own, name = layer.attention.self, "com.microsoft::MultiHeadAttention"
            parts, heads = (own.query(x), own.key(x), own.value(x)), {"num_heads": own.num_attention_heads}
            mixed = torch.onnx.ops.symbolic(name, parts, heads, dtype=x.dtype, shape=x.shape, version=1)
            mixed = layer.attention.output(mixed, x)
            x = layer.output(layer.intermediate(mixed), mixed)
        return x


def pruned(kind: str, layers: int, sparsity: float, folder: str) -> dict[str, torch.nn.Module]:
    """The masked model, and its exports in fp32 and int8."""
    config = BertConfig(num_hidden_layers=layers)
    masked = BertModel(config, add_pooling_layer=False).eval()
    matrices = encoder_matrices({n: tuple(p.shape) for n, p in masked.named_parameters()}, head_size=64)
    scores = {m.path: torch.rand(m.shape) for m in matrices}
    masks = make_masks(scores, matrices, KINDS[kind], sparsity=sparsity)
    apply_masks(masked, masks)
    masked.save_pretrained(f"{folder}/masked")
    models: dict[str, torch.nn.Module] = {"stock": masked}
    for name in ("fp32", "int8"):
        export_sparse(f"{folder}/masked", f"{folder}/{name}", masks, int8=name == "int8")
        small = AutoModel.from_pretrained(f"{folder}/{name}", trust_remote_code=True, add_pooling_layer=False)
        models[name] = small.eval()
    return models


def onnx_files(model: torch.nn.Module, ids: torch.Tensor, folder: str) -> dict[str, str]:
    """Files of ONNX Runtime's dynamic quantization."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    files = {}
    for name, module in {"ONNX Runtime int8": Hidden(model), "ONNX Runtime int8, fused": Joined(model)}.items():
        source, target = f"{folder}/{len(files)}.onnx", f"{folder}/{len(files)}_int8.onnx"
        with torch.no_grad():
            torch.onnx.export(module, (ids,), source, input_names=["x"], dynamo=True, verbose=False)
        if isinstance(module, Joined):
            optimized = optimize_model(source, model_type="bert", num_heads=12, hidden_size=768, opt_level=1)
            optimized.save_model_to_file(source := f"{folder}/fused.onnx")
        quantize_dynamic(source, target, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        files[name] = target
    return files


def sessions(files: dict[str, str], ids: torch.Tensor, threads: int) -> dict[str, Any]:
    """Runs of the files."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # the other runs need the cores
    found = {}
    for name, file in files.items():
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        found[name] = lambda session=session: session.run(None, {"x": ids.numpy()})
    return found


@torch.no_grad()
def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line per pattern, shape and number of threads."""
    found = []
    for kind in options.patterns:
        for shape in options.shapes:
            with tempfile.TemporaryDirectory() as folder:
                models = pruned(kind, options.layers, options.sparsity, folder)
                ids = torch.randint(0, 30000, tuple(map(int, shape.split("x"))))
                files = onnx_files(models["stock"], ids, folder) if options.onnx else {}
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    actions = {name: partial(m, ids) for name, m in models.items()} | sessions(files, ids, threads)
                    wanted, wide = models["stock"](ids)[0], models["int8"](ids)[0]
                    taken = seconds(actions, options.repeats)
                    others = [time for name, time in taken.items() if name.startswith("ONNX")]
                    found.append(
                        {
                            "pattern": kind,
                            "rows": shape,
                            "threads": threads,
                            **{f"{name}, ms": 1e3 * time for name, time in taken.items()},
                            "over fp32": taken["fp32"] / taken["int8"],
                            "against ONNX Runtime": min(others) / taken["int8"] if others else None,
                            "relative difference": float((wide - wanted).abs().mean() / wanted.abs().mean()),
                        }
                    )
                    print(found[-1], flush=True)
    return found


def main() -> None:
    """Parses, runs, publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128"])
    parser.add_argument("--patterns", nargs="+", default=["tile_wise_k", "tile_wise_kn"], choices=KINDS)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sparsity", type=float, default=75.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--isa", choices=["avx2"], help="vector instructions to hold PyTorch and our products to")
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.isa and os.environ.get("ATEN_CPU_CAPABILITY") != options.isa:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HELD_TO_AVX2})
    torch.manual_seed(0)
    settings = {name: value for name, value in vars(options).items() if name != "output"} | {"levels": int8_levels()}
    name = "sparse_int8" if options.isa is None else f"sparse_int8_{options.isa}"
    publish(name, settings, rows(options), options.output)


if __name__ == "__main__":
    main()
