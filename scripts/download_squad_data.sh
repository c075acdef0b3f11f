#!/usr/bin/env bash
# Fetches SQuAD 1.1 and 2.0 to data/squad, or to the folder named first. Started again it goes on where it broke off;
# every file is compared with its published checksum.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh
exec "$PYTHON" scripts/download_glue_data.py --tasks SQuAD1.1,SQuAD2.0 --data_dir "${1:-data/squad}"
