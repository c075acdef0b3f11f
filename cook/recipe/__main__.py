"""`python -m cook.recipe --config FILE`: writes the report of a run: table, figures and report.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from cook.base.errors import run_entry
from cook.config.load import load_config
from cook.recipe.run_report import report_run


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m cook.recipe", description=__doc__)
    parser.add_argument("--config", default="config/bmcook.json", help="the run's config (default: %(default)s)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a config value; may be repeated",
    )
    parser.add_argument("--output", help="folder for report.md and its figures (default: OUTPUT_DIR/report)")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    report_run(config, Path(arguments.output or f"{config.output_dir}/report"))


if __name__ == "__main__":
    run_entry(main)
