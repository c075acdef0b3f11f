"""Tokens a second, forward and backward, of this project's CPM-Ant against transformers' class of the same model.

Both have the same weights and get the same batch, take turns in one process, and must agree on the logits first. Three
contestants: `stock` (transformers), `ours` (the same function, every position a context for all), and `ours, causal`
(our plain language-model call, which is what training and evaluation use and what the stock class cannot do). Peak
memory is that of a process of its own for each, which imports, builds and runs one step.

    python scripts/bench/cpm_ant_forward.py --output results/bench/cpm_ant_forward.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import machine  # noqa: E402
from transformers.models.cpmant import CpmAntConfig as StockConfig  # noqa: E402
from transformers.models.cpmant import CpmAntForCausalLM as StockModel  # noqa: E402

from cook.base.device import wait_for  # noqa: E402
from cook.base.files import write_json  # noqa: E402
from cook.families.cpm_ant_formats import to_stock  # noqa: E402
from cook.models.cpm_ant import CpmAntConfig, CpmAntForCausalLM  # noqa: E402

BARS = {512: 1.0, 2048: 1.5}
CONTESTANTS = ("stock", "ours", "ours, causal")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.measure:
        print(json.dumps(peak_of_one_step(options, options.measure, options.lengths[0])))
        return
    results = []
    for length in options.lengths:
        results.append({"length": length, "tokens": batch_size(options, length) * length, **measure(options, length)})
        show(results[-1])
    record = {"machine": machine(), "model": model_fields(options), "repeats": options.repeats, "results": results}
    if options.output:
        write_json(options.output, record)
        print(f"written: {options.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="text lengths, prompt excluded")
    parser.add_argument("--tokens", type=int, default=2048, help="text tokens of a batch")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--dim-model", type=int, default=512)
    parser.add_argument("--dim-ff", type=int, default=1280)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--dim-head", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def model_fields(options: argparse.Namespace) -> dict:
    names = ("vocab_size", "dim_model", "dim_ff", "num_layers", "num_heads", "dim_head", "dtype", "device")
    return {name: getattr(options, name) for name in names}


def batch_size(options: argparse.Namespace, length: int) -> int:
    return max(1, options.tokens // length)


def build(options: argparse.Namespace, kinds: Sequence[str]) -> dict[str, torch.nn.Module]:
    """The contestants, with equal weights."""
    torch.manual_seed(0)
    fields = model_fields(options)
    dtype = getattr(torch, fields.pop("dtype"))
    device = fields.pop("device")
    ours = CpmAntForCausalLM(CpmAntConfig(**fields)).train()
    models: dict[str, torch.nn.Module] = {kind: ours for kind in kinds if kind != "stock"}
    if "stock" in kinds:
        stock_fields, tensors = to_stock(ours.config, ours.state_dict())
        stock = StockModel(StockConfig(**stock_fields)).train()
        stock.load_state_dict(dict(tensors), strict=True)
        models["stock"] = stock
    return {kind: model.to(device, dtype) for kind, model in models.items()}


def logits_of(kind: str, model: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Logits of the text's positions."""
    if kind == "stock":
        return model(input_ids=text, use_cache=False).logits
    if kind == "ours, causal":
        return model(input_ids=text).logits
    prompt = model.config.prompt_length
    ids = torch.cat([(torch.arange(prompt, device=text.device) + 2 * prompt).expand(len(text), -1), text], 1)
    is_text = (torch.arange(ids.shape[1], device=text.device) >= prompt).expand_as(ids)
    length = torch.full((len(text),), ids.shape[1], device=text.device)
    batch = {"input": ids, "length": length, "context": torch.ones_like(is_text), "segment": is_text * 2}
    return model(**batch, span=torch.zeros_like(ids)).logits[:, prompt:]


def step(kind: str, model: torch.nn.Module, text: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    logits = logits_of(kind, model, text)
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), text[:, 1:].flatten()).backward()


def measure(options: argparse.Namespace, length: int) -> dict:
    """Medians over steps in turns, the ratios to the stock class, and the peak memories."""
    models = build(options, CONTESTANTS)
    shape = (batch_size(options, length), length)
    text = torch.randint(1, options.vocab_size, shape, device=options.device)
    with torch.no_grad():
        stock, ours = (logits_of(kind, models[kind], text).float() for kind in ("stock", "ours"))
    difference = (stock - ours).abs().max().item()
    if difference > (1e-4 if options.dtype == "float32" else 1.0):
        raise SystemExit(f"the logits differ by {difference}: this would compare different models")
    seconds: dict[str, list[float]] = {kind: [] for kind in CONTESTANTS}
    for turn in range(options.repeats + 1):
        for kind in CONTESTANTS:
            elapsed = timed(lambda kind=kind: step(kind, models[kind], text), options.device)
            seconds[kind] += [elapsed] if turn else []  # the first turn warms up
    rate = {kind: text.numel() / statistics.median(values) for kind, values in seconds.items()}
    return {
        "largest_logit_difference": difference,
        "tokens_per_second": {kind: round(value, 1) for kind, value in rate.items()},
        "ratio": {kind: round(rate[kind] / rate["stock"], 3) for kind in CONTESTANTS[1:]},
        "bar": BARS.get(length),
        "peak_memory_mib": {kind: peak_in_a_process(options, kind, length) for kind in CONTESTANTS},
        "seconds": {kind: [round(value, 4) for value in values] for kind, values in seconds.items()},
    }


def timed(run: Callable[[], None], device: str) -> float:
    wait_for(torch.device(device))
    begin = time.perf_counter()
    run()
    wait_for(torch.device(device))
    return time.perf_counter() - begin


def peak_in_a_process(options: argparse.Namespace, kind: str, length: int) -> dict[str, float]:
    flags = ["--measure", kind, "--lengths", str(length), "--tokens", str(options.tokens)]
    for name, value in model_fields(options).items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_one_step(options: argparse.Namespace, kind: str, length: int) -> dict[str, float]:
    """MiB: the peak, and how much of it came with the step (the rest is the libraries and the weights)."""
    model = build(options, [kind])[kind]
    text = torch.randint(1, options.vocab_size, (batch_size(options, length), length), device=options.device)
    before = peak_mib(options.device)
    step(kind, model, text)
    after = peak_mib(options.device)
    return {"peak": round(after, 1), "step": round(after - before, 1)}


def peak_mib(device: str) -> float:
    if device != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands getrusage's peak down from the parent process, but not this one
        lines = [line.split() for line in status.read_text().splitlines()]
        return next(int(line[1]) for line in lines if line[0] == "VmHWM:") / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def show(result: dict) -> None:
    bar = f", bar {result['bar']}" if result["bar"] else ""
    print(f"length {result['length']}, {result['tokens']} tokens a step{bar}")
    print(f"  {'':14}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'of the step':>13}")
    for kind in CONTESTANTS:
        memory = result["peak_memory_mib"][kind]
        ratio = result["ratio"].get(kind, 1.0)
        rate = result["tokens_per_second"][kind]
        print(f"  {kind:14}{rate:10.0f}{ratio:8.2f}{memory['peak']:10.0f}{memory['step']:13.0f}")


if __name__ == "__main__":
    main()
