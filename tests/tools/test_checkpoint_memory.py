"""A checkpoint of state in host memory needs little memory beside it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_saving_and_restoring_need_a_fourth_of_the_state_at_most(tmp_path: Path):
    """Without a bound, saving needs four fifths. The long form has 2 GiB of state."""
    command = [sys.executable, "tools/checks/checkpoint_memory.py", "--mib", "208"]
    command += ["--directory", str(tmp_path)]
    # In smaller blocks than those of a large state, so that glibc also maps each by itself.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    # The peak depends on how the threads of one save overlap, and a loaded machine adds up to a
    # tenth of the state. The smallest peak of three shows what saving needs.
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, env=variables, text=True, capture_output=True)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("MiB beside 208 MiB of state") == 2
