#!/usr/bin/env bash
# Checks the pinned packages for known vulnerabilities. Exit code 0: none are known; 1: some are known; 3: the list was
# not available (no network, or an index without such a list), and only the oldest safe versions were checked.
set -uo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

"$PYTHON" -c 'from cook.base.environment import check_versions; check_versions()' || exit 1
if ! "$PYTHON" -m pip_audit --version >/dev/null 2>&1; then
  echo "pip-audit is not installed (pip install pip-audit): only the oldest safe versions were checked" >&2
  exit 3
fi
pinned=$(mktemp)
trap 'rm -f "$pinned"' EXIT
grep '==' requirements.txt >"$pinned"
# --strict: a package that could not be looked up must not count as safe.
said=$("$PYTHON" -m pip_audit --strict --no-deps --disable-pip --progress-spinner off -r "$pinned" 2>&1)
code=$?
echo "$said"
[ "$code" -eq 0 ] && exit 0
case $said in *"Found "*"known vulnerabilit"*) exit 1 ;; esac
echo "the list of known vulnerabilities was not available: only the oldest safe versions were checked" >&2
exit 3
