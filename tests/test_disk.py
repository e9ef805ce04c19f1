"""Reading regular files only, and writing to disks that may be full."""

import errno
import os
import socket
from pathlib import Path

import pytest

from llava_jax.disk import open_regular, read_regular
from llava_jax.training.run_config import write_description


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("fifo")
    Path("directory").mkdir()
    Path("link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("fifo", "link", "socket", "directory", "/dev/zero"):
            with pytest.raises(OSError, match=name):
                open_regular(name)
    Path("file").write_bytes(b"abc")
    assert read_regular("file", 3) == b"abc"
    with pytest.raises(OSError, match="larger than 2 bytes"):
        read_regular("file", 2)


def test_a_description_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_description(tmp_path, {"config": {}, "data": {}})
    before = (tmp_path / "config.json").read_text()
    write = Path.write_bytes

    def write_half(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match=r"No space left.*\.json"):
        write_description(tmp_path, {"config": {"seed": 1}, "data": {}})
    assert (tmp_path / "config.json").read_text() == before
