"""Writing to disks that may be full."""

import errno
from pathlib import Path

import pytest

from llava_jax.description import write_description


def test_a_description_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_description(tmp_path, {"config": {}})
    before = (tmp_path / "config.json").read_text()
    write = Path.write_bytes

    def write_half(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match=r"No space left.*config\.json"):
        write_description(tmp_path, {"config": {"seed": 1}})
    assert (tmp_path / "config.json").read_text() == before
