"""A few kills in every run of the tests, and as many as you like by `./test.sh tests/faults --kills 50`."""

import os
import subprocess
import sys

import pytest
from chain import ROOT


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_promise_1_a_training_killed_at_random_moments_ends_as_one_never_disturbed(tmp_path, request):
    """Every second kill is in the middle of a save, which is whole or not there."""
    kills = request.config.getoption("--kills")
    done = subprocess.run(
        [sys.executable, ROOT / "tests/faults/kill.py", "--kills", str(kills)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{kills} kills, ")
    in_saves = int(done.stdout.split()[2])
    assert kills // 2 <= in_saves <= kills
