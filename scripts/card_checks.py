"""Everything that can be checked only on an accelerator, in one command of at most eight minutes.

    python scripts/card_checks.py [--minutes 8] [--only NAME ...] [--output results/card.json]

The checks run one after the other, the most telling first; one that would begin after the end of the time is left out
and named. Their numbers, and the error of a check that failed, go to one JSON file. DeepSpeed must be installed. The
exit code is 2 without an accelerator, and 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cook.base.device import accelerator, card  # noqa: E402
from cook.base.errors import UserError, run_entry  # noqa: E402
from cook.base.files import write_json  # noqa: E402

STEP = ["scripts/bench/gated_step.py", "--precision", "bf16", "--repeats", "5"]
LARGE = ["--shape", "1b", "--length", "512", "--rows", "8"]
CHECKS: dict[str, list[str]] = {
    "waits per step": ["scripts/card_checks.py", "--waits"],
    "gated step, default shape": [*STEP, "--shape", "default"],
    "gated step, 1B, ZeRO 0": [*STEP, *LARGE, "--zero", "0"],
    "gated step, 1B, ZeRO 2": [*STEP, *LARGE, "--zero", "2"],
    "gated step, 1B, ZeRO 3": [*STEP, *LARGE, "--zero", "3"],
    "gated step, 1B, ZeRO 2, checkpointing": [*STEP, *LARGE, "--zero", "2", "--checkpointing"],
    "distilled step, 1B": ["scripts/bench/distilled_step.py", "--precision", "bf16", "--repeats", "5", *LARGE],
    "Triton kernels": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sparsity/kernels/test_sparse_triton.py"],
    "devices and collectives": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/base/test_device.py"],
}
"""Arguments of Python by the check's name; a bench writes its JSON to `--output`."""


def run_check(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Runs one check; its numbers, or its error."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        output = ["--output", str(result)] if arguments[0].startswith("scripts/") else []
        try:
            done = subprocess.run(
                [sys.executable, *arguments, *output], cwd=ROOT, capture_output=True, text=True, timeout=seconds
            )
            error = (done.stdout + done.stderr)[-2000:] if done.returncode else None
        except subprocess.TimeoutExpired:
            error = f"not finished after {seconds:.0f} s"
        found = json.loads(result.read_text()) if result.exists() else {}
    return {"seconds": time.monotonic() - begin, "error": error, **found}


def count_waits(output: str) -> None:
    """Counts the operations of a step that wait for the device, as torch reports them."""
    import warnings

    import torch

    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    from gated_step import SHAPES, batch_of, gates_of

    from cook.base.signals import Request
    from cook.config.types import TrainingConfig
    from cook.families.cpm_ant import ADAPTER
    from cook.pruning.attach import AttachedGates
    from cook.training.engine import Engine, initialise_processes
    from cook.training.step import train_step

    initialise_processes(None)
    config = SHAPES["default"] | {"model_type": "cook_cpm_ant"}
    training = TrainingConfig(steps=9, train_batch_size=8, micro_batch_size=8, learning_rate=1e-3, precision="bf16")
    engine = Engine(lambda: ADAPTER.build(config), None, training, {}, on_host=ADAPTER.on_host)
    groups, gates = gates_of(ADAPTER.space(config), "heads")
    attached = AttachedGates(engine.module, groups, {})
    places: list[str] = []
    for step in (1, 2, 3):
        torch.get_device_module(engine.device).set_sync_debug_mode("warn" if step == 3 else "default")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(
                engine,
                [batch_of(config, 8, 256)],
                step,
                num_targets=8 * 247,
                learning_rate=1e-3,
                attached=attached,
                gates=gates,
                extra_loss=None,
                asked=Request.NOTHING,
            )
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    write_json(output, {"waits": len(places), "places": places})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="+", choices=CHECKS, help="these checks alone")
    parser.add_argument("--output", default=str(ROOT / "results" / "card.json"))
    parser.add_argument("--waits", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if accelerator() is None:
        raise UserError(
            "there is no accelerator on this machine",
            wanted="a device that torch.accelerator reports, and DS_ACCELERATOR not set to cpu",
            remedy="run it on a machine with one; without, tests/families/test_meta_device.py finds mixed devices",
        )
    if options.waits:
        return count_waits(options.output)
    end, results = time.monotonic() + 60 * options.minutes, {}
    for name in options.only or CHECKS:
        left = end - time.monotonic()
        results[name] = run_check(CHECKS[name], left) if left > 20 else {"error": "no time was left"}
        print(f"{name}: {results[name].get('error') or 'done'}", flush=True)
        write_json(options.output, {"card": card(), "checks": results})
    print(f"written: {options.output}")
    if any(result["error"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run_entry(main)
