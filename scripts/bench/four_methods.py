"""Pruning, distillation, quantization and a mixture of experts, one after the other, against quantization alone.

    python scripts/bench/four_methods.py --model models/smollm2 --calibration valid.txt \
        --text wikitext2=test.txt --text imdb=reviews.txt

Trains one recipe with all methods (P: FFN dims removed by learned gates, D: finetuned with the dense model as the
teacher, M: experts, Q: int8 with fake quantization), and from the model after P and D two stages `quantize` alone
(int8, int4). All of them store the token embedding in 8 bits too. The peers round without training: torchao's own int8
and int4 of the dense model, with its embedding in floating point, and `cook quantize` of the model after P and D.
Losses on every text; bytes on the disk; tokens per second in turns, on 1 and 2 threads. Where llama-cpp-python is
installed, it runs the GGUF files of the same models. Started again, it skips finished stages.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish, run_apart
from moefy import place, run

from cook.base.environment import quiet_torchao
from cook.evaluation.loading import Entry, load_tokenizer
from cook.evaluation.measure import compare, read_texts
from cook.evaluation.settings import Settings, checked
from cook.export.check import quiet
from cook.families.source import open_model

quiet_torchao()
EXPERTS = {"is_moefy": True, "experts": 8, "shared": 3, "active": 0.5}


def main() -> None:
    options = parse()
    dense, folder = str(Path(options.model).resolve()), Path(options.folder).resolve()
    models, files = {"dense": dense}, dict[str, Path]()
    models |= trained(options, dense)
    for scheme in ("int8", "int4"):
        models[f"dense, torchao {scheme}"] = torchao(dense, folder / f"torchao_{scheme}", scheme)
        models[f"P+D, {scheme} without training"] = rounded(models["P+D"], folder / f"pd_{scheme}", scheme)
        if importlib.util.find_spec("llama_cpp"):
            files[f"dense, {scheme}, llama.cpp"] = gguf(folder / f"gguf_dense_{scheme}", scheme, dense)
            files[f"P+D+Q {scheme}, llama.cpp"] = gguf(
                folder / f"gguf_{scheme}", config=place(options, f"P+D+Q {scheme}")
            )
    rows = {name: {"model": name, "MB": size(Path(path))} for name, path in (models | files).items()}
    for name, text in options.texts:
        for row in losses(options, models, text):
            rows[row["name"]] |= {"parameters": row["parameters"], f"loss, {name}": row["loss"]}
        for each, file in files.items():
            rows[each][f"loss, {name}"] = llama_loss(options, file, dense, text)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for row in speeds(options, models):
            for key in ("prefill", "decode"):
                rows[row["name"]][f"{key} tokens/s, {threads}"] = row[f"{key}_tokens_per_second"]
        for each, file in files.items():
            rows[each] |= llama_speed(options, file, threads)
    hidden = ("model", "folder", "output", "calibration", "text", "texts")
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    headers = dict.fromkeys(key for row in rows.values() for key in row)
    publish("four_methods", settings, [{key: row.get(key) for key in headers} for row in rows.values()], options.output)


def trained(options: argparse.Namespace, dense: str) -> dict[str, str]:
    """The models of the recipe with all methods, and of the two that only quantize after P and D."""
    space = open_model(dense).adapter.space(open_model(dense).config)
    kept = round(options.kept * space.of("dimff")[0].size / 64) * 64
    masks, finetune, experts, last = options.steps
    rate = {"learning_rate": options.quantize_rate}
    stages: list[dict[str, Any]] = [
        {"name": "ffn_mask", "training": {"steps": masks, "train_weights": False}},
        {"name": "ffn_finetune", "training": {"steps": finetune}},
        {"name": "moefy", "training": {"steps": experts}},
        {"name": "quantize", "training": {"steps": last, **rate}},
    ]
    rounding = {"is_quant": True, "embeddings": True}
    sections = {"pruning": {"is_pruning": True}, "quantization": rounding, "MoEfication": EXPERTS}
    whole = place(options, "P+D+M+Q")
    run(options, "P+D+M+Q", stages, sections, kept, export=False)
    small = whole.parent / "pd"
    if not small.exists():
        own = ["--model", str(whole / "ffn_finetune/model"), "--dimff-mask", str(whole / "masks/dimff.pt")]
        run_apart(["-m", "cook", "reshape", *own, "--output", str(small)])
    models = {"P+D": str(small), "P+D+M": str(whole / "moefy/model")}
    models["P+D+M+Q int8"] = quantized(whole)
    for scheme in ("int8", "int4"):
        own_options = copy.copy(options)
        own_options.model = str(small)
        sections = {"quantization": rounding | {"scheme": scheme}, "distillation": {"teacher": dense}}
        run(own_options, f"P+D+Q {scheme}", stages[3:], sections, export=False)
        models[f"P+D+Q {scheme}"] = quantized(place(options, f"P+D+Q {scheme}"))
    return models


def quantized(folder: Path) -> str:
    """The folder for transformers of a run's stage `quantize`."""
    output = folder / "quantized"
    if not output.exists():
        run_apart(["-m", "cook", "quantize", "--config", str(folder / "bmcook.json"), str(output)])
    return str(output)


