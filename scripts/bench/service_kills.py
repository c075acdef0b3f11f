"""Kills the server and the supervisors of the service at random moments, and counts jobs that are lost or run twice.

.venv/bin/python scripts/bench/service_kills.py --kills 200
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import publish

from tests.service.kills import OPEN, PAUSE, WORK, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", help="Default: results/bench/service_kills.json.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cook-kills-") as folder:
        found = run(Path(folder), options.kills, options.seed, patience=600.0)
    row = {**found.as_json(), "lost": len(found.lost), "doubled": len(found.doubled)}
    settings = {"kills": options.kills, "seed": options.seed, "job_seconds": WORK, "open_jobs": OPEN, "pause": PAUSE}
    publish("service_kills", settings, [row], options.output)
    if found.lost or found.doubled:
        raise SystemExit(f"lost: {found.lost}; doubled: {found.doubled}")


if __name__ == "__main__":
    main()
