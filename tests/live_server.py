"""A server in a process of its own, and what is asked of it."""

import base64
import contextlib
import re
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from tiny_run import ROOT, environment

TINY = ROOT / "assets" / "tiny-llava"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
MIB = 2**20
RED_TRIANGLE = resources.files("easy_vqa") / "data" / "test" / "images" / "0.png"


@contextlib.contextmanager
def server(*arguments: str, checkpoint: Path = TINY, **variables: object) -> Iterator[str]:
    """Yields the address of a server, which is then told to end, and must do so in order."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "tools/serve.py", str(checkpoint), "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=(log := open(Path(folder) / "log", "w+")),  # noqa: SIM115 - closed below
            text=True,
            cwd=ROOT,
            env=environment(JAX_NUM_CPU_DEVICES=1, **variables),
        )
        with process, log:
            try:
                assert process.stdout is not None
                lines = iter(process.stdout.readline, "")
                found = [
                    re.search(r"listening on (http://\S+)", line) for line in lines_until(lines)
                ]
                if found[-1] is None:
                    log.seek(0)
                    raise AssertionError(log.read())
                yield found[-1][1]
            finally:
                process.terminate()
                status = process.wait(30)
            log.seek(0)
            errors = log.read()
            assert status == 0, errors
            assert "Traceback" not in errors, errors


def lines_until(lines: Iterator[str]) -> Iterator[str]:
    """The lines up to that which says where a server listens."""
    last = ""
    for last in lines:
        yield last
        if "listening on" in last:
            return
    yield last


def metric(text: str, name: str) -> float:
    """A figure of /metrics; 0 if it is not there."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def resident(address: str) -> float:
    """Memory of a server, in MiB."""
    with urllib.request.urlopen(f"{address}/metrics") as figures:
        return metric(figures.read().decode(), "process_resident_memory_bytes") / MIB


def data_url(data: bytes) -> str:
    """A file as clients send it."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture() -> str:
    """A red triangle."""
    return data_url(RED_TRIANGLE.read_bytes())


def user(text: str, *urls: str) -> dict[str, Any]:
    """A message with images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": text}, *images]}


def huge_png() -> bytes:
    """A PNG that says it has 10^9 pixels and more, and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", 40_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
