# Sourced by demo.sh and test.sh: sets `python` to a Python 3.11 or newer, or ends with exit code 2.
# It is the variable PYTHON, or the first that can be used of: the project's .venv, python3.13, 3.12, 3.11, python3.

recent='import sys; sys.exit(sys.version_info < (3, 11))'
venv_python="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
candidates=(python3.13 python3.12 python3.11 python3)

python=""
if [ -n "${PYTHON:-}" ]; then
    candidates=("$PYTHON")
elif "$venv_python" -c "$recent" >/dev/null 2>&1; then
    python="$venv_python"
fi
for candidate in "${candidates[@]}"; do # that can make a .venv
    if [ -z "$python" ] && "$candidate" -c "import ensurepip, venv; $recent" >/dev/null 2>&1; then
        python="$candidate"
    fi
done
if [ -z "$python" ]; then
    echo "error: found no Python 3.11 or newer with the modules venv and ensurepip${PYTHON:+: PYTHON is $PYTHON}." >&2
    echo "Install one (on Debian and Ubuntu also python3-venv), or name it: PYTHON=/path/to/python3.12 $0" >&2
    exit 2
fi
