# Sourced by demo.sh and test.sh: sets `python` to a Python 3.11 or newer, or ends with exit code 2.
# In this order: the variable PYTHON, the project's .venv, python3.13, 3.12, 3.11, python3. All but .venv's
# have to be able to make one: Debian and Ubuntu keep `venv` and `ensurepip` in a package of their own.

is_recent='import sys; sys.exit(sys.version_info < (3, 11))'
venv_python="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
candidates=(python3.13 python3.12 python3.11 python3)
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi

python="" without_venv=""
if [ -z "${PYTHON:-}" ] && "$venv_python" -c "$is_recent" >/dev/null 2>&1; then
    python="$venv_python"
fi
for candidate in "${candidates[@]}"; do
    if [ -n "$python" ]; then break; fi
    if ! "$candidate" -c "$is_recent" >/dev/null 2>&1; then continue; fi
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        python="$candidate"
    else
        without_venv="${without_venv:-$candidate}"
    fi
done

if [ -z "$python" ]; then
    if [ -n "$without_venv" ]; then
        echo "error: $without_venv has no venv module (or no ensurepip), which .venv is made with." >&2
        echo "Install it (on Debian and Ubuntu: apt install python3-venv), or name another in PYTHON." >&2
    else
        echo "error: no Python 3.11 or newer found${PYTHON:+: PYTHON is $PYTHON}." >&2
        echo "Install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    fi
    exit 2
fi
