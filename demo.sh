#!/usr/bin/env bash
# Train on simulated brains and generate new ones; needs only Python 3.11 or newer with its venv module.
#
#   ./demo.sh               makes .venv on the first run, then outputs/demo
#   ./demo.sh --data DIR    the same with the volumes in DIR
#   ./demo.sh --help        all options
#
# The variable PYTHON names the Python to use. The steps are in launchers/demo.py.
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launchers/find_python.sh
source "$here/launchers/find_python.sh"
exec "$python" "$here/launchers/demo.py" "$@"
