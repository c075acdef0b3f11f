"""Fuzzes the readers of foreign files: `python scripts/fuzz/run.py [--seconds N] [--only NAME]`.

With Atheris (`pip install atheris`; pyproject.toml names the version), which steers by the code that inputs reach.
What is found is written to a file and printed; the command to try it again is
`python scripts/fuzz/run.py --only NAME --file FILE`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader (default: %(default)s)")
    parser.add_argument("--only", help="one reader: config, masks, pt, safetensors, manifest")
    parser.add_argument("--file", type=Path, help="no fuzzing: read this file once")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where findings go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        fuzz(arguments.child, arguments.seconds, arguments.found)
    from targets import TARGETS

    if arguments.file:
        TARGETS[arguments.only].check(arguments.file.read_bytes())
        return 0
    failed = []
    for name in [arguments.only] if arguments.only else TARGETS:
        # Its engine never comes back to its caller: one process a reader.
        options = ["--child", name, "--seconds", str(arguments.seconds), "--found", str(arguments.found.resolve())]
        code = subprocess.run([sys.executable, __file__, *options]).returncode
        print(f"{name}: {'a defect was found' if code else 'nothing found'}", flush=True)
        failed += [name] if code else []
    return 1 if failed else 0


def fuzz(name: str, seconds: int, found: Path) -> None:
    """Runs one reader for a while; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["cook", "json", "zipfile"]):
        from targets import TARGETS

    found.mkdir(parents=True, exist_ok=True)
    corpus = Path(tempfile.mkdtemp(prefix=f"cook-fuzz-{name}-"))
    for number, seed in enumerate(TARGETS[name].seeds()):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-artifact_prefix={found}/{name}-",
            "-rss_limit_mb=4096",
            "-timeout=20",
            "-max_len=20000",
            "-verbosity=0",
            "-print_final_stats=1",
            str(corpus),
        ],
        TARGETS[name].check,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
