"""What the benchmarks share: the machine's description, tables and JSON files of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cook.base.device import card  # noqa: E402
from cook.base.distributed import free_port  # noqa: E402
from cook.base.environment import quiet_torchao  # noqa: E402
from cook.base.files import write_json  # noqa: E402
from cook.report.tables import markdown_table  # noqa: E402

quiet_torchao()  # transformers is imported later


def machine() -> dict[str, Any]:
    """Processor or card, threads, versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": card(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def publish(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], output: str | None) -> None:
    """Prints `rows` as a table and writes them with the machine and the settings to results/bench/NAME.json.

    Rows may lack cells that others have. Where a run wrote its files is none of its settings.
    """
    headers = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in headers} for row in rows]
    cells = [[_text(row[header]) for header in headers] for row in rows]
    print(f"\n{name}\n{markdown_table(headers, cells)}\n")
    path = Path(output) if output else ROOT / "results" / "bench" / f"{name}.json"
    settings = {key: value for key, value in settings.items() if key not in ("output", "folder", "work")}
    write_json(path, {"bench": name, "machine": machine(), "settings": settings, "rows": rows})
    print(f"written: {path}")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def run_apart(arguments: list[str]) -> str:
    """Runs this Python on `arguments` in a process of its own and returns what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def run_ranks(arguments: list[str], ranks: int = 2) -> dict[str, Any]:
    """Runs this Python on `arguments` as the ranks of one process group; the JSON object that rank 0 prints last."""
    port = free_port()
    processes: list[subprocess.Popen[str]] = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        output, _ = processes[0].communicate(timeout=1800)
        for process in processes[1:]:
            process.communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
    if codes := [process.returncode for process in processes if process.returncode]:
        sys.exit(f"{' '.join(arguments)} failed on {len(codes)} of {ranks} ranks, exit code {codes[0]}")
    return json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
