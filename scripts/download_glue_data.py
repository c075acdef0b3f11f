"""Fetches the GLUE tasks' data (and SQuAD's) to the layout that `scripts/run.sh` reads.

    python scripts/download_glue_data.py                          # all nine tasks to data/glue
    python scripts/download_glue_data.py --tasks SST-2,MRPC
    python scripts/download_glue_data.py --tasks SQuAD1.1,SQuAD2.0 --data_dir data/squad

A second call fetches what is missing. Every file is compared with its published checksum. Without a network it
prints which address to fetch elsewhere and where to put the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cook.base.errors import UserError, UserErrors, run_entry  # noqa: E402
from cook.data.download import GLUE_ARCHIVES, MRPC_FILES, SQUAD_FILES, fetch, unpack, write_mrpc  # noqa: E402

TASKS = (*GLUE_ARCHIVES, "MRPC", *(f"SQuAD{version}" for version in SQUAD_FILES))
GLUE = (*GLUE_ARCHIVES, "MRPC")


def get(task: str, folder: Path) -> None:
    """One task's data."""
    if task.startswith("SQuAD"):
        for download in SQUAD_FILES[task.removeprefix("SQuAD")]:
            fetch(download, folder)
    elif task == "MRPC":
        files = {name: fetch(download, folder / "downloads") for name, download in MRPC_FILES.items()}
        write_mrpc(files["train"], files["test"], files["dev_ids"], folder / task)
    else:
        unpack(fetch(GLUE_ARCHIVES[task], folder / "downloads"), folder / task)
    print(f"{task}: ready in {folder if task.startswith('SQuAD') else folder / task}", flush=True)


def main() -> None:
    """Parses and fetches; what fails does not keep the others from being fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="all", help=f"of {', '.join(TASKS)}, with commas; all: the nine of GLUE")
    parser.add_argument("--data_dir", default="data/glue", help="where to (default: %(default)s)")
    arguments = parser.parse_args()
    names = GLUE if arguments.tasks == "all" else tuple(arguments.tasks.split(","))
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: unknown task {name!r}", wanted=", ".join(TASKS))
    errors = []
    for name in names:
        try:
            get(name, Path(arguments.data_dir))
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors("download", errors)


if __name__ == "__main__":
    run_entry(main)
