# Sourced by the other scripts. Sets $PYTHON to the Python of an environment with the packages of requirements.txt.
# An active environment that has them is used unchanged. Otherwise .venv is made or updated.

satisfied() { # exit status 0 if the interpreter $1 has all pinned requirements
  "$1" - <<'PY' 2>/dev/null
import importlib.metadata as m, sys
for line in open("requirements.txt"):
    name, _, version = line.split("#")[0].strip().partition("==")
    if name and version and m.version(name).split("+")[0] != version:
        sys.exit(1)
PY
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && satisfied python; then
  PYTHON=$(command -v python)
else
  wanted=$(cksum requirements.txt)
  if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.requirements 2>/dev/null)" != "$wanted" ]; then
    if ! [ -x .venv/bin/python ]; then
      if ! "${PYTHON_BASE:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: cook needs Python 3.11 or newer; set its path: PYTHON_BASE=python3.11 bash $0" >&2
        exit 2
      fi
      echo "setting up .venv from requirements.txt (a few minutes the first time)"
      "${PYTHON_BASE:-python3}" -m venv .venv
    fi
    satisfied .venv/bin/python ||
      .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    echo "$wanted" > .venv/.requirements
  fi
  PYTHON=$PWD/.venv/bin/python
  export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
fi
export PYTHON