def rounded(model: str, output: Path, scheme: str) -> str:
    """The folder that `cook quantize` writes of a model, without training."""
    if not output.exists():
        run_apart(["-m", "cook", "quantize", model, str(output), "--scheme", scheme, "--embeddings"])
    return str(output)


def gguf(output: Path, scheme: str = "", model: str = "", config: Path | None = None) -> Path:
    """The GGUF file of a model that is rounded without training, or of a run's stage `quantize`."""
    if not output.exists():
        own = [model, "--scheme", scheme, "--embeddings"]
        what = own if config is None else ["--config", str(config / "bmcook.json")]
        run_apart(["-m", "cook", "quantize", *what, str(output), "--format", "gguf"])
    return output / "model.gguf"


def torchao(model: str, output: Path, scheme: str) -> str:
    """The dense model, rounded and written by torchao and transformers alone."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    if not output.exists():
        rounding: Any = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        if scheme == "int8":
            rounding = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
        with quiet():
            made = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, quantization_config=TorchAoConfig(rounding)
            )
            made.save_pretrained(output)
            AutoTokenizer.from_pretrained(model).save_pretrained(output)
    return str(output)


def size(path: Path) -> float:
    """Megabytes of the weights on the disk."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) / 1e6


def losses(options: argparse.Namespace, models: dict[str, str], text: str) -> list[dict[str, Any]]:
    own = Settings(
        window=options.length, max_windows=options.windows, dtype="float32", speed=False, trust_remote_code=True
    )
    return measured(models, text, own)


def speeds(options: argparse.Namespace, models: dict[str, str]) -> list[dict[str, Any]]:
    own = Settings(
        window=options.length,
        max_windows=1,
        dtype="float32",
        prompt_tokens=options.length,
        new_tokens=options.decoded,
        repeats=options.repeats,
        trust_remote_code=True,
    )
    return measured(models, options.texts[0][1], own)


def measured(models: dict[str, str], text: str, settings: Settings) -> list[dict[str, Any]]:
    entries = [Entry(name=name, folder=folder) for name, folder in models.items()]
    with quiet():
        records: list[dict[str, Any]] = compare(entries, read_texts([text]), checked(settings), files=[text])["models"]
    return records


def llama(file: Path, tokens: int, threads: int) -> Any:
    from llama_cpp import Llama

    return Llama(
        str(file),
        n_ctx=tokens,
        n_batch=tokens,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )


def llama_loss(options: argparse.Namespace, file: Path, dense: str, text: str) -> float:
    """The mean loss over the same windows as the other models."""
    ids = load_tokenizer(Path(dense), False)(read_texts([text])).input_ids
    runs, found = llama(file, options.length, 2), []
    for start in range(0, min(len(ids) // options.length, options.windows) * options.length, options.length):
        window = ids[start : start + options.length]
        runs.reset()
        runs.eval(window)
        logits = torch.from_numpy(np.array(runs.scores[: len(window) - 1]))
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:])).item())
    runs.close()
    return statistics.mean(found)


def llama_speed(options: argparse.Namespace, file: Path, threads: int) -> dict[str, float]:
    runs, prefill, decode = llama(file, options.length + options.decoded, threads), [], []
    for _ in range(options.repeats):
        runs.reset()
        begun = time.perf_counter()
        runs.eval(list(range(1000, 1000 + options.length)))
        middle = time.perf_counter()
        for token in range(options.decoded):
            runs.eval([1000 + token])
        prefill.append(options.length / (middle - begun))
        decode.append(options.decoded / (time.perf_counter() - middle))
    runs.close()
    names = (f"prefill tokens/s, {threads}", f"decode tokens/s, {threads}")
    return dict(zip(names, map(statistics.median, (prefill, decode)), strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2")
    parser.add_argument("--calibration", required=True, help="text to train on")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE", help="in the domain first")
    parser.add_argument("--kept", type=float, default=0.7, help="share of the FFN dims")
    parser.add_argument("--steps", type=int, nargs=4, default=[50, 50, 50, 50], help="of P, D, M and Q")
    parser.add_argument("--rows", type=int, default=2, help="per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of D and M")
    parser.add_argument("--quantize-rate", type=float, default=2e-5, help="of Q")
    parser.add_argument("--windows", type=int, default=32, help="of each text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--decoded", type=int, default=16, help="tokens")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timing")
    parser.add_argument("--folder", default="results/four_methods")
    parser.add_argument("--output")
    options = parser.parse_args()
    options.texts = [(name, str(Path(file).resolve())) for name, file in (text.split("=", 1) for text in options.text)]
    return options


if __name__ == "__main__":
    main()
