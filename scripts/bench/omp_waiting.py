"""Training speed by how OpenMP threads wait for each other, on a quiet machine and beside busy processes.

    python scripts/bench/omp_waiting.py [--spins 1000,10000,100000] [--busy 1] [--repeats 3]

Settings take turns; each figure is the median of its repeats. Ratios are to OpenMP's default on the quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Any

from common import publish, run_apart

STEP = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 700}
model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes))
optimizer = torch.optim.AdamW(model.parameters())
rows = torch.randint(4096, (8, 256))
def step():
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
step()
started, steps = time.perf_counter(), 0
while steps < 3 or time.perf_counter() - started < float(sys.argv[1]):
    step()
    steps += 1
print(json.dumps(rows.numel() * steps / (time.perf_counter() - started)))
"""


@contextmanager
def busy(processes: int):
    """Other processes that keep a core busy each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def tokens_per_second(setting: dict[str, str], seconds: float) -> float:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(setting)
    try:
        return float(json.loads(run_apart(["-c", STEP, str(seconds)])))
    finally:
        for name in setting:
            del os.environ[name]
        os.environ.update(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", default="1000,10000,100000")
    parser.add_argument("--busy", type=int, default=1, help="other processes that keep a core busy each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--output")
    options = parser.parse_args()
    settings: dict[str, dict[str, str]] = {"OpenMP's default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
    settings |= {f"{int(count):,} spins": {"GOMP_SPINCOUNT": count} for count in options.spins.split(",")}
    found: dict[str, dict[str, list[float]]] = {name: {"quiet": [], "busy": []} for name in settings}
    began = time.perf_counter()
    for repeat in range(options.repeats):
        for name, setting in settings.items():
            found[name]["quiet"].append(tokens_per_second(setting, options.seconds))
            with busy(options.busy):
                found[name]["busy"].append(tokens_per_second(setting, options.seconds))
        print(f"repeat {repeat + 1} of {options.repeats}: {time.perf_counter() - began:.0f} s", flush=True)
    reference = statistics.median(found["OpenMP's default"]["quiet"])
    rows: list[dict[str, Any]] = []
    for name, values in found.items():
        quiet, beside = statistics.median(values["quiet"]), statistics.median(values["busy"])
        rows.append(
            {
                "threads wait by": name,
                "tokens/s, quiet": quiet,
                "ratio, quiet": quiet / reference,
                "tokens/s, busy": beside,
                "ratio, busy": beside / reference,
            }
        )
    shape = {"busy processes": options.busy, "repeats": options.repeats, "seconds": options.seconds}
    publish("omp_waiting", shape, rows, options.output)


if __name__ == "__main__":
    main()
