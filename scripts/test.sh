#!/usr/bin/env bash
# Sets up what is missing, then lints, type-checks and runs all tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh
if [ "$PYTHON" = "$PWD/.venv/bin/python" ] && ! "$PYTHON" -c 'import triton' 2>/dev/null; then
  # torch brings it along only with CUDA; with it the GPU kernel is tested here too, in the interpreter.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 --timeout 15 triton==3.9.0 ||
    echo "Triton cannot be installed here: the test of the GPU kernel will be skipped"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
