#!/usr/bin/env bash
# Installs missing packages, checks style and types, and runs the tests.
#
#   bash scripts/test.sh [--quick] [options of pytest]
#
# --quick takes less than two minutes on two cores. It leaves out the tests marked slow (modules that train, start
# processes or compile, listed in tests/conftest.py, and single tests), and checks types and pages beside the tests.
# WORKERS sets the number of test processes (default: one per core, each with one thread).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh
# The `dev` extra of pyproject.toml, without cook itself: tests make sure that exports load where cook is not installed.
pins=$("$PYTHON" - <<'PY'
import importlib.metadata as m, tomllib
for pin in tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"]:
    name, version = pin.split("==")
    try:
        found = m.version(name)
    except m.PackageNotFoundError:
        found = None
    if found != version:
        print(pin)
PY
)
if [ -n "$pins" ]; then
  echo "installing the packages for the tests"
  # shellcheck disable=SC2086  # one word per package
  "$PYTHON" -m pip install --quiet --disable-pip-version-check $pins
fi
if [ "$PYTHON" = "$PWD/.venv/bin/python" ] && ! "$PYTHON" -c 'import triton' 2>/dev/null; then
  # torch installs Triton only with CUDA. With it, the GPU kernel is tested here too, in Triton's interpreter.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 --timeout 15 triton==3.9.0 ||
    echo "Triton cannot be installed here: the test of the GPU kernel will be skipped"
fi
quick=()
if [ "${1:-}" = --quick ]; then
  shift
  quick=(-m "not real_text and not slow")
fi
types_and_pages() (
  set -e
  "$PYTHON" -m mypy
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  NO_MKDOCS_2_WARNING=1 "$PYTHON" -m mkdocs build --strict --quiet --site-dir "$site"
)
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m codespell_lib
# nproc reports OMP_NUM_THREADS where it is set. More processes than cores would delay the tests of lost ranks.
workers=${WORKERS:-$(env -u OMP_NUM_THREADS nproc)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
tests=("$PYTHON" -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder --durations 25)
if [ ${#quick[@]} -eq 0 ]; then
  types_and_pages
  exec "${tests[@]}" "$@"
fi
# mypy takes a minute where it has no cache yet; the quick tests do not depend on time.
said=$(mktemp)
trap 'rm -f "$said"' EXIT
types_and_pages > "$said" 2>&1 &
code=0 checked=0
"${tests[@]}" "${quick[@]}" "$@" || code=$?
wait $! || checked=$?
cat "$said"
[ "$checked" -eq 0 ] || exit "$checked"
exit "$code"
