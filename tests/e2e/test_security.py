"""What a run does to its surroundings: it writes below output_dir, and asks nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_run import environment, write_config

WATCHED = """
import json, os, sys
seen = {"written": [], "connected": [], "unpickled": []}
inside_worker = []

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(path, int):
            seen["written"].append(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link"):
        beside = any(isinstance(x, int) and x >= 0 for x in arguments[1:] if event != "os.mkdir")
        seen["written"] += [os.path.abspath(os.fsdecode(x)) for x in arguments
                            if isinstance(x, (str, bytes, os.PathLike)) and not beside]
    elif event in ("socket.connect", "socket.getaddrinfo"):
        seen["connected"].append(repr(arguments[1:] if event == "socket.connect" else arguments))
    elif event == "pickle.find_class":
        seen["unpickled"].append(".".join(arguments))

from llava_jax.cli import train
from llava_jax.training import run
sys.addaudithook(watch)
status = train.train(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump(seen | {"status": status}, file)
"""


def test_a_run_writes_below_its_directory_and_asks_nobody(base: Path, data: Path, tmp_path: Path):
    config = write_config(tmp_path / "config.py", base, data)
    output, report = tmp_path / "output", tmp_path / "report.json"
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    arguments = ["--config", str(config), "--output-dir", str(output)]
    run = subprocess.run(
        [sys.executable, script, report, *arguments],
        env=environment(HF_HUB_OFFLINE=0, JAX_COMPILATION_CACHE_DIR=tmp_path / ".cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    seen = json.loads(report.read_text())
    assert seen["status"] == 0, run.stderr
    assert seen["connected"] == []
    assert seen["unpickled"] == []
    inside = [path for path in seen["written"] if Path(path).is_relative_to(output)]
    allowed = (str(output), os.devnull, str(report), str(tmp_path / ".cache"))
    outside = [path for path in seen["written"] if not path.startswith(allowed)]
    assert inside
    assert outside == []
    assert sorted(path.name for path in output.iterdir()) == ["run"]
