#!/usr/bin/env bash
# Downloads SQuAD 1.1 and 2.0 to data/squad, or to the folder given as first argument. If it is interrupted, the same
# command resumes the download. Every file is compared with its published checksum.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh
exec "$PYTHON" scripts/download_glue_data.py --tasks SQuAD1.1,SQuAD2.0 --data_dir "${1:-data/squad}"
