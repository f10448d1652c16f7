#!/usr/bin/env bash
# Make or update .venv, check the code with ruff, run the tests. Arguments go to pytest.
#
#   ./test.sh
#   ./test.sh -x -k resume
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launchers/find_python.sh
source "$here/launchers/find_python.sh"
"$python" "$here/launchers/environment.py" requirements.txt requirements-test.txt
cd "$here"

# A few tests use lpips without its dependency torchvision, which has no build for every torch: the tests replace
# it. Where lpips is missing, they are skipped.
.venv/bin/python -m pip install --quiet --retries 1 --no-deps -c constraints.txt lpips ||
    echo "note: lpips could not be installed; the tests that need it are skipped" >&2

.venv/bin/python -m ruff check .
# A file is one process's, since its tests share what they trained; the order of files is kept, since the longest
# have few tests and would come last. -n 0 runs all in one process.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
